"""What is measured, and metric arithmetic: raw cells in, aggregates out. Accuracies are numbers in [0, 1]."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from pipeline.perturbations import PERTURBATIONS
from pipeline.seeding import level_name

# The row of the clean test images among the cells.
NATURAL = "natural"


@dataclass(frozen=True)
class Cell:
    """One evaluation: how many images of one variant and trial a model classifies correctly.

    Attributes:
        dataset: Name of the data set.
        perturbation: Name of the perturbation, or `natural`.
        level: Its physical value; 0 for `natural`.
        trial: 0-based repetition.
        n_correct: Images classified correctly.
        n_examples: Images classified.
    """

    dataset: str
    perturbation: str
    level: float
    trial: int
    n_correct: int
    n_examples: int


@dataclass(frozen=True)
class Example:
    """What a model says of one pictured test image.

    Attributes:
        perturbation: Name of the perturbation, or `natural`.
        level: Its physical value; 0 for `natural`.
        index: Index of the image in the test split; the perturbed version is that of trial 0.
        label: The right class.
        predicted: The model's class.
        confidence: Its softmax probability, in [0, 1].
    """

    perturbation: str
    level: float
    index: int
    label: int
    predicted: int
    confidence: float


@dataclass(frozen=True)
class ModelName:
    """Which model of a strategy.

    Attributes:
        strategy: Name of the strategy, or `natural`.
        train_perturbation: What it was trained on; `natural` for the natural model.
        train_level: The level that it was trained on; 0 for the natural model.
    """

    strategy: str
    train_perturbation: str
    train_level: float

    @property
    def trained_on(self) -> str:
        """Perturbation and level in words, such as `noise 0.05`."""
        if self.train_perturbation == NATURAL:
            return "natural images"
        return f"{self.train_perturbation} {level_name(self.train_level)}"

    def is_tested_on_own(self, perturbation: str) -> bool:
        """Whether a perturbation belongs to the family that the model was trained on; to the natural model, all do."""
        if NATURAL in (self.train_perturbation, perturbation):
            return True
        return PERTURBATIONS[self.train_perturbation].family == PERTURBATIONS[perturbation].family

    def is_tested(self, perturbation: str, trial: int, cross_trials: int) -> bool:
        """Whether the model is measured on a trial: on all of its own family, on `cross_trials` of other ones."""
        return trial < cross_trials or self.is_tested_on_own(perturbation)


@dataclass(frozen=True)
class ModelCell(Cell, ModelName):
    """A cell, and the model that it is about."""


@dataclass(frozen=True)
class AblationCell(Cell):
    """A cell of a model trained by a changed recipe.

    Attributes:
        variant: Name of the change.
        split: `test`, or `train` for the clean training images.
    """

    variant: str
    split: str


@dataclass(frozen=True)
class Confusion:
    """How often a model takes one class for another, over all trials of one level.

    Attributes:
        perturbation: Name of the perturbation, or `natural`.
        level: Its physical value; 0 for `natural`.
        actual: The right class.
        predicted: The model's class.
        n_examples: Images of the one that were taken for the other.
    """

    perturbation: str
    level: float
    actual: int
    predicted: int
    n_examples: int


@dataclass(frozen=True)
class ModelConfusion(Confusion, ModelName):
    """A confusion, and the model that it is about."""


def to_frame(rows: Sequence[Cell | Example | Confusion]) -> pd.DataFrame:
    """A table with the fields as columns."""
    return pd.DataFrame([asdict(row) for row in rows])


def to_csv(table: pd.DataFrame) -> str:
    """The table as CSV, levels written as the stores name them: the shortest decimal."""
    names = {name: table[name].map(level_name) for name in ("train_level", "level") if name in table}
    return table.assign(**names).to_csv(index=False)


def aggregate_trials(cells: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over trials.

    Args:
        cells: Columns as the fields of `Cell`.

    Returns:
        Columns perturbation, level, mean, std, trials, in the order in which the cells come. `std` has divisor n
        (ddof 0), as the authors' has, and is 0 for a single trial.
    """
    accuracy = cells.assign(accuracy=cells["n_correct"] / cells["n_examples"])
    groups = accuracy.groupby(["perturbation", "level"], sort=False)["accuracy"]
    table = pd.DataFrame({"mean": groups.mean(), "std": groups.std(ddof=0), "trials": groups.size()})
    return table.reset_index()


def summarize(cells: pd.DataFrame) -> dict[str, Any]:
    """The few numbers that tell two experiments apart.

    Args:
        cells: Columns as the fields of `Cell`, with one `natural` row.

    Returns:
        clean_accuracy: On the clean test images.
        robust_accuracy: Unweighted mean over all perturbed (perturbation, level), each the mean of its trials.
        worst_accuracy: The least of them.
        <perturbation>_accuracy: Their mean for one perturbation.
        All rounded to 6 decimals, finer than one image in the largest test set with 25 trials.
        robust_accuracy and worst_accuracy are absent where nothing was perturbed.
    """
    table = aggregate_trials(cells)
    clean = table.loc[table["perturbation"] == NATURAL, "mean"]
    perturbed = table[table["perturbation"] != NATURAL]
    summary = {"clean_accuracy": clean.iloc[0]}
    if len(perturbed):
        summary["robust_accuracy"] = perturbed["mean"].mean()
        summary["worst_accuracy"] = perturbed["mean"].min()
    for perturbation, rows in perturbed.groupby("perturbation", sort=False):
        summary[f"{perturbation}_accuracy"] = rows["mean"].mean()
    return {name: round(float(value), 6) for name, value in summary.items()}


def summarize_ablation(cells: pd.DataFrame) -> dict[str, dict[str, float]]:
    """What tells the variants of an ablation apart: variant → its numbers.

    Args:
        cells: Columns as the fields of `AblationCell`.

    Returns:
        For every variant train_accuracy, on the clean training images in evaluation mode, and all that
        `summarize` gives.
    """
    summaries = {}
    for variant, rows in cells.groupby("variant", sort=False):
        train = rows[rows["split"] == "train"]
        train_accuracy = float(train["n_correct"].sum() / train["n_examples"].sum())
        summary = summarize(rows[rows["split"] == "test"])
        summaries[str(variant)] = {"train_accuracy": round(train_accuracy, 6), **summary}
    return summaries


def find_best(cells: pd.DataFrame, perturbation: str, level: float) -> ModelName | None:
    """The model of any strategy that is most accurate at one level, the first of several; None if there is none.

    Args:
        cells: Columns as the fields of `ModelCell`; models that were trained on another family do not count.
        perturbation: Which perturbation.
        level: Its level.
    """
    family = PERTURBATIONS[perturbation].family
    rows = cells[cells["perturbation"].eq(perturbation) & cells["level"].eq(level) & cells["strategy"].ne(NATURAL)]
    rows = rows[rows["train_perturbation"].map(lambda name: PERTURBATIONS[name].family).eq(family)]
    if rows.empty:
        return None
    model = ["strategy", "train_perturbation", "train_level"]
    sums = rows.groupby(model, sort=False, as_index=False)[["n_correct", "n_examples"]].sum()
    best = sums.iloc[int((sums["n_correct"] / sums["n_examples"]).argmax())]
    return ModelName(str(best["strategy"]), str(best["train_perturbation"]), float(best["train_level"]))


def recall_by_class(confusions: pd.DataFrame) -> pd.Series:
    """Share of the images of each class that are classified correctly, index the class.

    Args:
        confusions: Columns as the fields of `Confusion`, of one model and level.
    """
    right = confusions[confusions["actual"] == confusions["predicted"]].set_index("actual")["n_examples"]
    return right / confusions.groupby("actual")["n_examples"].sum()


def summarize_strategy(cells: pd.DataFrame) -> dict[str, Any]:
    """The few numbers that tell two ways of training apart.

    Args:
        cells: Columns as the fields of `ModelCell`: the models of one strategy, and the natural one.

    Returns:
        clean_accuracy: On clean test images, mean over models.
        robust_accuracy: Unweighted mean over (model, test perturbation, level) where the test perturbation is of the
            family that the model was trained on.
        worst_accuracy: The least of them.
        cross_accuracy: The mean where it is of another family.
        mce: Mean over test perturbations of the error of the models trained on their family, relative to the
            error of the baseline on the same images; perturbations on which the baseline makes none are left out.
        baseline: The model that `mce` is relative to.
        baseline_clean_accuracy, baseline_robust_accuracy, baseline_worst_accuracy: The same of the baseline, over all
            perturbations.
        All rounded to 6 decimals. Absent where there is nothing to average.

    Source: `mce` after Hendrycks and Dietterich (arXiv 1903.12261), with our natural model for their AlexNet.
    """
    model = ["strategy", "train_perturbation", "train_level"]
    accuracy = cells.assign(accuracy=cells["n_correct"] / cells["n_examples"])
    table = accuracy.groupby([*model, "perturbation", "level"], sort=False)["accuracy"].mean().reset_index()
    is_clean, is_baseline = table["perturbation"] == NATURAL, table["strategy"] == NATURAL
    own = pd.Series(
        [
            ModelName(strategy, trained, level).is_tested_on_own(tested)
            for strategy, trained, level, tested in zip(
                table["strategy"], table["train_perturbation"], table["train_level"], table["perturbation"], strict=True
            )
        ],
        index=table.index,
    )
    ours, baseline = table[~is_clean & ~is_baseline], table[~is_clean & is_baseline]
    errors = 1 - ours[own[ours.index]].groupby("perturbation")["accuracy"].mean()
    baseline_errors = 1 - baseline.groupby("perturbation")["accuracy"].mean()
    numbers = {
        "clean_accuracy": table.loc[is_clean & ~is_baseline, "accuracy"].mean(),
        "robust_accuracy": ours.loc[own[ours.index], "accuracy"].mean(),
        "worst_accuracy": ours.loc[own[ours.index], "accuracy"].min(),
        "cross_accuracy": ours.loc[~own[ours.index], "accuracy"].mean(),
        "mce": (errors / baseline_errors[baseline_errors > 0]).mean(),
        "baseline_clean_accuracy": table.loc[is_clean & is_baseline, "accuracy"].mean(),
        "baseline_robust_accuracy": baseline["accuracy"].mean(),
        "baseline_worst_accuracy": baseline["accuracy"].min(),
    }
    return {name: round(float(value), 6) for name, value in numbers.items() if pd.notna(value)} | {"baseline": NATURAL}
