"""Checks users' paths: DVC must see changes in them, and stages must not overwrite them."""

import os
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.runtime import layout
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import read_file

if TYPE_CHECKING:
    from dvc.ignore import DvcIgnorePatterns

# A hundred times the size of ours.
_MAX_IGNORED = 2**16


def find_problem(path: str, is_file: bool) -> str | None:
    """Return why params.yaml cannot name this path of the user's, and a remedy; None if it can.

    Args:
        path: Path of an image source or a model, absolute or relative to the repository root (the current folder).
        is_file: Whether it has to be a file, not a folder.
    """
    if not path.isprintable() or path.startswith("~"):  # DVC takes "~" for the name of a folder
        return "is no path; write it out"
    theirs = _ways(Path(path))
    for folder in layout.WRITTEN:
        if any(a.is_relative_to(b) or b.is_relative_to(a) for a in _ways(folder) for b in theirs):
            return f"overlaps {folder}/, which stages write; move what is yours elsewhere"
    if not Path(path).is_dir():
        return None
    return find_overlooked(Path(path)) or ("is a folder; name a file" if is_file else None)


def find_overlooked(folder: Path) -> str | None:
    """Return why DVC would not see changes in a folder, and a remedy; None if it sees them.

    DVC always sees files that are named individually, and folders outside the repository whatever their names.
    """
    full = _absolute(folder)
    if not full.is_relative_to(Path.cwd()):
        return None
    is_named, found = _patterns().matches(str(full.parent), full.name, is_dir=True, details=True)
    if not is_named:
        return None
    return f".dvcignore names {found[-1].patterns}: DVC would not see what changes there; move it elsewhere"


def is_ignored(file: Path) -> bool:
    """Whether .dvcignore names a file of the repository, or a folder in which it lies."""
    full, root = _absolute(file), Path.cwd()
    ways = [way for way in (full, *full.parents) if way.is_relative_to(root) and way != root]
    return any(_patterns().matches(str(way.parent), way.name, is_dir=way != full) for way in ways)


def _absolute(path: Path) -> Path:
    return Path(os.path.normpath(Path.cwd() / path))  # does not resolve links


def _ways(path: Path) -> set[Path]:
    return {_absolute(path), Path(os.path.realpath(path))}


def _patterns() -> "DvcIgnorePatterns":
    content = b""
    with suppress(FileNotFoundError):
        content = read_file(Path(".dvcignore"), _MAX_IGNORED)
    return _parse(content, str(Path.cwd()))


@lru_cache(maxsize=1)
def _parse(content: bytes, root: str) -> "DvcIgnorePatterns":
    """Parse .dvcignore as DVC does, together with what DVC always ignores."""
    from dvc.ignore import DvcIgnorePatterns  # takes a tenth of a second; only folders in the repository need it

    lines = [line.strip() for line in content.decode(errors="replace").splitlines()]
    try:
        patterns = [".dvc", ".git", *(line for line in lines if line and not line.startswith("#"))]
        return DvcIgnorePatterns(patterns, root, os.sep)
    except (ValueError, re.error) as error:
        raise PipelineError(f".dvcignore: a pattern that DVC cannot read: {error}") from None
