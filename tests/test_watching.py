"""Folders that DVC leaves out are found as DVC itself finds them."""

from pathlib import Path

import pytest
from dvc.fs import localfs
from dvc.ignore import DvcIgnoreFilter

from pipeline.data.watching import find_overlooked
from pipeline.runtime.errors import PipelineError

# .dvcignore, a folder, and the pattern that leaves it out.
FOLDERS: list[tuple[str, str, str | None]] = [
    ("photos\n", "photos", "photos"),
    ("photos\n", "mine/photos/cats", "photos"),
    ("/photos\n", "mine/photos", None),
    ("# photos\n\n", "photos", None),
    ("mine/*\n!mine/photos\n", "mine/photos", None),
    ("mine/*\n!mine/photos\n", "mine/photos/cats", None),
    ("mine/*\n!mine/photos\n", "mine/others", "mine/*"),
    ("!mine/photos\nmine/*\n", "mine/photos", "mine/*"),
    ("mine\n!mine/photos\n", "mine/photos", "mine"),
    ("mine/**/raw/\n", "mine/a/b/raw", "mine/**/raw/"),
    ("*.bak\n!keep.bak\n", "keep.bak/a", None),
    ("*.bak\n!keep.bak\n", "a/keep.bak/b.bak", None),
    ("", "photos/.dvc/cache", ".dvc"),
    ("", ".git/photos", ".git"),
]


@pytest.mark.parametrize(("content", "folder", "pattern"), FOLDERS)
def test_a_folder_is_overlooked_where_dvc_leaves_it_out(
    content: str, folder: str, pattern: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".dvcignore").write_text(content)
    Path(folder).mkdir(parents=True)
    way = f".dvcignore names {pattern}: DVC would not see what changes there; move it elsewhere"
    assert find_overlooked(Path(folder)) == find_overlooked(tmp_path / folder) == (way if pattern else None)
    assert DvcIgnoreFilter(localfs, str(tmp_path)).is_ignored_dir(str(tmp_path / folder)) == bool(pattern)


def test_where_there_is_no_list_or_the_folder_lies_outside_nothing_is_overlooked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert find_overlooked(Path("photos")) is None
    Path(".dvcignore").write_text("photos\n*\n")
    assert find_overlooked(Path("../photos")) is None
    assert find_overlooked(Path()) is None


@pytest.mark.parametrize("pattern", ["!", "a\\", "[z-a]"])
def test_a_pattern_that_is_none_is_one_line(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".dvcignore").write_text(f"{pattern}\n")
    with pytest.raises(PipelineError, match=r"^\.dvcignore: a pattern that DVC cannot read: "):
        find_overlooked(Path("photos"))
