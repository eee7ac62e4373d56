"""Defocus as Gaussian blur."""

import cv2
import numpy as np

from pipeline.data.arrays import Images
from pipeline.perturbations.contract import kernel

# Images per OpenCV call: enough to make the call's overhead vanish, few enough to stay in the cache; fewer of large
# images, which bounds memory. Results do not depend on it.
_STRIP_IMAGES, _STRIP_BYTES = 100, 2**20
_MAX_CHANNELS = 128  # the limit of OpenCV 5


@kernel
def gaussian_blur(
    images: Images, sigma: float, rng: np.random.Generator | None = None, *, mix_channels: bool = False
) -> Images:
    """Convolve images with a Gaussian of standard deviation `sigma`, edges mirrored (dcba|abcd|dcba).

    OpenCV's 8-bit GaussianBlur defines the result. Its integer coefficients make it the same on every machine, and
    different from the exact convolution: by 1.3 grey levels at most at σ = 1, 4.1 at σ = 2 (docs/reproducibility.md).

    Args:
        images: uint8 (N, H, W, C), 0-255, C = 1 to 128; not modified.
        sigma: Standard deviation in pixels, above 0; the radius is ⌊4σ + ½⌋.
        rng: Unused; blur is deterministic. Every kernel takes one.
        mix_channels: Afterwards blur along the channel axis too, with the same kernel and mirrored edge.

    Returns:
        uint8 (N, H, W, C).

    Raises:
        ValueError: `sigma` is not positive, or the radius exceeds the image's height or width; more than 128 channels.
        TypeError, ValueError: As `contract.kernel`.

    Source: paper section III-C; `mix_channels` is what the authors' 3-D filter did to CIFAR-10.
    """
    n, height, width, channels = images.shape
    if not 0 < sigma <= max_sigma(height, width):
        limit = max_sigma(height, width)
        raise ValueError(f"sigma: {sigma} is outside (0, {limit:g}], where the kernel's radius fits the image")
    if channels > _MAX_CHANNELS:
        raise ValueError(f"images: {channels} channels, OpenCV takes {_MAX_CHANNELS}; blur them in parts")
    radius = int(4 * sigma + 0.5)
    size = 2 * radius + 1
    blurred = np.empty_like(images, order="C")
    step = max(1, min(_STRIP_IMAGES, _STRIP_BYTES // (height * width * channels)))
    for start in range(0, n, step):
        # Images are joined side by side into one wide picture, because OpenCV is fast at long rows. Left and right
        # edges are mirrored here, so that no image comes within a radius of another; OpenCV mirrors top and bottom.
        column = images[start : start + step].reshape(-1, width, channels)
        padded = cv2.copyMakeBorder(column, 0, 0, radius, radius, cv2.BORDER_REFLECT)
        strip = padded.reshape(-1, height, width + 2 * radius, channels).transpose(1, 0, 2, 3)
        strip = _blur(np.asarray(strip, np.uint8).reshape(height, -1, channels), (size, size), sigma).reshape(
            strip.shape
        )
        part = blurred[start : start + step]
        part[...] = strip[:, :, radius : radius + width].transpose(1, 0, 2, 3)
        if mix_channels and channels > 1:
            part[...] = _blur(part.reshape(-1, channels), (size, 1), sigma).reshape(part.shape)
    return blurred


def _blur(picture: Images, size: tuple[int, int], sigma: float) -> Images:
    # The hint asks for the bit-exact fixed-point path, whatever the build would choose.
    hint = cv2.ALGO_HINT_ACCURATE
    return np.asarray(cv2.GaussianBlur(picture, size, sigma, borderType=cv2.BORDER_REFLECT, hint=hint), np.uint8)


def max_sigma(height: int, width: int) -> float:
    """The largest σ, in pixels, whose kernel radius ⌊4σ + ½⌋ does not exceed the image's smaller side.

    Source: our choice; beyond it the mirrored edge repeats and the picture is close to its mean.
    """
    return min(height, width) / 4
