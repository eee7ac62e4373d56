"""Layers that networks are built of, where torch's own are slow or do not exist."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from pipeline.models.accelerated.winograd import WinogradConv2d
from pipeline.recipes.recipe import Convolution, Network

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class Standardize(nn.Module):
    """uint8 (N, H, W, C), 0-255 → float32 (N, C, H, W): minus the mean, over the standard deviation.

    Attributes:
        mean: float32, broadcastable to (H, W, C), on the scale 0-255.
        inverse_std: Likewise; 0 where the training set never varies, so that those positions become 0.
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, mean: NDArray[np.float64], std: NDArray[np.float64]) -> None:
        super().__init__()
        inverse = np.divide(1, std, out=np.zeros_like(std), where=std > 0)
        self.register_buffer("mean", torch.from_numpy(mean.astype(np.float32)))
        self.register_buffer("inverse_std", torch.from_numpy(inverse.astype(np.float32)))

    def forward(self, images: Tensor) -> Tensor:
        """Standardize images; the channels-last memory layout of the input is kept."""
        return images.float().sub_(self.mean).mul_(self.inverse_std).permute(0, 3, 1, 2)


class FirstLayer(nn.Module):
    """A layer that can take raw images: it has them standardized, and scaled if that is asked for."""

    def of_raw(self, images: Tensor, standardize: Standardize, side: int | None = None) -> Tensor:
        """Apply the layer to raw images after standardizing them.

        Args:
            images: uint8 (N, H, W, C).
            standardize: Standardization, done first.
            side: Height and width that images are scaled to next; None: not scaled.
        """
        values = standardize(images)
        if side is not None:
            values = interpolate(values, size=(side, side), mode="bilinear")
        return self(values)  # type: ignore[no-any-return]

    def load_start(self, following: nn.Module) -> None:
        """Load the weights that its description names, if it names any.

        Args:
            following: The next layer.
        """

    def native_code(self, device: torch.device) -> str | None:
        """Return the digest of our compiled code that `of_raw` runs on a device; None if it only runs torch's code."""
        return None


class Block(FirstLayer):
    """A convolution and what follows it: BatchNorm, activation, max pooling and, only after pooling, dropout.

    Pooling is computed before the activation, which is monotone: results are the same, from fewer values.

    Source: paper section IV and Table I; the order follows the authors' code.
    """

    def __init__(self, network: Network, convolution: Convolution, channels: int) -> None:
        """Build untrained layers.

        Args:
            network: Names activation, BatchNorm and dropout.
            convolution: This convolution.
            channels: Channels of its input.
        """
        super().__init__()
        filters, stride, padding = convolution.filters, convolution.stride, convolution.padding
        self.conv = WinogradConv2d(channels, filters, convolution.kernel, stride=stride, padding=padding)
        self.norm = nn.BatchNorm2d(filters) if network.batch_norm else None
        self.activation = ACTIVATIONS[network.activation]()
        self.pool = convolution.pool
        self.dropout = nn.Dropout(network.dropout) if self.pool > 1 and network.dropout > 0 else None

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


class Flatten(FirstLayer, nn.Flatten):
    """Flattens feature maps to vectors; the first layer of a network without convolutions."""


class Patches(FirstLayer, nn.Conv2d):
    """Filters for 2×2 patches, eight for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 8 * channels, kernel_size=2)

    @property
    def learns_fast(self) -> tuple[Tensor | None, ...]:
        """Weights that have a higher learning rate than the rest."""
        return (self.bias,)


class Whitening(Patches):
    """Whitens 2×2 patches: uncorrelated values of equal variance, each with both signs. The filters are not trained.

    Source: Jordan, "94% on CIFAR-10 in 3.29 Seconds" (arXiv 2404.00498); its bias is trained.
    """

    # Keeps directions with little variance from being amplified.
    EPSILON = 5e-4

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
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

    Three choices make few epochs enough: convolutions start as the identity where they can, BatchNorm has no learned
    scale, and its running statistics adapt fast.

    Source: as `Whitening`.
    """

    def __init__(self, channels: int, width: int, activation: Literal["relu", "tanh", "gelu"]) -> None:
        super().__init__()
        self.conv1, self.norm1 = self._conv(channels, width), self._norm(width)
        self.conv2, self.norm2 = self._conv(width, width), self._norm(width)
        self.activation = ACTIVATIONS[activation]()

    @property
    def learns_fast(self) -> tuple[Tensor | None, ...]:
        """Weights that have a higher learning rate than the rest."""
        return self.norm1.bias, self.norm2.bias

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


class GlobalMaxPool(nn.Module):
    """The maximum of every feature map; unlike torch's pooling, its gradient is deterministic on CUDA."""

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C)."""
        return maps.amax((2, 3))


class Scale(nn.Module):
    """Multiplies values by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values: Tensor) -> Tensor:
        """Scale values of any shape."""
        return values * self.factor
