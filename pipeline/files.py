"""Files and folders that appear whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Half-made outputs carry this suffix; .dvcignore and .gitignore name it too.
PARTIAL_SUFFIX = ".partial"


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    Args:
        path: The file to write; missing parent folders are made.

    Raises:
        OSError: The folder cannot be written; an existing `path` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}{PARTIAL_SUFFIX}"
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise _named(error, path) from None
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends without an error.

    Leftovers of earlier runs that were killed are removed first.

    Args:
        path: The folder to write; missing parent folders are made.

    Raises:
        OSError: The folder cannot be written; an existing `path` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}{PARTIAL_SUFFIX}"
    previous = path.parent / f".{path.name}.previous{PARTIAL_SUFFIX}"
    if previous.exists() and not path.exists():
        previous.rename(path)  # killed between the two renames below
    for leftover in (partial, previous):
        _remove(leftover)
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            path.rename(previous)
        try:
            partial.rename(path)
        except OSError:
            if previous.exists():
                previous.rename(path)
            raise
        _remove(previous)
    except OSError as error:
        raise _named(error, path) from None
    finally:
        _remove(partial)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with replacing_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _named(error: OSError, path: Path) -> OSError:
    # A full disk is reported by a write, which does not know the file's name.
    if error.errno is not None and error.filename is None:
        error.filename = str(path)
    return error
