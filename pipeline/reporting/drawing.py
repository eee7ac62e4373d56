"""The paper's figures 3 to 8 as PNG, drawn from metric files and stores."""

from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.data import store
from pipeline.data.arrays import Images
from pipeline.data.datasets import Dataset
from pipeline.data.seeding import level_name
from pipeline.data.store import read_clean
from pipeline.evaluation import results
from pipeline.evaluation.metrics import NATURAL, aggregate_trials
from pipeline.perturbations import PERTURBATIONS
from pipeline.reporting import published
from pipeline.reporting.plotting import COLORS, Axes, Figure, default_settings, save_figure
from pipeline.runtime.files import replacing_folder
from pipeline.study.opening import open_tested
from pipeline.study.params import Params

_RIGHT, _WRONG = "#1a7f37", "#c1121f"
_DPI = 130

# (perturbation, level name) → the first test images in their version of trial 0.
Pictures = dict[tuple[str, str], Images]


def draw_all(params: Params, dataset: Dataset, folder: Path) -> list[Path]:
    """Draw every figure of a data set into `folder`, which is replaced as a whole.

    Args:
        params: The study.
        dataset: Which data set.
        folder: Where the PNG files go.

    Returns:
        The files: per family of perturbations `accuracy_<family>.png` (figures 4, 6, 8 of the paper),
        `examples_<family>.png` (3, 5, 7) and `levels_<family>.png`.

    Raises:
        PipelineError: Metric files or stores are missing, or do not fit params.
    """
    n_shown = min(params.impact.n_examples, params.datasets[dataset.name].n_test)
    pictures: Pictures = {(NATURAL, "0"): read_clean(dataset, "test", "images")[:n_shown]}
    tested = {name: levels.test_levels for name, levels in params.perturbations.items()}
    for (perturbation, level), (array, made_by) in open_tested(params, dataset, tested).items():
        pictures[perturbation, level_name(level)] = store.read_part(array, (0, slice(0, n_shown)), made_by)
    cells, examples = results.read_impact(params, dataset)
    families = dict.fromkeys(PERTURBATIONS[name].family for name, _ in pictures if name != NATURAL)
    written = []
    with replacing_folder(folder) as partial:
        for family in families:
            for kind, figure in (
                ("accuracy", draw_accuracy(cells, dataset, family)),
                ("examples", draw_examples(pictures, examples, dataset, family)),
                ("levels", draw_levels(pictures, dataset, family)),
            ):
                name = f"{kind}_{family}.png"
                save_figure(figure, partial / name, _DPI)
                written.append(folder / name)
    return written


@default_settings()
def draw_accuracy(cells: pd.DataFrame, dataset: Dataset, family: str) -> Figure:
    """Accuracy against level, mean ± standard deviation over trials, with the authors' values at the same levels.

    Args:
        cells: Columns as the fields of `Cell`.
        dataset: Which data set.
        family: Perturbations to draw.

    Source: paper figures 4 (pixels), 6 (noise) and 8 (blur).
    """
    table = aggregate_trials(cells)
    natural = float(table.loc[table["perturbation"] == NATURAL, "mean"].iloc[0])
    authors = published.read_impact(dataset)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(100 * natural, color="0.45", linewidth=1, linestyle=":", label=f"natural images {100 * natural:.1f} %")
    names = [name for name in dict.fromkeys(table["perturbation"]) if name in PERTURBATIONS]
    names = [name for name in names if PERTURBATIONS[name].family == family]
    for name, color in zip(names, cycle(COLORS), strict=False):
        ours = table[table["perturbation"] == name].sort_values("level")
        axes.errorbar(
            ours["level"],
            100 * ours["mean"],
            100 * ours["std"],
            color=color,
            marker="o",
            capsize=3,
            label=f"{name}, ours",
        )
        theirs = authors[(authors["kind"] == name) & authors["level"].isin(ours["level"])].sort_values("level")
        if len(theirs):
            axes.errorbar(
                theirs["level"],
                theirs["mean"],
                theirs["std"],
                color=color,
                marker="s",
                markerfacecolor="white",
                linestyle="--",
                capsize=3,
                label=f"{name}, authors",
            )
    axes.set_xticks(sorted(set(table.loc[table["perturbation"].isin(names), "level"])))
    units = dict.fromkeys(PERTURBATIONS[name].unit_text for name in names)
    axes.set_xlabel(f"{' / '.join(names)}: {' / '.join(units)}")
    axes.set_ylabel("accuracy on test images, %")
    axes.set_ylim(0, 101)
    axes.set_title(f"{dataset.name}, natural model: {family}")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return figure


@default_settings()
def draw_examples(pictures: Pictures, examples: pd.DataFrame, dataset: Dataset, family: str) -> Figure:
    """The first test images, natural and at the hardest level, with the model's class and confidence.

    Args:
        pictures: The images.
        examples: Columns as the fields of `Example`.
        dataset: Which data set.
        family: Perturbations to draw.

    Source: paper figures 3 (pixels), 5 (noise) and 7 (blur). The images are the first of the test set, not chosen.
    """
    rows = [(NATURAL, "0"), *_hardest_levels(pictures, family)]
    n_columns = len(pictures[NATURAL, "0"])
    figure = Figure(figsize=(1.15 * n_columns + 0.9, 1.5 * len(rows) + 0.4), layout="constrained")
    grid = figure.subplots(len(rows), n_columns, squeeze=False)
    for (name, level), row in zip(rows, grid, strict=True):
        chosen = examples[(examples["perturbation"] == name) & (examples["level"].map(level_name) == level)]
        answers = zip(chosen["label"], chosen["predicted"], chosen["confidence"], strict=True)
        for axes, image, (label, predicted, confidence) in zip(row, pictures[name, level], answers, strict=True):
            color = _RIGHT if predicted == label else _WRONG
            mark = "" if predicted == label else " ✗"
            _show(axes, image, color)
            axes.set_title(f"{dataset.classes[predicted]}{mark} {100 * confidence:.0f} %", fontsize=7, color=color)
        row[0].set_ylabel(_row_label(name, level), fontsize=8)
    figure.suptitle(f"{dataset.name}: predictions before and after (✗ wrong), confidence of the model", fontsize=9)
    return figure


@default_settings()
def draw_levels(pictures: Pictures, dataset: Dataset, family: str) -> Figure:
    """One test image at every level of every perturbation of a family.

    Args:
        pictures: The images.
        dataset: Which data set.
        family: Perturbations to draw.
    """
    levels: dict[str, list[str]] = {}
    for name, level in pictures:
        if name != NATURAL and PERTURBATIONS[name].family == family:
            levels.setdefault(name, []).append(level)
    n_columns = 1 + max(len(values) for values in levels.values())
    figure = Figure(figsize=(1.3 * n_columns + 0.6, 1.5 * len(levels) + 0.4), layout="constrained")
    grid = figure.subplots(len(levels), n_columns, squeeze=False)
    for (name, values), row in zip(levels.items(), grid, strict=True):
        for axes in row:
            axes.axis("off")
        shown = [(NATURAL, "0"), *((name, level) for level in values)]
        for axes, key in zip(row, shown, strict=False):
            axes.axis("on")
            _show(axes, pictures[key][0], "0.6")
            axes.set_title("natural" if key[0] == NATURAL else _row_label(*key).replace("\n", " "), fontsize=7)
    figure.suptitle(f"{dataset.name}: levels of {family}", fontsize=9)
    return figure


def _show(axes: Axes, image: Images, color: str) -> None:
    axes.imshow(np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(color)
        spine.set_linewidth(1.5)


def _row_label(name: str, level: str) -> str:
    if name == NATURAL:
        return "natural"
    unit = PERTURBATIONS[name].unit
    if unit == "n_pixels":
        return f"{name}\n{level} pixel{'' if level == '1' else 's'}"
    return f"{name}\n{'σ' if unit == 'sigma' else unit} = {level}"


def _hardest_levels(pictures: Pictures, family: str) -> list[tuple[str, str]]:
    hardest = {
        name: (name, level)
        for name, level in sorted(pictures, key=lambda key: float(key[1]))
        if name != NATURAL and PERTURBATIONS[name].family == family
    }
    return [hardest[name] for name in dict.fromkeys(name for name, _ in pictures) if name in hardest]
