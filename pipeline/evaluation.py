"""Models on clean and perturbed test images; every store is read once for all of them."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import store
from pipeline.arrays import Images
from pipeline.devices import select_precision
from pipeline.metrics import NATURAL, Cell, Confusion, Example
from pipeline.networks import N_CLASSES, Classifier, logits_of

# uint8 (N, H, W, C) → float32 logits (N, 10); from `predictor`.
Predictor = Callable[[Images], NDArray[np.float32]]
# (perturbation, level) → array (trials, N, H, W, C) and the command that makes it.
Perturbed = Mapping[tuple[str, float], tuple[store.Array, str]]
Model = TypeVar("Model")


def predictor(classifier: Classifier, device: torch.device, precision: str, batch_size: int) -> Predictor:
    """The classifier as a function from images to logits.

    Args:
        classifier: Is moved to `device`.
        device: Where to compute.
        precision: Of its recipe: `float32`, `bfloat16` or `auto`.
        batch_size: Images per pass; results do not depend on it.
    """
    return partial(
        logits_of,
        classifier.to(device),
        device=device,
        precision=select_precision(precision, device),
        batch_size=batch_size,
    )


def measure_models(
    dataset: str,
    models: Mapping[Model, Predictor],
    clean: Images,
    labels: NDArray[np.uint8],
    perturbed: Perturbed,
    is_wanted: Callable[[Model, str, int], bool] = lambda model, perturbation, trial: True,
    progress: Callable[[int], Any] = lambda n_images: None,
) -> list[tuple[Model, Cell]]:
    """How many images every model classifies correctly, natural ones and every level and trial.

    Args:
        dataset: Name of the data set.
        models: Whatever names a model → the model.
        clean: uint8 (N, H, W, C), clean test images.
        labels: uint8 (N,).
        perturbed: The perturbed versions.
        is_wanted: (model, perturbation, trial) → whether to measure that.
        progress: Called with the number of images read since the last call.

    Source: paper sections V and VI.
    """
    cells: list[tuple[Model, Cell]] = []
    for perturbation, level, trial, images in _each_trial(clean, perturbed):
        for model, predict in models.items():
            if is_wanted(model, perturbation, trial):
                n_correct = int((predict(images).argmax(axis=1) == labels).sum())
                cells.append((model, Cell(dataset, perturbation, level, trial, n_correct, len(images))))
        progress(len(images))
    return cells


def describe_examples(
    predict: Predictor, clean: Images, labels: NDArray[np.uint8], perturbed: Perturbed
) -> list[Example]:
    """What a model says of a few test images, natural and in the version of trial 0 of every level.

    Args:
        predict: The model.
        clean: uint8 (n, H, W, C), the first n clean test images.
        labels: uint8 (n,).
        perturbed: The perturbed versions of at least those.

    Source: paper figures 3, 5 and 7. The first images of the test set are shown; none is chosen.
    """
    pictures = {(NATURAL, 0.0): clean}
    for key, (array, made_by) in perturbed.items():
        pictures[key] = store.read_part(array, (0, slice(0, len(clean))), made_by)
    examples = []
    for (perturbation, level), images in pictures.items():
        probabilities = torch.from_numpy(predict(images)).softmax(1).numpy()
        for index, row in enumerate(probabilities):
            predicted, confidence = int(row.argmax()), round(float(row.max()), 4)
            examples.append(Example(perturbation, level, index, int(labels[index]), predicted, confidence))
    return examples


def count_confusions(
    models: Mapping[Model, Predictor],
    clean: Images,
    labels: NDArray[np.uint8],
    perturbed: Perturbed,
    is_wanted: Callable[[Model, str], bool],
) -> list[tuple[Model, Confusion]]:
    """How often every model takes each class for each other one, all trials together.

    Args:
        models: Whatever names a model → the model.
        clean: uint8 (N, H, W, C), clean test images.
        labels: uint8 (N,).
        perturbed: The perturbed versions.
        is_wanted: (model, perturbation) → whether to measure that.

    Source: the paper's section IX names this as future work.
    """
    counts: dict[tuple[Model, str, float], NDArray[np.int64]] = {}
    for perturbation, level, _, images in _each_trial(clean, perturbed):
        for model, predict in models.items():
            if is_wanted(model, perturbation):
                # One number per pair of classes.
                pairs = labels.astype(np.int64) * N_CLASSES + predict(images).argmax(axis=1)
                key = model, perturbation, level
                counts[key] = counts.get(key, 0) + np.bincount(pairs, minlength=N_CLASSES**2)
    return [
        (model, Confusion(perturbation, level, *divmod(pair, N_CLASSES), n_examples=int(n)))
        for (model, perturbation, level), pairs in counts.items()
        for pair, n in enumerate(pairs)
    ]


def _each_trial(clean: Images, perturbed: Perturbed) -> Iterator[tuple[str, float, int, Images]]:
    """The clean test images, then every level and trial: (perturbation, level, trial, images)."""
    yield NATURAL, 0, 0, clean
    for (perturbation, level), (array, made_by) in perturbed.items():
        for trial, images in enumerate(store.read_trials(array, made_by)):
            yield perturbation, level, trial, images
