"""The determinism contract: an image depends on its names, and on nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from pipeline.data import store
from pipeline.data.arrays import Images
from pipeline.data.datasets import MNIST, Dataset
from pipeline.data.seeding import BLOCK_SIZE, block_generator, block_size, level_name
from pipeline.perturbations import PERTURBATIONS, generation
from pipeline.perturbations.variants import PlannedArray, Variant
from pipeline.runtime.engine import LocalThreads
from tests.conftest import tree

N = 2 * BLOCK_SIZE + 130
Shape = tuple[int, int, int]


def some_level(name: str) -> float:
    limit = PERTURBATIONS[name].max_level(28, 28)
    return int(limit / 16) if PERTURBATIONS[name].unit == "n_pixels" else limit / 16


def make_variant(name: str, split: str = "test", **changes: Any) -> Variant:
    options = {option: values[0] for option, values in PERTURBATIONS[name].options.items()}
    return replace(Variant(name, some_level(name), split, seed=5, options=options), **changes)


def recorded_images() -> Images:
    # Integer arithmetic, so that they hang on nothing.
    values = np.arange(N * 28 * 28, dtype=np.uint64) * np.uint64(2654435761) >> np.uint64(13)
    return (values & np.uint64(255)).astype(np.uint8).reshape(N, 28, 28, 1)


@pytest.fixture(scope="module")
def clean() -> Images:
    return recorded_images()


@pytest.fixture
def dataset(clean: Images) -> Dataset:
    digests = {(split, "images"): store.sha256(clean) for split in ("train", "test")}
    return replace(MNIST, n_examples={"train": N, "test": N}, digests=digests)


def write(
    path: Path, dataset: Dataset, variants: list[tuple[Variant, tuple[int, ...]]], clean: dict[str, Images], n: int
) -> None:
    arrays = [PlannedArray(dataset, variant, leading) for variant, leading in variants]
    generation.write_perturbed(path, dataset, variants[0][0].perturbation, arrays, clean, LocalThreads(n))


@pytest.mark.parametrize("name", PERTURBATIONS)
class TestContract:
    def test_an_image_is_the_same_whatever_range_it_is_made_in(self, name: str, clean: Images) -> None:
        whole = generation.perturb_images(clean, make_variant(name), 1, 0, N)
        for start, stop in ((0, 1), (499, 501), (3, 777), (N - 7, N), (BLOCK_SIZE, 2 * BLOCK_SIZE)):
            part = generation.perturb_images(clean, make_variant(name), 1, start, stop)
            assert np.array_equal(part, whole[start:stop])

    def test_an_image_does_not_depend_on_what_follows_it(self, name: str, clean: Images) -> None:
        few = generation.perturb_images(clean[: BLOCK_SIZE * 2], make_variant(name), 0, 0, 600)
        assert np.array_equal(few, generation.perturb_images(clean, make_variant(name), 0, 0, 600))

    def test_every_name_counts(self, name: str, clean: Images) -> None:
        base = generation.perturb_images(clean, make_variant(name), 0, 0, 50)
        others = ((make_variant(name, seed=6), 0), (make_variant(name, split="train"), 0), (make_variant(name), 1))
        for variant, trial in others:
            other = generation.perturb_images(clean, variant, trial, 0, 50)
            assert np.array_equal(base, other) == (not PERTURBATIONS[name].is_random)

    def test_stores_are_the_same_for_any_number_of_workers(
        self, name: str, clean: Images, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store, "SHARD_BYTES", 600 * 28 * 28)  # several shards per trial
        variants: list[tuple[Variant, tuple[int, ...]]]
        variants = [(make_variant(name, "train"), (1000,)), (make_variant(name), (2, 1100))]
        for n in (1, 2, 7):
            write(tmp_path / f"{n}.zarr", dataset, variants, {"train": clean, "test": clean}, n)
        one, *others = (tree(tmp_path / f"{n}.zarr") for n in (1, 2, 7))
        assert others == [one, one]

    def test_images_do_not_depend_on_chunks_shards_or_other_levels(
        self, name: str, clean: Images, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        variant = make_variant(name)
        other = replace(variant, level=1 if PERTURBATIONS[name].unit == "n_pixels" else some_level(name) / 2)
        found = []
        for chunk, shard_images, variants in (
            (500, 5000, [variant]),
            (130, 260, [other, variant]),
            (77, 77, [variant, other]),
        ):
            monkeypatch.setattr(store, "images_per_chunk", lambda image_bytes, chunk=chunk: chunk)
            monkeypatch.setattr(store, "SHARD_BYTES", shard_images * 28 * 28)
            path = tmp_path / f"{chunk}.zarr"
            write(path, dataset, [(v, (2, 900)) for v in variants], {"test": clean}, 2)
            array = zarr.open_group(path, mode="r")[f"{level_name(some_level(name))}/test"]
            assert isinstance(array, zarr.Array)
            assert array.chunks[1] == chunk
            found.append(np.asarray(array[...]))
        assert np.array_equal(found[0], found[1])
        assert np.array_equal(found[0], found[2])
        expected = [generation.perturb_images(clean, variant, trial, 0, 900) for trial in range(2)]
        assert np.array_equal(found[0], expected)


SIZES = [
    # shape of an image, images, trials
    *(((1, 1, 1), 1230, 2), ((212, 212, 3), 230, 2), ((224, 224, 3), 130, 1), ((600, 400, 3), 27, 2)),
    *(((1500, 1500, 3), 5, 1), ((3600, 3600, 3), 2, 1)),
]


@pytest.mark.parametrize(("shape", "n", "n_trials"), SIZES, ids=str)
def test_images_of_every_size_are_made_block_by_block(shape: Shape, n: int, n_trials: int, tmp_path: Path) -> None:
    names = ["noise"] if shape[0] == 3600 else ["hot", "noise"] if shape[0] == 1 else ["hot", "noise", "blur"]
    size = block_size(shape)
    images = np.random.default_rng(1).integers(0, 256, (n, *shape), dtype=np.uint8)
    dataset = replace(MNIST, shape=shape, n_examples={"test": n}, digests={("test", "images"): store.sha256(images)})
    for name in names:
        variant = replace(make_variant(name), level=1 if name == "hot" else 0.3)
        write(tmp_path / name, dataset, [(variant, (n_trials, n))], {"test": images}, 1)
        array = store.get_array(store.open_store(tmp_path / name, "x"), f"{level_name(variant.level)}/test", "x")
        assert array.attrs["block_size"] == (size if PERTURBATIONS[name].is_random else None)
        for trial, found in enumerate(store.read_trials(array, "x")):
            for start in range(0, n, size):  # each from its own generator
                block = images[start : start + size]
                rng = block_generator(5, name, variant.level, "test", trial, start // size)
                assert np.array_equal(variant.kernel.kernel(block, variant.level, rng), found[start : start + size])
        part = generation.perturb_images(images, variant, 0, n // 3, n - n // 5)
        assert np.array_equal(part, store.read_part(array, (0, slice(n // 3, n - n // 5)), "x"))


def test_sensor_scope_holds_over_all_blocks_of_a_trial(clean: Images) -> None:
    variant = make_variant("hot", options={"scope": "sensor"})
    black = np.zeros_like(clean)
    first, second = (generation.perturb_images(black, variant, trial, 0, N) for trial in (0, 1))
    assert (first == first[0]).all()
    assert not np.array_equal(first[0], second[0])


def test_attributes_say_what_is_needed_to_regenerate(clean: Images, dataset: Dataset, tmp_path: Path) -> None:
    variant = make_variant("stuck")
    write(tmp_path / "stuck.zarr", dataset, [(variant, (2, 700))], {"test": clean}, 2)
    array = zarr.open_group(tmp_path / "stuck.zarr", mode="r")["49/test"]
    assert isinstance(array, zarr.Array)
    attributes = dict(array.attrs)
    assert attributes == {
        "dataset": "mnist",
        "split": "test",
        "perturbation": "stuck",
        "level": 49,
        "unit": "n_pixels",
        "options": {"scope": "image"},
        "seed": 5,
        "block_size": BLOCK_SIZE,
        "source_sha256": store.sha256(clean),
        "sha256": store.sha256(np.asarray(array[...], np.uint8)),
    }
