"""Contract of every kernel in the table, and each kernel against an independent definition."""

import itertools
import subprocess
import sys
from statistics import NormalDist
from typing import Any

import cv2
import numpy as np
import pytest
from scipy import ndimage, stats

from pipeline.arrays import Images
from pipeline.perturbations import (
    PERTURBATIONS,
    Perturbation,
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


@pytest.mark.parametrize(("kernel", "value"), [(hot_pixels, 255), (dead_pixels, 0)], ids=["hot", "dead"])
@pytest.mark.parametrize("n_pixels", [1, 5, 60])
def test_hot_and_dead_set_exactly_so_many_whole_pixels(kernel: Any, value: int, n_pixels: int) -> None:
    images = np.full((50, 9, 8, 3), 7, np.uint8)
    changed = kernel(images, n_pixels, make_rng()) != images
    assert (changed.any(axis=3) == changed.all(axis=3)).all()
    assert (changed.any(axis=3).sum(axis=(1, 2)) == n_pixels).all()
    assert (kernel(images, n_pixels, make_rng())[changed] == value).all()


def test_stuck_changes_at_most_so_many_pixels_and_nothing_else() -> None:
    images = make_images(300, (9, 8, 3))
    n_changed = (stuck_pixels(images, 4, make_rng()) != images).any(axis=3).sum(axis=(1, 2))
    assert n_changed.max() == 4
    assert n_changed.min() >= 3  # a pixel stays as it was with probability 256^-3


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


def test_noise_equals_a_naive_inversion_of_the_same_draws() -> None:
    images, sigma = make_images(3, (5, 6, 3)), 0.2
    words = make_rng().bit_generator.random_raw(-(-images.size // 4))
    high_bits = words.view(np.uint16)[: images.size].astype(int)
    perturbed = gaussian_noise(images, sigma, make_rng()).ravel().astype(int)
    law = NormalDist(0, 255 * sigma)
    for clean, high, found in zip(images.ravel().tolist(), high_bits.tolist(), perturbed.tolist(), strict=True):
        # The 16 bits leave an interval of probabilities; the variate must lie in its image.
        low = law.inv_cdf(max(high, 1e-6) / 2**16)
        top = law.inv_cdf(min(high + 1, 2**16 - 1e-6) / 2**16)
        assert np.clip(clean + round(low), 0, 255) <= found <= np.clip(clean + round(top), 0, 255)


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


@pytest.mark.parametrize("mix_channels", [False, True])
@pytest.mark.parametrize("sigma", [0.4, 0.7, 1.0, 2.0])
def test_blur_is_within_rounding_of_the_exact_gaussian(sigma: float, mix_channels: bool) -> None:
    images = make_images(20, (32, 32, 3))
    exact = images.astype(np.float64)
    for axis in (1, 2, 3) if mix_channels else (1, 2):
        exact = ndimage.gaussian_filter1d(exact, sigma, axis=axis, mode="reflect", truncate=4.0)
    difference = np.abs(gaussian_blur(images, sigma, mix_channels=mix_channels) - exact)
    # Half a level of rounding per pass, and OpenCV's quantised kernel: worst at small sigma.
    assert difference.max() < 2.5
    assert difference.mean() < 0.6


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
