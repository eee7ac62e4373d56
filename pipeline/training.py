"""Training of a classifier: one loop, the whole data set on the device as uint8."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from pipeline.arrays import Images
from pipeline.devices import select_precision
from pipeline.networks import Classifier, Standardize, build_network, fit_standardization, logits_of
from pipeline.params import Recipe
from pipeline.seeding import derive_seed


@dataclass(frozen=True)
class Examples:
    """Images and their labels.

    Attributes:
        images: uint8 (N, H, W, C), 0-255.
        labels: uint8 (N,), 0-9.
    """

    images: Images
    labels: NDArray[np.uint8]


@dataclass(frozen=True)
class Epoch:
    """One row of the learning curve; accuracies in [0, 1], the training ones with dropout and before each step."""

    epoch: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float


def train_natural(
    recipe: Recipe,
    train: Examples,
    test: Examples,
    seed: int,
    device: torch.device,
    report: Callable[[Epoch], Any] = lambda epoch: None,
    progress: Callable[[int], Any] = lambda n_images: None,
) -> tuple[Classifier, list[Epoch]]:
    """A classifier trained on clean images, and its learning curve.

    The test images are only looked at after each epoch; nothing is chosen by them.

    Args:
        recipe: Network, standardization, optimizer, epochs.
        train: Training set.
        test: Test set.
        seed: Decides initial weights, order and dropout; on one machine with the same number of threads the weights
            are the same, bit for bit.
        device: Where to train.
        report: Called after every epoch.
        progress: Called with the number of training images seen since the last call.

    Source: paper sections IV and VI.
    """
    precision = select_precision(recipe.precision, device)
    _seed_torch(seed, "weights")
    _, height, width, channels = train.images.shape
    shape = (height, width, channels)
    standardize = Standardize(*fit_standardization(train.images, recipe.standardize))
    classifier = Classifier(shape, standardize, build_network(recipe.network, shape)).to(device)
    classifier.network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(
        classifier.parameters(), lr=recipe.adam.learning_rate, betas=(recipe.adam.beta1, recipe.adam.beta2), fused=True
    )
    images = torch.from_numpy(train.images).to(device)
    labels = torch.from_numpy(train.labels).to(device, torch.long)
    n, size = len(images), recipe.batch_size
    n_used = n - n % size if recipe.drop_last else n
    curve = []
    for epoch in range(1, recipe.epochs + 1):
        # Every epoch has a seed of its own, so that the state of no generator outlives it.
        _seed_torch(seed, "epoch", epoch)
        order = (torch.randperm(n) if recipe.shuffle else torch.arange(n)).to(device)
        loss_sum = torch.zeros((), device=device)
        n_correct = torch.zeros((), device=device, dtype=torch.long)
        classifier.train()
        for start in range(0, n_used, size):
            batch = order[start : min(start + size, n_used)]
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                logits = classifier(images[batch])
            loss = cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss_sum += loss.detach() * len(batch)
            n_correct += (logits.argmax(1) == labels[batch]).sum()
            progress(len(batch))
        predicted = logits_of(classifier, test.images, device, precision, batch_size=500).argmax(1)
        curve.append(
            Epoch(
                epoch=epoch,
                train_loss=loss_sum.item() / n_used,
                train_accuracy=n_correct.item() / n_used,
                test_accuracy=float((predicted == test.labels).mean()),
            )
        )
        report(curve[-1])
    return classifier.eval(), curve


def _seed_torch(*names: int | str) -> None:
    torch.manual_seed(derive_seed(*names) % 2**63)
