"""Models on clean and perturbed images; every store is read once for all of them."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.arrays import Images
from pipeline.evaluation.metrics import Cell, Confusion, Example
from pipeline.models.classifier import Classifier
from pipeline.models.devices import images_per_pass, select_precision, worker_threads
from pipeline.perturbations.variants import StoredArray
from pipeline.recipes.plan import CLEAN, ModelKey
from pipeline.runtime.errors import PipelineError
from pipeline.study.planning import PlannedCell


class Predictor:
    """A trained classifier, ready to be asked what it sees.

    Attributes:
        preparation: Predictors with equal ones prepare images in the same way.
    """

    def __init__(self, classifier: Classifier, device: torch.device, precision: str) -> None:
        """The classifier in evaluation mode.

        Args:
            classifier: Is moved to `device`.
            device: Where to compute.
            precision: Of its recipe: `float32`, `bfloat16` or `auto`.
        """
        self._classifier = classifier.eval().to(device)
        self._precision = select_precision(precision, device)
        self.preparation: object = self._classifier.packing(device) or self

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W, C) → float32 logits (N, n_classes), on the device of both."""
        return self.classify(self.prepare(images))

    def prepare(self, images: Tensor) -> Tensor:
        """What `classify` takes of raw images.

        Raises:
            PipelineError: Their shape is not what the network takes.
        """
        if images.shape[1:] != self._classifier.shape:
            raise PipelineError(
                f"images of shape {tuple(images.shape[1:])} do not fit a network for {self._classifier.shape}"
            )
        with self._arithmetic(images):
            return self._classifier.prepare(images)

    def classify(self, prepared: Tensor) -> Tensor:
        """Logits of images that went through `prepare`.

        Raises:
            PipelineError: One of them is not a finite number.
        """
        with self._arithmetic(prepared):
            logits = self._classifier.classify(prepared)
            if not logits.isfinite().all():
                which = self._classifier.path or "a model"
                raise PipelineError(
                    f"{which}: its answer is not a finite number; train it again, with a lower learning rate"
                )
            return logits

    @contextmanager
    def _arithmetic(self, values: Tensor) -> Iterator[None]:
        is_mixed = self._precision != torch.float32
        with torch.inference_mode(), torch.autocast(values.device.type, self._precision, enabled=is_mixed):
            yield


@dataclass(frozen=True)
class Predictions:
    """What models say of one set of images.

    Attributes:
        cells: The planned measurements, one for each model.
        images: uint8 (N, H, W, C).
        classes: Model → predicted classes, int64 (N,).
    """

    cells: Sequence[PlannedCell]
    images: Images
    classes: Mapping[ModelKey, NDArray[np.int64]]


def predict_all(
    cells: Iterable[PlannedCell],
    models: Mapping[ModelKey, Predictor],
    clean: Mapping[str, Images],
    perturbed: Mapping[tuple[str, float], StoredArray],
    device: torch.device,
    batch_size: int,
) -> Iterator[Predictions]:
    """What models say of clean images and of every level and trial; every stored array is read once, for all of them.

    Batches are spread over the cores, one thread each, all models on a batch one after the other, while the next trial
    is read.

    Args:
        cells: What to measure, those of the same images one after the other.
        models: The model of every cell.
        clean: Split → uint8 (N, H, W, C).
        perturbed: (perturbation, level) → the perturbed test images.
        device: Where the models are.
        batch_size: CIFAR-10 images per pass, more of smaller ones and fewer of larger; results do not depend on it.

    Source: paper sections V and VI.
    """
    ahead: deque[tuple[list[PlannedCell], Images, list[Future[dict[ModelKey, NDArray[np.int64]]]]]] = deque()
    with worker_threads(device) as pool:
        try:
            for group, images in _each_set(cells, clean, perturbed):
                wanted = {cell.model: models[cell.model] for cell in group}
                n_per_pass = images_per_pass(batch_size, images[0].size)
                batches = torch.split(torch.from_numpy(images).to(device), n_per_pass)
                ahead.append((group, images, [pool.submit(_predict, wanted, batch) for batch in batches]))
                if len(ahead) == 2:
                    yield _wait(*ahead.popleft())
            while ahead:
                yield _wait(*ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def count_correct(predictions: Predictions, labels: NDArray[np.uint8]) -> list[Cell]:
    """How many images every model classifies correctly.

    Args:
        predictions: On N images.
        labels: uint8 (N,).
    """
    return [
        Cell(**vars(cell), n_correct=int((predictions.classes[cell.model] == labels).sum()))
        for cell in predictions.cells
    ]


def describe_examples(
    predictor: Predictor,
    perturbation: str,
    level: float,
    images: Images,
    labels: NDArray[np.uint8],
    device: torch.device,
) -> list[Example]:
    """What a model says of a few test images.

    Args:
        predictor: The model.
        perturbation: What was done to them.
        level: How much.
        images: uint8 (n, H, W, C), the first of the test set.
        labels: uint8 (n,).
        device: Where the model is.

    Source: paper figures 3, 5 and 7. The first images of the test set are shown; none is chosen.
    """
    probabilities = predictor(torch.from_numpy(images).to(device)).softmax(1).cpu().numpy()
    return [
        Example(perturbation, level, index, int(labels[index]), int(row.argmax()), round(float(row.max()), 4))
        for index, row in enumerate(probabilities)
    ]


class ConfusionCounter:
    """How often every model takes each class for each other one, all trials of a level together.

    Source: the paper's section IX names this as future work.
    """

    def __init__(self, n_classes: int) -> None:
        self._n_classes = n_classes
        self._counts: dict[tuple[ModelKey, str, float], NDArray[np.int64]] = {}

    def add(self, predictions: Predictions, labels: NDArray[np.uint8]) -> None:
        """Count predictions on N images, labels uint8 (N,)."""
        for cell in predictions.cells:
            # One number per pair of classes.
            pairs = labels.astype(np.int64) * self._n_classes + predictions.classes[cell.model]
            key = cell.model, cell.perturbation, cell.level
            self._counts[key] = self._counts.get(key, 0) + np.bincount(pairs, minlength=self._n_classes**2)

    def rows(self, model: ModelKey, perturbation: str, level: float) -> list[Confusion]:
        """The counts of a model at a level, a row for every pair of classes."""
        return [
            Confusion(
                **vars(model),
                perturbation=perturbation,
                level=level,
                actual=actual,
                predicted=predicted,
                n_examples=int(n),
            )
            for (actual, predicted), n in np.ndenumerate(
                self._counts[model, perturbation, level].reshape(self._n_classes, self._n_classes)
            )
        ]


def _predict(models: Mapping[ModelKey, Predictor], images: Tensor) -> dict[ModelKey, NDArray[np.int64]]:
    predicted: dict[ModelKey, NDArray[np.int64]] = {}
    preparation: object = None
    for name, model in models.items():
        if model.preparation != preparation:
            preparation, prepared = model.preparation, model.prepare(images)
        predicted[name] = model.classify(prepared).argmax(1).cpu().numpy()
    return predicted


def _wait(
    cells: list[PlannedCell], images: Images, futures: list[Future[dict[ModelKey, NDArray[np.int64]]]]
) -> Predictions:
    parts = [future.result() for future in futures]
    return Predictions(cells, images, {model: np.concatenate([part[model] for part in parts]) for model in parts[0]})


def _each_set(
    cells: Iterable[PlannedCell], clean: Mapping[str, Images], perturbed: Mapping[tuple[str, float], StoredArray]
) -> Iterator[tuple[list[PlannedCell], Images]]:
    """The cells of the same images, and these, in the order of the cells."""
    for (split, perturbation, level), of_level in groupby(cells, key=lambda cell: cell.images[:3]):
        by_trial = [list(group) for _, group in groupby(of_level, key=lambda cell: cell.trial)]
        trials = [clean[split]] if perturbation == CLEAN else perturbed[perturbation, level].trials()
        yield from zip(by_trial, trials, strict=True)
