"""Argument checks of perturbation kernels, derived from each kernel's signature."""

import inspect
import math
import numbers
from collections.abc import Callable
from functools import partial, wraps
from types import NoneType
from typing import Any, Literal, ParamSpec, get_args, get_origin, get_type_hints

import numpy as np

from pipeline.data.arrays import Images

P = ParamSpec("P")
Choices = tuple[str | bool, ...]

_ARRAY = "give a numpy array of uint8, one image (H, W) or (H, W, C) or a batch (N, H, W, C), values 0-255"


def kernel(function: Callable[P, Images]) -> Callable[P, Images]:
    """Make a kernel refuse arguments that its signature does not allow, before it computes anything.

    Args:
        function: `(images, level, rng, *, options)`, pure. The level is annotated as `int` or `float`, the generator as
            `np.random.Generator`, or as that or None where it is not used, an option as `bool` or a `Literal`.

    Returns:
        The function with checks. It receives the level as Python's own int or float, and images as a batch
        (N, H, W, C). A single image, (H, W) or (H, W, C) with C = 1 or 3, is passed as a batch of one, and the result
        has the image's own shape. TypeError or ValueError, beginning with the argument's name, is raised for:
        images that are not a uint8 numpy array of one of these shapes with H, W, C of at least 1 (N may be 0);
        a level that is not a whole number (`int`), or not a finite one (`float`);
        a generator that is not an `np.random.Generator`;
        an option value that is not one of its choices.
    """
    hints, (images, level, rng, *_) = get_type_hints(function), inspect.signature(function).parameters
    checks: dict[str, Callable[[Any], Any]] = {
        images: partial(_to_images, images),
        level: partial(_to_whole if hints[level] is int else _to_finite, level),
        rng: partial(_to_generator, rng, NoneType not in get_args(hints[rng])),
        **{name: partial(_to_choice, name, choices) for name, choices in choices_of(function).items()},
    }
    in_order = list(checks.values())[:3]

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Images:
        values = [check(value) for check, value in zip(in_order, args, strict=False)]
        named = {name: checks[name](value) if name in checks else value for name, value in kwargs.items()}
        given = args[0] if args else kwargs[images]
        return function(*values, *args[3:], **named).reshape(given.shape)  # type: ignore[arg-type, attr-defined]

    return checked


def choices_of(function: Callable[..., Images]) -> dict[str, Choices]:
    """Option → values that it may have, the default first."""
    hints, choices = get_type_hints(function), dict[str, Choices]()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            values = get_args(hints[name]) if get_origin(hints[name]) is Literal else (False, True)
            choices[name] = (parameter.default, *(value for value in values if value != parameter.default))
    return choices


def _to_images(name: str, images: Any) -> Images:
    if not isinstance(images, np.ndarray) or isinstance(images, np.ma.MaskedArray):
        raise TypeError(f"{name}: of type {type(images).__name__}; {_ARRAY}")
    if images.dtype != np.uint8:
        way = "; for values in [0, 1]: `(255 * images).round().astype(np.uint8)`" if images.dtype.kind == "f" else ""
        raise TypeError(f"{name}: of type {images.dtype}; {_ARRAY}{way}")
    is_image = images.ndim == 2 or (images.ndim == 3 and images.shape[2] in (1, 3))
    batch = np.asarray(images)
    if is_image:
        batch = batch[None] if images.ndim == 3 else batch[None, ..., None]
    if batch.ndim != 4 or min(batch.shape[1:]) < 1:
        way = "; for grey images (N, H, W): `images[..., None]`" if images.ndim == 3 else ""
        raise ValueError(f"{name}: of shape {images.shape}; {_ARRAY}{way}")
    return batch


def _to_whole(name: str, level: Any) -> int:
    if not isinstance(level, numbers.Integral) or isinstance(level, bool):
        raise TypeError(f"{name}: {level!r} is of type {type(level).__name__}; give a whole number")
    return int(level)


def _to_finite(name: str, level: Any) -> float:
    if not isinstance(level, numbers.Real) or isinstance(level, bool):
        raise TypeError(f"{name}: {level!r} is of type {type(level).__name__}; give a number")
    try:
        number = float(level)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: {number} is not finite; give a number")
    return number


def _to_generator(name: str, is_drawing: bool, rng: Any) -> np.random.Generator | None:
    if not isinstance(rng, np.random.Generator) and (is_drawing or rng is not None):
        raise TypeError(f"{name}: of type {type(rng).__name__}; give a `numpy.random.default_rng(seed)`")
    return rng


def _to_choice(name: str, choices: Choices, value: Any) -> Any:
    # True is not 1: an option is stored, and must be read back as what it was.
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ValueError(f"{name}: {value!r} is unknown; choose from {', '.join(map(repr, choices))}")
    return value
