"""The report's figures, drawn from tables of cells: one PNG each, for one data set."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd

from pipeline.data.datasets import Dataset
from pipeline.data.seeding import level_name
from pipeline.evaluation.metrics import NATURAL, aggregate_trials
from pipeline.perturbations import PERTURBATIONS
from pipeline.reporting.plotting import COLORS, Axes, Figure, Rectangle, default_settings

_GREY = "0.45"
# Of `evaluate.cells`: what names a model.
_MODEL = ["strategy", "train_perturbation", "train_level"]


def aggregate_models(cells: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over trials of every model and level.

    Args:
        cells: Columns as the fields of `ModelCell`.

    Returns:
        Columns strategy, train_perturbation, train_level, perturbation, level, mean, std (ddof 0), n_trials.
    """
    accuracy = cells.assign(accuracy=cells["n_correct"] / cells["n_examples"])
    groups = accuracy.groupby([*_MODEL, "perturbation", "level"], sort=False)["accuracy"]
    return pd.DataFrame({"mean": groups.mean(), "std": groups.std(ddof=0), "n_trials": groups.size()}).reset_index()


@default_settings()
def draw_strategy(models: pd.DataFrame, authors: pd.DataFrame, dataset: Dataset, strategy: str, family: str) -> Figure:
    """Accuracy against training level, a panel per perturbation trained on, ours beside the authors'.

    Args:
        models: From `aggregate_models`, the models of one strategy.
        authors: From `reference.read_strategies`; empty for a strategy that they did not try.
        dataset: Which data set.
        strategy: Its name.
        family: Perturbations trained on.

    Source: paper figures A.1 to C.3, one column of each.
    """
    trained_on = [name for name in PERTURBATIONS if PERTURBATIONS[name].family == family]
    trained_on = [name for name in trained_on if (models["train_perturbation"] == name).any()]
    figure = Figure(figsize=(5.2, 0.8 + 2.7 * len(trained_on)), layout="constrained")
    panels = figure.subplots(len(trained_on), 1, squeeze=False)[:, 0]
    tested = _shown_levels(models, family)
    for axes, name in zip(panels, trained_on, strict=True):
        for (perturbation, level), color in zip(tested, cycle((_GREY, *COLORS)), strict=False):
            label = name_variant(perturbation, level)
            for table, style in ((models, _OURS), (authors, _THEIRS)):
                rows = table[
                    table["train_perturbation"].eq(name)
                    & table["perturbation"].eq(perturbation)
                    & table["level"].eq(level)
                ].sort_values("train_level")
                if len(rows):
                    axes.errorbar(
                        rows["train_level"],
                        100 * rows["mean"],
                        100 * rows["std"],
                        color=color,
                        label=f"{label}{', authors' if style is _THEIRS else ''}",
                        **style,
                    )
        axes.set_title(f"trained on {name}", fontsize=9)
        axes.set_xlabel(f"training level: {PERTURBATIONS[name].unit_text}", fontsize=8)
        axes.set_ylabel("accuracy, %", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7)
    figure.suptitle(f"{dataset.name}, {strategy}", fontsize=10)
    return figure


_OURS: Mapping[str, Any] = {"marker": "o", "markersize": 5, "capsize": 2, "zorder": 3}
_THEIRS: Mapping[str, Any] = {
    "marker": "s", "markersize": 4, "markerfacecolor": "white", "linestyle": "--", "linewidth": 1, "capsize": 2,
    "alpha": 0.8,
}  # fmt: skip


def _shown_levels(models: pd.DataFrame, family: str) -> list[tuple[str, float]]:
    """Natural images and the levels of a family, in the order in which they were measured."""
    shown = [
        (perturbation, level)
        for perturbation, level in zip(models["perturbation"], models["level"], strict=True)
        if perturbation == NATURAL or PERTURBATIONS[perturbation].family == family
    ]
    return list(dict.fromkeys(shown))


@default_settings()
def draw_summary(numbers: pd.DataFrame, dataset: Dataset) -> Figure:
    """Clean, robust, cross and worst accuracy of every strategy beside the natural model, as bars.

    Args:
        numbers: Index the strategies, `natural` first; columns the accuracies, in [0, 1], missing where there is none.
        dataset: Which data set.
    """
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(numbers)
    positions = np.arange(len(numbers.columns))
    for offset, ((strategy, row), color) in enumerate(zip(numbers.iterrows(), cycle((_GREY, *COLORS)), strict=False)):
        values = 100 * row.to_numpy(float)
        bars = axes.bar(positions + (offset - (len(numbers) - 1) / 2) * width, values, width, color=color)
        bars.set_label(str(strategy))
        axes.bar_label(bars, [f"{value:.0f}" if np.isfinite(value) else "" for value in values], fontsize=7)
    axes.set_xticks(positions, [str(name) for name in numbers.columns])
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 108)
    axes.set_title(f"{dataset.name}: what each way of training gives", fontsize=10)
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=len(numbers), fontsize=8)
    return figure


def cross_matrix(models: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of what was trained on (rows) on what is tested on (columns), mean over training levels; in [0, 1].

    Args:
        models: From `aggregate_models`: the models of one strategy and the natural one.
    """
    columns = [name_variant(name, level) for name, level in zip(models["perturbation"], models["level"], strict=True)]
    table = models.assign(tested=columns)
    matrix = table.pivot_table("mean", "train_perturbation", "tested", sort=False)
    return matrix[list(dict.fromkeys(columns))]


@default_settings()
def draw_cross_matrix(matrix: pd.DataFrame, dataset: Dataset, strategy: str) -> Figure:
    """The matrix of `cross_matrix` as a heat map; own families are framed.

    Args:
        matrix: Accuracies in [0, 1].
        dataset: Which data set.
        strategy: Its name.
    """
    figure = Figure(figsize=(1.5 + 0.62 * len(matrix.columns), 1.3 + 0.42 * len(matrix)), layout="constrained")
    axes = figure.add_subplot()
    values = matrix.to_numpy(float)
    axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for row, trained_on in enumerate(matrix.index):
        for column, tested in enumerate(matrix.columns):
            value = values[row, column]
            own = _family(str(trained_on)) == _family(str(tested))
            axes.text(
                column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8,
                color="white" if value < 0.6 else "black", weight="bold" if own else "normal",
            )  # fmt: skip
            if own:
                axes.add_patch(_frame(column, row))
    axes.set_xticks(range(len(matrix.columns)), list(matrix.columns), rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(matrix)), list(matrix.index), fontsize=8)
    axes.set_xlabel("tested on", fontsize=8)
    axes.set_ylabel("trained on", fontsize=8)
    axes.set_title(f"{dataset.name}, {strategy}: accuracy, %", fontsize=9)
    return figure


def _frame(column: int, row: int) -> Rectangle:
    return Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, fill=False, edgecolor="#d55e00", linewidth=1.6)


def _family(name: str) -> str:
    perturbation = name.split()[0]
    return NATURAL if perturbation == NATURAL else PERTURBATIONS[perturbation].family


@default_settings()
def draw_ablation(variants: Mapping[str, pd.DataFrame], dataset: Dataset, title: str) -> Figure:
    """Accuracy against level of every perturbation, a line per variant.

    Args:
        variants: Variant → its cells on test images, columns as the fields of `Cell`.
        dataset: Which data set.
        title: What the variants differ in.
    """
    tables = {name: aggregate_trials(cells) for name, cells in variants.items()}
    first = next(iter(tables.values()))
    names = [name for name in dict.fromkeys(first["perturbation"]) if name != NATURAL]
    n_rows = -(-len(names) // 2)
    figure = Figure(figsize=(6.4, 0.9 + 2.1 * n_rows), layout="constrained")
    panels = list(figure.subplots(n_rows, 2, squeeze=False, sharey=True).flat)
    for axes, name in zip(panels, names, strict=False):
        for (variant, table), color in zip(tables.items(), cycle(COLORS), strict=False):
            rows = table[table["perturbation"].isin([name, NATURAL])].sort_values("level")
            axes.errorbar(rows["level"], 100 * rows["mean"], 100 * rows["std"], color=color, label=variant, **_OURS)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(f"{PERTURBATIONS[name].unit_text}; 0: natural images", fontsize=7)
        axes.tick_params(labelsize=8)
        axes.set_ylim(0, 101)
        axes.grid(alpha=0.25)
    for axes in panels[len(names) :]:
        axes.axis("off")
    for axes in panels[::2]:
        axes.set_ylabel("accuracy, %", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"{dataset.name}, natural model: {title}", fontsize=10)
    return figure


@default_settings()
def draw_confusion(confusions: pd.DataFrame, classes: Sequence[str], title: str) -> Figure:
    """Share of the images of each class (row) that the model takes for each class (column).

    Args:
        confusions: Columns as the fields of `Confusion`, of one model and level.
        classes: Names of the labels.
        title: Which model sees what.
    """
    counts = confusions.pivot_table("n_examples", "actual", "predicted", aggfunc="sum").to_numpy(float)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    figure = Figure(figsize=(4.2, 4.4), layout="constrained")
    axes: Axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for actual, predicted in zip(*np.nonzero(shares >= 0.005), strict=True):
        share = shares[actual, predicted]
        axes.text(
            predicted, actual, f"{100 * share:.0f}", ha="center", va="center", fontsize=7,
            color="white" if share > 0.5 else "black",
        )  # fmt: skip
    axes.set_xticks(range(len(classes)), classes, rotation=45 if max(map(len, classes)) > 1 else 0, fontsize=7)
    axes.set_yticks(range(len(classes)), classes, fontsize=7)
    axes.set_xlabel("taken for", fontsize=8)
    axes.set_ylabel("class", fontsize=8)
    axes.set_title(title, fontsize=9)
    return figure


def name_variant(perturbation: str, level: float) -> str:
    """A level in words: `noise 0.05`, `hot 2`, `natural`."""
    return NATURAL if perturbation == NATURAL else f"{perturbation} {level_name(level)}"
