"""What each recipe uses to train a model: optimizer, learning-rate schedule, augmentation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.recipes.recipe import FastRecipe, PaperRecipe, Recipe


class PaperSchedule:
    """Adam at a constant learning rate, without augmentation.

    Attributes:
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).

    Source: paper section IV.
    """

    label_smoothing = 0.0

    def __init__(self, recipe: PaperRecipe) -> None:
        self._adam = recipe.adam

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer of all trainable weights, at the full learning rate."""
        weights = [tensor for tensor in model.parameters() if tensor.requires_grad]
        adam = self._adam
        return torch.optim.Adam(weights, lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), fused=True)

    def rate(self, done: float) -> float:
        """Learning rate after a share `done` of all steps, relative to its full value."""
        return 1.0

    def augment(self, images: Tensor, flips: Tensor, epoch: int) -> Tensor:
        """Return a batch as the training step sees it.

        Args:
            images: uint8 (N, H, W, C).
            flips: bool (N,), drawn once for every image of the training set.
            epoch: From 1.
        """
        return images

    def side(self, done: float) -> int | None:
        """Side, in pixels, that images are scaled to after a share `done` of all steps; None: not scaled."""
        return None


class FastSchedule:
    """SGD at a high learning rate that first rises and then falls; images mirrored and shifted, small ones first.

    Attributes and methods are those of `PaperSchedule`.

    Source: our choice, after airbench94 (Jordan, arXiv 2404.00498).
    """

    def __init__(self, recipe: FastRecipe) -> None:
        self._recipe = recipe
        self.label_smoothing = recipe.label_smoothing

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer; weights that layers list in `learns_fast` have a higher learning rate than the rest."""
        sgd = self._recipe.sgd
        biases = {id(tensor) for layer in model.modules() for tensor in getattr(layer, "learns_fast", ())}
        weights = [tensor for tensor in model.parameters() if tensor.requires_grad]
        # Weight decay times learning rate is the same for all: biases take larger steps, not more decay.
        groups = [
            {
                "params": [tensor for tensor in weights if (id(tensor) in biases) == is_bias],
                "lr": sgd.learning_rate * factor,
                "weight_decay": sgd.weight_decay / factor,
            }
            for is_bias, factor in ((False, 1.0), (True, sgd.bias_factor))
        ]
        return torch.optim.SGD(groups, momentum=sgd.momentum, nesterov=True, fused=True)

    def rate(self, done: float) -> float:
        """Learning rate, relative: rises from a fifth to 1, then falls to a fourteenth."""
        warm_up = self._recipe.sgd.warm_up
        if done < warm_up:
            return 0.2 + 0.8 * done / warm_up
        return 1 - (1 - 0.07) * (done - warm_up) / (1 - warm_up)

    def augment(self, images: Tensor, flips: Tensor, epoch: int) -> Tensor:
        """Mirror every image in every other epoch, which is better than at random, and shift all of a batch alike.

        A shift fills the gap by reflection at the edge.
        """
        if self._recipe.flip:
            mirrored = flips ^ (epoch % 2 == 0)
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(2), images)
        shift = self._recipe.shift
        if shift:
            for axis, offset in zip((1, 2), torch.randint(-shift, shift + 1, (2,)).tolist(), strict=True):
                places = torch.arange(images.shape[axis], device=images.device) + offset
                last = images.shape[axis] - 1
                images = images.index_select(axis, last - (last - places.abs()).abs())
        return images

    def side(self, done: float) -> int | None:
        """Small images for the first share of all steps."""
        small = self._recipe.small_images
        return small.side if done < small.share else None


_SCHEDULES: dict[str, Callable[[Any], PaperSchedule | FastSchedule]] = {"paper": PaperSchedule, "fast": FastSchedule}


def schedule_of(recipe: Recipe) -> PaperSchedule | FastSchedule:
    """Return the schedule of a recipe."""
    return _SCHEDULES[recipe.recipe](recipe)
