"""What is measured, and metric arithmetic: raw cells in, aggregates out. Accuracies are numbers in [0, 1]."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

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


def to_frame(rows: Sequence[Cell | Example]) -> pd.DataFrame:
    """A table with the fields as columns."""
    return pd.DataFrame([asdict(row) for row in rows])


def to_csv(table: pd.DataFrame) -> str:
    """The table as CSV, levels written as the stores name them: the shortest decimal."""
    return table.assign(level=table["level"].map(level_name)).to_csv(index=False)


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
