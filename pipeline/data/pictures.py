"""Reads pictures from files: decoded strictly, rotated as EXIF says, and resized to what a study uses."""

import warnings
from collections.abc import Sequence
from io import BytesIO
from math import ceil, prod
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.data.arrays import Images
from pipeline.runtime.errors import PipelineError, is_outage
from pipeline.runtime.files import read_file

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".webp": "WEBP"}
# Pictures that users have to convert; files with any other suffix are not pictures.
OTHER_FORMATS = (
    ".apng", ".avif", ".bmp", ".dds", ".dib", ".fits", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jp2", ".jpf", ".jpx",
    ".jxl", ".mpo", ".pbm", ".pcx", ".pfm", ".pgm", ".pnm", ".ppm", ".psd", ".qoi", ".sgi", ".tga", ".tif", ".tiff",
)  # fmt: skip
# Larger than any file that cameras write.
_MAX_BYTES = 2**28
_CONVERT = "convert it to 8-bit grey or RGB"
# Pixels of a resized picture, before its centre is cut out; more only if it is at most 16 times as long as the result.
_MAX_RESIZED = 2**25


def read_picture(path: Path | str, channels: int) -> Images:
    """Read the pixels of a picture, as a viewer shows them.

    Args:
        path: A PNG, JPEG or WebP file.
        channels: 1: grey (ITU-R 601 luma of a coloured picture). 3: RGB (three equal channels of a grey picture).

    Returns:
        uint8 (H, W, C), rotated as its EXIF says.

    Raises:
        PipelineError: It is not such a file, is damaged or truncated, is animated, has 16 bits, CMYK colours or
            transparent pixels, or more pixels than Pillow considers harmless (89 million).
    """
    try:
        content = read_file(Path(path), _MAX_BYTES)
    except FileNotFoundError:
        raise PipelineError(f"{path}: a link to nowhere, or removed meanwhile") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # problems that Pillow can make up for
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(content), formats=tuple(set(FORMATS.values()))) as picture:
                problem = _find_problem(picture, content)
                pixels = None if problem else to_pixels(ImageOps.exif_transpose(picture), channels)
    except UnidentifiedImageError:
        raise PipelineError(f"{path}: no PNG, JPEG or WebP, whatever its name says") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow passes on what its decoders and parsers raise
        if is_outage(error):
            raise
        raise PipelineError(f"{path}: cannot be decoded: {' '.join(str(error).split())}") from None
    if pixels is None:
        raise PipelineError(f"{path}: {problem or 'has transparent pixels; give it a background'}")
    return pixels


def _find_problem(picture: Image.Image, content: bytes) -> str | None:
    if picture.format in ("PNG", "WEBP") and getattr(picture, "n_frames", 1) > 1:
        return "animated; give one of its pictures"
    # Pillow silently reads 16-bit colours as 8-bit. Byte 24 of a PNG is its bit depth.
    if picture.mode.startswith(("I", "F")) or (picture.format == "PNG" and content[24] == 16):
        return f"has 16 bits per value; {_CONVERT}"
    if picture.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        return f"has {picture.mode} colours; {_CONVERT}"
    return None


def to_pixels(picture: Image.Image, channels: int) -> Images | None:
    """Convert a Pillow picture to uint8 (H, W, C), C = 1 or 3; None if some of it is transparent."""
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        if np.asarray(picture.getchannel("A")).min() < 255:
            return None
    values = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    return values[..., None] if channels == 1 else values


def fit(image: Images, size: tuple[int, int]) -> Images:
    """Resize an image until it just covers `size`, and cut out its centre.

    Args:
        image: uint8 (H, W, C).
        size: Height and width of the result.

    Source: our choice: area averaging to shrink it, which keeps what a sensor with fewer pixels would see; bilinear
    interpolation to enlarge it.
    """
    if image.shape[:2] == size:
        return image
    scale = max(short / long for long, short in zip(image.shape, size, strict=False))
    # A long strip is cut first: enlarged as a whole, it would not fit into memory.
    n_times = max(16, _MAX_RESIZED // prod(size))
    most = [ceil(n_times * short / scale) for short in size]
    image = _centre(image, [min(long, n) for long, n in zip(image.shape, most, strict=False)])
    height, width = (max(short, round(long * scale)) for long, short in zip(image.shape, size, strict=False))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    resized = np.asarray(cv2.resize(image, (width, height), interpolation=how), np.uint8)
    return _centre(resized.reshape(height, width, -1), size)


def _centre(image: Images, size: Sequence[int]) -> Images:
    top, left = ((long - short) // 2 for long, short in zip(image.shape, size, strict=False))
    return image[top : top + size[0], left : left + size[1]]
