"""Contract of every kernel in the table; test_determinism.py holds each of them to an independent definition."""

import inspect
import itertools
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.data.arrays import Images
from pipeline.perturbations import PERTURBATIONS, Perturbation, blur, gaussian_blur, hot_pixels

Shape = tuple[int, int, int]
SHAPES = {"grey": (28, 28, 1), "rgb": (32, 32, 3), "odd": (7, 11, 3)}
CASES = [
    pytest.param(
        perturbation, dict(zip(perturbation.options, values, strict=True)), id="-".join([name, *map(str, values)])
    )
    for name, perturbation in PERTURBATIONS.items()
    for values in itertools.product(*perturbation.options.values())
]


def make_images(n: int, shape: Shape, seed: int = 0) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def make_rng(seed: int = 1, bit_generator: Any = np.random.SFC64) -> np.random.Generator:
    return np.random.Generator(bit_generator(seed))


Damage = Callable[..., Images]


@pytest.fixture
def damage(perturbation: Perturbation, options: dict[str, Any]) -> Damage:
    """The kernel with its options, at some level unless told another."""
    some_level = 3 if perturbation.unit == "n_pixels" else 0.7

    def apply(images: Images, seed: int = 1, level: float = some_level) -> Images:
        return perturbation.kernel(images, level, make_rng(seed), **options)

    return apply


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("perturbation", "options"), CASES)
class TestEveryKernel:
    def test_keeps_shape_and_type_and_leaves_its_input_alone(self, damage: Damage, shape: Shape) -> None:
        images = make_images(20, shape)
        before = images.copy()
        images.flags.writeable = False
        perturbed = damage(images)
        assert perturbed.shape == images.shape
        assert perturbed.dtype == np.uint8
        assert perturbed.flags.c_contiguous
        assert not np.shares_memory(perturbed, images)
        assert np.array_equal(images, before)
        assert not np.array_equal(perturbed, images)

    def test_same_seed_same_bytes_other_seed_other_bytes(
        self, damage: Damage, shape: Shape, perturbation: Perturbation
    ) -> None:
        first, again, other = (damage(make_images(20, shape), seed) for seed in (1, 1, 2))
        assert np.array_equal(first, again)
        assert np.array_equal(first, other) == (not perturbation.is_random)

    def test_accepts_an_empty_batch_and_a_view(self, damage: Damage, shape: Shape) -> None:
        assert damage(make_images(0, shape)).shape == (0, *shape)
        view = make_images(20, shape)[::2]
        assert np.array_equal(damage(view), damage(view.copy()))

    def test_an_image_does_not_depend_on_the_others_of_its_block(self, damage: Damage, shape: Shape) -> None:
        images, others = make_images(20, shape), make_images(20, shape, seed=9)
        others[7] = images[7]
        assert np.array_equal(damage(images)[7], damage(others)[7])

    def test_accepts_its_largest_level_and_refuses_those_out_of_range(
        self, damage: Damage, shape: Shape, perturbation: Perturbation
    ) -> None:
        limit, is_whole = perturbation.max_level(*shape[:2]), perturbation.unit == "n_pixels"
        assert damage(make_images(2, shape), level=int(limit) if is_whole else limit).shape == (2, *shape)
        for level in (0, -1, int(limit) + 1 if is_whole else limit * 1.001):
            with pytest.raises(ValueError, match=perturbation.unit):
                damage(make_images(2, shape), level=level)


# What every kernel refuses: the table is walked, so a kernel without `@kernel` fails here.

IMAGES = make_images(3, (8, 8, 3))
WRONG_IMAGES: dict[str, tuple[Any, type[Exception], str]] = {
    # id: images, what is raised, and what is said
    "float32": ((IMAGES / 255).astype(np.float32), TypeError, r"of type float32; .*\(255 \* images\)\.round\(\)"),
    **{
        name: (IMAGES.astype(name), TypeError, f"of type {name}")
        for name in ("float64", "float16", "int8", "uint16", "int64", "bool")
    },
    "objects": (IMAGES.astype(object), TypeError, "of type object"),
    "list": (IMAGES.tolist(), TypeError, "of type list"),
    "tensor": (torch.from_numpy(IMAGES), TypeError, "of type Tensor"),
    "masked": (np.ma.masked_array(IMAGES), TypeError, "of type MaskedArray"),
    "nothing": (None, TypeError, "of type NoneType"),
    "grey-batch": (IMAGES[..., 0], ValueError, r"of shape \(3, 8, 8\).*images\[\.\.\., None\]"),
    "no-image": (IMAGES[0, 0, 0], ValueError, r"of shape \(3,\)"),
    "trials": (IMAGES[None], ValueError, r"of shape \(1, 3, 8, 8, 3\)"),
    "a-number": (np.uint8(3), TypeError, "of type uint8"),
    "no-height": (IMAGES[:, :0], ValueError, r"of shape \(3, 0, 8, 3\)"),
    "no-width": (IMAGES[:, :, :0], ValueError, r"of shape \(3, 8, 0, 3\)"),
    "no-channel": (IMAGES[..., :0], ValueError, r"of shape \(3, 8, 8, 0\)"),
    "nothing-at-all": (np.empty((0, 0, 0, 0), np.uint8), ValueError, r"of shape \(0, 0, 0, 0\)"),
}
WRONG_LEVELS = {"bool": True, "numpy-bool": np.True_, "text": "1", "None": None, "list": [1], "complex": 1j}
WRONG_LEVELS |= {"decimal": Decimal(1), "array": np.array([1]), "array-of-no-dimension": np.array(1)}
WRONG_WHOLE = {"1.0": 1.0, "0.5": 0.5, "nan": float("nan"), "float32": np.float32(1), "fraction": Fraction(1)}
WRONG_FINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "float32-nan": np.float32("nan")}
WRONG_FINITE |= {"beyond-all-floats": 10**400}
# A generator, and whether it is wrong where it is not used too.
WRONG_GENERATORS: dict[str, tuple[Any, bool]] = {
    **{"None": (None, False), "RandomState": (np.random.RandomState(0), True), "seed": (1, True)},
    **{"module": (np.random, True), "class": (np.random.Generator, True)},
    "bit-generator": (np.random.PCG64(0), True),
}


@pytest.mark.parametrize("perturbation", PERTURBATIONS.values(), ids=PERTURBATIONS)
class TestEveryKernelRefuses:
    @pytest.mark.parametrize(("images", "error", "said"), WRONG_IMAGES.values(), ids=WRONG_IMAGES)
    def test_images_of_another_kind(
        self, images: Any, error: type[Exception], said: str, perturbation: Perturbation
    ) -> None:
        with pytest.raises(error, match=f"^images: {said}"):
            perturbation.kernel(images, 1, make_rng())
        with pytest.raises(error, match=f"^images: {said}"):
            perturbation.kernel(rng=make_rng(), images=images, **{perturbation.unit: 1})

    @pytest.mark.parametrize("level", WRONG_LEVELS.values(), ids=WRONG_LEVELS)
    def test_a_level_that_is_no_number(self, level: Any, perturbation: Perturbation) -> None:
        with pytest.raises(TypeError, match=f"^{perturbation.unit}: .* is of type {type(level).__name__}; give a "):
            perturbation.kernel(IMAGES, level, make_rng())
        with pytest.raises(TypeError, match=f"^{perturbation.unit}: "):
            perturbation.kernel(IMAGES, rng=make_rng(), **{perturbation.unit: level})

    def test_a_level_that_is_not_whole_or_not_finite(self, perturbation: Perturbation) -> None:
        is_whole = perturbation.unit == "n_pixels"
        for level in (WRONG_WHOLE if is_whole else WRONG_FINITE).values():
            with pytest.raises(TypeError if is_whole else ValueError, match=f"^{perturbation.unit}: .*; give a "):
                perturbation.kernel(IMAGES, level, make_rng())

    @pytest.mark.parametrize(("rng", "is_always_wrong"), WRONG_GENERATORS.values(), ids=WRONG_GENERATORS)
    def test_what_is_no_generator(self, rng: Any, is_always_wrong: bool, perturbation: Perturbation) -> None:
        if is_always_wrong or perturbation.is_random:
            with pytest.raises(TypeError, match=f"^rng: of type {type(rng).__name__}; .*default_rng"):
                perturbation.kernel(IMAGES, 1, rng)
        else:
            perturbation.kernel(IMAGES, 1, rng)

    def test_an_option_that_is_not_among_its_choices(self, perturbation: Perturbation) -> None:
        for option, choices in perturbation.options.items():
            for value in ("foo", "", None, 0, 1, 1.0, ["image"], b"image", "Image", "True", np.True_):
                with pytest.raises(ValueError, match=f"^{option}: .* is unknown; choose from {choices[0]!r}, "):
                    perturbation.kernel(IMAGES, 1, make_rng(), **{option: value})
        with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
            perturbation.kernel(IMAGES, 1, make_rng(), colour=1)
        with pytest.raises(TypeError, match="positional argument"):
            perturbation.kernel(IMAGES, 1, make_rng(), True)

    def test_and_takes_numbers_of_any_type_as_the_same_level(self, perturbation: Perturbation) -> None:
        expected = perturbation.kernel(IMAGES, 1, make_rng())
        whole = (np.int64(1), np.uint8(1), np.int8(1))
        finite = (1.0, np.float32(1), np.float64(1), np.float16(1), Fraction(1), *whole)
        for level in whole if perturbation.unit == "n_pixels" else finite:
            assert np.array_equal(perturbation.kernel(IMAGES, level, make_rng()), expected)

    def test_and_the_table_says_what_its_signature_says(self, perturbation: Perturbation) -> None:
        parameters = inspect.signature(perturbation.kernel).parameters
        assert list(parameters)[:3] == ["images", perturbation.unit, "rng"]
        assert (parameters["rng"].default is inspect.Parameter.empty) == perturbation.is_random
        assert list(perturbation.options) == list(parameters)[3:]
        assert [choices[0] for choices in perturbation.options.values()] == [p.default for p in parameters.values()][3:]
        assert perturbation.kernel.__doc__


def test_options_are_those_of_the_signatures() -> None:
    scope = {"scope": ("image", "sensor")}
    expected = {"stuck": scope, "hot": scope, "dead": scope, "noise": {}, "blur": {"mix_channels": (False, True)}}
    assert {name: PERTURBATIONS[name].options for name in expected} == expected


def test_every_set_of_pixels_is_equally_likely() -> None:
    images = np.zeros((60_000, 2, 3, 1), np.uint8)
    hot = hot_pixels(images, 3, make_rng()).reshape(-1, 6) == 255
    sets = hot @ (1 << np.arange(6))
    counts = np.bincount(sets, minlength=64)
    assert (counts > 0).sum() == 20  # 6 choose 3
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-4


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("sigma", [0.04, 0.4, 0.55, 0.7, 0.85, 1.0, 1.6])
def test_blur_is_opencv_image_by_image(sigma: float, shape: Shape) -> None:
    images = make_images(130, shape)
    size = 2 * int(4 * sigma + 0.5) + 1
    naive = [cv2.GaussianBlur(image, (size, size), sigma, borderType=cv2.BORDER_REFLECT) for image in images]
    assert np.array_equal(gaussian_blur(images, sigma), np.reshape(naive, images.shape))


def test_blur_takes_up_to_128_channels_and_each_is_blurred_alone() -> None:
    for channels in (1, 2, 5, 13, 128):
        images = make_images(3, (9, 8, channels))
        alone = [gaussian_blur(images[..., [i]], 0.7) for i in range(channels)]
        assert np.array_equal(gaussian_blur(images, 0.7), np.concatenate(alone, axis=3))
    with pytest.raises(ValueError, match=r"^images: 129 channels, OpenCV takes 128; "):
        gaussian_blur(make_images(1, (9, 8, 129)), 0.7)


@pytest.mark.parametrize("mix_channels", [False, True])
def test_blur_is_the_same_in_strips_of_any_length(mix_channels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_images(130, (28, 28, 3))
    expected = gaussian_blur(images, 0.7, mix_channels=mix_channels)
    for n_bytes in (1, 5 * 28 * 28 * 3):
        monkeypatch.setattr(blur, "_STRIP_BYTES", n_bytes)
        assert np.array_equal(gaussian_blur(images, 0.7, mix_channels=mix_channels), expected)
