"""Which paths of a user's `dvc repro` can watch, and which would be lost or overlooked."""

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
    full, content = _absolute(folder), b""
    if not full.is_relative_to(Path.cwd()):
        return None
    with suppress(FileNotFoundError):
        content = read_file(Path(".dvcignore"), _MAX_IGNORED)
    is_ignored, found = _parse(content, str(Path.cwd())).matches(str(full.parent), full.name, is_dir=True, details=True)
    if not is_ignored:
        return None
    return f".dvcignore names {found[-1].patterns}: DVC would not see what changes there; move it elsewhere"


def _absolute(path: Path) -> Path:
    return Path(os.path.normpath(Path.cwd() / path))  # links as they stand


def _ways(path: Path) -> set[Path]:
    return {_absolute(path), Path(os.path.realpath(path))}


@lru_cache(maxsize=1)
def _parse(content: bytes, root: str) -> "DvcIgnorePatterns":
    """What .dvcignore says, with what DVC leaves out by itself, as DVC reads it."""
    from dvc.ignore import DvcIgnorePatterns  # a tenth of a second, which only folders in the repository need

    lines = [line.strip() for line in content.decode(errors="replace").splitlines()]
    try:
        patterns = [".dvc", ".git", *(line for line in lines if line and not line.startswith("#"))]
        return DvcIgnorePatterns(patterns, root, os.sep)
    except (ValueError, re.error) as error:
        raise PipelineError(f".dvcignore: a pattern that DVC cannot read: {error}") from None
