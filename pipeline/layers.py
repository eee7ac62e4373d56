"""The layers that networks are built of, where torch's own would be slow or do not exist."""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad

from pipeline.recipes import Convolution, Network
from pipeline.winograd import WinogradConv2d

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
        self.conv = WinogradConv2d(channels, filters, convolution.kernel, stride=stride, padding=padding)
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
        norm: Any = self.norm
        pooled: Tensor
        if norm is None or not norm.training:
            weight, bias = self._folded()
            pooled = self._convolved(windows, weight).amax(0) + bias.view(-1, 1)
        else:
            sign = torch.where(norm.weight.detach() < 0, -1.0, 1.0)
            maps = self._convolved(windows, self.conv.weight * sign.view(-1, 1, 1, 1))
            pooled, mean, variance = _PooledNorm.apply(maps, norm.weight * sign, norm.bias, norm.eps)
            with torch.no_grad():
                n = maps.numel() // len(mean)
                norm.running_mean.lerp_(mean * sign + cast(Tensor, self.conv.bias), norm.momentum)
                norm.running_var.lerp_(variance * (n / (n - 1)), norm.momentum)
                norm.num_batches_tracked += 1
        return self._activated(pooled.view(-1, *windows.shape[:3]).transpose(0, 1))

    def _convolved(self, windows: Tensor, weight: Tensor) -> Tensor:
        """The convolution at every place of the pooling windows: float32 (pool², filters, N·H'·W')."""
        maps = self._shifted(weight).flatten(0, 2).flatten(1) @ windows.flatten(0, 2).T
        return maps.float().view(self.pool**2, len(weight), -1)

    def _shifted(self, weight: Tensor) -> Tensor:
        """Filters (F, 1, k, k) at every place of a pooling window: (pool, pool, F, side, side), 0 elsewhere."""
        shifted: Tensor = _Shifted.apply(weight, self.pool, self.conv.stride[0])
        return shifted

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution with BatchNorm's running statistics in them."""
        weight, norm, bias = self.conv.weight, self.norm, cast(Tensor, self.conv.bias)
        if norm is None:
            return weight, bias
        mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        scale = norm.weight * torch.rsqrt(variance + norm.eps)
        return weight * scale.view(-1, 1, 1, 1), norm.bias + (bias - mean) * scale


class PlacedBlock(WindowBlock):
    """A trained `WindowBlock` that takes windows of raw images, and gives what the `WindowBlock` gives up to rounding.

    Every place has filters of its own, with the standardization of its pixels and BatchNorm in them. So windows are
    cut once for all models that look at an image, whatever they were trained on.

    Attributes:
        geometry: Blocks with equal ones cut images in the same way.
    """

    weight: Tensor
    shift: Tensor
    bias: Tensor

    @torch.no_grad()
    def __init__(self, block: WindowBlock, mean: Tensor, inverse_std: Tensor) -> None:
        """Filters of every place.

        Args:
            block: Trained.
            mean: float32 (H, W, 1), on the scale 0-255; subtracted from images before `block`.
            inverse_std: Likewise; multiplied with what is left.
        """
        nn.Module.__init__(self)
        self.conv, self.norm, self.pool, self.dropout = block.conv, None, block.pool, None
        self.activation = block.activation
        self.geometry = (self.conv.kernel_size, self.conv.stride, self.conv.padding, self.pool)
        # Padding is 0 after standardization: cut pads both with 0, too.
        means, factors = (
            block.cut(values.double().permute(2, 0, 1).unsqueeze(0)).flatten(0, 2) for values in (mean, inverse_std)
        )
        weight, bias = block._folded()
        shifted = block._shifted(weight).flatten(0, 2).flatten(1)
        placed = factors.unsqueeze(1) * shifted
        self.register_buffer("weight", placed.float())
        self.register_buffer("shift", -(placed @ means.unsqueeze(2)).float())
        self.register_buffer("bias", bias.view(-1, 1).clone())

    def forward(self, windows: Tensor) -> Tensor:
        """(N, H', W', side²), of values 0-255 → (N, filters, H', W')."""
        n, height, width, _ = windows.shape
        maps = torch.baddbmm(self.shift, self.weight, windows.flatten(1, 2).permute(1, 2, 0))
        pooled = maps.float().view(len(maps), self.pool**2, -1, n).amax(1) + self.bias
        # (filters, H'·W', N): images last, as the next layer's product reads them without a copy.
        maps = self._activated(pooled.transpose(0, 1).contiguous())
        return maps.view(-1, height, width, n).permute(3, 0, 1, 2)


class _Shifted(torch.autograd.Function):
    """Filters (F, 1, k, k) → (pool, pool, F, side, side), each at every place in the pooling window."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, pool: int, stride: int) -> Tensor:
        n_filters, _, kernel, _ = weight.shape
        side = kernel + stride * (pool - 1)
        shifted = weight.new_zeros(pool, pool, n_filters, side, side)
        along_y, along_x, *inner = shifted.stride()
        ctx.view = (pool, pool, n_filters, kernel, kernel), (along_y + stride * side, along_x + stride, *inner)
        shifted.as_strided(*ctx.view).copy_(weight.squeeze(1))
        return shifted

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].contiguous().as_strided(*ctx.view).sum((0, 1)).unsqueeze(1), None, None


class _PooledNorm(torch.autograd.Function):
    """BatchNorm of maps float32 (phases, C, N), its scale ≥ 0, and the maximum over phases: (C, N), mean and variance.

    What is not the maximum is never normalized, and the gradient has a closed form. Of equal maxima the first gets the
    gradient, as in max_pool2d.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, scale: Tensor, shift: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        mean = maps.mean((0, 2))
        # A row's norm: the square of every value is never written.
        mean_square = torch.linalg.vector_norm(maps, dim=2).square().sum(0) / (maps.numel() // len(mean))
        variance = mean_square - mean.square()
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
        offset = mean * slope + factor * of_shift / n
        of_maps = torch.empty_like(maps)
        left = gradient * factor.view(-1, 1)
        part = torch.empty_like(left)
        for of_map, values in zip(of_maps, maps, strict=True):
            # 1.0 or 0.0: torch computes with these several times as fast as with bools.
            torch.eq(values, maxima, out=part)
            part.mul_(left)
            left.sub_(part)
            torch.addcmul(part.sub_(offset.view(-1, 1)), values, slope.view(-1, 1), out=of_map)
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
