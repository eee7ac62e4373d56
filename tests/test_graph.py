"""The code is layered, and every stage in dvc.yaml names the code and the params that decide its output."""

import ast
import itertools
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT

PACKAGE = ROOT / "pipeline"
# The packages, and the modules beside them, lowest first: each imports from those before it only.
LAYERS = (
    *("runtime", "recipes", "data", "perturbations", "models", "training", "study", "evaluation", "reporting"),
    *("lockfile", "verification", "pytorch", "stages", "commands", "__main__"),
)
# These say what types are called, where things lie, how params are read, what errors look like, and how work is spread;
# no output depends on them.
PLUMBING = {
    *("", "runtime", "lockfile", "stages", "stages.options", "training", "training.job"),
    *("study", "study.opening", "study.params", "study.reading"),
}
STAGES = (
    *("check", "prepare", "perturb", "train", "import-model"),
    *("impact", "strategies", "evaluate", "ablations", "report"),
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


def room_of(module: str) -> str:
    return module.split(".")[0]


def imports_between_rooms() -> set[tuple[str, str]]:
    pairs = {(room_of(module), room_of(imported)) for module in MODULES for imported in imports_of(module)}
    return {(room, other) for room, other in pairs if room and other and room != other}


def test_every_package_has_a_layer() -> None:
    assert {room_of(module) for module in MODULES} - {""} == set(LAYERS)


@pytest.mark.parametrize("room", LAYERS)
def test_a_package_imports_only_from_layers_below(room: str) -> None:
    below = LAYERS[: LAYERS.index(room)]
    assert {other for one, other in imports_between_rooms() if one == room} <= set(below)


def test_packages_know_few_others() -> None:
    assert len(imports_between_rooms()) <= 70


@pytest.mark.parametrize("stage", [name for name in MODULES if name.startswith("stages.")])
def test_a_stage_imports_no_other_stage(stage: str) -> None:
    shared = {"stages", "stages.options"}
    assert {name for name in imports_of(stage) if name.startswith("stages")} <= shared


def test_modules_of_one_package_import_each_other_without_a_cycle() -> None:
    left = {module: {name for name in imports_of(module) if name in MODULES} for module in MODULES}
    packages = {name for name in MODULES if (PACKAGE / name.replace(".", "/")).is_dir()}
    while left:
        free = {module for module, names in left.items() if not (names - packages) & left.keys() - {module}}
        assert free, f"a cycle among {sorted(left)}"
        left = {module: names for module, names in left.items() if module not in free}


def test_zarr_and_obstore_stay_in_their_modules_and_generating_data_does_not_import_torch() -> None:
    importers: dict[str, set[str]] = {"zarr": set(), "torch": set()}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                importers.setdefault(name.split(".")[0], set()).add(module)
    assert importers["zarr"] == {"data.store", "data.backends"}
    assert importers["obstore"] == {"runtime.bucket"}
    assert {room_of(module) for module in importers["torch"]} == {"models", "training", "evaluation", "pytorch"}
    without_torch = closure("stages.perturb", set()) | closure("stages.prepare", set()) | closure("stages.plan", set())
    assert not importers["torch"] & without_torch
    assert not importers["zarr"] & closure("perturbations", set())


@pytest.fixture(scope="module")
def graph() -> dict[str, Any]:
    stages: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
    return {name: stage.get("do", stage) for name, stage in stages.items()}


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


def is_plumbing(module: str) -> bool:
    return module in PLUMBING or module.startswith("runtime.")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_all_code_that_decides_its_output(graph: dict[str, Any], stage: str) -> None:
    plumbing = {module for module in MODULES if is_plumbing(module)}
    module = f"stages.{stage.replace('-', '_')}"
    needed, reached = closure(module, plumbing), closure(module, set())
    deps = {Path(dep) for dep in graph[stage]["deps"]}
    paths = {module: MODULES[module].relative_to(ROOT) for module in MODULES}
    for module in needed:
        assert deps & {paths[module], *paths[module].parents}, f"{stage} uses {paths[module]}"
    for dep in deps:
        if dep.parts[0] == "pipeline":
            assert any(paths[module].is_relative_to(dep) for module in reached), f"nothing imports {dep}"


def test_a_stage_names_a_handful_of_folders(graph: dict[str, Any]) -> None:
    for name, stage in graph.items():
        assert sum(dep.startswith("pipeline/") for dep in stage["deps"]) <= 9, name


def test_the_graph_has_exactly_the_stages_that_have_a_command(graph: dict[str, Any]) -> None:
    assert tuple(graph) == STAGES
    for name, stage in graph.items():
        assert stage["cmd"].split()[:4] == ["python", "-m", "pipeline", name]


@pytest.mark.parametrize("profile", sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml")))
def test_every_tracked_param_exists(graph: dict[str, Any], profile: str) -> None:
    values = YAML(typ="safe", pure=True).load((ROOT / f"profiles/{profile}.yaml").read_text())
    values["models"] = {"mine": {"dataset": next(iter(values["datasets"]))}}
    for name, stage in graph.items():
        for template in stage.get("params", []):
            for dataset, perturbation in itertools.product(values["datasets"], values["perturbations"]):
                node, key = values, template.replace("${key}", "mine" if name == "import-model" else dataset)
                key = key.replace("${item.dataset}", dataset).replace("${item.perturbation}", perturbation)
                for part in key.split("."):
                    assert part in node, key
                    node = node[part]
