"""3×3 convolutions with a quarter of the multiplications, by Winograd's algorithm."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

# Outputs are computed in tiles of 4×4, each from 6×6 inputs.
_TILE, _SEEN = 4, 6
# Size limit of a buffer, of which one step holds three; memory depends on it, results hardly do.
_MAX_BYTES = 64 * 2**20


class WinogradConv2d(nn.Conv2d):
    """A `Conv2d`, faster on CPU in float32 if it has 3×3 filters, many channels, and sides that are multiples of 4.

    Winograd's F(4×4, 3×3): tiles of the image and filters are transformed, multiplied channel by channel with 36
    instead of 144 multiplications for 16 outputs, and transformed back; all of it as matrix products. Values and
    gradients are those of `Conv2d` up to rounding, which is about 1e-5 of the largest value.

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308).
    """

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) → (N, filters, H', W')."""
        if not self._is_faster(images):
            return super().forward(images)
        bias = self.weight.new_zeros(self.out_channels) if self.bias is None else self.bias
        n_values = images[0, 0].numel() * _SEEN**2 // _TILE**2 * max(self.in_channels, self.out_channels)
        parts = torch.split(images, max(1, _MAX_BYTES // (4 * n_values)))
        maps: list[Tensor] = [_Winograd.apply(part, self.weight, bias) for part in parts]
        return maps[0] if len(maps) == 1 else torch.cat(maps)

    def _is_faster(self, images: Tensor) -> bool:
        device, channels, filters = images.device.type, self.in_channels, self.out_channels
        can_be = (
            self.kernel_size == (3, 3)
            and self.stride == self.padding == self.dilation == (1, 1)
            and self.groups == 1
            and images.shape[2] % _TILE == images.shape[3] % _TILE == 0
            and device == "cpu"
            and images.dtype == torch.float32
            and not torch.is_autocast_enabled(device)
        )
        # Transforms cost in proportion to channels + filters, products to channels × filters.
        return can_be and channels * filters >= 40 * (channels + filters)


@lru_cache
def _transforms(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the transforms of tiles (36, 36), filters (36, 9) and results (16, 36), for rows and columns at once."""
    tiles = [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
    filters = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]
    results = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
    both = [
        torch.kron(one, one) for one in (torch.tensor(rows, dtype=torch.float64) for rows in (tiles, filters, results))
    ]
    both[1] /= 24**2
    of_tiles, of_filters, of_results = (one.to(dtype) for one in both)
    return of_tiles, of_filters, of_results


class _Winograd(torch.autograd.Function):
    """Images (N, C, H, W), filters (F, C, 3, 3), bias (F) → (N, F, H, W), all channels last in memory."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        n, channels, height, width = images.shape
        n_filters = len(weight)
        rows, columns = height // _TILE, width // _TILE
        of_tiles, of_filters, of_results = _transforms(images.dtype)
        padded = pad(images.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        tiles = padded.unfold(1, _SEEN, _TILE).unfold(2, _SEEN, _TILE).permute(4, 5, 0, 1, 2, 3).contiguous()
        tiles = (of_tiles @ tiles.view(_SEEN**2, -1)).view(_SEEN**2, -1, channels)
        filters = (of_filters @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(_SEEN**2, channels, n_filters)
        maps = torch.bmm(tiles, filters)
        maps[_SEEN + 1] += bias  # at the point (1, 1), which enters every result with factor 1
        maps = (of_results @ maps.view(_SEEN**2, -1)).view(_TILE, _TILE, n, rows, columns, n_filters)
        ctx.save_for_backward(tiles, filters)
        ctx.sizes = n, rows, columns
        return maps.permute(2, 3, 0, 4, 1, 5).reshape(n, height, width, n_filters).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        tiles, filters = ctx.saved_tensors
        n, rows, columns = ctx.sizes
        _, channels, n_filters = filters.shape
        of_tiles, of_filters, of_results = _transforms(tiles.dtype)
        gradient = gradients[0].permute(0, 2, 3, 1).reshape(n, rows, _TILE, columns, _TILE, n_filters)
        gradient = gradient.permute(2, 4, 0, 1, 3, 5).contiguous()
        grad_maps = (of_results.T @ gradient.view(_TILE**2, -1)).view(_SEEN**2, -1, n_filters)
        grad_weight = of_filters.T @ torch.bmm(tiles.transpose(1, 2), grad_maps).view(_SEEN**2, -1)
        grad_weight = grad_weight.view(3, 3, channels, n_filters).permute(3, 2, 0, 1)
        grad_bias = grad_maps[_SEEN + 1].sum(0)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, grad_bias
        grad_seen = of_tiles.T @ torch.bmm(grad_maps, filters.transpose(1, 2)).view(_SEEN**2, -1)
        grad_seen = grad_seen.view(_SEEN, _SEEN, n, rows, columns, channels)
        # Tiles overlap by two rows and columns.
        grad_padded = gradient.new_zeros(n, rows + 1, _TILE, columns + 1, _TILE, channels).permute(2, 4, 0, 1, 3, 5)
        more = _SEEN - _TILE
        grad_padded[:, :, :, :-1, :-1] = grad_seen[:_TILE, :_TILE]
        grad_padded[:more, :, :, 1:, :-1] += grad_seen[_TILE:, :_TILE]
        grad_padded[:, :more, :, :-1, 1:] += grad_seen[:_TILE, _TILE:]
        grad_padded[:more, :more, :, 1:, 1:] += grad_seen[_TILE:, _TILE:]
        grad_images = grad_padded.permute(2, 3, 0, 4, 1, 5).reshape(
            n, (rows + 1) * _TILE, (columns + 1) * _TILE, channels
        )
        inner = slice(1, rows * _TILE + 1), slice(1, columns * _TILE + 1)
        return grad_images[:, *inner].permute(0, 3, 1, 2), grad_weight, grad_bias
