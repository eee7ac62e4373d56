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
    """A model of the user's: measured as the natural model is, never trained.

    Attributes:
        key: Its name, as the strategy; label `clean` and seed 0.
        dataset: Whose images it classifies.
        spec: Where the user has it and what it expects.
        path: Folder of the copy that is measured.
        made_by: The command that takes it in.
        trained_on: None: on what, nobody knows.
    """

    key: ModelKey
    dataset: Dataset
    spec: External
    path: Path
    made_by: str
    trained_on: None = None


@dataclass(frozen=True)
class TrainingJob:
    """One model: all that is needed to train it, to find it, and to tell whether a file is it.

    Attributes:
        key: What it is called.
        dataset: Which data set.
        n_train: Training images, the first of the split.
        n_test: Test images of the learning curve, likewise.
        plan: How it is trained.
        seed_names: Decide initial weights, order of images and dropout.
        trained_on: The perturbed training images; None for a plan that never uses any.
        start: The model that a plan starts from, if it does: the natural one, or one of the user's.
        device: `device` of params.yaml.
        n_threads: Threads of torch on CPU; 0 for all. Models trained side by side have one each, so that their weights
            do not depend on the number of cores.
        path: Where its weights go.
        made_by: The command that makes it.
        description: All of params that decides the model and its learning curve, as JSON values.
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
