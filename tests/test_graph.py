"""The code is layered, and every stage in dvc.yaml names the code and the params that decide its output."""

import ast
import itertools
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.data.datasets import DATASETS
from tests.conftest import ROOT

PACKAGE = ROOT / "pipeline"
# Lowest first; a module imports only from layers below its own.
LAYERS = [
    {"errors", "stopping", "streams"},
    {"", "arrays", "datasets", "files", "layout", "memory", "recipes", "seeding"},
    {"perturbations", "strategies"},
    {"lockfile", "metrics", "params", "store"},
    {"devices", "networks", "plotting", "reference", "regimens", "sources", "variants", "workers"},
    {"evaluation", "generation", "models", "results", "training"},
    {"kept"},
    {"campaign", "charts", "drawing", "verification"},
    {"report"},
    {"stages"},
    {"commands"},
    {"__main__"},
]
# These say what types are called, where things lie, how params are read and what errors look like; no output depends on
# them.
PLUMBING = {
    "",
    "arrays",
    "errors",
    "files",
    "layout",
    "lockfile",
    "memory",
    "params",
    "stages.options",
    "stages",
    "stopping",
    "streams",
    "workers",
}
STAGES = (
    "check",
    "prepare",
    "perturb",
    "train",
    "impact",
    "figures",
    "strategies",
    "evaluate",
    "ablations",
    "confusion",
    "report",
)


def find_modules() -> dict[str, Path]:
    """Module names below `pipeline`, such as `stages.train` or, for the package itself, an empty one."""
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = find_modules()


def imports_of(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pipeline":
            base = node.module.removeprefix("pipeline").removeprefix(".")
            for alias in node.names:
                name = f"{base}.{alias.name}" if base else alias.name
                found.add(name if name in MODULES else base)
        elif isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "pipeline" for alias in node.names), "use from ... import"
    return found


def layer_of(module: str) -> int:
    top = module.split(".")[0]
    return next(number for number, names in enumerate(LAYERS) if top in names)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_layers_below(module: str) -> None:
    for imported in imports_of(module):
        same_package = imported.split(".")[0] == module.split(".")[0]
        assert same_package or layer_of(imported) < layer_of(module) or imported == "arrays", imported
        if layer_of(module) == len(LAYERS) - 3 and imported.startswith("stages"):
            assert imported in ("stages", "stages.options"), "a stage imports no other stage"


def test_only_one_module_imports_zarr_and_matplotlib_and_generating_data_does_not_import_torch() -> None:
    importers: dict[str, set[str]] = {"zarr": set(), "torch": set()}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                importers.setdefault(name.split(".")[0], set()).add(module)
    assert importers["zarr"] == {"store"}
    assert importers["matplotlib"] == {"plotting"}
    assert importers["torch"] == {
        *("devices", "campaign", "evaluation", "kept", "networks", "regimens", "training"),
        *(f"networks.{name}" for name in ("compiled", "layers", "windows", "winograd")),
    }


@pytest.fixture(scope="module")
def graph() -> dict[str, Any]:
    stages: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
    return stages


def closure(module: str, stops: set[str]) -> set[str]:
    """A module and those that it imports, directly or not, without looking into `stops`."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        module = waiting.pop()
        if module not in found | stops:
            found.add(module)
            waiting += imports_of(module)
    return found


def test_folders_that_stages_depend_on_are_there_when_params_ask_for_nothing_in_them() -> None:
    # Of strategies or ablations; DVC refuses a dependency that does not exist, and git keeps no empty folder.
    for folder in ("metrics/ablations", *(f"metrics/evaluate/cells/{dataset}" for dataset in DATASETS)):
        assert (ROOT / folder / ".gitkeep").is_file()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_all_code_that_decides_its_output(graph: dict[str, Any], stage: str) -> None:
    needed, reached = closure(f"stages.{stage}", PLUMBING), closure(f"stages.{stage}", set())
    deps = {Path(dep) for dep in graph[stage]["deps"]}
    for module in needed:
        path = MODULES[module].relative_to(ROOT)
        assert path in deps or path.parent in deps, f"{stage} uses {path}"
    code = {dep for dep in deps if dep.suffix == ".py"}
    assert code <= {MODULES[module].relative_to(ROOT) for module in reached}, "a dependency that nothing imports"


def test_the_graph_has_exactly_the_stages_that_have_a_command(graph: dict[str, Any]) -> None:
    assert tuple(graph) == STAGES
    for name, stage in graph.items():
        assert stage["cmd"].split()[:4] == ["python", "-m", "pipeline", name]


@pytest.mark.parametrize("profile", sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml")))
def test_every_tracked_param_exists(graph: dict[str, Any], profile: str) -> None:
    values = YAML(typ="safe", pure=True).load((ROOT / f"profiles/{profile}.yaml").read_text())
    for stage in graph.values():
        for template in stage.get("params", []):
            matrix = {"dataset": "datasets", "perturbation": "perturbations", "strategy": "strategies"}
            matrix["ablation"] = "ablations"
            for items in itertools.product(*(values[block] for block in matrix.values())):
                node, key = values, template
                for name, item in zip(matrix, items, strict=True):
                    key = key.replace(f"${{item.{name}}}", item)
                for part in key.split("."):
                    assert part in node, key
                    node = node[part]
