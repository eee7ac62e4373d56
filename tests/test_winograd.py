"""Winograd's convolution is the plain one, and takes its place only where it is faster."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from pipeline.models.accelerated import winograd
from pipeline.models.accelerated.winograd import WinogradConv2d


def make_tensors(n: int, channels: int, filters: int, height: int, width: int) -> list[Tensor]:
    """Images, weight, bias and a gradient of the result, all float64 and channels last."""
    generator = torch.Generator().manual_seed(n)
    shapes = (n, channels, height, width), (filters, channels, 3, 3), (filters,), (n, filters, height, width)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [one.contiguous(memory_format=torch.channels_last) if one.ndim == 4 else one for one in tensors]


@pytest.mark.parametrize(
    "sizes", [(3, 5, 7, 8, 12), (1, 1, 1, 4, 4), (2, 6, 4, 16, 4), (7, 2, 9, 4, 4)], ids="{}".format
)
def test_values_and_gradients_are_those_of_a_plain_convolution(sizes: tuple[int, int, int, int, int]) -> None:
    *inputs, gradient = make_tensors(*sizes)
    results = []
    for convolve in (partial(conv2d, padding=1), winograd._Winograd.apply):
        own = [one.clone().requires_grad_() for one in inputs]
        maps = convolve(*own)
        maps.backward(gradient)
        results.append([maps, *(one.grad for one in own)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_images_need_no_gradient() -> None:
    images, weight, bias, gradient = make_tensors(2, 3, 4, 8, 8)
    winograd._Winograd.apply(images, weight.requires_grad_(), bias.requires_grad_()).backward(gradient)
    assert images.grad is None
    assert weight.grad is not None


def layer(filters: int = 96, kernel_size: int = 3, padding: int = 1, **options: Any) -> WinogradConv2d:
    torch.manual_seed(1)
    return WinogradConv2d(96, filters, kernel_size, padding=padding, **options)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of images whenever Winograd's convolution is used."""
    sizes: list[int] = []
    apply = winograd._Winograd.apply

    def count(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        sizes.append(len(images))
        result: Tensor = apply(images, weight, bias)
        return result

    monkeypatch.setattr(winograd._Winograd, "apply", count)
    return sizes


def check(convolution: nn.Conv2d, images: Tensor) -> None:
    """That the result is the plain one."""
    expected = nn.Conv2d.forward(convolution, images)
    torch.testing.assert_close(convolution(images), expected, rtol=1e-4, atol=1e-4)


IMAGES = torch.randn(2, 96, 8, 8)


def test_it_is_used_with_many_channels(seen: list[int]) -> None:
    check(layer(), IMAGES)
    check(layer(bias=False), IMAGES)
    assert seen == [2, 2]


@pytest.mark.parametrize(
    ("convolution", "images"),
    [
        (layer(filters=32), IMAGES),
        (layer(kernel_size=5, padding=2), IMAGES),
        (layer(stride=2), IMAGES),
        (layer(padding=0), IMAGES),
        (layer(groups=2), IMAGES),
        (layer(), IMAGES[..., :7]),
        (layer().double(), IMAGES.double()),
    ],
    ids=["few-channels", "5x5", "stride", "padding", "groups", "odd-size", "float64"],
)
def test_elsewhere_it_is_not(convolution: nn.Conv2d, images: Tensor, seen: list[int]) -> None:
    check(convolution, images)
    assert seen == []


def test_in_bfloat16_it_is_not_for_that_is_too_coarse(seen: list[int]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        check(layer(), IMAGES)
    assert seen == []


def test_memory_is_bounded_by_convolving_a_few_images_at_a_time(
    seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    convolution, images = layer(), torch.randn(7, 96, 8, 8).contiguous(memory_format=torch.channels_last)
    whole = convolution(images)
    monkeypatch.setattr(winograd, "_MAX_BYTES", 3 * 4 * 36 * 4 * 96)
    parts = convolution(images)
    assert seen == [7, 3, 3, 1]
    assert parts.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(parts, whole)
