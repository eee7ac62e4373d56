"""File access: outputs appear whole or not at all, one process writes at a time, and reads are bounded in size."""

import os
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.runtime.errors import PipelineError, is_outage

if TYPE_CHECKING:
    from zipfile import ZipFile

# Half-made outputs carry this suffix; .dvcignore and .gitignore name it too.
PARTIAL_SUFFIX = ".partial"
# Size limits, far above any model: a damaged or hostile file cannot take more memory. A checkpoint also holds the state
# of the optimizer, two values for each weight.
MAX_WEIGHTS = 16 * 2**30
MAX_CHECKPOINT = 3 * MAX_WEIGHTS


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block ends without an error.

    Nothing is synced to disk first: after a power cut a new file may be empty, as DVC's own may. Readers notice that,
    since they check digests or every row, and the file can be made again.

    Args:
        path: The file to write; missing parent folders are made.

    Raises:
        OSError: The folder cannot be written; an existing `path` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.parent / f".{path.name}{PARTIAL_SUFFIX}"
    try:
        try:
            remove(staged)  # left by a run that was stopped; or a link to another file, or a pipe
            yield staged
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
    except OSError as error:
        raise _named(error, path) from None


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a staging folder beside `path` that takes its place when the block ends without an error.

    Leftovers of earlier runs that were stopped or killed are removed first.

    Args:
        path: The folder to write; missing parent folders are made.

    Raises:
        OSError: The folder cannot be written; an existing `path` is left as it was.
    """
    with _replacing_folder(path, None) as staged:
        yield staged


@contextmanager
def resuming_folder(path: Path, key: str) -> Iterator[Path]:
    """Yield a staging folder as `replacing_folder` does, but keep it if the block fails: the next one may continue it.

    Args:
        path: The folder to write.
        key: Identifies what decides the content; a folder that was left under another key is removed first.

    Raises:
        OSError: As `replacing_folder`.
    """
    with _replacing_folder(path, key) as staged:
        yield staged


@contextmanager
def _replacing_folder(path: Path, key: str | None) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.parent / f".{path.name}{PARTIAL_SUFFIX}"
    previous = path.parent / f".{path.name}.previous{PARTIAL_SUFFIX}"
    keyed = path.parent / f".{path.name}.key{PARTIAL_SUFFIX}"

    def is_resumed() -> bool:
        return key is not None and keyed.is_file() and keyed.read_bytes() == key.encode() and staged.is_dir()

    def clean_up() -> None:
        if not is_resumed():
            remove(staged)
            remove(keyed)
        if os.path.lexists(previous):
            # Moved away in one step, so that a half-removed folder is never put back; or put back, if nothing has
            # taken its place.
            is_replaced = os.path.lexists(path)
            previous.rename(staged if is_replaced else path)
            if is_replaced:
                remove(staged)

    try:
        try:
            clean_up()
            if not is_resumed():
                staged.mkdir()
                if key is not None:
                    keyed.write_bytes(key.encode())
            yield staged
            if os.path.lexists(path):
                path.rename(previous)
            staged.rename(path)
        finally:
            clean_up()
    except OSError as error:
        raise _named(error, path) from None


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    write_texts({path: text})


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write files that belong together (path → text, UTF-8): all are complete before the first takes its place."""
    with ExitStack() as stack:
        for path, text in texts.items():
            stack.enter_context(replacing_file(path)).write_text(text, encoding="utf-8", newline="\n")


def read_file(path: Path, max_bytes: int) -> bytes:
    """Return the content of a file; this package reads files other than its own source in no other way.

    Args:
        path: The file, or a link to it.
        max_bytes: The largest size that such a file can have.

    Raises:
        FileNotFoundError: There is no such file.
        PipelineError: It is not a regular file (a folder, a pipe, a device), is larger than `max_bytes`, or cannot be
            read.
    """
    n_bytes = check_file(path, max_bytes)
    with _named_reading(path), path.open("rb") as file:
        return file.read(n_bytes)  # Python allocates as much as it is asked for, however little there is to read


@contextmanager
def opened_zip(path: Path) -> Iterator["ZipFile"]:
    """Open a zip archive of any size, whose members are to be read in parts.

    Raises:
        FileNotFoundError: As `read_file`.
        PipelineError: It is not a regular file, not a zip archive, or damaged.
    """
    from zipfile import ZipFile

    check_file(path, sys.maxsize)
    try:
        with ZipFile(path) as archive:
            yield archive
    except (PipelineError, MemoryError):
        raise
    except Exception as error:  # zipfile and its decoders raise what they like
        if is_outage(error):
            raise
        raise PipelineError(f"{path}: no zip archive, or damaged: {error}") from None


def check_file(path: Path, max_bytes: int) -> int:
    """Refuse what `read_file` refuses, for libraries that open files themselves.

    Returns:
        The size of the file.

    Raises:
        FileNotFoundError: As `read_file`.
        PipelineError: As `read_file`.
    """
    with _named_reading(path):
        status = path.stat()  # before it is opened: opening a pipe waits for a writer, and a device may never end
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise PipelineError(f"{path}: {kind}, not a file; move it elsewhere")
    if status.st_size > max_bytes:
        raise PipelineError(
            f"{path}: {status.st_size:,} bytes, more than the {max_bytes:,} that it can have; move it elsewhere"
        )
    return status.st_size


@contextmanager
def _named_reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:  # a looping link, no permission, a broken disk
        if is_outage(error):
            raise
        raise PipelineError(f"{path}: cannot be read: {error.strerror or error}") from None


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Let one process at a time into the block; the others wait, and say what for.

    The kernel releases the lock when its process ends, for whatever reason. Where there are no locks (some network file
    systems, a folder that cannot be written) nobody waits.

    Args:
        path: The lock file, which exists as long as the block runs.
        what: What the block does, for the line that waiting processes write to standard error.

    Raises:
        PipelineError: `path` is something other than a file.
    """
    from filelock import FileLock, Timeout  # importing takes a twentieth of a second

    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise PipelineError(f"{path}: not a file, as a lock is; remove it")
    lock = FileLock(path, fallback_to_soft=False)
    with ExitStack() as held:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                sys.stderr.write(f"{what}: another process is doing this; waiting for it to end\n")
                lock.acquire()
            held.callback(lock.release)
            held.callback(path.unlink, missing_ok=True)  # runs first, while the lock is still ours
        yield


def is_locked(path: Path) -> bool:
    """Whether a process is in a block of `locked` with this file, which must exist."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(path, blocking=False, fallback_to_soft=False):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it; do nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _named(error: OSError, path: Path) -> OSError:
    # A full disk is reported by a write, which does not know the file's name.
    if error.errno is not None and error.filename is None:
        error.filename = str(path)
    return error
