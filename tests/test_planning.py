"""The plan is what the stages do: its arrays, models and cells are those that are found when all has run."""

from typing import Any

import pytest
import zarr

from pipeline.runtime import layout
from pipeline.study import params
from pipeline.study.params import load
from pipeline.study.planning import MEASURING, plan_studies, plan_study
from tests.test_params import WHERE, changed
from tests.test_stages import read_rows, succeed
from tests.test_work import done, done_once  # noqa: F401


def test_what_is_planned_is_what_is_found(done: Any) -> None:  # noqa: F811
    study = plan_study(load(), "mnist")
    for perturbation, arrays in study.arrays.items():
        root = zarr.open_group(layout.perturbed_store("mnist", perturbation), mode="r")
        found = {f"{level}/{split}": array.shape for level, group in root.groups() for split, array in group.arrays()}
        assert found == {array.name: array.shape for array in arrays}
    made = set(layout.strategy_models("mnist").rglob("*.safetensors"))
    assert made == {job.path for job in study.jobs("strategies")}
    for stage, curves in (("train", layout.natural_curves), ("strategies", layout.strategy_curves)):
        epochs = sum(job.plan.recipe.epochs for job in study.jobs(stage))
        assert len(read_rows(curves("mnist"))) == epochs
    measured = [(row["strategy"], row["perturbation"]) for row in read_rows(layout.cells("evaluate", "mnist"))]
    assert measured == [(cell.strategy, cell.perturbation) for cell in study.cells("evaluate")]
    assert f"mnist evaluate: {len(measured)} cells, " in succeed("plan", "evaluate", "mnist")


def test_quick_in_numbers(quick_values: dict[str, Any]) -> None:
    """Counted by hand: 5 perturbations with 1 training level and 3 test levels, of which blur has 1 trial, others 3."""
    studies = plan_studies(params.validate(quick_values, WHERE))
    assert list(studies) == ["mnist", "cifar10"]
    for study in studies.values():
        assert len(study.jobs("train")) == 1
        assert len(study.jobs("strategies")) == 3 * 5
        assert len(study.jobs("ablations")) == 2 + 2  # components and standardization, the natural model left out
        assert len(study.cells("impact")) == 1 + 3 * (4 * 3 + 1)
        assert len(study.cells("ablations")) == 6 * (2 + 3 * (4 * 3 + 1))


def test_the_order_of_blocks_changes_nothing(quick_values: dict[str, Any]) -> None:
    def turned(block: Any) -> Any:
        return {key: turned(block[key]) for key in reversed(block)} if isinstance(block, dict) else block

    model: dict[str, Any] = {
        "dataset": "mnist",
        "kind": "onnx",
        "path": "../a.onnx",
        "architecture": None,
        "channels": "grey",
    }
    model |= {"size": None, "scale": 1.0, "mean": [0.0], "std": [1.0], "classes": None}
    values = quick_values | {"models": {"b": model, "a": model}}
    study, other = (plan_study(params.validate(one, WHERE), "mnist") for one in (values, turned(values)))
    for stage in MEASURING:
        assert study.models(stage) == other.models(stage)
        assert study.cells(stage) == other.cells(stage)
    for stage in ("train", "strategies", "ablations"):
        assert study.jobs(stage) == other.jobs(stage)


@pytest.mark.parametrize(("key", "value"), [("epochs", 5), ("batch_size", 50), ("adam.learning_rate", 0.02)])
def test_what_decides_the_natural_model_decides_those_that_start_from_it(
    key: str, value: float, quick_values: dict[str, Any]
) -> None:
    values = quick_values, changed(quick_values, {f"train.recipes.mnist.{key}": value})
    before, after = (plan_study(params.validate(one, WHERE), "mnist") for one in values)
    for strategy in ("train", "strategies"):
        for job, other in zip(before.jobs(strategy), after.jobs(strategy), strict=True):
            assert job.description != other.description, job.key


@pytest.mark.parametrize("seeds", [[1], [3, 5]])
def test_every_seed_has_models_and_cells_of_its_own(seeds: list[int], quick_values: dict[str, Any]) -> None:
    study = plan_study(params.validate(changed(quick_values, {"train.seeds": seeds}), WHERE), "mnist")
    for stage in MEASURING:
        keys = {cell.model for cell in study.cells(stage)}
        assert {key.seed for key in keys} == set(seeds)
        assert len(keys) == len(seeds) * len({(key.strategy, key.label) for key in keys})
    paths = [job.path for stage in ("train", "strategies", "ablations") for job in study.jobs(stage)]
    assert len(paths) == len(set(paths))
