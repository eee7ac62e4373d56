"""Additive Gaussian sensor noise."""

from functools import lru_cache
from math import erfc, sqrt

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.arrays import Images
from pipeline.perturbations.contract import kernel

_UNDECIDED = np.iinfo(np.int16).min
# Values at a time: few enough that their draws stay in the cache. A multiple of 4; results do not depend on it.
_STRETCH = 1 << 19


@kernel
def gaussian_noise(images: Images, sigma: float, rng: np.random.Generator) -> Images:
    """Add N(0, σ²) to every value of every channel; the result is clipped to 0..255 and rounded.

    Because a pixel is an integer, rounding the sum equals adding a rounded normal variate. That variate is drawn
    exactly, by inverting its distribution function at a 32-bit uniform number. The upper 16 bits decide it by table
    look-up for all but a few values (one in 600 at σ = 0.05, one in 40 at σ = 1), which draw 16 more bits. Draws are
    only used in integer arithmetic, so the bytes are the same on every machine.

    Args:
        images: uint8 (N, H, W, C), 0-255; not modified.
        sigma: Standard deviation as a fraction of full scale (255), above 0 and at most 1.
        rng: Source of the draws, with any bit generator.

    Returns:
        uint8 (N, H, W, C).

    Raises:
        ValueError: `sigma` is outside (0, 1].
        TypeError, ValueError: As `contract.kernel`.

    Source: paper section III-B, whose "variance" its authors used as σ. The sampler is our choice; tails beyond
    probability 2⁻³³ on either side (6.2 σ) are cut.
    """
    if not 0 < sigma <= 1:
        raise ValueError(f"sigma: {sigma} is outside (0, 1], fractions of full scale")
    table, thresholds, smallest = _rounded_normal(sigma)
    clean = np.ascontiguousarray(images).reshape(1, -1)
    noisy = np.empty_like(clean)
    undecided, upper_bits = [np.empty(0, np.intp)], [np.empty(0, "<u2")]
    for start in range(0, clean.size, _STRETCH):
        part = clean[:, start : start + _STRETCH]
        # Not `random_raw`: it would return the words of a 32-bit generator as if they had 64 bits.
        words = rng.integers(0, 1 << 64, size=-(-part.size // 4), dtype=np.uint64)
        uniform = words.astype("<u8", copy=False).view("<u2")[: part.size]
        noise = cv2.LUT(uniform.reshape(1, -1), table)
        places = np.flatnonzero(noise[0] == _UNDECIDED)
        cv2.add(part, noise, noisy[:, start : start + _STRETCH], dtype=cv2.CV_8U)
        undecided.append(start + places)
        upper_bits.append(uniform[places])
    places = np.concatenate(undecided)
    low_bits = rng.integers(0, 1 << 16, size=places.size, dtype=np.uint32)
    exact = (np.concatenate(upper_bits).astype(np.uint32) << 16) | low_bits
    variates = smallest + np.searchsorted(thresholds, exact, side="right")
    noisy[0, places] = (clean[0, places] + variates).clip(0, 255)
    return noisy.reshape(images.shape)


@lru_cache(maxsize=64)
def _rounded_normal(sigma: float) -> tuple[NDArray[np.int16], NDArray[np.uint64], int]:
    """Return the distribution of round(255·σ·Z) as a table over 16 bits and thresholds over 32.

    Returns:
        table: int16 (1, 65536), the variate for the upper 16 bits, `_UNDECIDED` where they do not decide it.
        thresholds: uint64, ascending; the variate of a 32-bit number u is `smallest` + the number of them ≤ u.
        smallest: The smallest variate.
    """
    scale = 255 * sigma
    reach = int(6.5 * scale) + 1
    # P(variate ≤ k) for k = -reach .. reach, in units of 2^-32, rounded.
    cumulative = [round(0.5 * erfc(-(k + 0.5) / (scale * sqrt(2))) * 2**32) for k in range(-reach, reach + 1)]
    thresholds = np.array(cumulative, dtype=np.uint64)
    prefixes = np.arange(1 << 16, dtype=np.uint64) << np.uint64(16)
    lowest = np.searchsorted(thresholds, prefixes, side="right")
    highest = np.searchsorted(thresholds, prefixes | np.uint64(0xFFFF), side="right")
    table = np.where(lowest == highest, lowest - reach, _UNDECIDED).astype(np.int16)
    return table.reshape(1, -1), thresholds, -reach
