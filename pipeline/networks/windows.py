"""The first convolution of a network and the pooling after it, in one pass over raw images."""

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_unshuffle

from pipeline.networks.compiled import load_library
from pipeline.networks.layers import Block
from pipeline.recipes import Convolution, Network


@dataclass(frozen=True)
class Geometry:
    """What the compiled code is compiled for: grey images (height, width), a convolution and its pooling."""

    height: int
    width: int
    filters: int
    kernel: int
    stride: int
    padding: int
    pool: int

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of a map, before pooling."""
        height, width = ((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in self._sides)
        return height, width

    @property
    def pooled(self) -> tuple[int, int]:
        """Height and width of a map, after pooling."""
        height, width = self.out
        return height // self.pool, width // self.pool

    @property
    def phase(self) -> tuple[int, int]:
        """Height and width of every stride-th pixel, padding included."""
        height, width = (-(-(side + 2 * self.padding) // self.stride) for side in self._sides)
        return height, width

    @property
    def _sides(self) -> tuple[int, int]:
        return self.height, self.width

    def pack(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W, 1) → (N, stride², phase height, phase width): neighbours lie a stride apart."""
        (height, width), before = self.phase, self.padding
        after_x, after_y = width * self.stride - self.width - before, height * self.stride - self.height - before
        padded = pad(images.permute(0, 3, 1, 2), (before, after_x, before, after_y))
        return pixel_unshuffle(padded, self.stride).contiguous()


class WindowBlock(Block):
    """A `Block` for grey images, fast on CPU where its pooling windows cover all that the convolution gives.

    There, passes over the large output of the convolution cost more than its arithmetic. Here an image is standardized,
    convolved and pooled in the cache, only what is pooled is normalized, and what BatchNorm needs of the rest are two
    sums. (A maximum stays one under a growing function, and signs make the scale of BatchNorm grow.) Up to rounding the
    values, gradients and statistics are those of `Block`; they are float32 whatever the precision of other layers.

    Attributes:
        geometry: Blocks with equal ones take images that are packed alike.
    """

    def __init__(self, network: Network, convolution: Convolution, shape: tuple[int, int, int]) -> None:
        """Untrained layers.

        Args:
            network: Activation, BatchNorm and dropout.
            convolution: This convolution.
            shape: (H, W, C) of the images.
        """
        super().__init__(network, convolution, shape[2])
        self.geometry = Geometry(*shape[:2], **convolution.model_dump())

    @staticmethod
    def fits(convolution: Convolution, shape: tuple[int, int, int]) -> bool:
        """Whether it can take the place of a `Block` for images of `shape` (H, W, C)."""
        sides = (convolution.output_side(shape[0]), convolution.output_side(shape[1]))
        # Larger filters, and more of them, would not stay in registers and cache. Colours: no faster (measured).
        is_small = convolution.kernel <= 16 and convolution.filters <= 64 and shape[2] == 1
        return is_small and 1 < convolution.pool <= 15 and all(side % convolution.pool == 0 for side in sides)

    def takes_packed(self, device: torch.device) -> bool:
        """Whether `of_packed` can be called there."""
        return device.type == "cpu" and _library(self.geometry) is not None

    def of_packed(self, packed: Tensor, mean: Tensor, inverse_std: Tensor) -> Tensor:
        """The block applied to (images - mean) · inverse_std.

        Args:
            packed: uint8, images packed by `geometry`.
            mean: float32, broadcastable to (H, W, 1).
            inverse_std: Likewise.

        Returns:
            float32 (N, filters, H', W').
        """
        geometry, norm, bias = self.geometry, cast(Any, self.norm), self.conv.bias
        shape, weight = (geometry.height, geometry.width, 1), self.conv.weight
        images = packed, mean.expand(shape).contiguous(), inverse_std.expand(shape).contiguous()
        tail, left = self._tail(len(packed))
        # Within a Function, torch does not say whether anyone will ask for gradients.
        fixed = (*images, geometry, tail, torch.is_grad_enabled())
        if norm is None:
            out, *_ = _Window.apply(weight, bias, None, None, None, None, 0.0, *fixed)
        elif norm.training:
            out, centre, variance = _Window.apply(weight, None, norm.weight, norm.bias, None, None, norm.eps, *fixed)
            n = len(packed) * geometry.out[0] * geometry.out[1]
            with torch.no_grad():
                norm.running_mean.lerp_((centre + bias).float(), norm.momentum)
                norm.running_var.lerp_((variance * (n / (n - 1))).float(), norm.momentum)
                norm.num_batches_tracked += 1
        else:
            statistics = norm.running_mean, norm.running_var
            out, *_ = _Window.apply(weight, bias, norm.weight, norm.bias, *statistics, norm.eps, *fixed)
        for layer in left:
            out = layer(out)
        return cast(Tensor, out)

    def _tail(self, n: int) -> tuple["_Tail", list[nn.Module]]:
        """What follows the normalization of n images: what compiled code does, and the layers that it does not."""
        activation, dropout = self.activation, self.dropout
        if not isinstance(activation, nn.ReLU):
            return _Tail(), [activation, *([] if dropout is None else [dropout])]
        if dropout is None or not dropout.training:
            return _Tail(floor=0.0), []
        words, least = dropout.draw(n * self.geometry.filters * self.geometry.pooled[0] * self.geometry.pooled[1])
        return _Tail(0.0, words, float(least), 1 / (1 - dropout.p)), []


@dataclass(frozen=True)
class _Tail:
    """Values are at least `floor`; with words, those whose word is below `least` are 0, the others times `factor`."""

    floor: float = -math.inf
    words: Tensor | None = None
    least: float = 0.0
    factor: float = 1.0


class _Window(torch.autograd.Function):
    """Filters (F, 1, k, k) and what BatchNorm needs → float32 (N, F, H', W'), mean and variance float64 (F).

    BatchNorm scales by a factor that is made positive by turning filters around, so that it can follow the pooling.
    Mean and variance are those of the batch, without `bias`, unless given; then they are not returned.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        epsilon: float,
        packed: Tensor,
        image_mean: Tensor,
        inverse_std: Tensor,
        geometry: Geometry,
        tail: _Tail,
        has_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, filters, (height, width) = len(packed), geometry.filters, geometry.out
        images = packed, image_mean, inverse_std
        sign = torch.ones(filters) if gamma is None else torch.where(gamma < 0, -1.0, 1.0)
        maxima = torch.empty(n, filters, *geometry.pooled)
        moments = torch.zeros(2, filters, dtype=torch.float64)
        maps = places = None
        if has_gradient:
            maps = torch.empty(n, filters, height, -(-width // 8) * 8)
            places = torch.empty(maxima.shape, dtype=torch.uint8)
        turned = weight.contiguous() * sign.view(-1, 1, 1, 1)
        _call(geometry, "convolve_and_pool", n, *images, turned, maxima, moments, maps, places)
        is_of_batch = gamma is not None and mean is None
        if is_of_batch:
            mean, mean_square = moments / (n * height * width)
            variance, mean = mean_square - mean.square(), mean * sign
        centre = torch.zeros(filters) if mean is None else mean
        if bias is not None:
            centre = centre - bias
        inverse = torch.ones(filters) if variance is None else torch.rsqrt(variance + epsilon)
        scale = inverse if gamma is None else inverse * gamma
        shift = -centre * scale if beta is None else beta - centre * scale
        out, single = torch.empty_like(maxima), (scale * sign).float()
        last = (tail.floor, tail.words, tail.least, tail.factor, out)
        _call(geometry, "scale_maxima", n, maxima, single, shift.float(), *last)
        ctx.save_for_backward(*images, maps, places, maxima, out, sign, centre, inverse, scale, gamma)
        ctx.geometry, ctx.tail, ctx.is_of_batch = geometry, tail, is_of_batch
        if mean is None or variance is None or not is_of_batch:
            mean, variance = torch.empty(0), torch.empty(0)
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *images, maps, places, maxima, out, sign, centre, inverse, scale, gamma = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        n, filters = len(out), geometry.filters
        of_scaled, (of_shift, of_scale) = torch.empty_like(out), torch.zeros(2, filters, dtype=torch.float64)
        inputs = (maxima, ctx.tail.floor, ctx.tail.factor, out, gradients[0].contiguous())
        _call(geometry, "scale_gradient", n, *inputs, of_scaled, of_shift, of_scale)
        of_scale = of_scale * sign - centre * of_shift
        of_values = torch.zeros(2, filters)
        if ctx.is_of_batch:
            # Every value y has a share of the mean and of the mean square, by which the variance is computed.
            of_variance = of_scale * gamma * inverse**3 * -0.5
            of_mean = -scale * of_shift - 2 * centre * of_variance
            n_values = n * geometry.out[0] * geometry.out[1]
            of_values = (torch.stack([of_mean * sign, 2 * of_variance]) / n_values).float()
        of_weight = torch.empty(filters, 1, geometry.kernel, geometry.kernel)
        single = (scale * sign).float()
        _call(geometry, "filter_gradient", n, *images, maps, places, of_scaled, single, of_values, of_weight)
        of_weight *= sign.view(-1, 1, 1, 1)
        of_bias = None if ctx.is_of_batch else (scale * of_shift).float()
        of_norm = (None, None) if gamma is None else ((of_scale * inverse).float(), of_shift.float())
        return of_weight, of_bias, *of_norm, *(None,) * 9


@cache
def _library(geometry: Geometry) -> ctypes.CDLL | None:
    """Code compiled for a geometry; None where there is no compiler."""
    macros = {
        "FILTERS": geometry.filters,
        "HEIGHT": geometry.height,
        "KERNEL": geometry.kernel,
        "OUT_HEIGHT": geometry.out[0],
        "OUT_WIDTH": geometry.out[1],
        "PADDING": geometry.padding,
        "PHASE_HEIGHT": geometry.phase[0],
        "PHASE_WIDTH": geometry.phase[1],
        "POOL": geometry.pool,
        "STRIDE": geometry.stride,
        "WIDTH": geometry.width,
    }
    return load_library("windows", tuple(macros.items()))


def _call(geometry: Geometry, function: str, n: int, *arguments: Tensor | float | None) -> None:
    """Call a function of windows.c, with addresses in place of tensors; other threads of Python go on meanwhile."""
    passed = [
        ctypes.c_float(value)
        if isinstance(value, float)
        else ctypes.c_void_p(None if value is None else value.data_ptr())
        for value in arguments
    ]
    if getattr(_library(geometry), function)(ctypes.c_int64(n), *passed) == 1:
        raise MemoryError(f"{function} of {n} images")
