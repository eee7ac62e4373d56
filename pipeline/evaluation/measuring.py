"""Measures models on clean and perturbed images; every store is read once for all models."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.arrays import Images, Labels
from pipeline.evaluation.metrics import Cell, Confusion, Example
from pipeline.models import external, storage
from pipeline.models.classifier import Classifier
from pipeline.models.devices import images_per_pass, select_device, select_precision
from pipeline.models.external import ExternalClassifier
from pipeline.recipes.plan import CLEAN, ModelKey
from pipeline.runtime.engine import Engine, Held, LocalThreads, check_wanted, shown_here
from pipeline.runtime.errors import PipelineError
from pipeline.study.opening import StudyData, open_study
from pipeline.study.planning import PlannedCell, Study
from pipeline.training.job import ExternalModel, TrainingJob

Extra = TypeVar("Extra")
Classes = Mapping[ModelKey, NDArray[np.int64]]
# (model, perturbation, level) → (class, predicted class) → number of images; pairs that do not occur are left out.
Confusions = Mapping[tuple[ModelKey, str, float], Counter[tuple[int, int]]]


class Predictor:
    """A trained classifier, ready for inference.

    Attributes:
        device: Device that it computes on.
    """

    def __init__(self, classifier: Classifier | ExternalClassifier, device: torch.device, precision: str) -> None:
        """Put a classifier into evaluation mode.

        Args:
            classifier: Is moved to `device`.
            device: Device to compute on.
            precision: Precision of its recipe: `float32`, `bfloat16` or `auto`.
        """
        self.device = device
        self._classifier = classifier.eval().to(device)
        self._precision = select_precision(precision, device)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W, C) → float32 logits (N, n_classes); images and model are on the same device.

        Raises:
            PipelineError: The network does not take images of this shape; a logit is not a finite number.
        """
        if images.shape[1:] != self._classifier.shape:
            raise PipelineError(
                f"images of shape {tuple(images.shape[1:])} do not fit a network for {self._classifier.shape}"
            )
        is_mixed = self._precision != torch.float32
        with torch.inference_mode(), torch.autocast(images.device.type, self._precision, enabled=is_mixed):
            logits: Tensor = self._classifier(images)
            if not logits.isfinite().all():
                which = self._classifier.path or "a model"
                raise PipelineError(f"{which}: its output is not a finite number; {self._classifier.if_not_finite}")
            return logits


@dataclass(frozen=True)
class Predictions:
    """What models predict for one set of images.

    Attributes:
        models: The models.
        cells: A measurement for every model.
        images: uint8 (N, H, W, C).
        labels: uint8 or uint16 (N,).
        classes: Model → predicted classes, int64 (N,).
    """

    models: Mapping[ModelKey, Predictor]
    cells: Sequence[Cell]
    images: Images
    labels: Labels
    classes: Classes


# Models that one job measures on an array on a cluster; on one machine, all. Our choice, by replaying profile paper
# (docs/cluster.md): with all models in each job there are ten jobs, and more than five workers do not help.
MODELS_PER_JOB = 4


@dataclass(frozen=True)
class _Part:
    """The cells measured on one set of images (clean images or a stored array), of all models or of some.

    Attributes:
        images: Which set of images of the stage, as its index.
        trials: The cells of each trial; empty where these models are not measured on it.
    """

    images: int
    trials: Sequence[Sequence[PlannedCell]]

    @property
    def first(self) -> PlannedCell:
        """Its first cell."""
        return next(cell for cells in self.trials for cell in cells)

    @property
    def models(self) -> tuple[ModelKey, ...]:
        """Which models are measured."""
        return tuple(dict.fromkeys(cell.model for cells in self.trials for cell in cells))

    @property
    def n_images(self) -> int:
        """Number of images, all trials together."""
        return len(self.trials) * self.first.n_examples

    @property
    def work(self) -> int:
        """Number of images to classify, over all models."""
        return sum(cell.n_examples for cells in self.trials for cell in cells)


@dataclass(frozen=True)
class _Job(Generic[Extra]):
    """A job that measures one part of the plan, given by its index, and extracts more from its predictions.

    It is small, whatever the study: a cluster is sent one for every part.
    """

    place: int
    plan: Held[Sequence[_Part]]
    batch_size: int
    models: Held[Mapping[ModelKey, Predictor]]
    data: Held[StudyData]
    extract: Callable[[Predictions], Extra]
    progress: Held[Callable[[int], object]]


def load_models(study: Study, stage: str, wanted: Collection[ModelKey] | None = None) -> dict[ModelKey, Predictor]:
    """Load the models that stage `impact`, `evaluate` or `ablations` measures, on the device of the study.

    Args:
        study: The study of a data set.
        stage: Name of the stage.
        wanted: The models to load; None: all.

    Raises:
        PipelineError: A model is missing, damaged, or made with other params.
    """
    device = select_device(study.device)

    def load(model: TrainingJob | ExternalModel) -> Predictor:
        if isinstance(model, ExternalModel):
            shape, n_classes = study.dataset.shape, len(study.dataset.classes)
            return Predictor(external.load(model.path, model.spec, shape, n_classes, model.made_by), device, "float32")
        classifier = storage.load(model.path, model.made_by, model.description)
        return Predictor(classifier, device, model.plan.recipe.precision)

    return {model.key: load(model) for model in study.models(stage) if wanted is None or model.key in wanted}


def local_engine(device: str) -> LocalThreads:
    """Return the engine for this machine: a thread for every core, or a single thread that feeds a GPU.

    Args:
        device: `device` of params.yaml.
    """
    return LocalThreads(torch.get_num_threads() if select_device(device).type == "cpu" else 1)


def extract_nothing(predictions: Predictions) -> None:
    """Extract nothing: for a stage that needs only the cells."""


def measure(
    study: Held[Study],
    stage: str,
    models: Mapping[ModelKey, Predictor],
    data: StudyData,
    extract: Callable[[Predictions], Extra],
    engine: Engine,
    progress: Callable[[int], object] = lambda n_images: None,
) -> tuple[list[Cell], list[Extra]]:
    """Count how many images models classify correctly: on clean images, and at every level and trial.

    Every stored array is read once, for all models, by one thread; several arrays are measured in parallel.

    Args:
        study: The study of a data set, and how another process plans it.
        stage: The stage whose cells to measure.
        models: From `load_models`.
        data: From `open_study`.
        extract: Called with the predictions for every set of images, in any thread; returns what a stage needs besides
            the cells. On a cluster it is called several times per set, each time with some of the models. Picklable.
        engine: Runs the jobs; results do not depend on it.
        progress: Called with the number of images finished since the last call.

    Returns:
        The cells, in planned order, and what `extract` returned, in the order of the cells.

    Raises:
        PipelineError: A store is damaged; a logit is not a finite number.

    Source: paper sections V and VI.
    """
    plan_parts = partial(_plan_parts, study, stage, None if engine.is_in_process else MODELS_PER_JOB)
    plan = plan_parts()
    new = partial(
        _Job,
        plan=Held(plan, plan_parts),
        batch_size=study.get().batch_sizes[stage],
        data=Held(data, partial(_open_study, study, stage)),
        extract=extract,
        progress=shown_here(progress),
    )
    jobs = [
        new(place, models=Held(models, partial(_load_models, study, stage, part.models)))
        for place, part in enumerate(plan)
    ]
    found: dict[int, list[tuple[list[Cell], list[Extra]]]] = {}
    n_left = Counter(part.images for part in plan)
    # The largest first: started last, one of them would keep the other cores waiting.
    for job, measured in engine.run(_measure, sorted(jobs, key=lambda job: -plan[job.place].work)):
        found[job.place], part = measured, plan[job.place]
        n_left[part.images] -= 1
        if not engine.is_in_process and not n_left[part.images]:
            progress(part.n_images)
    cells, extras = [], []
    for _, places in groupby(range(len(plan)), key=lambda place: plan[place].images):
        for of_trial in zip(*(found[place] for place in places), strict=True):
            cells += [cell for of_part, _ in of_trial for cell in of_part]
            extras += [extra for _, of_part in of_trial for extra in of_part]
    return cells, extras


def _plan_parts(study: Held[Study], stage: str, n_models: int | None) -> list[_Part]:
    """Split what a stage measures into parts, in planned order, of `n_models` models each; None: of all models."""
    parts = []
    n_trials = {
        (array.variant.perturbation, array.variant.level): array.leading[0] for array in study.get().tested(stage)
    }
    by_images = groupby(study.get().cells(stage), key=lambda cell: cell.images[:3])
    for place, ((_, perturbation, level), of_images) in enumerate(by_images):
        trials: list[list[PlannedCell]] = [[] for _ in range(n_trials.get((perturbation, level), 1))]
        for cell in of_images:
            trials[cell.trial].append(cell)
        models = list(dict.fromkeys(cell.model for cells in trials for cell in cells))
        for first in range(0, len(models), n_models or len(models)):
            wanted = set(models[first : first + (n_models or len(models))])
            parts.append(_Part(place, [[cell for cell in cells if cell.model in wanted] for cells in trials]))
    return parts


def _load_models(study: Held[Study], stage: str, wanted: Collection[ModelKey]) -> dict[ModelKey, Predictor]:
    return load_models(study.get(), stage, wanted)


def _open_study(study: Held[Study], stage: str) -> StudyData:
    return open_study(study.get(), stage)


def _measure(job: _Job[Extra]) -> list[tuple[list[Cell], list[Extra]]]:
    """Measure a part: for every trial, its cells and what `extract` returns; both empty for a trial without cells."""
    torch.set_num_threads(1)  # in this thread: results do not depend on the number of cores
    part, models, data = job.plan.get()[job.place], job.models.get(), job.data.get()
    first = part.first
    labels = data.labels[first.split]
    found: list[tuple[list[Cell], list[Extra]]] = []
    is_clean = first.perturbation == CLEAN
    trials = [data.clean[first.split]] if is_clean else data.perturbed[first.perturbation, first.level].trials()
    for cells, images in zip(part.trials, trials, strict=True):  # all trials: their digest is checked after the last
        if not cells:
            found.append(([], []))
            continue
        wanted = {cell.model: models[cell.model] for cell in cells}
        on_device = torch.from_numpy(images).to(next(iter(wanted.values())).device)  # once for all models
        batches = torch.split(on_device, images_per_pass(job.batch_size, images[0].size))
        predicted = [_predict(wanted, batch) for batch in batches]
        classes = {model: np.concatenate([batch[model] for batch in predicted]) for model in wanted}
        counted = [Cell(**vars(cell), n_correct=int((classes[cell.model] == labels).sum())) for cell in cells]
        found.append((counted, [job.extract(Predictions(wanted, counted, images, labels, classes))]))
        job.progress.get()(len(images))
    return found


def describe_examples(model: ModelKey, n: int, predictions: Predictions) -> list[Example]:
    """Return what a model predicts for the first n images; nothing for trials other than the first.

    Nothing either if these predictions are not of that model.

    Source: paper figures 3, 5 and 7. The first images of the test set are shown; none is chosen.
    """
    if predictions.cells[0].trial != 0 or model not in predictions.models:
        return []
    predictor = predictions.models[model]
    probabilities = predictor(torch.from_numpy(predictions.images[:n]).to(predictor.device)).softmax(1).cpu().numpy()
    level = predictions.cells[0].perturbation, predictions.cells[0].level
    return [
        Example(*level, index, int(label), int(row.argmax()), round(float(row.max()), 4))
        for index, (label, row) in enumerate(zip(predictions.labels[:n], probabilities, strict=True))
    ]


def count_confusions(levels: Collection[tuple[str, float]], predictions: Predictions) -> Confusions:
    """Count each pair of class and predicted class, for every model on one set of images; nothing at other levels.

    Source: the paper's section IX names this as future work.
    """
    if (predictions.cells[0].perturbation, predictions.cells[0].level) not in levels:
        return {}
    actual = predictions.labels.tolist()
    return {
        (cell.model, cell.perturbation, cell.level): Counter(
            zip(actual, predictions.classes[cell.model].tolist(), strict=True)
        )
        for cell in predictions.cells
    }


def list_confusions(counted: Iterable[Confusions], wanted: Iterable[tuple[ModelKey, str, float]]) -> list[Confusion]:
    """List the counts of some models at some levels, over all trials, with a row for every pair of classes that occurs.

    Args:
        counted: From `count_confusions`, for every set of images.
        wanted: (model, perturbation, level).
    """
    total: defaultdict[tuple[ModelKey, str, float], Counter[tuple[int, int]]] = defaultdict(Counter)
    for of_set in counted:
        for key, counts in of_set.items():
            total[key].update(counts)
    return [
        Confusion(
            **vars(model), perturbation=perturbation, level=level, actual=actual, predicted=predicted, n_examples=n
        )
        for model, perturbation, level in wanted
        for (actual, predicted), n in sorted(total[model, perturbation, level].items())
    ]


def _predict(models: Mapping[ModelKey, Predictor], images: Tensor) -> Classes:
    check_wanted()
    return {key: model(images).argmax(1).cpu().numpy() for key, model in models.items()}
