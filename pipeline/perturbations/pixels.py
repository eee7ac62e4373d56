"""Defective sensor pixels: stuck, hot and dead."""

from typing import Literal

import numpy as np

from pipeline.data.arrays import Images
from pipeline.perturbations.contract import kernel

Scope = Literal["image", "sensor"]


@kernel
def stuck_pixels(images: Images, n_pixels: int, rng: np.random.Generator, *, scope: Scope = "image") -> Images:
    """Set `n_pixels` distinct pixels of every image to random values, one for each channel.

    Args:
        images: uint8 (N, H, W, C), 0-255; not modified.
        n_pixels: Pixels per image, 1 to H·W, uniform over the image.
        rng: Source of positions and values (uniform on 0..255).
        scope: `image`: every image has its own pixels. `sensor`: all images have the same pixels and values.

    Returns:
        uint8 (N, H, W, C).

    Raises:
        ValueError: `n_pixels` is below 1 or above H·W.
        TypeError, ValueError: As `contract.kernel`.

    Source: paper section III-A; `sensor` is our choice, because a camera's defects do not move.
    """
    n, height, width, channels = images.shape
    n_drawn = n if scope == "image" else 1
    chosen = _choose_pixels(n_drawn, height * width, n_pixels, rng)
    values = rng.integers(0, 256, size=(n_drawn, n_pixels, channels), dtype=np.uint8)
    perturbed = images.reshape(n, height * width, channels).copy()
    perturbed[np.arange(n)[:, None], chosen] = values
    return perturbed.reshape(images.shape)


@kernel
def hot_pixels(images: Images, n_pixels: int, rng: np.random.Generator, *, scope: Scope = "image") -> Images:
    """Set `n_pixels` distinct pixels of every image to 255 in every channel; arguments as `stuck_pixels`.

    Source: paper section III-A.
    """
    return _set_pixels(images, n_pixels, rng, scope, 255)


@kernel
def dead_pixels(images: Images, n_pixels: int, rng: np.random.Generator, *, scope: Scope = "image") -> Images:
    """Set `n_pixels` distinct pixels of every image to 0 in every channel; arguments as `stuck_pixels`.

    Source: paper section III-A.
    """
    return _set_pixels(images, n_pixels, rng, scope, 0)


def _set_pixels(images: Images, n_pixels: int, rng: np.random.Generator, scope: Scope, value: int) -> Images:
    n, height, width, channels = images.shape
    chosen = _choose_pixels(n if scope == "image" else 1, height * width, n_pixels, rng)
    perturbed = images.reshape(n, height * width, channels).copy()
    perturbed[np.arange(n)[:, None], chosen] = value
    return perturbed.reshape(images.shape)


def _choose_pixels(n: int, n_positions: int, n_pixels: int, rng: np.random.Generator) -> np.ndarray:
    """Draw distinct positions in 0..n_positions-1, every set of them equally likely: intp (n, n_pixels).

    Source: Floyd's sampling without replacement (Bentley & Floyd, CACM 30(9), 1987), for all rows at once.
    The number of draws grows with the pixels chosen, not with the size of the image.
    """
    if not 1 <= n_pixels <= n_positions:
        raise ValueError(f"n_pixels: {n_pixels} is outside 1 to {n_positions}, the pixels of an image")
    rows = np.arange(n)
    taken = np.zeros((n, n_positions), dtype=bool)
    chosen = np.empty((n, n_pixels), dtype=np.intp)
    for step, last in enumerate(range(n_positions - n_pixels, n_positions)):
        drawn = rng.integers(0, last, size=n, endpoint=True)
        position = np.where(taken[rows, drawn], last, drawn)
        taken[rows, position] = True
        chosen[:, step] = position
    return chosen
