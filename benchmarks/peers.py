"""The same perturbations by other libraries, used as their users would: what this project's kernels are compared with.

Every contender takes uint8 (N, H, W, C) and gives uint8 of that shape. Libraries that take batches get the whole batch;
libraries that take images get them one by one. No library sets exactly `n_pixels` defective pixels; PixelDropout drops
each pixel with a probability that gives as many on average.
"""

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch

from pipeline.data.arrays import Images

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # otherwise it looks for its latest version online


def of(perturbation: str, level: float) -> dict[str, Callable[[], Callable[[Images], Images]]]:
    """Return name → function that imports and builds the contender, which maps images to damaged images.

    Args:
        perturbation: Its name.
        level: As in params.yaml.
    """
    if perturbation == "noise":
        return _noise(level)
    if perturbation == "blur":
        return _blur(level)
    return _pixels(int(level), {"stuck": None, "hot": 255, "dead": 0}[perturbation])


def _one_by_one(damage: Callable[[Images], Images]) -> Callable[[Images], Images]:
    return lambda images: np.stack([damage(image) for image in images])


def _as_batch(damage: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Images], Images]:
    """Run a function of float images (N, C, H, W) in 0..1, as torch libraries take them; round as a camera does."""

    def run(images: Images) -> Images:
        batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        damaged = damage(batch).clamp(0, 1).mul(255).round().to(torch.uint8)
        return damaged.permute(0, 2, 3, 1).contiguous().numpy()

    return run


def _pixels(n_pixels: int, value: int | None) -> dict[str, Callable[[], Callable[[Images], Images]]]:
    """Contenders for stuck (`value` None), hot (255) and dead (0) pixels, as functions that import and build them."""

    def numpy_one_by_one() -> Callable[[Images], Images]:
        rng = np.random.default_rng(0)

        def damage(image: Images) -> Images:
            height, width, channels = image.shape
            damaged = image.copy()
            chosen = rng.choice(height * width, n_pixels, replace=False)
            new = rng.integers(0, 256, (n_pixels, channels)) if value is None else value
            damaged.reshape(-1, channels)[chosen] = new
            return damaged

        return _one_by_one(damage)

    def albumentations() -> Callable[[Images], Images]:
        import albumentations

        @lru_cache
        def build(n_positions: int) -> Any:
            return albumentations.PixelDropout(dropout_prob=n_pixels / n_positions, drop_value=value, p=1)

        def damage(image: Images) -> Images:
            damaged: Images = build(image.shape[0] * image.shape[1])(image=image)["image"]
            return damaged

        return _one_by_one(damage)

    return {"numpy, image by image": numpy_one_by_one, "albumentations": albumentations}


def _noise(sigma: float) -> dict[str, Callable[[], Callable[[Images], Images]]]:
    """Contenders for Gaussian noise."""

    def numpy_batch() -> Callable[[Images], Images]:
        rng = np.random.default_rng(0)

        def damage(images: Images) -> Images:
            noisy = images + rng.normal(0, 255 * sigma, images.shape)
            rounded: Images = np.rint(noisy.clip(0, 255)).astype(np.uint8)
            return rounded

        return damage

    def opencv() -> Callable[[Images], Images]:
        def damage(image: Images) -> Images:
            channels = image.shape[2]
            drawn = cv2.randn(np.empty(image.shape, np.int16), np.zeros(channels), np.full(channels, 255 * sigma))
            return np.asarray(cv2.add(image, drawn, dtype=cv2.CV_8U), np.uint8)

        return _one_by_one(damage)

    def albumentations() -> Callable[[Images], Images]:
        import albumentations

        transform = albumentations.GaussNoise(std_range=(sigma, sigma), p=1)
        return _one_by_one(lambda image: transform(image=image)["image"])

    def torchvision() -> Callable[[Images], Images]:
        from torchvision.transforms import v2

        return _as_batch(v2.GaussianNoise(sigma=sigma))

    def kornia() -> Callable[[Images], Images]:
        from kornia.augmentation import RandomGaussianNoise

        return _as_batch(RandomGaussianNoise(std=sigma, p=1.0))

    return {
        "numpy, whole batch": numpy_batch,
        "OpenCV": opencv,
        "albumentations": albumentations,
        "torchvision v2": torchvision,
        "kornia": kornia,
    }


def _blur(sigma: float) -> dict[str, Callable[[], Callable[[Images], Images]]]:
    """Contenders for Gaussian blur, all with our radius and mirrored edge where they can."""
    size = 2 * int(4 * sigma + 0.5) + 1

    def opencv() -> Callable[[Images], Images]:
        return _one_by_one(
            lambda image: np.asarray(
                cv2.GaussianBlur(image, (size, size), sigma, borderType=cv2.BORDER_REFLECT), np.uint8
            ).reshape(image.shape)
        )

    def albumentations() -> Callable[[Images], Images]:
        import albumentations

        transform = albumentations.GaussianBlur(sigma_limit=(sigma, sigma), blur_limit=(size, size), p=1)
        return _one_by_one(lambda image: transform(image=image)["image"])

    def scipy() -> Callable[[Images], Images]:
        from scipy.ndimage import gaussian_filter

        return lambda images: np.asarray(gaussian_filter(images, (0, sigma, sigma, 0), mode="reflect"), np.uint8)

    def torchvision() -> Callable[[Images], Images]:
        from torchvision.transforms import v2

        def damage(images: Images) -> Images:
            batch = torch.from_numpy(images).permute(0, 3, 1, 2)
            blurred = v2.functional.gaussian_blur(batch, [size, size], [sigma, sigma])
            return np.ascontiguousarray(blurred.permute(0, 2, 3, 1).numpy())

        return damage

    def kornia() -> Callable[[Images], Images]:
        from kornia.filters import gaussian_blur2d

        return _as_batch(lambda batch: gaussian_blur2d(batch, (size, size), (sigma, sigma), "reflect"))

    return {
        "OpenCV": opencv,
        "albumentations": albumentations,
        "scipy": scipy,
        "torchvision v2": torchvision,
        "kornia": kornia,
    }
