"""Pictures are the same whatever the user has told matplotlib, and matplotlib stays as the user has told it."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, command_environment

EXOTIC = "lines.linewidth: 30\nfont.size: 30\nsavefig.dpi: 10\nsavefig.transparent: True\ntext.usetex: True\n"
GARBAGE = b"\xff\xfe lines.linewidth"
_DRAW = """
import hashlib, json, os, sys
environment, folder = dict(os.environ), os.getcwd()
{before}
from pipeline.reporting.plotting import Figure, default_settings, matplotlib, save_figure
assert (dict(os.environ), os.getcwd()) == (environment, folder)
settings = {{name: str(value) for name, value in matplotlib.rcParams.copy().items()}}

@default_settings()
def draw():
    figure = Figure(figsize=(2, 2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([1, 2, 4], label="one")
    axes.set_title("σ ✗")
    axes.legend()
    return figure

from pathlib import Path
save_figure(draw(), Path(sys.argv[1]), dpi=100)
assert settings == {{name: str(value) for name, value in matplotlib.rcParams.copy().items()}}
digest = hashlib.sha256(Path(sys.argv[1]).read_bytes()).hexdigest()
print(json.dumps([digest, settings["lines.linewidth"], settings["backend"]]))
"""


def draw(folder: Path, before: str = "", **environment: str) -> Any:
    """Digest of a figure drawn in a process of its own, then the line width and backend that its user has."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", _DRAW.format(before=before), str(folder.parent / "drawn.png")],
        cwd=folder,
        env={**command_environment(), "HOME": str(folder.parent), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the figure that a user draws who has set nothing."""
    path = tmp_path_factory.mktemp("plain") / "folder"
    path.mkdir()
    return str(draw(path)[0])


def loop(path: Path) -> str:
    path.symlink_to(path)
    return str(path)


def pipe(path: Path) -> str:
    os.mkfifo(path)
    return str(path)


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# What the user has set: (folder, empty otherwise) → environment.
SETTINGS: dict[str, Callable[[Path], dict[str, str]]] = {
    "backend-of-a-notebook": lambda folder: {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
    "backend-unknown": lambda folder: {"MPLBACKEND": "nonsense"},
    "file": lambda folder: {"MATPLOTLIBRC": write(folder.parent / "exotic", EXOTIC)},
    "file-broken": lambda folder: {"MATPLOTLIBRC": write(folder.parent / "exotic", GARBAGE)},
    "working-directory": lambda folder: {"NAME": write(folder / "matplotlibrc", EXOTIC)},
    "working-directory-broken": lambda folder: {"NAME": write(folder / "matplotlibrc", GARBAGE)},
    "working-directory-pipe": lambda folder: {"NAME": pipe(folder / "matplotlibrc")},
    "home-broken": lambda folder: {"NAME": write(folder.parent / ".config/matplotlib/matplotlibrc", GARBAGE)},
    "configuration-unwritable": lambda folder: {"MPLCONFIGDIR": write(folder.parent / "file", "") + "/below"},
    "configuration-loop": lambda folder: {"MPLCONFIGDIR": loop(folder.parent / "loop")},
    "home-unwritable": lambda folder: {"HOME": write(folder.parent / "file", "") + "/below"},
    "home-loop": lambda folder: {"HOME": loop(folder.parent / "loop")},
}


@pytest.mark.parametrize("settings", [pytest.param(settings, id=name) for name, settings in SETTINGS.items()])
def test_a_figure_has_the_same_bytes_whatever_the_user_has_set(
    settings: Callable[[Path], dict[str, str]], folder: Path, digest: str
) -> None:
    assert draw(folder, **settings(folder))[0] == digest


def test_a_figure_has_the_same_bytes_in_a_session_with_settings(folder: Path, digest: str) -> None:
    before = "import matplotlib; matplotlib.rcParams.update({'lines.linewidth': 30, 'font.size': 30, 'backend': 'svg'})"
    assert draw(folder, before) == [digest, "30.0", "svg"]


def test_matplotlib_is_left_as_the_user_has_set_it(folder: Path, digest: str) -> None:
    write(folder / "matplotlibrc", EXOTIC)
    assert draw(folder, MPLBACKEND="svg") == [digest, "30.0", "svg"]


def test_every_figure_is_drawn_with_the_default_settings() -> None:
    drawn = 0
    for path in (ROOT / "pipeline").rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                called = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
                if "Figure" in called:
                    drawn += 1
                    assert "default_settings()" in map(ast.unparse, function.decorator_list), function.name
    assert drawn >= 8
