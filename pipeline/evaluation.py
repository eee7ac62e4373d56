"""Models on clean and perturbed test images; every store is read once."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import store
from pipeline.arrays import Images
from pipeline.metrics import NATURAL, Cell, Example, ModelCell, ModelName
from pipeline.networks import Classifier, logits_of


def measure_impact(
    dataset: str,
    classifier: Classifier,
    clean: Images,
    labels: NDArray[np.uint8],
    perturbed: Mapping[tuple[str, float], tuple[store.Array, str]],
    device: torch.device,
    precision: torch.dtype,
    batch_size: int,
    n_examples: int,
    progress: Callable[[int], Any] = lambda n_images: None,
) -> tuple[list[Cell], list[Example]]:
    """Cells and pictured examples of one model; every store is read once, trial by trial.

    Args:
        dataset: Name of the data set.
        classifier: The model, on `device`.
        clean: uint8 (N, H, W, C), clean test images.
        labels: uint8 (N,).
        perturbed: (perturbation, level) → array (trials, N, H, W, C) and the command that makes it.
        device: Where to compute.
        precision: float32 or bfloat16.
        batch_size: Images per pass; results do not depend on it.
        n_examples: The first so many test images are the examples.
        progress: Called with the number of images classified since the last call.

    Source: paper section V.
    """
    cells: list[Cell] = []
    examples: list[Example] = []
    for perturbation, level, trial, images in _each_trial(clean, perturbed):
        logits = logits_of(classifier, images, device, precision, batch_size)
        predicted = logits.argmax(axis=1)
        cells.append(Cell(dataset, perturbation, level, trial, int((predicted == labels).sum()), len(images)))
        if trial == 0:
            shown = torch.from_numpy(logits[:n_examples]).softmax(1).amax(1).tolist()
            examples.extend(
                Example(perturbation, level, index, int(labels[index]), int(predicted[index]), round(confidence, 4))
                for index, confidence in enumerate(shown)
            )
        progress(len(images))
    return cells, examples


def evaluate_models(
    dataset: str,
    models: Mapping[ModelName, Classifier],
    clean: Images,
    labels: NDArray[np.uint8],
    perturbed: Mapping[tuple[str, float], tuple[store.Array, str]],
    device: torch.device,
    precision: torch.dtype,
    batch_size: int,
    cross_trials: int,
    progress: Callable[[int], Any] = lambda n_images: None,
) -> list[ModelCell]:
    """Cells of several models; every store is read once for all of them, trial by trial.

    Args:
        dataset: Name of the data set.
        models: The models, on `device`.
        clean: uint8 (N, H, W, C), clean test images.
        labels: uint8 (N,).
        perturbed: (perturbation, level) → array (trials, N, H, W, C) and the command that makes it.
        device: Where to compute.
        precision: float32 or bfloat16.
        batch_size: Images per pass; results do not depend on it.
        cross_trials: Trials for a model on perturbations of another family than its own; all trials on its own.
        progress: Called with the number of images read since the last call.

    Source: paper section VI; evaluation across families is our choice.
    """
    cells: list[ModelCell] = []
    for perturbation, level, trial, images in _each_trial(clean, perturbed):
        for name, classifier in models.items():
            if trial < cross_trials or name.is_tested_on_own(perturbation):
                predicted = logits_of(classifier, images, device, precision, batch_size).argmax(axis=1)
                cell = Cell(dataset, perturbation, level, trial, int((predicted == labels).sum()), len(images))
                cells.append(ModelCell(**asdict(name), **asdict(cell)))
        progress(len(images))
    return cells


def _each_trial(
    clean: Images, perturbed: Mapping[tuple[str, float], tuple[store.Array, str]]
) -> Iterator[tuple[str, float, int, Images]]:
    """The clean test images, then every level and trial: (perturbation, level, trial, images)."""
    yield NATURAL, 0, 0, clean
    for (perturbation, level), (array, made_by) in perturbed.items():
        for trial, images in enumerate(store.read_trials(array, made_by)):
            yield perturbation, level, trial, images
