"""The transform and the data set for training loops of others, by torchvision's own contracts."""

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import tv_tensors
from torchvision.transforms import v2

from pipeline.data import store
from pipeline.data.datasets import DATASETS
from pipeline.perturbations import PERTURBATIONS, gaussian_noise, stuck_pixels
from pipeline.perturbations.generation import write_perturbed
from pipeline.perturbations.variants import PlannedArray, Variant
from pipeline.pytorch import Perturb, StoreDataset
from pipeline.runtime import layout
from pipeline.runtime.engine import LocalThreads
from pipeline.runtime.errors import PipelineError

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 20, 24), dtype=np.uint8))


def perturb(name: str = "noise", level: Any = 0.1, seed: int = 1, **options: Any) -> Perturb:
    return Perturb(name, level, np.random.default_rng(seed), **options)


def rng_after_setup(seed: int = 1) -> np.random.Generator:
    """The generator as a new transform leaves it."""
    return perturb(seed=seed).generator


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_images_are_damaged_as_the_kernel_damages_them(name: str) -> None:
    level = 7 if PERTURBATIONS[name].unit == "n_pixels" else 0.9
    expected = PERTURBATIONS[name].kernel(IMAGES.numpy().transpose(0, 2, 3, 1).copy(), level, rng_after_setup())
    damaged = perturb(name, level)(IMAGES)
    assert np.array_equal(damaged.numpy().transpose(0, 2, 3, 1), expected)


@pytest.mark.parametrize("shape", [(3, 20, 24), (1, 20, 24), (5, 3, 20, 24), (2, 5, 3, 20, 24)])
def test_tensors_of_any_leading_shape_keep_type_and_shape(shape: tuple[int, ...]) -> None:
    given = torch.zeros(shape, dtype=torch.uint8)
    for wrap in (torch.Tensor.clone, tv_tensors.Image):
        damaged = perturb()(wrap(given))
        assert type(damaged) is type(wrap(given))
        assert (damaged.shape, damaged.dtype) == (given.shape, torch.uint8)
        assert damaged.float().std() > 0
        assert not given.any()  # the input stays as it was


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pil_images_stay_pil_images(mode: str) -> None:
    image = Image.new(mode, (24, 20))
    damaged = perturb()(image)
    assert (damaged.mode, damaged.size) == (mode, (24, 20))
    assert np.asarray(damaged).std() > 0


def test_what_is_no_image_passes_as_it_is() -> None:
    boxes = tv_tensors.BoundingBoxes([[1, 2, 3, 4]], format="XYXY", canvas_size=(20, 24))
    mask = tv_tensors.Mask(torch.ones(20, 24, dtype=torch.uint8))
    sample = {"image": tv_tensors.Image(IMAGES[0]), "boxes": boxes, "mask": mask, "label": 3, "id": torch.tensor(5)}
    damaged = perturb()(sample)
    assert not torch.equal(damaged["image"], IMAGES[0])
    assert all(damaged[name] is sample[name] for name in ("boxes", "mask", "label", "id"))
    image, label = perturb()(IMAGES[0], 3)
    assert label == 3
    assert not torch.equal(image, IMAGES[0])


def test_it_composes_and_can_be_pickled() -> None:
    chain = v2.Compose([v2.RandomHorizontalFlip(0.0), perturb(), v2.ToDtype(torch.float32, scale=True)])
    again = pickle.loads(pickle.dumps(chain))
    assert torch.equal(chain(IMAGES), again(IMAGES))
    assert "'noise', level=0.1" in repr(chain)


def test_the_generator_decides_all() -> None:
    first, again, other = (perturb(level=(0.01, 0.3), seed=seed) for seed in (1, 1, 2))
    ones, twos, others = ([transform(IMAGES) for _ in range(3)] for transform in (first, again, other))
    assert all(map(torch.equal, ones, twos))
    assert not torch.equal(ones[0], ones[1])
    assert not torch.equal(ones[0], others[0])


def test_levels_are_drawn_between_the_two() -> None:
    transform = perturb("hot", (2, 5))
    black = torch.zeros(1, 20, 24, dtype=torch.uint8)
    assert {int((transform(black) == 255).sum()) for _ in range(60)} == {2, 3, 4, 5}


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        (("fog", 1), ValueError, "name: unknown 'fog'; choose from stuck"),
        (("noise", 2.0), ValueError, "sigma: 2.0 is outside"),
        (("noise", (0.3, 0.1)), ValueError, "give the lower one first"),
        (("hot", 1.5), TypeError, "n_pixels: 1.5 is of type float"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: tuple[Any, ...], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        perturb(*arguments)


@pytest.mark.parametrize(("name", "level"), [("hot", 70_000), ("blur", 70.0)])
def test_a_level_for_large_images_is_refused_only_for_small_ones(name: str, level: float) -> None:
    transform = perturb(name, level)
    assert transform(torch.zeros(1, 300, 300, dtype=torch.uint8)).shape == (1, 300, 300)
    with pytest.raises(ValueError, match="is outside"):
        transform(IMAGES)


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(TypeError, match=r"before v2\.ToDtype"):
        perturb()(IMAGES.float())
    with pytest.raises(ValueError, match="mode CMYK"):
        perturb()(Image.new("CMYK", (9, 9)))
    with pytest.raises(TypeError, match="generator: of type int"):
        Perturb("noise", 0.1, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'lens' is unknown"):
        perturb("hot", 3, scope="lens")


# The data set.


@pytest.fixture
def stores(study: Path) -> Path:
    """The clean store of the tiny MNIST, and one of noise."""
    dataset = DATASETS["mnist"]
    arrays = [
        PlannedArray(dataset, Variant("noise", 0.5, "train", 1, {}), (300,)),
        PlannedArray(dataset, Variant("noise", 0.5, "test", 1, {}), (2, 100)),
    ]
    clean = {split: store.read_clean(dataset, split, "images") for split in ("train", "test")}
    write_perturbed(layout.perturbed_store("mnist", "noise"), dataset, "noise", arrays, clean, LocalThreads(1))
    return study


def test_a_data_set_gives_the_images_of_its_store(stores: Path) -> None:
    clean = StoreDataset("data/clean/mnist.zarr", "test")
    images, labels = (store.read_clean(DATASETS["mnist"], "test", kind) for kind in ("images", "labels"))
    assert len(clean) == len(images)
    assert clean.classes == tuple("0123456789")
    image, label = clean[5]
    assert isinstance(image, tv_tensors.Image)
    assert np.array_equal(image.numpy().transpose(1, 2, 0), images[5])
    assert label == labels[5]
    noisy = StoreDataset(stores / "data/perturbed/mnist/noise.zarr", "test", level=0.5, trial=1)
    array = store.get_array(store.open_store(noisy.path, ""), "0.5/test", "")
    assert len(noisy) == 100
    assert np.array_equal(noisy[-1][0].numpy().transpose(1, 2, 0), store.read_part(array, (1, 99), ""))
    assert [noisy[i][1] for i in range(len(noisy))] == labels[:100].tolist()
    assert len(StoreDataset("data/perturbed/mnist/noise.zarr", "train", level=0.5)) == 300
    (stores / "data/perturbed").rename(stores / "elsewhere")
    (stores / "data/perturbed").symlink_to(stores / "elsewhere")
    assert len(StoreDataset("data/perturbed/mnist/noise.zarr", "train", level=0.5)) == 300


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("data/clean/none.zarr", "test"), "no such store"),
        (("data/clean/mnist.zarr", "validation"), "has no validation/images, but test, train"),
        (("data/clean/mnist.zarr", "test", 0.5), "a clean store has no levels"),
        (("data/perturbed/mnist/noise.zarr", "test"), "say which level"),
        (("data/perturbed/mnist/noise.zarr", "test", 0.7), "has no 0.7/test, but 0.5/train, 0.5/test"),
        (("data/perturbed/mnist/noise.zarr", "test", 0.5, 2), "has trials 0 to 1, not 2"),
    ],
)
def test_what_a_store_does_not_have_is_refused(stores: Path, arguments: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(PipelineError, match=reason):
        StoreDataset(*arguments)


def test_labels_of_other_images_are_refused(stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("data/perturbed/mnist")
    assert len(StoreDataset("noise.zarr", "train", 0.5)) == 300
    clean = zarr.open_array(stores / "data/clean/mnist.zarr/train/images", mode="r+")
    clean.attrs["sha256"] = "0" * 64
    with pytest.raises(PipelineError, match=r"noise.zarr: made from other images than .*mnist.zarr has now; run"):
        StoreDataset("noise.zarr", "train", 0.5)


def batches(n_workers: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    damaged = Perturb("noise", (0.1, 0.3), np.random.default_rng(7))
    images = StoreDataset("data/clean/mnist.zarr", "train", transform=v2.Compose([damaged]), target_transform=float)
    loader = DataLoader(Subset(images, range(192)), batch_size=64, num_workers=n_workers)
    return torch.cat([batch for batch, _ in loader])


def test_workers_draw_differently_and_a_seed_decides_all(stores: Path) -> None:
    first, again, other = (batches(2, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    clean = torch.from_numpy(store.read_clean(DATASETS["mnist"], "train", "images")[:192]).permute(0, 3, 1, 2)
    noise = first.int() - clean.int()
    # The first image of the one worker and that of the other, where neither is clipped.
    one, two = noise[0], noise[64]
    assert not torch.equal(one, two)
    assert len(batches(0, seed=3)) == len(clean)


def test_kernels_take_one_image_as_people_have_it() -> None:
    colour = IMAGES[0].numpy().transpose(1, 2, 0).copy()
    for image in (colour, colour[..., :1], colour[..., 0]):
        batch = image.reshape(1, *image.shape[:2], -1)
        for kernel in (partial(gaussian_noise, sigma=0.1), partial(stuck_pixels, n_pixels=5)):
            one, many = (kernel(given, rng=np.random.default_rng(2)) for given in (image, batch))
            assert one.shape == image.shape
            assert np.array_equal(one.reshape(batch.shape), many)
