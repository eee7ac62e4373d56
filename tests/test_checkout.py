"""A checkout has the same bytes everywhere, and what editors leave in it changes no stage."""

from pathlib import Path

import pytest

from tests.conftest import copy_index, run

LEFTOVERS = (
    *("__pycache__/blur.cpython-311.pyc", ".ipynb_checkpoints/blur-checkpoint.py", ".idea/workspace.xml"),
    *(".vscode/settings.json", ".blur.py.swp", ".blur.py.swo", "blur.py~", ".#blur.py", "#blur.py#", "blur.py.bak"),
    *("blur.py.orig", "blur.py.rej", ".nfs000000000123", ".DS_Store", "Thumbs.db", "blur.py.partial"),
)


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_index(tmp_path_factory.mktemp("committed"))


@pytest.mark.parametrize("autocrlf", ["true", "input", "false"])
def test_a_clone_has_the_bytes_that_were_committed(autocrlf: str, committed: Path, tmp_path: Path) -> None:
    run(tmp_path, "git", "clone", "-q", "-c", f"core.autocrlf={autocrlf}", str(committed), "clone")
    for name in filter(None, run(committed, "git", "ls-files", "-z").split("\0")):
        content = (tmp_path / "clone" / name).read_bytes()
        assert content == (committed / name).read_bytes(), name
        assert name.endswith(".png") or b"\r" not in content, name
    assert run(tmp_path / "clone", "git", "status", "--short") == ""


@pytest.mark.parametrize("tool", ["dvc", "git"])
def test_leftovers_in_folders_of_code_are_ignored(tool: str, committed: Path) -> None:
    folders = ("pipeline/models", "pipeline/perturbations", "pipeline/reporting/published")
    paths = [f"{folder}/{name}" for folder in folders for name in LEFTOVERS]
    for path in paths:
        (committed / path).parent.mkdir(exist_ok=True)
        (committed / path).write_text("left behind")
    assert run(committed, tool, "check-ignore", *paths).splitlines() == paths
    assert run(committed, "git", "status", "--short") == ""


def test_code_is_not_ignored(committed: Path) -> None:
    names = [name for name in run(committed, "git", "ls-files").splitlines() if name.startswith("pipeline/")]
    for tool in ("dvc", "git"):
        assert run(committed, tool, "check-ignore", *names, status=1) == ""
