"""Stores that params no longer name are removed, by however many at a time."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.runtime import layout
from pipeline.study import params
from pipeline.study.opening import remove_stale_stores
from pipeline.study.planning import plan_study
from tests.conftest import WriteParams, tree

FOLDER = layout.perturbed_store("mnist", "any").parent


@pytest.fixture
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_values: dict[str, Any], write_params: WriteParams
) -> Path:
    """The folder of perturbed stores, in which one that params name has a file, and so has a half-made one."""
    monkeypatch.chdir(tmp_path)
    write_params(quick_values)
    for name in ("noise.zarr", ".hot.zarr.partial"):
        (FOLDER / name).mkdir(parents=True)
        (FOLDER / name / "zarr.json").write_text("{}")
    return FOLDER


def make_stale(name: str, n_files: int) -> Path:
    path = FOLDER / f"{name}.zarr"
    for number in range(n_files):
        (path / str(number % 7)).mkdir(parents=True, exist_ok=True)
        (path / str(number % 7) / str(number)).write_bytes(b"x")
    return path


def test_what_params_do_not_name_is_removed_and_nothing_else(folder: Path) -> None:
    before = tree(folder)
    removed = [make_stale(name, 20) for name in ("impulse", "speckle")]
    (folder / "file.zarr").write_bytes(b"x")
    (folder / "link.zarr").symlink_to("noise.zarr")
    stale = remove_stale_stores(plan_study(params.load(), "mnist"))
    assert stale == sorted([*removed, folder / "file.zarr", folder / "link.zarr"])
    assert tree(folder) == before
    assert remove_stale_stores(plan_study(params.load(), "mnist")) == []


def test_what_a_killed_one_left_is_removed_by_the_next(folder: Path) -> None:
    before = tree(folder)
    make_stale("impulse", 20).rename(folder / ".impulse.zarr.0123.stale.partial")
    assert remove_stale_stores(plan_study(params.load(), "mnist")) == []
    assert tree(folder) == before


def test_a_store_that_another_one_takes_first_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(folder)
    rename = Path.rename

    def too_late(self: Path, target: Path) -> Path:
        rename(self, target.with_name(".other.stale.partial"))
        return rename(self, target)

    make_stale("impulse", 20)
    monkeypatch.setattr(Path, "rename", too_late)
    assert remove_stale_stores(plan_study(params.load(), "mnist")) == []
    assert tree(folder) == before


def test_many_that_remove_the_same_stores_at_once_all_succeed(folder: Path) -> None:
    before, study = tree(folder), plan_study(params.load(), "mnist")
    for number in range(20):
        make_stale(f"old{number}", 300)
    with ThreadPoolExecutor(3) as threads:
        removed = list(threads.map(remove_stale_stores, [study] * 3))
    assert sum(map(len, removed)) == 20
    assert tree(folder) == before
