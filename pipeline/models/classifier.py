"""Classifiers built from a network's description, with input standardization inside.

A classifier takes raw uint8 images (N, H, W, C) and gives logits (N, n_classes), so whoever loads one needs to know
nothing about how it was trained.
"""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.data.arrays import Images
from pipeline.models import library
from pipeline.models.accelerated.windows import first_block
from pipeline.models.devices import free_memory
from pipeline.models.layers import (
    ACTIVATIONS,
    Block,
    FirstLayer,
    Flatten,
    GlobalMaxPool,
    Group,
    Patches,
    Scale,
    Standardize,
    Whitening,
)
from pipeline.recipes.recipe import FastNetwork, LibraryNetwork, Network
from pipeline.runtime.errors import PipelineError

AnyNetwork = Network | FastNetwork | LibraryNetwork
# Values of images that are squared at a time, as int64: 32 MiB.
_FIT_VALUES = 2**22
# Name of the child module that gives the logits, which transfer to another task replaces.
HEAD = "output"


def fit_standardization(images: Images, mode: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute mean and standard deviation of the training images.

    Args:
        images: uint8 (N, H, W, C), the training set actually used.
        mode: `pixel`: for every position and channel, shapes (H, W, C), as the authors do. `channel`: for every
            channel, (1, 1, C). `none`: 0 and 255, (1, 1, 1), so that inputs are in [0, 1].

    Returns:
        mean, std: float64, std with divisor N. Sums are exact integers, so that a position that never
        varies has a standard deviation of exactly 0.
    """
    if mode == "none":
        return np.zeros((1, 1, 1)), np.full((1, 1, 1), 255.0)
    height, width, channels = images.shape[1:]
    total = np.zeros((height, width, channels), np.int64)
    total_squares = np.zeros_like(total)
    step = max(1, _FIT_VALUES // images[0].size)
    for start in range(0, len(images), step):
        block = images[start : start + step].astype(np.int64)
        total += block.sum(axis=0)
        total_squares += (block * block).sum(axis=0)
    count = len(images)
    if mode == "channel":
        total = total.sum(axis=(0, 1), keepdims=True)
        total_squares = total_squares.sum(axis=(0, 1), keepdims=True)
        count *= height * width
    # Python integers: the products below exceed 64 bits.
    numerator = total_squares.astype(object) * count - total.astype(object) ** 2
    variance = numerator.astype(np.float64) / float(count) ** 2
    return total / count, np.sqrt(variance)


def build_network(network: AnyNetwork, shape: tuple[int, int, int], n_classes: int) -> nn.Sequential:
    """Build untrained layers from float32 (N, C, H, W) to logits (N, n_classes).

    Args:
        network: Its description; `Params` has checked that it fits the images.
        shape: (H, W, C) of the images.
        n_classes: Number of classes.

    Source: paper section IV and Table I; for `FastNetwork` see `layers`.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = shape[2]
    if isinstance(network, LibraryNetwork):
        body = library.Body(network, shape)
        layers["body"], n_features = body, body.n_features
    elif isinstance(network, FastNetwork):
        patches = Whitening(channels) if network.whiten else Patches(channels)
        layers["patches"], layers["activation"] = patches, ACTIVATIONS[network.activation]()
        channels = patches.out_channels
        for number, group_width in enumerate(network.widths, start=1):
            layers[f"group{number}"] = Group(channels, group_width, network.activation)
            channels = group_width
        layers["pool"] = GlobalMaxPool()
        n_features = network.n_features(shape)
    else:
        for number, convolution in enumerate(network.convolutions, start=1):
            block = first_block(network, convolution, shape) if number == 1 else Block(network, convolution, channels)
            layers[f"block{number}"], channels = block, convolution.filters
        layers["flatten"], n_features = Flatten(), network.n_features(shape)
    for number, hidden in enumerate(network.fully_connected, start=1):
        layers[f"hidden{number}"] = nn.Linear(n_features, hidden)
        layers[f"hidden{number}_activation"] = ACTIVATIONS[network.activation]()
        n_features = hidden
    layers[HEAD] = nn.Linear(n_features, n_classes)
    if isinstance(network, FastNetwork):
        layers["scale"] = Scale(1 / 9)  # large steps need small logits; the factor is airbench's
    return nn.Sequential(layers)


def check_step(
    network: AnyNetwork,
    shape: tuple[int, int, int],
    n_classes: int,
    batch_size: int,
    device: torch.device,
    small: int | None = None,
) -> None:
    """Refuse a library's network that cannot take the images, or whose training step does not fit into free memory.

    Args:
        network: Its description; networks of our own layers are small, and `Params` has checked them.
        shape: (H, W, C) of the images.
        n_classes: Number of classes.
        batch_size: Images per step.
        device: Where it is trained.
        small: As `library.try_step`.

    Raises:
        PipelineError: The network is refused.
    """
    if not isinstance(network, LibraryNetwork):
        return
    needed, free = library.try_step(network, shape, n_classes, batch_size, small), free_memory(device)
    if needed > free:
        raise PipelineError(
            f"batch_size: a step of {network.architecture} with {batch_size} images of {shape[0]}x{shape[1]} takes "
            f"about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; give a smaller batch_size, or fewer "
            "--workers"
        )


def native_code(network: AnyNetwork, shape: tuple[int, int, int], device: torch.device) -> str | None:
    """Return the digest of our compiled code that computes a network on a device; None if only torch's code does.

    Args:
        network: Its description.
        shape: (H, W, C) of the images.
        device: Where it runs.
    """
    with torch.device("meta"):
        return first_layer(build_network(network, shape, n_classes=1)).native_code(device)


def first_layer(network: nn.Sequential) -> FirstLayer:
    """Return the layer of a network that takes the raw images."""
    first = network[0]
    assert isinstance(first, FirstLayer)
    return first


class Classifier(nn.Module):
    """Standardization and network in one: uint8 (N, H, W, C) → float32 logits (N, n_classes).

    Attributes:
        shape: (H, W, C) of the images it takes.
        path: File that it was loaded from; None if it was not loaded.
        if_not_finite: What to do if its output is not finite.
    """

    path: Path | None = None
    if_not_finite = "train it again, with a lower learning rate"

    def __init__(self, shape: tuple[int, int, int], standardize: Standardize, network: nn.Sequential) -> None:
        super().__init__()
        self.shape = shape
        self.standardize = standardize
        self.network = network

    def fit(self, images: Tensor) -> None:
        """Fit the layers that are computed from training images instead of learned.

        Args:
            images: uint8 (N, H, W, C), a few thousand.
        """
        for layer in self.network:
            if (fit := getattr(layer, "fit", None)) is not None:
                fit(self.standardize(images))

    def load_start(self) -> None:
        """Load the weights that training starts from, if the network's description names a file of them."""
        first_layer(self.network).load_start(self.network[1])

    def forward(self, images: Tensor, side: int | None = None) -> Tensor:
        """Compute the logits of raw images; these are scaled to `side` pixels after standardization, if it is given."""
        values = first_layer(self.network).of_raw(images, self.standardize, side)
        for layer in list(self.network)[1:]:
            values = layer(values)
        return values.float()
