"""The authors' published values: those behind their figures, and their Table I."""

from importlib import resources

import pandas as pd

from pipeline.data.datasets import Dataset
from pipeline.perturbations import PERTURBATIONS

# The authors' names of data sets that have other names here.
_THEIR_NAMES = {"cifar10": "cifar"}
# The data set of Table I.
_COMPONENTS_OF = "cifar10"


def read_impact(dataset: Dataset) -> pd.DataFrame:
    """Read the values behind figures 4, 6 and 8: columns kind, level, trials, mean, std, natural; percent."""
    return _of(dataset, _read("impact"))


def read_strategies(dataset: Dataset, strategy: str) -> pd.DataFrame:
    """Read the values behind figures A, B or C; accuracies in [0, 1].

    Returns:
        Columns train_perturbation, train_level, perturbation, level, mean, std; `perturbation` is `natural` and
        `level` 0 for natural images. Their pixel models labelled k were trained with k + 1 pixels; `train_level` is
        what they were trained with.
    """
    table = _of(dataset, _read("strategies"))
    table = table[table["strategy"] == strategy]
    is_pixels = table["train_kind"].isin([name for name, one in PERTURBATIONS.items() if one.family == "pixels"])
    return pd.DataFrame(
        {
            "train_perturbation": table["train_kind"],
            "train_level": table["train_level"] + is_pixels,
            "perturbation": table["test_kind"],
            "level": table["test_level"].fillna(0),
            "mean": table["mean"] / 100,
            "std": table["std"].fillna(0) / 100,
        }
    )


def read_components(dataset: Dataset) -> pd.DataFrame:
    """Read Table I of the paper: columns batch_norm, dropout (both bool), activation, train, test; percent."""
    table = _read("components")
    return table if dataset.name == _COMPONENTS_OF else table.iloc[:0]


def _read(name: str) -> pd.DataFrame:
    with resources.files(__name__).joinpath(f"{name}.csv").open() as file:
        return pd.read_csv(file)


def _of(dataset: Dataset, table: pd.DataFrame) -> pd.DataFrame:
    return table[table["dataset"] == _THEIR_NAMES.get(dataset.name, dataset.name)]
