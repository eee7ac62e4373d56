"""Contract of every kernel in the table, and each kernel against an independent definition."""

import inspect
import itertools
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.data.arrays import Images
from pipeline.perturbations import (
    PERTURBATIONS,
    Perturbation,
    blur,
    dead_pixels,
    gaussian_blur,
    gaussian_noise,
    hot_pixels,
    stuck_pixels,
)

SHAPES = {"grey": (28, 28, 1), "rgb": (32, 32, 3), "odd": (7, 11, 3)}
CASES = [
    pytest.param(
        perturbation, dict(zip(perturbation.options, values, strict=True)), id="-".join([name, *map(str, values)])
    )
    for name, perturbation in PERTURBATIONS.items()
    for values in itertools.product(*perturbation.options.values())
]


def make_images(n: int, shape: tuple[int, int, int], seed: int = 0) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def make_rng(seed: int = 1) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(seed))


def some_level(perturbation: Perturbation) -> float:
    return 3 if perturbation.unit == "n_pixels" else 0.7


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("perturbation", "options"), CASES)
class TestEveryKernel:
    def test_keeps_shape_and_type_and_leaves_its_input_alone(
        self, perturbation: Perturbation, options: dict[str, Any], shape: tuple[int, int, int]
    ) -> None:
        images = make_images(20, shape)
        before = images.copy()
        images.flags.writeable = False
        perturbed = perturbation.kernel(images, some_level(perturbation), make_rng(), **options)
        assert perturbed.shape == images.shape
        assert perturbed.dtype == np.uint8
        assert perturbed.flags.c_contiguous
        assert not np.shares_memory(perturbed, images)
        assert np.array_equal(images, before)
        assert not np.array_equal(perturbed, images)

    def test_same_seed_same_bytes_other_seed_other_bytes(
        self, perturbation: Perturbation, options: dict[str, Any], shape: tuple[int, int, int]
    ) -> None:
        images, level = make_images(20, shape), some_level(perturbation)
        first, again, other = (perturbation.kernel(images, level, make_rng(seed), **options) for seed in (1, 1, 2))
        assert np.array_equal(first, again)
        assert np.array_equal(first, other) == (not perturbation.is_random)

    def test_accepts_an_empty_batch_and_a_view(
        self, perturbation: Perturbation, options: dict[str, Any], shape: tuple[int, int, int]
    ) -> None:
        level = some_level(perturbation)
        assert perturbation.kernel(make_images(0, shape), level, make_rng(), **options).shape == (0, *shape)
        images = make_images(20, shape)
        view = perturbation.kernel(images[::2], level, make_rng(), **options)
        assert np.array_equal(view, perturbation.kernel(images[::2].copy(), level, make_rng(), **options))

    def test_an_image_does_not_depend_on_the_others_of_its_block(
        self, perturbation: Perturbation, options: dict[str, Any], shape: tuple[int, int, int]
    ) -> None:
        images, level = make_images(20, shape), some_level(perturbation)
        others = make_images(20, shape, seed=9)
        others[7] = images[7]
        one, two = (perturbation.kernel(batch, level, make_rng(), **options) for batch in (images, others))
        assert np.array_equal(one[7], two[7])

    def test_refuses_levels_out_of_range(
        self, perturbation: Perturbation, options: dict[str, Any], shape: tuple[int, int, int]
    ) -> None:
        height, width, _ = shape
        for level in (0, -1, perturbation.max_level(height, width) * 1.001 + (perturbation.unit == "n_pixels")):
            value = int(level) if perturbation.unit == "n_pixels" else level
            with pytest.raises(ValueError, match=perturbation.unit):
                perturbation.kernel(make_images(2, shape), value, make_rng(), **options)

    def test_accepts_its_largest_level(
        self, perturbation: Perturbation, options: dict[str, Any], shape: tuple[int, int, int]
    ) -> None:
        limit = perturbation.max_level(*shape[:2])
        level = int(limit) if perturbation.unit == "n_pixels" else limit
        assert perturbation.kernel(make_images(2, shape), level, make_rng(), **options).shape == (2, *shape)


# What every kernel refuses: the table is walked, so a kernel without `@kernel` fails here.

IMAGES = make_images(3, (8, 8, 3))
WRONG_IMAGES: dict[str, tuple[Any, type[Exception], str]] = {
    # id: images, what is raised, and what is said
    "float32": ((IMAGES / 255).astype(np.float32), TypeError, r"of type float32; .*\(255 \* images\)\.round\(\)"),
    "float64": (IMAGES / 255, TypeError, "of type float64"),
    "float16": (IMAGES.astype(np.float16), TypeError, "of type float16"),
    "int8": (IMAGES.astype(np.int8), TypeError, "of type int8"),
    "uint16": (IMAGES.astype(np.uint16), TypeError, "of type uint16"),
    "int64": (IMAGES.astype(np.int64), TypeError, "of type int64"),
    "bool": (IMAGES > 9, TypeError, "of type bool"),
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
    "None": (None, False),
    "RandomState": (np.random.RandomState(0), True),
    "seed": (1, True),
}
WRONG_GENERATORS |= {
    "module": (np.random, True),
    "bit-generator": (np.random.PCG64(0), True),
    "class": (np.random.Generator, True),
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


@pytest.mark.parametrize(("kernel", "value"), [(hot_pixels, 255), (dead_pixels, 0)], ids=["hot", "dead"])
@pytest.mark.parametrize("n_pixels", [1, 5, 60])
def test_hot_and_dead_set_exactly_so_many_whole_pixels(kernel: Any, value: int, n_pixels: int) -> None:
    images = np.full((50, 9, 8, 3), 7, np.uint8)
    changed = kernel(images, n_pixels, make_rng()) != images
    assert (changed.any(axis=3) == changed.all(axis=3)).all()
    assert (changed.any(axis=3).sum(axis=(1, 2)) == n_pixels).all()
    assert (kernel(images, n_pixels, make_rng())[changed] == value).all()


def test_stuck_values_are_uniform_and_independent_between_channels() -> None:
    black = np.zeros((40_000, 2, 2, 3), np.uint8)
    values = stuck_pixels(black, 4, make_rng()).reshape(-1, 3)
    for channel in range(3):
        counts = np.bincount(values[:, channel], minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4
    assert np.abs(np.corrcoef(values.T.astype(float)) - np.eye(3)).max() < 0.01


def test_every_set_of_pixels_is_equally_likely() -> None:
    images = np.zeros((60_000, 2, 3, 1), np.uint8)
    hot = hot_pixels(images, 3, make_rng()).reshape(-1, 6) == 255
    sets = hot @ (1 << np.arange(6))
    counts = np.bincount(sets, minlength=64)
    assert (counts > 0).sum() == 20  # 6 choose 3
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-4


@pytest.mark.parametrize("kernel", [stuck_pixels, hot_pixels, dead_pixels])
def test_sensor_scope_damages_the_same_pixels_in_every_image(kernel: Any) -> None:
    images = np.full((30, 12, 12, 3), 100, np.uint8)
    perturbed = kernel(images, 5, make_rng(), scope="sensor")
    assert (perturbed == perturbed[:1]).all()
    assert ((perturbed[0] != 100).any(axis=2)).sum() == 5
    assert not (kernel(images, 5, make_rng(), scope="image") == perturbed).all()


@pytest.mark.parametrize("sigma", [0.001, 0.01325, 0.05, 0.3])
def test_noise_is_the_rounded_normal_law_tails_included(sigma: float) -> None:
    grey = np.full((3000, 32, 32, 1), 128, np.uint8)
    noise = gaussian_noise(grey, sigma, make_rng()).ravel().astype(int) - 128
    law = NormalDist(0, 255 * sigma)
    edges = [-np.inf, *(np.arange(-127, 127) + 0.5), np.inf]  # clipping gathers the tails at 0 and 255
    expected = np.diff([law.cdf(edge) for edge in edges]) * noise.size
    counts = np.bincount(noise + 128, minlength=256)[1:].astype(float)
    counts[0] += (noise == -128).sum()
    # Merge the bins that expect less than 10 into their inner neighbours.
    kept = expected >= 10
    observed = [*counts[kept], counts[~kept].sum()]
    wanted = [*expected[kept], expected[~kept].sum()]
    if wanted[-1] < 5:
        observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
    assert stats.chisquare(observed, np.array(wanted) * (noise.size / sum(wanted))).pvalue > 1e-4


def test_noise_draws_are_independent_between_neighbours_and_channels() -> None:
    grey = np.full((500, 32, 32, 3), 128, np.uint8)
    noise = gaussian_noise(grey, 0.1, make_rng()).astype(float) - 128
    for axis in (1, 2, 3):
        ahead, behind = np.take(noise, range(1, 3), axis).ravel(), np.take(noise, range(2), axis).ravel()
        assert abs(np.corrcoef(ahead, behind)[0, 1]) < 0.01


BIT_GENERATORS = (np.random.SFC64, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.MT19937)


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("bit_generator", BIT_GENERATORS)
def test_noise_has_the_asked_for_spread_with_every_bit_generator(bit_generator: Any, sigma: float) -> None:
    grey = np.full((600, 28, 28, 1), 128, np.uint8)
    noise = gaussian_noise(grey, sigma, np.random.Generator(bit_generator(3))).astype(float) - 128
    expected = np.sqrt((255 * sigma) ** 2 + 1 / 12)  # and that of rounding
    assert abs(noise.std() / expected - 1) < 0.01
    assert abs(noise.mean()) < 0.01 * expected


@pytest.mark.parametrize("bit_generator", BIT_GENERATORS[:4])
def test_noise_draws_the_raw_stream_where_that_has_64_bits(bit_generator: Any) -> None:
    """What the bytes of the first release were made of; the stream of `Generator.integers` is pinned by its digest."""
    one, other = (np.random.Generator(bit_generator(5)) for _ in range(2))
    raw = one.bit_generator.random_raw(10_001)
    assert np.array_equal(raw, other.integers(0, 1 << 64, size=10_001, dtype=np.uint64))
    assert one.integers(0, 1 << 16, dtype=np.uint32) == other.integers(0, 1 << 16, dtype=np.uint32)


def test_noise_clips_instead_of_wrapping() -> None:
    assert gaussian_noise(np.zeros((50, 8, 8, 1), np.uint8), 0.02, make_rng()).max() < 60
    assert gaussian_noise(np.full((50, 8, 8, 1), 255, np.uint8), 0.02, make_rng()).min() > 195


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("sigma", [0.04, 0.4, 0.55, 0.7, 0.85, 1.0, 1.6])
def test_blur_is_opencv_image_by_image(sigma: float, shape: tuple[int, int, int]) -> None:
    images = make_images(130, shape)
    size = 2 * int(4 * sigma + 0.5) + 1
    naive = [cv2.GaussianBlur(image, (size, size), sigma, borderType=cv2.BORDER_REFLECT) for image in images]
    assert np.array_equal(gaussian_blur(images, sigma), np.reshape(naive, images.shape))


@pytest.mark.parametrize("channels", [1, 2, 5, 13, 128])
def test_blur_takes_so_many_channels_and_each_is_blurred_alone(channels: int) -> None:
    images = make_images(3, (9, 8, channels))
    alone = [gaussian_blur(images[..., [i]], 0.7) for i in range(channels)]
    assert np.array_equal(gaussian_blur(images, 0.7), np.concatenate(alone, axis=3))


def test_blur_says_how_many_channels_are_too_many() -> None:
    with pytest.raises(ValueError, match=r"^images: 129 channels, OpenCV takes 128; "):
        gaussian_blur(make_images(1, (9, 8, 129)), 0.7)


@pytest.mark.parametrize("mix_channels", [False, True])
def test_blur_is_the_same_in_strips_of_any_length(mix_channels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_images(130, (28, 28, 3))
    expected = gaussian_blur(images, 0.7, mix_channels=mix_channels)
    for n_bytes in (1, 5 * 28 * 28 * 3):
        monkeypatch.setattr(blur, "_STRIP_BYTES", n_bytes)
        assert np.array_equal(gaussian_blur(images, 0.7, mix_channels=mix_channels), expected)


def test_blur_below_a_radius_of_one_is_the_identity() -> None:
    images = make_images(5, (28, 28, 1))
    assert np.array_equal(gaussian_blur(images, 0.04), images)


def test_blur_mixes_channels_only_when_asked() -> None:
    red = np.zeros((1, 32, 32, 3), np.uint8)
    red[..., 0] = 200
    assert np.array_equal(gaussian_blur(red, 1.0), red)
    assert gaussian_blur(red, 1.0, mix_channels=True)[..., 1].min() > 20


def test_kernels_import_without_torch_and_zarr() -> None:
    code = "import sys, pipeline.perturbations; sys.exit(bool({'torch', 'zarr'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
