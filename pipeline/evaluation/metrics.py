"""What is measured, and metric arithmetic: raw cells in, aggregates out. Accuracies are numbers in [0, 1]."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import pandas as pd

from pipeline.data.seeding import level_name
from pipeline.perturbations import PERTURBATIONS

# The row of the clean test images among the cells.
NATURAL = "natural"
# Columns that name a model, and those that name the images that it was shown.
_MODEL = ["strategy", "train_perturbation", "train_level"]
_IMAGES = ["perturbation", "level", "trial"]


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
    sums = rows.groupby(_MODEL, sort=False, as_index=False)[["n_correct", "n_examples"]].sum()
    best = sums.iloc[int((sums["n_correct"] / sums["n_examples"]).argmax())]
    return ModelName(str(best["strategy"]), str(best["train_perturbation"]), float(best["train_level"]))


def recall_by_class(confusions: pd.DataFrame) -> pd.Series:
    """Share of the images of each class that are classified correctly, index the class.

    Args:
        confusions: Columns as the fields of `Confusion`, of one model and level.
    """
    right = confusions[confusions["actual"] == confusions["predicted"]].set_index("actual")["n_examples"]
    return right / confusions.groupby("actual")["n_examples"].sum()


def pair_with_natural(cells: pd.DataFrame) -> pd.DataFrame:
    """Every model of a strategy beside the natural model, on the same images.

    Args:
        cells: Columns as the fields of `ModelCell`: the models of one strategy, and the natural one.

    Returns:
        A row per (model, perturbation, level), clean images included, the natural model left out. Columns strategy,
        train_perturbation, train_level, perturbation, level, accuracy and baseline_accuracy (of the natural model),
        both means over the trials on which the model was measured, and is_own: whether the images are damaged by a
        perturbation of the family that the model was trained on.
    """
    measured = cells.assign(accuracy=cells["n_correct"] / cells["n_examples"])
    is_baseline = measured["strategy"] == NATURAL
    baseline = measured.loc[is_baseline, [*_IMAGES, "accuracy"]].rename(columns={"accuracy": "baseline_accuracy"})
    paired = measured[~is_baseline].merge(baseline, on=_IMAGES, validate="many_to_one")
    groups = paired.groupby([*_MODEL, "perturbation", "level"], sort=False)[["accuracy", "baseline_accuracy"]]
    table = groups.mean().reset_index()
    models = table[[*_MODEL, "perturbation"]].itertuples(index=False, name=None)
    own = [tested != NATURAL and ModelName(*model).is_tested_on_own(tested) for *model, tested in models]
    return table.assign(is_own=pd.Series(own, table.index, dtype=bool))


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
        baseline_clean_accuracy: The same of the baseline.
        baseline_robust_accuracy, baseline_worst_accuracy, baseline_cross_accuracy: The same of the baseline, over the
            same images with the same weights: a level on which three models were measured counts three times.
        All rounded to 6 decimals. Absent where there is nothing to average.

    Source: `mce` after Hendrycks and Dietterich (arXiv 1903.12261), with our natural model for their AlexNet.
    """
    table = pair_with_natural(cells)
    is_clean = table["perturbation"] == NATURAL
    own, cross = table[table["is_own"]], table[~table["is_own"] & ~is_clean]
    errors = 1 - own.groupby("perturbation")[["accuracy", "baseline_accuracy"]].mean()
    errors = errors[errors["baseline_accuracy"] > 0]
    clean_baseline = cells[cells["strategy"].eq(NATURAL) & cells["perturbation"].eq(NATURAL)]
    numbers = {
        "clean_accuracy": table.loc[is_clean, "accuracy"].mean(),
        "robust_accuracy": own["accuracy"].mean(),
        "worst_accuracy": own["accuracy"].min(),
        "cross_accuracy": cross["accuracy"].mean(),
        "mce": (errors["accuracy"] / errors["baseline_accuracy"]).mean(),
        "baseline_clean_accuracy": (clean_baseline["n_correct"] / clean_baseline["n_examples"]).mean(),
        "baseline_robust_accuracy": own["baseline_accuracy"].mean(),
        "baseline_worst_accuracy": own["baseline_accuracy"].min(),
        "baseline_cross_accuracy": cross["baseline_accuracy"].mean(),
    }
    return {name: round(float(value), 6) for name, value in numbers.items() if pd.notna(value)} | {"baseline": NATURAL}


@dataclass(frozen=True)
class Comparison:
    """A strategy beside the natural model, on the same images; accuracies in [0, 1].

    Attributes:
        strategy: Its name.
        n_examples: Test images.
        clean_accuracy: On clean test images, mean over models.
        baseline_clean_accuracy: Of the natural model.
        robust_accuracy: On the damage that each model was trained on, as in `summarize_strategy`.
        baseline_robust_accuracy: Of the natural model, over the same images with the same weights.
        mce: As in `summarize_strategy`; None where the natural model makes no error.
    """

    strategy: str
    n_examples: int
    clean_accuracy: float
    baseline_clean_accuracy: float
    robust_accuracy: float
    baseline_robust_accuracy: float
    mce: float | None

    @property
    def gain(self) -> float:
        """Robust accuracy above that of the natural model, in [-1, 1]."""
        return self.robust_accuracy - self.baseline_robust_accuracy

    @property
    def clean_cost(self) -> float:
        """Clean accuracy below that of the natural model, in [-1, 1]."""
        return self.baseline_clean_accuracy - self.clean_accuracy

    @property
    def chance(self) -> float:
        """The largest gain or loss that the choice of the test images explains: two standard errors.

        An upper bound. All levels, trials and models are shown the same `n_examples` images, so these count once,
        and that both accuracies are of the same images, which makes their difference more certain, is left out. That
        another training seed gives another model is not in it.

        Source: Agresti and Caffo, The American Statistician 54 (2000), 280: two images more for either accuracy, one
        right and one wrong, so that it holds for few images and for accuracies of 0 and 1 too.
        """
        n = self.n_examples
        shares = [(n * accuracy + 1) / (n + 2) for accuracy in (self.robust_accuracy, self.baseline_robust_accuracy)]
        return 2 * sqrt((n + 2) * sum(share * (1 - share) for share in shares)) / n

    @property
    def beats_natural(self) -> bool:
        """Whether it gains more than chance explains."""
        return self.gain > self.chance


def compare_strategies(cells: Mapping[str, pd.DataFrame]) -> list[Comparison]:
    """What every strategy gains over doing nothing, the largest gain first, the first named of equal ones.

    Args:
        cells: Strategy → columns as the fields of `ModelCell`: its models, and the natural one. Strategies of which no
            model was tested on damage of the family that it was trained on are left out.
    """
    compared = []
    for strategy, table in cells.items():
        numbers = summarize_strategy(table)
        if "robust_accuracy" in numbers:
            accuracies = {
                name: numbers[name]
                for name in (
                    "clean_accuracy",
                    "baseline_clean_accuracy",
                    "robust_accuracy",
                    "baseline_robust_accuracy",
                )
            }
            n_examples = int(table["n_examples"].min())
            compared.append(Comparison(strategy, n_examples, **accuracies, mce=numbers.get("mce")))
    return sorted(compared, key=lambda comparison: comparison.gain, reverse=True)


def needed_accuracy(n_classes: int) -> float:
    """The clean accuracy below which a natural model is too weak to conclude from, in [0, 1].

    Two thirds of the way from guessing to no error at all, 0.7 for ten classes: a model that errs more has not learned
    its task, and what another way of training gains or costs may be its share of the learning still to be done.

    Source: our choice.
    """
    guessing = 1 / n_classes
    return guessing + (1 - guessing) * 2 / 3
