"""Metrics computed from measurements: accuracies in [0, 1], their aggregates, and comparisons of models."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import hypot, sqrt
from statistics import stdev
from typing import Any

import pandas as pd

from pipeline.data.seeding import level_name
from pipeline.recipes.plan import CLEAN, NATURAL, ModelKey
from pipeline.study.planning import PlannedCell

# Columns that name a model, and those that name the images that it was measured on.
_MODEL = ["strategy", "label", "seed"]
_IMAGES = ["seed", "split", "perturbation", "level", "trial"]


@dataclass(frozen=True)
class Cell(PlannedCell):
    """A measurement with its result.

    Attributes:
        n_correct: Images classified correctly.
    """

    n_correct: int


@dataclass(frozen=True)
class Example:
    """A model's prediction for one of the test images that the report shows.

    Attributes:
        perturbation: Name of the perturbation, or `clean`.
        level: Its physical value; 0 for `clean`.
        index: Index of the image in the test split; the perturbed version is that of trial 0.
        actual: The true class.
        predicted: The predicted class.
        confidence: Its softmax probability, in [0, 1].
    """

    perturbation: str
    level: float
    index: int
    actual: int
    predicted: int
    confidence: float


@dataclass(frozen=True)
class Confusion:
    """How often a model takes one class for another, over all trials of one level.

    Attributes:
        strategy: With `label` and `seed`, the `ModelKey` of the model.
        label: Likewise.
        seed: Likewise.
        perturbation: Name of the perturbation, or `clean`.
        level: Its physical value; 0 for `clean`.
        actual: The true class.
        predicted: The predicted class.
        n_examples: Images of class `actual` that were classified as `predicted`.
    """

    strategy: str
    label: str
    seed: int
    perturbation: str
    level: float
    actual: int
    predicted: int
    n_examples: int


def to_frame(rows: Sequence[Cell | Example | Confusion], kind: type = Cell) -> pd.DataFrame:
    """A table with the fields of `kind` as columns."""
    return pd.DataFrame([asdict(row) for row in rows], columns=[field.name for field in fields(kind)])


def to_csv(table: pd.DataFrame) -> str:
    """The table as CSV, levels written as the stores name them: the shortest decimal."""
    names = {name: table[name].map(level_name) for name in ("level",) if name in table}
    return table.assign(**names).to_csv(index=False)


def aggregate_trials(cells: pd.DataFrame) -> pd.DataFrame:
    """Compute mean and standard deviation of accuracy over trials, and over seeds where there are several.

    Args:
        cells: Columns as the fields of `Cell`.

    Returns:
        Columns perturbation, level, mean, std, trials, in the order of the cells. `std` has divisor n (ddof 0), as the
        authors' has, and is 0 for a single trial.
    """
    accuracy = cells.assign(accuracy=cells["n_correct"] / cells["n_examples"])
    groups = accuracy.groupby(["perturbation", "level"], sort=False)["accuracy"]
    table = pd.DataFrame({"mean": groups.mean(), "std": groups.std(ddof=0), "trials": groups.size()})
    return table.reset_index()


def summarize(cells: pd.DataFrame) -> dict[str, Any]:
    """Summarize cells in the few numbers by which experiments are compared.

    Args:
        cells: Columns as the fields of `Cell`, of one model or of one per seed, on test images.

    Returns:
        clean_accuracy: On the clean test images.
        robust_accuracy: Unweighted mean over all perturbed (perturbation, level), each the mean of its trials.
        worst_accuracy: The lowest of them.
        <perturbation>_accuracy: Their mean for one perturbation.
        All rounded to 6 decimals, finer than one image in the largest test set with 25 trials.
        robust_accuracy and worst_accuracy are absent where nothing was perturbed.
    """
    table = aggregate_trials(cells)
    clean = table.loc[table["perturbation"] == CLEAN, "mean"]
    perturbed = table[table["perturbation"] != CLEAN]
    summary = {"clean_accuracy": clean.iloc[0]}
    if len(perturbed):
        summary["robust_accuracy"] = perturbed["mean"].mean()
        summary["worst_accuracy"] = perturbed["mean"].min()
    for perturbation, rows in perturbed.groupby("perturbation", sort=False):
        summary[f"{perturbation}_accuracy"] = rows["mean"].mean()
    return {name: round(float(value), 6) for name, value in summary.items()}


def summarize_ablation(cells: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Summarize the variants of an ablation: variant → its numbers.

    Args:
        cells: Columns as the fields of `Cell`, of one ablation.

    Returns:
        For every variant train_accuracy, on the clean training images in evaluation mode, and all that
        `summarize` gives.
    """
    summaries = {}
    for variant, rows in cells.groupby("label", sort=False):
        train = rows[rows["split"] == "train"]
        train_accuracy = float(train["n_correct"].sum() / train["n_examples"].sum())
        summary = summarize(rows[rows["split"] == "test"])
        summaries[str(variant)] = {"train_accuracy": round(train_accuracy, 6), **summary}
    return summaries


def find_best(cells: pd.DataFrame, perturbation: str, level: float) -> ModelKey | None:
    """Return the model of any strategy with the highest accuracy at one level, the first in a tie; None if none.

    Args:
        cells: Columns as the fields of `Cell`; models that were trained on another family do not count.
        perturbation: Which perturbation.
        level: Its level.
    """
    rows = cells[cells["perturbation"].eq(perturbation) & cells["level"].eq(level) & cells["seen"]]
    if rows.empty:
        return None
    sums = rows.groupby(_MODEL, sort=False, as_index=False)[["n_correct", "n_examples"]].sum()
    best = sums.iloc[int((sums["n_correct"] / sums["n_examples"]).argmax())]
    return ModelKey(str(best["strategy"]), str(best["label"]), int(best["seed"]))


def recall_by_class(confusions: pd.DataFrame) -> pd.Series:
    """Compute the recall of each class: the share of its images classified correctly, indexed by class.

    Args:
        confusions: Columns as the fields of `Confusion`, of one model and level.
    """
    right = confusions[confusions["actual"] == confusions["predicted"]].set_index("actual")["n_examples"]
    all_of_class = confusions.groupby("actual")["n_examples"].sum()
    return right.reindex(all_of_class.index, fill_value=0) / all_of_class


def pair_with_natural(cells: pd.DataFrame) -> pd.DataFrame:
    """Pair every model of a strategy with the natural model of the same seed, on the same images.

    Args:
        cells: Columns as the fields of `Cell`: models of strategies, and the natural ones.

    Returns:
        A row per (model, perturbation, level), clean images included, the natural models left out. Columns strategy,
        label, seed, seen, perturbation, level, accuracy and baseline_accuracy (of the natural model), both means over
        the trials on which the model was measured.
    """
    measured = cells.assign(accuracy=cells["n_correct"] / cells["n_examples"])
    is_baseline = measured["strategy"] == NATURAL
    baseline = measured.loc[is_baseline, [*_IMAGES, "accuracy"]].rename(columns={"accuracy": "baseline_accuracy"})
    paired = measured[~is_baseline].merge(baseline, on=_IMAGES, validate="many_to_one")
    groups = paired.groupby([*_MODEL, "seen", "perturbation", "level"], sort=False)[["accuracy", "baseline_accuracy"]]
    return groups.mean().reset_index()


def summarize_strategy(cells: pd.DataFrame, baseline: str = NATURAL) -> dict[str, Any]:
    """Summarize a strategy in the few numbers by which ways of training are compared.

    Args:
        cells: From `of_strategy`.
        baseline: As in `of_strategy`.

    Returns:
        clean_accuracy: On clean test images, mean over models.
        robust_accuracy: Unweighted mean over (model, test perturbation, level) where the test perturbation is of the
            family that the model was trained on.
        worst_accuracy: The lowest of them, each the mean over seeds.
        cross_accuracy: The mean where it is of another family.
        relative_error: Mean over test perturbations of the error of the models trained on their family, relative to
            that of the baseline on the same images; perturbations without errors of the baseline are left out.
        baseline: The model that `relative_error` is relative to.
        baseline_clean_accuracy: Clean accuracy of the baseline.
        baseline_robust_accuracy, baseline_worst_accuracy, baseline_cross_accuracy: The same of the baseline, over the
            same images with the same weights: a level on which three models were measured counts three times.
        All rounded to 6 decimals. Absent where there is nothing to average.

    Source: `relative_error` is computed like the mCE (mean corruption error) of Hendrycks and Dietterich (arXiv
    1903.12261), with the baseline in place of their AlexNet. But theirs is of one model that has seen no corruption,
    and this is of models that were trained on the damage.
    """
    table = pair_with_natural(cells)
    is_clean = table["perturbation"] == CLEAN
    own, cross = table[table["seen"]], table[~table["seen"] & ~is_clean]
    over_seeds = own.groupby(["label", "perturbation", "level"])[["accuracy", "baseline_accuracy"]].mean()
    errors = 1 - own.groupby("perturbation")[["accuracy", "baseline_accuracy"]].mean()
    errors = errors[errors["baseline_accuracy"] > 0]
    clean_baseline = cells[cells["strategy"].eq(NATURAL) & cells["perturbation"].eq(CLEAN)]
    numbers = {
        "clean_accuracy": table.loc[is_clean, "accuracy"].mean(),
        "robust_accuracy": own["accuracy"].mean(),
        "worst_accuracy": over_seeds["accuracy"].min(),
        "cross_accuracy": cross["accuracy"].mean(),
        "relative_error": (errors["accuracy"] / errors["baseline_accuracy"]).mean(),
        "baseline_clean_accuracy": (clean_baseline["n_correct"] / clean_baseline["n_examples"]).mean(),
        "baseline_robust_accuracy": own["baseline_accuracy"].mean(),
        "baseline_worst_accuracy": over_seeds["baseline_accuracy"].min(),
        "baseline_cross_accuracy": cross["baseline_accuracy"].mean(),
    }
    return {name: round(float(value), 6) for name, value in numbers.items() if pd.notna(value)} | {"baseline": baseline}


def of_strategy(cells: pd.DataFrame, strategy: str, baseline: str = NATURAL) -> pd.DataFrame:
    """Select the cells of a strategy's models, and those of its baseline under the name of the natural models.

    Args:
        cells: Columns as the fields of `Cell`.
        strategy: Name of the strategy.
        baseline: `natural`, or a model of the user, whose cells are then repeated for every seed.
    """
    if baseline == NATURAL:
        return cells[cells["strategy"].isin([NATURAL, strategy])]
    own, given = cells[cells["strategy"] == strategy], cells[cells["strategy"] == baseline]
    beside = [given.assign(strategy=NATURAL, seed=seed) for seed in own["seed"].unique()]
    return pd.concat([own, *beside], ignore_index=True)


@dataclass(frozen=True)
class Comparison:
    """A comparison of a model with its baseline on the same images; accuracies in [0, 1].

    Attributes:
        strategy: Its name.
        n_examples: Test images.
        clean_accuracy: On clean test images, mean over models.
        baseline_clean_accuracy: Of the baseline.
        robust_accuracy: On the damage that each model was trained on, as in `summarize_strategy`.
        baseline_robust_accuracy: Of the baseline, over the same images with the same weights.
        relative_error: As in `summarize_strategy`; None where the baseline makes no error.
        baseline: Its name.
        gains: `gain` of every training seed alone, in the order of the cells.
        clean_gains: `clean_gain`, likewise.
        cross_accuracy: On damage of other families, as in `summarize_strategy`; None without any.
        baseline_cross_accuracy: Of the baseline.
    """

    strategy: str
    n_examples: int
    clean_accuracy: float
    baseline_clean_accuracy: float
    robust_accuracy: float
    baseline_robust_accuracy: float
    relative_error: float | None
    baseline: str = NATURAL
    gains: Sequence[float] = ()
    clean_gains: Sequence[float] = ()
    cross_accuracy: float | None = None
    baseline_cross_accuracy: float | None = None

    @property
    def gain(self) -> float:
        """Robust accuracy above that of the baseline, in [-1, 1]."""
        return self.robust_accuracy - self.baseline_robust_accuracy

    @property
    def clean_gain(self) -> float:
        """Clean accuracy above that of the baseline, in [-1, 1]."""
        return self.clean_accuracy - self.baseline_clean_accuracy

    @property
    def chance(self) -> float:
        """The largest gain or loss that the choice of test images and of training seeds explains."""
        images = two_errors(self.robust_accuracy, self.baseline_robust_accuracy, self.n_examples)
        return hypot(images, error_over_seeds(self.gains))

    @property
    def clean_chance(self) -> float:
        """The same for the gain on clean images."""
        images = two_errors(self.clean_accuracy, self.baseline_clean_accuracy, self.n_examples)
        return hypot(images, error_over_seeds(self.clean_gains))

    @property
    def beats_baseline(self) -> bool:
        """Whether it gains more than chance explains."""
        return self.gain > self.chance


def two_errors(accuracy: float, other: float, n_examples: int) -> float:
    """Return two standard errors of the difference of two accuracies, in [0, 1].

    This is an upper bound: both accuracies are measured on the same images, which makes their difference more certain,
    and that is left out. All levels, trials and models share the same `n_examples` images, so these count only once.
    Variation between training seeds is not included; `error_over_seeds` is that.

    Source: Agresti and Caffo, The American Statistician 54 (2000), 280: two images are added to each accuracy, one
    right and one wrong, so that the error holds for few images and for accuracies of 0 and 1 too.
    """
    n = n_examples
    shares = [(n * share + 1) / (n + 2) for share in (accuracy, other)]
    return 2 * sqrt((n + 2) * sum(share * (1 - share) for share in shares)) / n


def error_over_seeds(differences: Sequence[float]) -> float:
    """Return how far the mean over training seeds may be from that over all seeds; 0 for fewer than two seeds.

    Args:
        differences: Of two accuracies, one for each seed, both models trained with it.

    Source: half of the 95 % confidence interval of a mean by Student's t distribution.
    """
    n = len(differences)
    if n < 2:
        return 0.0
    from scipy.special import stdtrit  # importing it takes a fifth of a second, and most studies have one seed

    return float(stdtrit(n - 1, 0.975) * stdev(differences) / sqrt(n))


def compare_strategies(cells: pd.DataFrame, baselines: Mapping[str, str] | None = None) -> list[Comparison]:
    """Compare every strategy with its baseline, the largest gain first; ties keep the order of the cells.

    Args:
        cells: Columns as the fields of `Cell`: models of all strategies, and the natural ones. A strategy is left out
            if none of its models was tested on the family of perturbations that it was trained on.
        baselines: Strategy → its baseline, where that is not the natural model.
    """
    compared = []
    for strategy in cells.loc[cells["strategy"] != NATURAL, "strategy"].unique():
        baseline = (baselines or {}).get(strategy, NATURAL)
        table = of_strategy(cells, strategy, baseline)
        numbers = summarize_strategy(table, baseline)
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
            of_seeds = [summarize_strategy(rows, baseline) for _, rows in table.groupby("seed", sort=False)]
            gains, clean_gains = (
                [one[f"{kind}_accuracy"] - one[f"baseline_{kind}_accuracy"] for one in of_seeds]
                for kind in ("robust", "clean")
            )
            n_examples, error = int(table["n_examples"].min()), numbers.get("relative_error")
            compared.append(
                Comparison(
                    strategy,
                    n_examples,
                    **accuracies,
                    relative_error=error,
                    baseline=baseline,
                    gains=gains,
                    clean_gains=clean_gains,
                    cross_accuracy=numbers.get("cross_accuracy"),
                    baseline_cross_accuracy=numbers.get("baseline_cross_accuracy"),
                )
            )
    return sorted(compared, key=lambda comparison: comparison.gain, reverse=True)


def compare_seeds(name: str, cells: pd.DataFrame, baseline: pd.DataFrame) -> Comparison | None:
    """Compare a model, under all damage, with the natural models; None if none was tested.

    Args:
        name: Its name.
        cells: Columns as the fields of `Cell`, on test images: of one model per seed, or of a single one.
        baseline: Likewise, of the natural models, on the same images.
    """
    (own, natural) = (
        pd.DataFrame({seed: summarize(rows) for seed, rows in of.groupby("seed", sort=False)}).T
        for of in (cells, baseline)
    )
    if "robust_accuracy" not in natural:
        return None
    if len(own) == 1:  # of the user, compared with the natural model of every seed
        own = own.loc[own.index.repeat(len(natural))].set_index(natural.index)
    return Comparison(
        name,
        int(cells["n_examples"].min()),
        clean_accuracy=float(own["clean_accuracy"].mean()),
        baseline_clean_accuracy=float(natural["clean_accuracy"].mean()),
        robust_accuracy=float(own["robust_accuracy"].mean()),
        baseline_robust_accuracy=float(natural["robust_accuracy"].mean()),
        relative_error=None,
        gains=(own["robust_accuracy"] - natural["robust_accuracy"]).tolist(),
        clean_gains=(own["clean_accuracy"] - natural["clean_accuracy"]).tolist(),
    )


def needed_accuracy(guessing: float) -> float:
    """The clean accuracy below which a model is weak, in [0, 1].

    It is two thirds of the way from guessing to no error at all, 0.7 for ten classes of equal size. A less accurate
    model has not learned its task: what another way of training gains or costs may be learning that was still to be
    done.

    Args:
        guessing: The accuracy of always naming the most frequent class, in (0, 1].

    Source: our choice.
    """
    return guessing + (1 - guessing) * 2 / 3


def is_weak(clean_accuracy: float, n_examples: int, guessing: float) -> bool:
    """Whether a model is weak, beyond the uncertainty from the choice of test images.

    That is, its accuracy is more than two standard errors below the needed one.

    Args:
        clean_accuracy: On clean test images, in [0, 1].
        n_examples: Test images.
        guessing: As `needed_accuracy`.

    Source: our choice; the interval is that of Agresti and Coull, The American Statistician 52 (1998), 119: four images
    are added, two right and two wrong, so that it holds for few images and for accuracies of 0 and 1 too.
    """
    n = n_examples + 4
    share = (n_examples * clean_accuracy + 2) / n
    return share + 2 * sqrt(share * (1 - share) / n) < needed_accuracy(guessing)


def find_guessing(levels: pd.DataFrame, n_examples: int, guessing: float) -> dict[str, float]:
    """Find the lowest level of each perturbation from which on a model is not clearly better than guessing, if any.

    Clearly better means more than two standard errors above it.

    Args:
        levels: From `aggregate_trials`, of one model.
        n_examples: Test images.
        guessing: As `needed_accuracy`.
    """
    limit = guessing + 2 * sqrt(guessing * (1 - guessing) / n_examples)
    found = {}
    for perturbation, rows in levels[levels["perturbation"] != CLEAN].groupby("perturbation", sort=False):
        harmless = max(rows.loc[rows["mean"] > limit, "level"], default=0.0)
        beyond = rows.loc[rows["level"] > harmless, "level"]
        if len(beyond):
            found[str(perturbation)] = float(beyond.min())
    return found
