"""The profiles have the form in which `dvc exp run -S` writes them, so that it changes the line of its key only."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from tests.conftest import ROOT

PROFILES = {path.stem: path.read_text() for path in sorted((ROOT / "profiles").glob("*.yaml"))}
# Blocks of which a part may be left out, `-S '~datasets.cifar10'`; the parts have names of the user's choice.
OPTIONAL = (
    *("datasets", "perturbations", "train.recipes", "strategies", "evaluate.levels"),
    *("ablations", "ablations.components", "ablations.standardization"),
)


def parse(text: str) -> dict[str, Any]:
    values: dict[str, Any] = YAML(typ="safe").load(text)
    return values


def override(text: str, changes: list[str], folder: Path) -> str:
    """The text after `dvc exp run -S` with these changes."""
    path = folder / "params.yaml"
    path.write_text(text)
    apply_overrides(path, changes)
    return path.read_text()


def values_below(value: Any, *path: str | int) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Path and value of every scalar and every list below `value`."""
    if not isinstance(value, dict):
        yield path, value
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from values_below(item, *path, name)


def other_than(value: Any) -> Any:
    """A value of the same type and about the same length."""
    if isinstance(value, bool):
        return not value
    return {int: lambda: value + 1, float: lambda: value + 1}.get(type(value), lambda: "other")()


def dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


def with_values(text: str, given: dict[tuple[str | int, ...], Any]) -> dict[str, Any]:
    values = parse(text)
    for path, value in given.items():
        node: Any = values
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = value
    return values


def changed_lines(before: str, after: str) -> list[str]:
    """The lines that were taken away or added."""
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0))[2:]
    return [line[1:] for line in lines if not line.startswith("@@")]


def is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_is_as_dvc_writes_it(profile: str, tmp_path: Path) -> None:
    text = PROFILES[profile]
    assert override(text, ["perturb.seed=2004"], tmp_path) == text
    scalars = [(path, value) for path, value in values_below(parse(text)) if not isinstance(value, list)]
    changes = [f"{dotted(path)}={str(other_than(value)).lower()}" for path, value in scalars]
    lines, written = text.splitlines(), override(text, changes, tmp_path).splitlines()
    assert len(written) == len(lines)
    for old, new in zip(lines, written, strict=True):
        has_value = not is_comment(old) and (old.partition(": ")[2] or old.lstrip().startswith("- "))
        assert (old == new) == (not has_value or old.endswith(("{}", "[]"))) or old == "  local_folder:"
    found = dict(values_below(parse("\n".join(written))))
    assert all(found[path] == other_than(value) for path, value in scalars)


@pytest.mark.parametrize("profile", PROFILES)
def test_lists_given_whole_change_their_own_lines(profile: str, tmp_path: Path) -> None:
    text, given = PROFILES[profile], [7, 8, 9]
    lists = {path: value for path, value in values_below(parse(text)) if isinstance(value, list)}
    outer = {path: value for path, value in lists.items() if not any(path[:n] in lists for n in range(len(path)))}
    written = override(text, [f"{dotted(path)}={given}" for path in outer], tmp_path)
    assert parse(written) == with_values(text, dict.fromkeys(outer, given))
    own = {"- "}
    for path, value in outer.items():
        own |= {f"{path[-1]}:", *(f"{name}:" for item in value if isinstance(item, dict) for name in item)}
    for line in changed_lines(text, written):
        assert not is_comment(line), line
        assert line.lstrip().startswith(tuple(own)), line


def without_block(text: str, *path: str) -> list[str]:
    """The lines of the text, empty ones left out, without the block of this path."""
    lines = [line for line in text.splitlines() if line]
    start = 0
    for depth, name in enumerate(path):
        start = next(n for n in range(start, len(lines)) if lines[n].startswith(f"{'  ' * depth}{name}:"))
    indent = "  " * (len(path) - 1)
    inside = (f"{indent} ", f"{indent}- ")
    stop = next((n for n in range(start + 1, len(lines)) if not lines[n].startswith(inside)), len(lines))
    return lines[:start] + lines[stop:]


@pytest.mark.parametrize(
    "profile", [pytest.param(name, marks=[] if name in ("quick", "own") else pytest.mark.slow) for name in PROFILES]
)
def test_a_part_left_out_takes_its_own_comments_and_no_others(profile: str, tmp_path: Path) -> None:
    text = PROFILES[profile]
    for block in OPTIONAL:
        names = parse(text)
        for part in block.split("."):
            names = names.get(part, {})
        for name in names:
            written = override(text, [f"~{block}.{name}"], tmp_path)
            if len(names) > 1:
                assert [line for line in written.splitlines() if line] == without_block(text, *block.split("."), name)
        emptied = override(text, [f"~{block}.{name}" for name in names], tmp_path)
        assert parse(emptied) == with_values(text, {tuple(block.split(".")): {}}) if names else True
