"""Models on clean and perturbed test images; every store is read once for all of them."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data import store
from pipeline.data.arrays import Images
from pipeline.evaluation.metrics import NATURAL, Cell, Confusion, Example
from pipeline.models.classifier import Classifier
from pipeline.models.devices import images_per_pass, select_precision, worker_threads
from pipeline.runtime.errors import PipelineError

# (perturbation, level) → array (trials, N, H, W, C) and the command that makes it.
Perturbed = Mapping[tuple[str, float], tuple[store.Array, str]]
Model = TypeVar("Model")


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


def measure_models(
    dataset: str,
    models: Mapping[Model, Predictor],
    clean: Images,
    labels: NDArray[np.uint8],
    perturbed: Perturbed,
    device: torch.device,
    batch_size: int,
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
        device: Where the models are.
        batch_size: CIFAR-10 images per pass, more of smaller ones and fewer of larger; results do not depend on it.
        is_wanted: (model, perturbation, trial) → whether to measure that.
        progress: Called with the number of images read since the last call.

    Source: paper sections V and VI.
    """
    cells: list[tuple[Model, Cell]] = []
    for perturbation, level, trial, predicted in _predict_each_trial(
        models, clean, perturbed, device, batch_size, is_wanted
    ):
        for model, classes in predicted.items():
            n_correct = int((classes == labels).sum())
            cells.append((model, Cell(dataset, perturbation, level, trial, n_correct, len(labels))))
        progress(len(labels))
    return cells


def describe_examples(
    predict: Predictor, clean: Images, labels: NDArray[np.uint8], perturbed: Perturbed, device: torch.device
) -> list[Example]:
    """What a model says of a few test images, natural and in the version of trial 0 of every level.

    Args:
        predict: The model.
        clean: uint8 (n, H, W, C), the first n clean test images.
        labels: uint8 (n,).
        perturbed: The perturbed versions of at least those.
        device: Where the model is.

    Source: paper figures 3, 5 and 7. The first images of the test set are shown; none is chosen.
    """
    pictures = {(NATURAL, 0.0): clean}
    for key, (array, made_by) in perturbed.items():
        pictures[key] = store.read_part(array, (0, slice(0, len(clean))), made_by)
    examples = []
    for (perturbation, level), images in pictures.items():
        probabilities = predict(torch.from_numpy(images).to(device)).softmax(1).cpu().numpy()
        for index, row in enumerate(probabilities):
            predicted, confidence = int(row.argmax()), round(float(row.max()), 4)
            examples.append(Example(perturbation, level, index, int(labels[index]), predicted, confidence))
    return examples


def count_confusions(
    models: Mapping[Model, Predictor],
    clean: Images,
    labels: NDArray[np.uint8],
    perturbed: Perturbed,
    device: torch.device,
    batch_size: int,
    n_classes: int,
    is_wanted: Callable[[Model, str], bool],
) -> list[tuple[Model, Confusion]]:
    """How often every model takes each class for each other one, all trials together.

    Args:
        models: Whatever names a model → the model.
        clean: uint8 (N, H, W, C), clean test images.
        labels: uint8 (N,).
        perturbed: The perturbed versions.
        device: Where the models are.
        batch_size: CIFAR-10 images per pass, more of smaller ones and fewer of larger; results do not depend on it.
        n_classes: How many classes there are.
        is_wanted: (model, perturbation) → whether to measure that.

    Source: the paper's section IX names this as future work.
    """
    counts: dict[tuple[Model, str, float], NDArray[np.int64]] = {}
    for perturbation, level, _, predicted in _predict_each_trial(
        models, clean, perturbed, device, batch_size, lambda model, perturbation, trial: is_wanted(model, perturbation)
    ):
        for model, classes in predicted.items():
            # One number per pair of classes.
            pairs = labels.astype(np.int64) * n_classes + classes
            key = model, perturbation, level
            counts[key] = counts.get(key, 0) + np.bincount(pairs, minlength=n_classes**2)
    return [
        (model, Confusion(perturbation, level, *divmod(pair, n_classes), n_examples=int(n)))
        for (model, perturbation, level), pairs in counts.items()
        for pair, n in enumerate(pairs)
    ]


def _predict_each_trial(
    models: Mapping[Model, Predictor],
    clean: Images,
    perturbed: Perturbed,
    device: torch.device,
    batch_size: int,
    is_wanted: Callable[[Model, str, int], bool],
) -> Iterator[tuple[str, float, int, dict[Model, NDArray[np.int64]]]]:
    """The clean test images, then every level and trial: (perturbation, level, trial, model → classes (N,)).

    Batches are spread over the cores, one thread each, all models on a batch one after the other, while the next trial
    is read.
    """
    ahead: deque[tuple[str, float, int, list[Future[dict[Model, NDArray[np.int64]]]]]] = deque()
    with worker_threads(device) as pool:
        try:
            for perturbation, level, trial, images in _each_trial(clean, perturbed):
                wanted = {name: model for name, model in models.items() if is_wanted(name, perturbation, trial)}
                n_per_pass = images_per_pass(batch_size, images[0].size)
                batches = torch.split(torch.from_numpy(images).to(device), n_per_pass)
                futures = [pool.submit(_predict, wanted, batch) for batch in batches]
                ahead.append((perturbation, level, trial, futures))
                if len(ahead) == 2:
                    yield _wait(*ahead.popleft())
            while ahead:
                yield _wait(*ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _predict(models: Mapping[Model, Predictor], images: Tensor) -> dict[Model, NDArray[np.int64]]:
    predicted: dict[Model, NDArray[np.int64]] = {}
    preparation: object = None
    for name, model in models.items():
        if model.preparation != preparation:
            preparation, prepared = model.preparation, model.prepare(images)
        predicted[name] = model.classify(prepared).argmax(1).cpu().numpy()
    return predicted


def _wait(
    perturbation: str, level: float, trial: int, futures: list[Future[dict[Model, NDArray[np.int64]]]]
) -> tuple[str, float, int, dict[Model, NDArray[np.int64]]]:
    parts = [future.result() for future in futures]
    return perturbation, level, trial, {model: np.concatenate([part[model] for part in parts]) for model in parts[0]}


def _each_trial(clean: Images, perturbed: Perturbed) -> Iterator[tuple[str, float, int, Images]]:
    """The clean test images, then every level and trial: (perturbation, level, trial, images)."""
    yield NATURAL, 0, 0, clean
    for (perturbation, level), (array, made_by) in perturbed.items():
        for trial, images in enumerate(store.read_trials(array, made_by)):
            yield perturbation, level, trial, images
