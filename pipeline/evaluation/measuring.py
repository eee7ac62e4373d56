"""Models on clean and perturbed images; every store is read once for all of them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from pipeline.models import storage
from pipeline.models.classifier import Classifier
from pipeline.models.devices import images_per_pass, select_device, select_precision, worker_threads
from pipeline.recipes.plan import CLEAN, ModelKey
from pipeline.runtime.errors import PipelineError
from pipeline.study.opening import StudyData
from pipeline.study.planning import PlannedCell, Study

Classes = Mapping[ModelKey, NDArray[np.int64]]


class Predictor:
    """A trained classifier, ready to be asked what it sees.

    Attributes:
        device: Where it computes.
        packing: Predictors with equal ones take images that are packed alike.
    """

    def __init__(self, classifier: Classifier, device: torch.device, precision: str) -> None:
        """The classifier in evaluation mode.

        Args:
            classifier: Is moved to `device`.
            device: Where to compute.
            precision: Of its recipe: `float32`, `bfloat16` or `auto`.
        """
        self.device = device
        self._classifier = classifier.eval().to(device)
        self._precision = select_precision(precision, device)
        self.packing: object = self._classifier.packing(device)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W, C) → float32 logits (N, n_classes), on the device of both."""
        return self.classify(self.pack(images))

    def pack(self, images: Tensor) -> Tensor:
        """What `classify` takes of raw images.

        Raises:
            PipelineError: Their shape is not what the network takes.
        """
        if images.shape[1:] != self._classifier.shape:
            raise PipelineError(
                f"images of shape {tuple(images.shape[1:])} do not fit a network for {self._classifier.shape}"
            )
        return self._classifier.pack(images)

    def classify(self, packed: Tensor) -> Tensor:
        """Logits of images that went through `pack`.

        Raises:
            PipelineError: One of them is not a finite number.
        """
        with self._arithmetic(packed):
            logits = self._classifier.classify(packed)
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
        images: uint8 (N, H, W, C).
        classes: Model → predicted classes, int64 (N,).
    """

    images: Images
    classes: Classes


def load_models(study: Study, stage: str) -> dict[ModelKey, Predictor]:
    """The models that stage `impact`, `evaluate` or `ablations` measures, on the device of the study.

    Raises:
        PipelineError: One is missing, damaged, or made with other params.
    """
    device = select_device(study.device)
    return {
        job.key: Predictor(storage.load(job.path, job.made_by, job.description), device, job.plan.recipe.precision)
        for job in study.models(stage)
    }


def measure(
    study: Study,
    stage: str,
    models: Mapping[ModelKey, Predictor],
    data: StudyData,
    progress: Callable[[int], object] = lambda n_images: None,
) -> Iterator[tuple[Predictions, list[Cell]]]:
    """What models say of clean images and of every level and trial, and how often they are right.

    Every stored array is read once, for all models. Batches are spread over the cores, one thread each, all models on a
    batch one after the other, while the next trial is read.

    Args:
        study: The study of a data set.
        stage: Whose cells to measure.
        models: From `load_models`.
        data: From `open_study`.
        progress: Called with the number of images finished since the last call.

    Raises:
        PipelineError: A store is damaged; an answer of a model is not a finite number.

    Source: paper sections V and VI.
    """
    device, batch_size = select_device(study.device), study.batch_sizes[stage]
    ahead: deque[tuple[list[PlannedCell], Images, list[Future[Classes]]]] = deque()

    def wait() -> tuple[Predictions, list[Cell]]:
        cells, images, futures = ahead.popleft()
        parts = [future.result() for future in futures]
        classes = {model: np.concatenate([part[model] for part in parts]) for model in parts[0]}
        labels = data.labels[cells[0].split]
        progress(len(images))
        counted = [Cell(**vars(cell), n_correct=int((classes[cell.model] == labels).sum())) for cell in cells]
        return Predictions(images, classes), counted

    with worker_threads(device) as pool:
        try:
            for cells, images in _each_set(study.cells(stage), data):
                wanted = {cell.model: models[cell.model] for cell in cells}
                n_per_pass = images_per_pass(batch_size, images[0].size)
                batches = torch.split(torch.from_numpy(images).to(device), n_per_pass)
                ahead.append((cells, images, [pool.submit(_predict, wanted, batch) for batch in batches]))
                if len(ahead) == 2:
                    yield wait()
            while ahead:
                yield wait()
        finally:
            pool.shutdown(cancel_futures=True)


def describe_examples(
    predictor: Predictor, cell: PlannedCell, images: Images, labels: NDArray[np.uint8]
) -> list[Example]:
    """What a model says of a few test images.

    Args:
        predictor: The model.
        cell: What was done to them.
        images: uint8 (n, H, W, C), the first of the test set.
        labels: uint8 (n,).

    Source: paper figures 3, 5 and 7. The first images of the test set are shown; none is chosen.
    """
    probabilities = predictor(torch.from_numpy(images).to(predictor.device)).softmax(1).cpu().numpy()
    return [
        Example(cell.perturbation, cell.level, index, int(labels[index]), int(row.argmax()), round(float(row.max()), 4))
        for index, row in enumerate(probabilities)
    ]


class ConfusionCounter:
    """How often every model takes each class for each other one, all trials of a level together.

    Source: the paper's section IX names this as future work.
    """

    def __init__(self, n_classes: int) -> None:
        self._n_classes = n_classes
        self._counts: dict[tuple[ModelKey, str, float], NDArray[np.int64]] = {}

    def add(self, perturbation: str, level: float, predictions: Predictions, labels: NDArray[np.uint8]) -> None:
        """Count predictions on N images of a perturbation and level, labels uint8 (N,)."""
        for model, classes in predictions.classes.items():
            pairs = labels.astype(np.int64) * self._n_classes + classes  # one number per pair of classes
            key = model, perturbation, level
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


def _predict(models: Mapping[ModelKey, Predictor], images: Tensor) -> Classes:
    packed: dict[object, Tensor] = {}
    predicted: dict[ModelKey, NDArray[np.int64]] = {}
    for name, model in models.items():
        if model.packing not in packed:
            packed[model.packing] = model.pack(images)
        predicted[name] = model.classify(packed[model.packing]).argmax(1).cpu().numpy()
    return predicted


def _each_set(cells: Iterable[PlannedCell], data: StudyData) -> Iterator[tuple[list[PlannedCell], Images]]:
    """The cells of the same images, and these, in the order of the cells."""
    for (split, perturbation, level), of_level in groupby(cells, key=lambda cell: cell.images[:3]):
        by_trial = [list(group) for _, group in groupby(of_level, key=lambda cell: cell.trial)]
        trials = [data.clean[split]] if perturbation == CLEAN else data.perturbed[perturbation, level].trials()
        yield from zip(by_trial, trials, strict=True)
