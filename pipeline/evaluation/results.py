"""Metric files as tables, checked against what params ask for."""

import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, fields
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.data.datasets import Dataset
from pipeline.data.seeding import level_name
from pipeline.evaluation.metrics import (
    NATURAL,
    AblationCell,
    Cell,
    Example,
    ModelCell,
    ModelConfusion,
    ModelName,
    find_best,
    to_csv,
)
from pipeline.runtime import layout
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import read_file
from pipeline.study.params import Params
from pipeline.study.planning import planned_variants

# Ten times the largest table of profile paper.
_MAX_BYTES = 64 * 2**20

# (perturbation, level, trial).
Key = tuple[str, float, int]


def read_impact(params: Params, dataset: Dataset) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cells and examples of the impact study, columns as the fields of `Cell` and `Example`.

    Raises:
        PipelineError: A file is missing, damaged, or made with other params.
    """
    made_by = f"python -m pipeline impact {dataset.name}"
    keys = _tested(params, dataset, params.impact_levels)
    path = layout.impact_cells(dataset.name)
    cells = _read(path, Cell, dataset, made_by)
    _check_keys(path, cells, ["perturbation", "level", "trial"], keys, made_by)
    _check_counts(path, cells, params.datasets[dataset.name].n_test, made_by)
    path = layout.impact_examples(dataset.name)
    examples = _read(path, Example, dataset, made_by)
    shown = range(min(params.impact.n_examples, params.datasets[dataset.name].n_test))
    expected = [(name, level, index) for name, level in dict.fromkeys(key[:2] for key in keys) for index in shown]
    _check_keys(path, examples, ["perturbation", "level", "index"], expected, made_by)
    _check_classes(path, examples[["label", "predicted"]], dataset, made_by)
    if not examples["confidence"].between(0, 1).all():
        raise PipelineError(f"{path}: a confidence that is not in [0, 1]; make it again with `{made_by}`")
    return cells, examples


def read_evaluation(params: Params, dataset: Dataset, strategy: str) -> pd.DataFrame:
    """Cells of the models of a strategy and of the natural one, columns as the fields of `ModelCell`.

    Raises:
        PipelineError: As `read_impact`.
    """
    made_by = f"python -m pipeline evaluate {dataset.name} {strategy}"
    path = layout.evaluate_cells(dataset.name, strategy)
    cells = _read(path, ModelCell, dataset, made_by)
    models = [ModelName(NATURAL, NATURAL, 0), *trained_models(params, dataset, strategy)]
    expected = [
        (model.strategy, model.train_perturbation, model.train_level, *key)
        for key in _tested(params, dataset, params.evaluate.levels)
        for model in models
        if model.is_tested(key[0], key[2], params.evaluate.cross_trials)
    ]
    columns = ["strategy", "train_perturbation", "train_level", "perturbation", "level", "trial"]
    _check_keys(path, cells, columns, expected, made_by)
    _check_counts(path, cells, params.datasets[dataset.name].n_test, made_by)
    return cells


def read_ablation(params: Params, dataset: Dataset, ablation: str) -> pd.DataFrame:
    """Cells of all variants of an ablation, columns as the fields of `AblationCell`.

    Raises:
        PipelineError: As `read_impact`.
    """
    made_by = f"python -m pipeline ablations {dataset.name} {ablation}"
    path = layout.ablation_cells(dataset.name, ablation)
    cells = _read(path, AblationCell, dataset, made_by)
    variants = list(params.ablations[ablation])
    expected = [
        *((variant, "train", NATURAL, 0, 0) for variant in variants),
        *((variant, "test", *key) for key in _tested(params, dataset, params.impact_levels) for variant in variants),
    ]
    _check_keys(path, cells, ["variant", "split", "perturbation", "level", "trial"], expected, made_by)
    subset = params.datasets[dataset.name]
    for split, n_examples in (("train", subset.n_train), ("test", subset.n_test)):
        _check_counts(path, cells[cells["split"] == split], n_examples, made_by)
    return cells


def read_confusions(params: Params, dataset: Dataset) -> pd.DataFrame:
    """Confusions of the natural model and of the best ones, columns as the fields of `ModelConfusion`.

    Raises:
        PipelineError: As `read_impact`.
    """
    made_by = f"python -m pipeline confusion {dataset.name}"
    path = layout.confusion(dataset.name)
    confusions = _read(path, ModelConfusion, dataset, made_by)
    tables = [read_evaluation(params, dataset, strategy) for strategy in params.strategies]
    models = {(NATURAL, 0.0): [ModelName(NATURAL, NATURAL, 0)]}
    for name, (level,) in hardest_levels(params).items():
        best = find_best(pd.concat(tables), name, level) if tables else None
        models[name, level] = [*models[NATURAL, 0.0], *([best] if best else [])]
    classes = range(len(dataset.classes))
    tested = [(astuple(model), *level) for level, of_level in models.items() for model in of_level]
    expected = [(*model, *level, *pair) for model, *level in tested for pair in product(classes, repeat=2)]
    columns = ["strategy", "train_perturbation", "train_level", "perturbation", "level", "actual", "predicted"]
    _check_keys(path, confusions, columns, expected, made_by)
    n_trials = Counter(key[:2] for key in _tested(params, dataset, params.evaluate.levels))
    n_images = [n_trials[name, level] * params.datasets[dataset.name].n_test for _, name, level in tested]
    counts = confusions["n_examples"].to_numpy().reshape(len(tested), -1)
    if counts.min() < 0 or counts.sum(axis=1).tolist() != n_images:
        raise PipelineError(f"{path}: counts that do not add up; make it again with `{made_by}`")
    return confusions


def read_curves(params: Params, dataset: Dataset, strategy: str) -> pd.DataFrame:
    """Learning curves of all models of a strategy, or of the natural model: columns as the fields of `Epoch`.

    Raises:
        PipelineError: As `read_impact`.
    """
    epochs = range(1, params.plan(strategy, dataset.name).recipe.epochs + 1)
    types = {"epoch": "int", "train_loss": "float", "train_accuracy": "float", "test_accuracy": "float"}
    if strategy == NATURAL:
        path, made_by = layout.learning_curve(dataset.name), f"python -m pipeline train {dataset.name}"
        curves = _read_columns(path, types, made_by)
        _check_keys(path, curves, ["epoch"], [(epoch,) for epoch in epochs], made_by)
        return curves
    path, made_by = (
        layout.strategy_curves(dataset.name, strategy),
        f"python -m pipeline strategies {dataset.name} {strategy}",
    )
    curves = _read_columns(path, {"model": "str", **types}, made_by)
    labels = [
        f"{model.train_perturbation}-{level_name(model.train_level)}"
        for model in trained_models(params, dataset, strategy)
    ]
    _check_keys(path, curves, ["model", "epoch"], [(label, epoch) for label in labels for epoch in epochs], made_by)
    return curves


def read_summary(path: Path, expected: Mapping[str, Any], made_by: str) -> dict[str, Any]:
    """The few numbers of a metrics file.

    Args:
        path: The file.
        expected: The same numbers from the cells.
        made_by: Command that makes it, for the error message.

    Raises:
        PipelineError: It is missing, or not what the stage writes of these numbers.
    """
    check_text(path, json.dumps(expected, indent=2) + "\n", made_by)
    return dict(expected)


def trained_models(params: Params, dataset: Dataset, strategy: str) -> list[ModelName]:
    """The models of a strategy that params ask for."""
    return [
        ModelName(strategy, perturbation, variant.level)
        for perturbation in params.perturbations
        for variant, _ in planned_variants(params, dataset.name, perturbation)
        if variant.split == "train"
    ]


def hardest_levels(params: Params) -> dict[str, tuple[float]]:
    """Perturbation → the highest of its levels in `evaluate.levels`."""
    return {name: (max(params.evaluate.levels[name]),) for name in params.perturbations if params.evaluate.levels[name]}


def _tested(params: Params, dataset: Dataset, levels: Any) -> list[Key]:
    """The cells of one model, in the order in which they are measured."""
    return [
        (NATURAL, 0, 0),
        *(
            (perturbation, variant.level, trial)
            for perturbation in params.perturbations
            for variant, leading in planned_variants(params, dataset.name, perturbation)
            if variant.split == "test" and variant.level in levels[perturbation]
            for trial in range(leading[0])
        ),
    ]


def _read(path: Path, row: type, dataset: Dataset, made_by: str) -> pd.DataFrame:
    """A table of rows that were written as `row`, all of this data set."""
    table = _read_columns(path, {field.name: field.type for field in fields(row)}, made_by)
    if "dataset" in table and not table["dataset"].eq(dataset.name).all():
        raise PipelineError(f"{path}: of another data set; make it again with `{made_by}`")
    return table


def _read_columns(path: Path, types: Mapping[str, Any], made_by: str) -> pd.DataFrame:
    """A table of these columns, without gaps, to the byte as it was written."""
    content = _content(path, made_by)
    try:
        # As text first: pandas' own parser does not read every float to the last bit, and takes some names for gaps.
        table = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
        table = table.astype({name: kind for name, kind in types.items() if name in table})
    except (ValueError, OverflowError) as error:  # pandas' parser errors are ValueErrors
        raise PipelineError(f"{path}: damaged ({error}); make it again with `{made_by}`") from None
    if list(table) != list(types):
        raise PipelineError(f"{path}: damaged (columns are not {', '.join(types)}); make it again with `{made_by}`")
    _check_text(path, content, to_csv(table), made_by)
    return table


def _content(path: Path, made_by: str) -> bytes:
    try:
        return read_file(path, _MAX_BYTES)
    except FileNotFoundError:
        raise PipelineError(f"{path}: no such file; make it with `{made_by}`") from None
    except PipelineError as error:
        raise PipelineError(f"{error}; make it again with `{made_by}`") from None


def check_text(path: Path, expected: str, made_by: str) -> None:
    """That a file is to the byte what its stage would write.

    Args:
        path: The file.
        expected: Its content.
        made_by: Command that makes it, for the error message.

    Raises:
        PipelineError: It is missing, or something else.
    """
    _check_text(path, _content(path, made_by), expected, made_by)


def _check_text(path: Path, content: bytes, expected: str, made_by: str) -> None:
    lines = zip_longest(content.split(b"\n"), expected.encode().split(b"\n"), fillvalue=b"")
    for number, (found, wanted) in enumerate(lines, 1):
        if found != wanted:
            shown = [repr(line[:80].decode(errors="backslashreplace")) for line in (found, wanted)]
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
    return tuple(part if isinstance(part, str) else level_name(part) for part in key)


def _check_counts(path: Path, table: pd.DataFrame, n_examples: int, made_by: str) -> None:
    if not (table["n_examples"].eq(n_examples) & table["n_correct"].between(0, n_examples)).all():
        raise PipelineError(f"{path}: counts that do not fit {n_examples} images; make it again with `{made_by}`")


def _check_classes(path: Path, table: pd.DataFrame, dataset: Dataset, made_by: str) -> None:
    if not table.isin(range(len(dataset.classes))).all(axis=None):
        raise PipelineError(f"{path}: a class that {dataset.name} does not have; make it again with `{made_by}`")
