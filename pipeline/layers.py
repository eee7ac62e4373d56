"""The layers that networks are built of, where torch's own would be slow or do not exist."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad

from pipeline.recipes import Convolution, Network

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class Dropout(nn.Dropout):
    """Dropout whose mask costs 16 random bits a value on CPU, a quarter of what torch draws.

    The probability is rounded to a multiple of 2⁻¹⁶. Values lie in memory without gaps, in any order.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Values of any shape, in training some of them 0 and the others larger by 1 / (1 - p)."""
        if not self.training or values.device.type != "cpu":
            return super().forward(values)
        words = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        # Compared as float32: torch computes with 1.0 and 0.0 several times as fast as with bools.
        kept = words.view(torch.int16)[: values.numel()].float().ge_(round(self.p * 2**16) - 2**15)
        return values * kept.mul_(1 / (1 - self.p)).as_strided(values.shape, values.stride())


class Block(nn.Module):
    """A convolution and what follows it: BatchNorm, activation, max pooling and, after a pool only, dropout.

    Pooling comes before the activation, which is monotone: the values are the same, and fewer.

    Source: paper section IV and Table I; the order follows the authors' code.
    """

    def __init__(self, network: Network, convolution: Convolution, channels: int) -> None:
        """Untrained layers.

        Args:
            network: Activation, BatchNorm and dropout.
            convolution: This convolution.
            channels: Of its input.
        """
        super().__init__()
        filters, stride, padding = convolution.filters, convolution.stride, convolution.padding
        self.conv = nn.Conv2d(channels, filters, convolution.kernel, stride=stride, padding=padding)
        self.norm = nn.BatchNorm2d(filters) if network.batch_norm else None
        self.activation = ACTIVATIONS[network.activation]()
        self.pool = convolution.pool
        self.dropout = Dropout(network.dropout) if self.pool > 1 and network.dropout > 0 else None

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) → (N, filters, H', W')."""
        maps: Tensor = self.conv(images)
        if self.norm is not None:
            maps = self.norm(maps)
        if self.pool > 1:
            maps = max_pool2d(maps, self.pool)
        return self._activated(maps)

    def _activated(self, maps: Tensor) -> Tensor:
        maps = self.activation(maps)
        if self.dropout is not None:
            maps = self.dropout(maps)
        return maps


class WindowBlock(Block):
    """A `Block` for grey images whose pooling windows cover the whole output, fast where that is small.

    There, passes over the large output of the convolution cost more than its arithmetic. Here it is one matrix product,
    of filters shifted to each place in the pooling window, with windows of the images that are cut once for all epochs.
    Its maps lie one after the other: pooling is the maximum of whole maps, every pass runs along memory, and only what
    is pooled is normalized. (A maximum stays one under a growing function, and signs make the scale of BatchNorm grow.)
    Up to rounding the values, gradients and statistics are those of `Block`.
    """

    @staticmethod
    def fits(convolution: Convolution, shape: tuple[int, int, int]) -> bool:
        """Whether it can take the place of a `Block` for images of `shape` (H, W, C)."""
        height, width, channels = shape
        sides = (convolution.output_side(height), convolution.output_side(width))
        return channels == 1 and convolution.pool > 1 and all(side % convolution.pool == 0 for side in sides)

    def cut(self, images: Tensor) -> Tensor:
        """(N, 1, H, W) → (N, H', W', side²): what decides each value after pooling, in the type that is computed in."""
        if torch.is_autocast_enabled(images.device.type):
            images = images.to(torch.get_autocast_dtype(images.device.type))
        stride, padding = self.conv.stride[0], int(self.conv.padding[0])
        side, step = self.conv.kernel_size[0] + stride * (self.pool - 1), stride * self.pool
        if padding:  # pad copies even where it adds nothing
            images = pad(images, (padding,) * 4)
        return images.squeeze(1).unfold(1, side, step).unfold(2, side, step).flatten(3)

    def forward(self, windows: Tensor) -> Tensor:
        """(N, H', W', side²) → (N, filters, H', W')."""
        weight: Tensor = self.conv.weight
        bias: Any = self.conv.bias
        norm: Any = self.norm
        pooled: Tensor
        if norm is None:
            pooled = self._convolved(windows, weight).amax(0) + bias.view(-1, 1)
        elif not norm.training:
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            maps = self._convolved(windows, weight * scale.view(-1, 1, 1, 1))
            pooled = maps.amax(0) + (norm.bias + (bias - norm.running_mean) * scale).view(-1, 1)
        else:
            sign = torch.where(norm.weight.detach() < 0, -1.0, 1.0)
            maps = self._convolved(windows, weight * sign.view(-1, 1, 1, 1))
            pooled, mean, variance = _PooledNorm.apply(maps, norm.weight * sign, norm.bias, norm.eps)
            with torch.no_grad():
                n = maps.numel() // len(mean)
                norm.running_mean.lerp_(mean * sign + bias, norm.momentum)
                norm.running_var.lerp_(variance * (n / (n - 1)), norm.momentum)
                norm.num_batches_tracked += 1
        return self._activated(pooled.view(-1, *windows.shape[:3]).transpose(0, 1))

    def _convolved(self, windows: Tensor, weight: Tensor) -> Tensor:
        """The convolution at every place of the pooling windows: float32 (pool², filters, N·H'·W')."""
        stride, last = self.conv.stride[0], self.pool - 1
        shifted = [
            pad(weight, (stride * x, stride * (last - x), stride * y, stride * (last - y)))
            for y in range(self.pool)
            for x in range(self.pool)
        ]
        maps = torch.cat(shifted).flatten(1) @ windows.flatten(0, 2).T
        return maps.float().view(len(shifted), len(weight), -1)


class _PooledNorm(torch.autograd.Function):
    """BatchNorm of maps float32 (phases, C, N), its scale ≥ 0, and the maximum over phases: (C, N), mean and variance.

    What is not the maximum is never normalized, and the gradient has a closed form. Of equal maxima the first gets the
    gradient, as in max_pool2d.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, scale: Tensor, shift: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        mean = maps.mean((0, 2))
        variance = maps.square().mean((0, 2)) - mean.square()
        inverse = torch.rsqrt(variance + epsilon)
        maxima = maps.amax(0)
        normalized = (maxima - mean.view(-1, 1)) * inverse.view(-1, 1)
        ctx.save_for_backward(maps, maxima, normalized, mean, inverse, scale)
        ctx.mark_non_differentiable(mean, variance)
        return normalized * scale.view(-1, 1) + shift.view(-1, 1), mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        maps, maxima, normalized, mean, inverse, scale = ctx.saved_tensors
        n = maps.numel() // len(mean)
        of_scale, of_shift = (gradient * normalized).sum(1), gradient.sum(1)
        factor = scale * inverse
        # What reaches every value through the mean and the variance, a linear function of the value.
        slope = -factor * inverse * of_scale / n
        of_maps = maps * slope.view(-1, 1)
        of_maps -= (mean * slope + factor * of_shift / n).view(-1, 1)
        left = gradient * factor.view(-1, 1)
        is_maximum = torch.empty_like(left)
        for of_map, values in zip(of_maps, maps, strict=True):
            # 1.0 or 0.0: torch computes with these several times as fast as with bools.
            torch.eq(values, maxima, out=is_maximum)
            of_map.addcmul_(left, is_maximum)
            left.addcmul_(left, is_maximum, value=-1)
        return of_maps, of_scale, of_shift, None


class Whitening(nn.Conv2d):
    """2×2 patches as uncorrelated values of equal variance, each twice, with either sign; not trained.

    Source: Jordan, "94% on CIFAR-10 in 3.29 Seconds" (arXiv 2404.00498); its bias is trained.
    """

    # Keeps directions that hardly vary from being blown up.
    EPSILON = 5e-4

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 8 * channels, kernel_size=2)
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Compute the weights.

        Args:
            images: float32 (N, C, H, W), standardized.
        """
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 4 * images.shape[1])
        variances, directions = torch.linalg.eigh((patches.T @ patches / len(patches)).double().cpu())
        whitened = (directions / (variances + self.EPSILON).sqrt()).T.flip(0).float()
        self.weight.copy_(torch.cat([whitened, -whitened]).reshape(self.weight.shape))
        assert self.bias is not None
        self.bias.zero_()


class Group(nn.Module):
    """Two 3×3 convolutions with BatchNorm and activation, the first pooled to half the side.

    Convolutions start as the identity where they can, BatchNorm has no scale of its own and forgets fast: what makes
    few epochs enough.

    Source: as `Whitening`.
    """

    def __init__(self, channels: int, width: int, activation: Literal["relu", "tanh", "gelu"]) -> None:
        super().__init__()
        self.conv1, self.norm1 = self._conv(channels, width), self._norm(width)
        self.conv2, self.norm2 = self._conv(width, width), self._norm(width)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, maps: Tensor) -> Tensor:
        """(N, channels, H, W) → (N, width, H/2, W/2)."""
        maps = self.activation(self.norm1(max_pool2d(self.conv1(maps), 2)))
        return self.activation(self.norm2(self.conv2(maps)))  # type: ignore[no-any-return]

    @staticmethod
    def _conv(channels: int, width: int) -> nn.Conv2d:
        conv = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)
        with torch.no_grad():
            nn.init.dirac_(conv.weight[:channels])
        return conv

    @staticmethod
    def _norm(width: int) -> nn.BatchNorm2d:
        norm = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
        norm.weight.requires_grad_(False)
        return norm


class Scale(nn.Module):
    """Values times a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values: Tensor) -> Tensor:
        """Values of any shape."""
        return values * self.factor
