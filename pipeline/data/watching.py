"""Which paths of a user's `dvc repro` can watch, and which would be lost or overlooked."""

import os
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from pipeline.runtime import layout
from pipeline.runtime.files import read_file

# A hundred times what ours has.
_MAX_IGNORED = 2**16


def find_problem(path: str, is_file: bool) -> str | None:
    """Why a path that params.yaml names cannot be one of the user's, with the way out; None if it can.

    Args:
        path: Of a source of images or of a model, relative to the repository root, the current folder, or absolute.
        is_file: Whether no folder can be meant.
    """
    if not path.isprintable() or path.startswith("~"):  # which DVC takes for the name of a folder
        return "is no path; write it out"
    theirs = _ways(Path(path))
    for folder in layout.WRITTEN:
        if any(a.is_relative_to(b) or b.is_relative_to(a) for a in _ways(folder) for b in theirs):
            return f"overlaps {folder}/, which stages write; move what is yours elsewhere"
    if not Path(path).is_dir():
        return None
    return find_overlooked(Path(path)) or ("is a folder; name a file" if is_file else None)


def find_overlooked(folder: Path) -> str | None:
    """Why DVC does not see what changes in a folder, with the way out; None if it does.

    Files that are named by themselves it sees everywhere, and folders outside of the repository whatever their names.
    """
    full = _absolute(folder)
    if full.is_relative_to(Path.cwd()):
        below = full.relative_to(Path.cwd())
        for pattern in _ignored():
            is_above = f"/{below.as_posix()}/".startswith(f"{pattern.rstrip('/')}/")
            if is_above or any(fnmatch(part, pattern) for part in below.parts):
                return f".dvcignore names {pattern}: DVC would not see what changes there; move it elsewhere"
    return None


def _absolute(path: Path) -> Path:
    return Path(os.path.normpath(Path.cwd() / path))  # links as they stand


def _ways(path: Path) -> set[Path]:
    return {_absolute(path), Path(os.path.realpath(path))}


def _ignored() -> Iterator[str]:
    """The patterns of .dvcignore, and what DVC leaves out by itself."""
    yield from (".dvc", ".git")
    with suppress(FileNotFoundError):
        lines = read_file(Path(".dvcignore"), _MAX_IGNORED).decode(errors="replace").splitlines()
        yield from (line for line in lines if line and not line.startswith("#"))
