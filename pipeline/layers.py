"""The layers that networks are built of, where torch's own would be slow or do not exist."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d, pad

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

    def __init__(self, network: Network, convolution: Convolution, channels: int, pools_evenly: bool) -> None:
        """Untrained layers.

        Args:
            network: Activation, BatchNorm and dropout.
            convolution: This convolution.
            channels: Of its input.
            pools_evenly: Whether the pooling windows cover the convolution's whole output.
        """
        super().__init__()
        filters, stride, padding = convolution.filters, convolution.stride, convolution.padding
        self.conv = nn.Conv2d(channels, filters, convolution.kernel, stride=stride, padding=padding)
        self.norm = nn.BatchNorm2d(filters) if network.batch_norm else None
        self.activation = ACTIVATIONS[network.activation]()
        self.pool = convolution.pool
        self.dropout = Dropout(network.dropout) if self.pool > 1 and network.dropout > 0 else None
        self.convolves_in_phases = self.pool > 1 and channels == 1 and pools_evenly

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) → (N, filters, H', W')."""
        maps: Tensor
        if self.convolves_in_phases:
            maps = self._pooled_phases(images)
        else:
            maps = self.conv(images)
            if self.norm is not None:
                maps = self.norm(maps)
            if self.pool > 1:
                maps = max_pool2d(maps, self.pool)
        maps = self.activation(maps)
        if self.dropout is not None:
            maps = self.dropout(maps)
        return maps

    def _pooled_phases(self, images: Tensor) -> Tensor:
        """Convolution, BatchNorm and pooling of grey images, up to rounding as torch's three layers.

        On grey images, passes over the large output cost more than the convolution. Here one convolution has a filter
        for each place in the pooling window, and its maps are laid one after the other: pooling is the maximum of whole
        maps, every pass runs along memory, and only what is pooled is normalized. (A maximum stays one under a growing
        function, and signs make the scale of BatchNorm grow.)
        """
        weight: Tensor = self.conv.weight
        bias: Any = self.conv.bias
        norm: Any = self.norm
        pooled: Tensor
        if norm is None:
            maps, size = self._phases(images, weight)
            pooled = maps.amax(0) + bias.view(-1, 1)
        elif not norm.training:
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            maps, size = self._phases(images, weight * scale.view(-1, 1, 1, 1))
            pooled = maps.amax(0) + (norm.bias + (bias - norm.running_mean) * scale).view(-1, 1)
        else:
            sign = torch.where(norm.weight.detach() < 0, -1.0, 1.0)
            maps, size = self._phases(images, weight * sign.view(-1, 1, 1, 1))
            pooled, mean, variance = _PooledNorm.apply(maps, norm.weight * sign, norm.bias, norm.eps)
            with torch.no_grad():
                n = maps.numel() // len(mean)
                norm.running_mean.lerp_(mean * sign + bias, norm.momentum)
                norm.running_var.lerp_(variance * (n / (n - 1)), norm.momentum)
                norm.num_batches_tracked += 1
        return pooled.view(-1, len(images), *size).transpose(0, 1)

    def _phases(self, images: Tensor, weight: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The convolution at every place of the pooling windows: float32 (pool², filters, N·H'·W'), and (H', W')."""
        stride, last, padding = self.conv.stride[0], self.pool - 1, int(self.conv.padding[0])
        shifted = [
            pad(weight, (stride * x, stride * (last - x), stride * y, stride * (last - y)))
            for y in range(self.pool)
            for x in range(self.pool)
        ]
        # Flattened in between, so that torch does not take one channel for channels-last and answers filters first.
        filters = torch.cat(shifted).flatten(1).view(-1, 1, *shifted[0].shape[2:])
        images = images.flatten(1).view(images.shape)
        maps = conv2d(images, filters, stride=stride * self.pool, padding=padding)
        size = (maps.shape[2], maps.shape[3])
        return maps.transpose(0, 1).float().reshape(len(shifted), len(weight), -1), size


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
        for of_map, values in zip(of_maps, maps, strict=True):
            # 1.0 or 0.0: torch computes with these several times as fast as with bools.
            is_maximum = values.clone().eq_(maxima)
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
