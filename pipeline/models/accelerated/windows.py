"""The first convolution of a network and the pooling after it, in one pass over raw images."""

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.models.accelerated.compiled import digest_of, load_library
from pipeline.models.layers import Block, Standardize
from pipeline.recipes.recipe import Convolution, Network

# Pooled values of an image, all filters together: half a MiB.
_MAX_POOLED = 2**17


@dataclass(frozen=True)
class Geometry:
    """What the C code is compiled for: grey images (height, width), a convolution and its pooling."""

    height: int
    width: int
    filters: int
    kernel: int
    stride: int
    padding: int
    pool: int

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of a feature map, before pooling."""
        height, width = ((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in self._sides)
        return height, width

    @property
    def pooled(self) -> tuple[int, int]:
        """Height and width of a feature map, after pooling."""
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


class WindowBlock(Block):
    """A `Block` for grey images that is faster on CPU, if its pooling windows cover all of the convolution's output.

    In `Block`, passes over the large output of the convolution cost more than its arithmetic. Here an image is
    standardized, convolved and pooled in the processor's cache, and only the pooled values are normalized; from the
    rest, BatchNorm only needs two sums. (An increasing function keeps a maximum; where BatchNorm's scale is negative,
    signs are turned to make it increasing.) Up to rounding, values, gradients and statistics are those of `Block`; they
    are float32 whatever the precision of other layers.
    """

    def __init__(self, network: Network, convolution: Convolution, shape: tuple[int, int, int]) -> None:
        """Build untrained layers.

        Args:
            network: Names activation, BatchNorm and dropout.
            convolution: This convolution.
            shape: (H, W, C) of the images.
        """
        super().__init__(network, convolution, shape[2])
        self._geometry = Geometry(*shape[:2], **convolution.model_dump())

    @staticmethod
    def fits(convolution: Convolution, shape: tuple[int, int, int]) -> bool:
        """Whether it can replace a `Block` for images of `shape` (H, W, C)."""
        sides = (convolution.output_side(shape[0]), convolution.output_side(shape[1]))
        # Larger or more filters, or more of their output, would not stay in registers, cache and on the stack. For
        # colour images it is no faster (measured).
        is_small = convolution.kernel <= 16 and convolution.filters <= 64 and shape[2] == 1
        if not (is_small and 1 < convolution.pool <= 15 and all(side % convolution.pool == 0 for side in sides)):
            return False
        return convolution.filters * sides[0] * sides[1] // convolution.pool**2 <= _MAX_POOLED

    def native_code(self, device: torch.device) -> str | None:
        """As `FirstLayer.native_code`."""
        library = _library(self._geometry) if device.type == "cpu" else None
        return None if library is None else digest_of(library)

    def of_raw(self, images: Tensor, standardize: Standardize, side: int | None = None) -> Tensor:
        """As `FirstLayer.of_raw`.

        Raises:
            ValueError: `images` are not uint8 images of the shape that the block was built for.
        """
        shape = self._geometry.height, self._geometry.width, 1
        if images.dtype != torch.uint8 or images.shape[1:] != shape:
            raise ValueError(
                f"images: {images.dtype} {tuple(images.shape)}, expected torch.uint8 (N, {', '.join(map(str, shape))})"
            )
        values = (images, standardize.mean, *self.parameters(), *self.buffers())
        is_on_cpu = all(value.device.type == "cpu" for value in values)
        is_float = all(value.dtype in (torch.uint8, torch.float32, torch.long) for value in values)
        if side is not None or not is_on_cpu or not is_float or _library(self._geometry) is None:
            return super().of_raw(images, standardize, side)
        norm, dropout = cast(Any, self.norm), cast(Any, self.dropout)
        means, factors = (values.expand(shape).contiguous() for values in (standardize.mean, standardize.inverse_std))
        gamma, beta = (None, None) if norm is None else (norm.weight, norm.bias)
        is_bounded = isinstance(self.activation, nn.ReLU)
        drops = is_bounded and dropout is not None and dropout.training
        if norm is not None and norm.training:
            norm.num_batches_tracked.add_(1)
        task = _Task(
            self._geometry,
            images=(images.contiguous(), means, factors),
            running=(None, None) if norm is None else (norm.running_mean, norm.running_var),
            is_batch=norm is not None and norm.training,
            epsilon=0.0 if norm is None else norm.eps,
            momentum=0.0 if norm is None else norm.momentum,
            floor=0.0 if is_bounded else -math.inf,
            drop_below=round(dropout.p * 2**16) if drops else 0,
            kept_factor=1 / (1 - dropout.p) if drops else 1.0,
            seed=int(torch.empty((), dtype=torch.int64).random_(-(2**63), None)) if drops else 0,
            # Within a Function, torch does not tell whether gradients will be needed.
            has_gradient=torch.is_grad_enabled(),
        )
        out: Tensor = _Window.apply(self.conv.weight, self.conv.bias, gamma, beta, task)
        if not is_bounded:
            out = self._activated(out)
        return out


@dataclass(frozen=True)
class _Task:
    """Arguments of the compiled code, apart from weights.

    Attributes:
        geometry: Geometry of the block.
        images: uint8 (N, H, W, 1); mean and inverse standard deviation, float32 (H, W, 1).
        running: BatchNorm's running mean and variance; None without it.
        is_batch: Whether BatchNorm uses the batch's statistics, and updates the running ones by a share of `momentum`.
        epsilon: BatchNorm's epsilon.
        momentum: BatchNorm's momentum.
        floor: Lower bound of the values.
        drop_below: Values whose 16-bit random number is below this are dropped.
        kept_factor: What the others are multiplied by.
        seed: Seed of those random numbers.
        has_gradient: Whether `backward` will be called.
    """

    geometry: Geometry
    images: tuple[Tensor, Tensor, Tensor]
    running: tuple[Tensor | None, Tensor | None]
    is_batch: bool
    epsilon: float
    momentum: float
    floor: float
    drop_below: int
    kept_factor: float
    seed: int
    has_gradient: bool


class _Window(torch.autograd.Function):
    """Filters (F, 1, k, k), bias, gamma and beta (F) or None → float32 (N, F, H', W')."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor, gamma: Tensor | None, beta: Tensor | None, task: _Task
    ) -> Tensor:
        geometry = task.geometry
        n, filters, (height, width) = len(task.images[0]), geometry.filters, geometry.out
        norms = torch.empty(filters, 4, dtype=torch.float64)
        maxima = torch.empty(n, filters, *geometry.pooled)
        out, maps, places = torch.empty_like(maxima), None, None
        if task.has_gradient:
            maps = torch.empty(n, filters, height, -(-width // 8) * 8)
            places = torch.empty_like(maxima, dtype=torch.uint8)
        given = (*task.images, weight.contiguous(), bias, gamma, beta, *task.running)
        norm = task.is_batch, task.epsilon, task.momentum
        tail = task.floor, task.drop_below, task.kept_factor, task.seed
        _call(geometry, "forward", n, *given, *norm, *tail, norms, maxima, out, maps, places)
        ctx.task, ctx.norms, ctx.maxima, ctx.maps, ctx.places = task, norms, maxima, maps, places
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        task: _Task = ctx.task
        geometry = task.geometry
        grad_weight = torch.empty(geometry.filters, 1, geometry.kernel, geometry.kernel)
        grad_bias, grad_gamma, grad_beta = torch.empty(3, geometry.filters)
        given = (*task.images, task.is_batch, task.floor, task.kept_factor)
        made = ctx.norms, ctx.maxima, out, ctx.maps, ctx.places
        of = gradients[0].contiguous(), grad_weight, grad_bias, grad_gamma, grad_beta
        _call(geometry, "backward", len(out), *given, *made, *of)
        if task.running[0] is None:
            return grad_weight, grad_bias, None, None, None
        # In training, BatchNorm subtracts again what a bias adds to a batch.
        return grad_weight, None if task.is_batch else grad_bias, grad_gamma, grad_beta, None


def first_block(network: Network, convolution: Convolution, shape: tuple[int, int, int]) -> Block:
    """Return the fastest `Block` for raw images of `shape` (H, W, C)."""
    if WindowBlock.fits(convolution, shape):
        return WindowBlock(network, convolution, shape)
    return Block(network, convolution, shape[2])


@cache
def _library(geometry: Geometry) -> ctypes.CDLL | None:
    """Return the code compiled for a geometry; None if it cannot be compiled."""
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
    """Call a function of windows.c with the addresses of tensors; other Python threads keep running meanwhile."""
    passed = [
        ctypes.c_double(value)
        if isinstance(value, float)
        else ctypes.c_int64(value)
        if isinstance(value, int)
        else ctypes.c_void_p(None if value is None else value.data_ptr())
        for value in arguments
    ]
    if getattr(_library(geometry), function)(ctypes.c_int64(n), *passed) == 1:
        raise MemoryError(f"{function} of {n} images")
