"""Models to train or to measure, as frozen values that can be sent to another process."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.datasets import Dataset
from pipeline.perturbations.variants import PlannedArray
from pipeline.recipes.external import External
from pipeline.recipes.plan import ModelKey, Plan


@dataclass(frozen=True)
class ExternalModel:
    """A model that the user supplies: measured like the natural model, not trained itself.

    Attributes:
        key: Its name in place of a strategy, label `clean`, seed 0.
        dataset: The data set whose images it classifies.
        spec: Where the user's file is and what input it expects.
        path: Folder of the copy that is measured.
        made_by: The command that imports it.
        trained_on: None, because its training data are unknown.
    """

    key: ModelKey
    dataset: Dataset
    spec: External
    path: Path
    made_by: str
    trained_on: None = None


@dataclass(frozen=True)
class TrainingJob:
    """One model to train: all that is needed to train it, to find it, and to recognize its file.

    Attributes:
        key: Its name.
        dataset: Its data set.
        n_train: Number of training images, the first of the split.
        n_test: Number of test images for the learning curve, likewise.
        plan: How it is trained.
        seed_names: Names that the seeds of initial weights, image order, dropout and augmentation are derived from.
        trained_on: The perturbed training images; None for a plan that never uses any.
        start: The model to start from, the natural one or the user's; None to start from scratch.
        device: `device` of params.yaml.
        n_threads: Threads of torch on CPU; 0 for all. Models trained in parallel have one each, so that their weights
            do not depend on the number of cores.
        path: File for its weights.
        made_by: The command that makes it.
        description: All params that determine the model and its learning curve, as JSON values.
    """

    key: ModelKey
    dataset: Dataset
    n_train: int
    n_test: int
    plan: Plan
    seed_names: tuple[int | str, ...]
    trained_on: PlannedArray | None
    start: "TrainingJob | ExternalModel | None"
    device: str
    n_threads: int
    path: Path
    made_by: str
    description: Mapping[str, Any]
