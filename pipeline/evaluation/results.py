"""Metric files: writing them, and reading them as tables checked against the study's plan."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.data.seeding import level_name
from pipeline.evaluation.metrics import (
    Cell,
    Confusion,
    Example,
    find_best,
    of_strategy,
    summarize,
    summarize_ablation,
    summarize_strategy,
    to_csv,
    to_frame,
)
from pipeline.recipes.plan import CLEAN, NATURAL, ModelKey
from pipeline.runtime import layout
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import read_file, replacing_folder, write_text, write_texts
from pipeline.study.planning import PlannedCell, Study

# Size limits of metric files, far above any: bytes in a row, and without any row.
_MAX_ROW, _MAX_HEAD = 512, 2**20


def read_cells(study: Study, stage: str) -> pd.DataFrame:
    """Read what stage `impact`, `evaluate` or `ablations` has measured, with the fields of `Cell` as columns.

    Raises:
        PipelineError: The file is missing, damaged, or made with other params.
    """
    path, made_by = layout.cells(stage, study.dataset.name), _made_by(stage, study)
    planned = study.cells(stage)
    cells = _read(path, Cell, made_by, len(planned))
    keys = [field.name for field in fields(PlannedCell) if field.name != "n_examples"]
    _check_keys(path, cells, keys, (tuple(getattr(cell, key) for key in keys) for cell in planned), made_by)
    n_examples = pd.Series([cell.n_examples for cell in planned], cells.index)
    if not (cells["n_examples"].eq(n_examples) & cells["n_correct"].between(0, n_examples)).all():
        raise PipelineError(f"{path}: counts that do not fit the images of the study; make it again with `{made_by}`")
    return cells


def read_examples(study: Study) -> pd.DataFrame:
    """Read the natural model's predictions for the pictured images, with the fields of `Example` as columns.

    Raises:
        PipelineError: As `read_cells`.
    """
    path, made_by = layout.examples(study.dataset.name), _made_by("impact", study)
    levels = [(CLEAN, 0.0), *((array.variant.perturbation, array.variant.level) for array in study.tested("impact"))]
    expected = [(*level, index) for level in levels for index in range(study.n_pictured)]
    examples = _read(path, Example, made_by, len(expected))
    _check_keys(path, examples, ["perturbation", "level", "index"], expected, made_by)
    if not examples[["actual", "predicted"]].isin(range(len(study.dataset.classes))).all(axis=None):
        name = study.dataset.name
        raise PipelineError(f"{path}: a class that {name} does not have; make it again with `{made_by}`")
    if not examples["confidence"].between(0, 1).all():
        raise PipelineError(f"{path}: a confidence that is not in [0, 1]; make it again with `{made_by}`")
    return examples


def confused_models(study: Study, cells: pd.DataFrame) -> list[tuple[ModelKey, str, float]]:
    """Return the models whose confusions are counted, and at which levels.

    Args:
        study: The study of a data set.
        cells: From `read_cells`, of `evaluate`.

    Returns:
        (model, perturbation, level): the natural model of the first seed and the user's models, on clean images and at
        the hardest level of every perturbation; at each of these levels, also the best model that was trained on that
        family, if there is one.
    """
    given = [study.natural[0].key, *(model.key for model in study.external)]
    confused = [(model, CLEAN, 0.0) for model in given]
    for perturbation, level in study.hardest.items():
        best = find_best(cells, perturbation, level)
        confused += [(model, perturbation, level) for model in (*given, best) if model is not None]
    return confused


def read_confusions(study: Study, cells: pd.DataFrame) -> pd.DataFrame:
    """Read the confusions of the models in `confused_models`, with the fields of `Confusion` as columns.

    Args:
        study: The study of a data set.
        cells: From `read_cells`, of `evaluate`.

    Raises:
        PipelineError: As `read_cells`.
    """
    path, made_by = layout.confusion(study.dataset.name), _made_by("evaluate", study)
    keys, n_classes = ["strategy", "label", "seed", "perturbation", "level"], len(study.dataset.classes)
    expected = [(*vars(model).values(), *level) for model, *level in confused_models(study, cells)]
    shown = cells.groupby(keys)[["n_examples", "n_correct"]].sum().loc[expected].to_numpy().tolist()
    confusions = _read(path, Confusion, made_by, sum(min(n_examples, n_classes**2) for n_examples, _ in shown))
    groups = confusions.groupby(keys, sort=False)
    _check_keys(path, groups.size().reset_index(), keys, expected, made_by)
    pairs = confusions["actual"] * n_classes + confusions["predicted"]
    is_right = confusions["actual"] == confusions["predicted"]
    counted = confusions.assign(n_correct=confusions["n_examples"].where(is_right, 0))
    is_sound = (
        confusions[["actual", "predicted"]].isin(range(n_classes)).all(axis=None)
        and confusions["n_examples"].ge(1).all()
        and all(pairs[rows].is_monotonic_increasing and pairs[rows].is_unique for rows in groups.indices.values())
        and counted.groupby(keys, sort=False)[["n_examples", "n_correct"]].sum().to_numpy().tolist() == shown
    )
    if not is_sound:
        raise PipelineError(f"{path}: counts that do not add up; make it again with `{made_by}`")
    return confusions


def read_curves(study: Study, stage: str) -> pd.DataFrame:
    """Read the learning curves of the models that stage `train` or `strategies` makes.

    Returns:
        Columns strategy, label, seed, epoch, train_loss, train_accuracy, test_accuracy.

    Raises:
        PipelineError: As `read_cells`.
    """
    path, made_by = curves_path(study, stage), _made_by(stage, study)
    types = {field.name: field.type for field in fields(ModelKey)} | {"epoch": "int"}
    types |= dict.fromkeys(("train_loss", "train_accuracy", "test_accuracy"), "float")
    expected = [
        (*vars(job.key).values(), epoch) for job in study.jobs(stage) for epoch in range(1, job.plan.recipe.epochs + 1)
    ]
    curves = _read_columns(path, types, made_by, len(expected))
    _check_keys(path, curves, ["strategy", "label", "seed", "epoch"], expected, made_by)
    return curves


def curves_path(study: Study, stage: str) -> Path:
    """Where stage `train` or `strategies` writes learning curves."""
    name = study.dataset.name
    return layout.natural_curves(name) if stage == "train" else layout.strategy_curves(name)


def summarize_stage(study: Study, stage: str, cells: pd.DataFrame) -> dict[Path, dict[str, Any]]:
    """Return the files that `dvc metrics` shows for stage `impact`, `evaluate` or `ablations`: path → numbers.

    Args:
        study: The study of a data set.
        stage: Which stage.
        cells: What it measured, columns as the fields of `Cell`.
    """
    name = study.dataset.name
    if stage == "impact":
        groups = {str(strategy): summarize(rows) for strategy, rows in cells.groupby("strategy", sort=False)}
        return {layout.summary(stage, name): {**groups.pop(NATURAL), **groups}}
    if stage == "evaluate":
        return {
            layout.summary(stage, name, strategy): summarize_strategy(of_strategy(cells, strategy, baseline), baseline)
            for strategy, baseline in study.baselines.items()
        }
    return {
        layout.summary(stage, name, ablation, label): summary
        for ablation in study.ablations
        for label, summary in summarize_ablation(cells[cells["strategy"] == ablation]).items()
    }


def summary_to_json(summary: Mapping[str, Any]) -> str:
    """The content of a file that `dvc metrics` shows."""
    return json.dumps(summary, indent=2) + "\n"


def write_cells(
    study: Study,
    stage: str,
    cells: Sequence[Cell],
    examples: Sequence[Example] | None = None,
    confusions: Sequence[Confusion] | None = None,
) -> list[str]:
    """Write what a stage has measured and its summaries; return the summaries as lines of text."""
    name, table = study.dataset.name, to_frame(cells)
    texts = {layout.cells(stage, name): to_csv(table)}
    if examples is not None:
        texts[layout.examples(name)] = to_csv(to_frame(examples, Example))
    if confusions is not None:
        texts[layout.confusion(name)] = to_csv(to_frame(confusions, Confusion))
    summaries, folder = summarize_stage(study, stage, table), layout.summary(stage, name)
    if folder in summaries:
        texts[folder] = summary_to_json(summaries[folder])
    else:  # replaced whole: summaries no longer asked for must go
        with replacing_folder(folder) as staged:
            for path, summary in summaries.items():
                write_text(staged / path.relative_to(folder), summary_to_json(summary))
            write_texts(texts)  # before the summaries, which a full disk must not leave beside other cells
        texts = {}
    write_texts(texts)
    names = {path: " ".join((name, *path.with_suffix("").parts[4:])) for path in summaries}
    return [line for path, summary in summaries.items() for line in _lines_of(names[path], summary)]


def _lines_of(name: str, summary: Mapping[str, Any]) -> list[str]:
    """A line with the numbers of a summary, and one for every model that has a block in it."""
    numbers = {key: value for key, value in summary.items() if not isinstance(value, Mapping)}
    own = f"{name}: " + ", ".join(f"{key} {value}" for key, value in numbers.items())
    blocks = {key: block for key, block in summary.items() if isinstance(block, Mapping)}
    return [own, *(line for key, block in blocks.items() for line in _lines_of(f"{name} {key}", block))]


def _made_by(stage: str, study: Study) -> str:
    return f"python -m pipeline {stage} {study.dataset.name}"


def _read(path: Path, row: type, made_by: str, n_rows: int) -> pd.DataFrame:
    """Read a table with the fields of `row` as columns."""
    return _read_columns(path, {field.name: field.type for field in fields(row)}, made_by, n_rows)


def _read_columns(path: Path, types: Mapping[str, Any], made_by: str, n_rows: int) -> pd.DataFrame:
    """Read a table with these columns; refuse missing values, and any byte that differs from what was written."""
    content = _content(path, made_by, n_rows)
    try:
        # As text first: pandas' parser does not read every float to the last bit, and takes some names for missing.
        table = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
        kinds = {name: getattr(kind, "__name__", kind) for name, kind in types.items()}
        if "seen" in table:
            table["seen"] = table["seen"] == "True"  # anything but `True` or `False` is found below
        table = table.astype({name: kind for name, kind in kinds.items() if name in table})
    except (ValueError, OverflowError) as error:  # pandas' parser errors are ValueErrors
        raise PipelineError(f"{path}: damaged ({error}); make it again with `{made_by}`") from None
    if list(table) != list(types):
        raise PipelineError(f"{path}: damaged (columns are not {', '.join(types)}); make it again with `{made_by}`")
    _check_text(path, content, to_csv(table), made_by)
    return table


def _content(path: Path, made_by: str, n_rows: int) -> bytes:
    try:
        return read_file(path, _MAX_HEAD + _MAX_ROW * n_rows)
    except FileNotFoundError:
        raise PipelineError(f"{path}: no such file; make it with `{made_by}`") from None
    except PipelineError as error:
        raise PipelineError(f"{error}; make it again with `{made_by}`") from None


def check_text(path: Path, expected: str, made_by: str) -> None:
    """Check that a file is, byte for byte, what its stage would write.

    Args:
        path: The file.
        expected: Its content.
        made_by: Command that makes it, for the error message.

    Raises:
        PipelineError: It is missing, or differs.
    """
    _check_text(path, _content(path, made_by, expected.count("\n")), expected, made_by)


def _check_text(path: Path, content: bytes, expected: str, made_by: str) -> None:
    lines = zip_longest(content.split(b"\n"), expected.encode().split(b"\n"))
    for number, (found, wanted) in enumerate(lines, 1):
        if found != wanted:
            shown = [
                "missing" if line is None else repr(line[:80].decode(errors="backslashreplace"))
                for line in (found, wanted)
            ]
            raise PipelineError(
                f"{path}: damaged (line {number} is {shown[0]}, the stage would write {shown[1]}); "
                f"make it again with `{made_by}`"
            )


def _check_keys(
    path: Path, table: pd.DataFrame, columns: Sequence[str], expected: Iterable[tuple[Any, ...]], made_by: str
) -> None:
    found = table[list(columns)].itertuples(index=False, name=None)
    if [_named(key) for key in found] != [_named(key) for key in expected]:
        raise PipelineError(f"{path}: made with other params; make it again with `{made_by}`")


def _named(key: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(level_name(part) if isinstance(part, float) else str(part) for part in key)
