"""Files and folders that appear whole or not at all, are written by one process at a time, and read within bounds."""

import errno
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial as bind
from pathlib import Path

from pipeline.runtime.errors import PipelineError, is_exhausted
from pipeline.runtime.stopping import signals_delayed, taken_back_when_stopped

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Half-made outputs carry this suffix; .dvcignore and .gitignore name it too.
PARTIAL_SUFFIX = ".partial"


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    Nothing is forced onto the disk before: after a power cut a new file may be empty, as DVC's own may. Readers find
    that, since they check digests or every row, and it can be made again.

    Args:
        path: The file to write; missing parent folders are made.

    Raises:
        OSError: The folder cannot be written; an existing `path` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}{PARTIAL_SUFFIX}"
    try:
        with taken_back_when_stopped(bind(remove, partial)):
            try:
                remove(partial)  # it may be a link to another file, or a pipe
                yield partial
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise _named(error, path) from None


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

    def clean_up() -> None:
        remove(partial)
        if os.path.lexists(previous):
            # Out of the way in one step, so that nobody puts back one of which half is removed; or back, if nothing
            # has taken its place.
            previous.rename(partial if os.path.lexists(path) else path)
            remove(partial)

    def take_back() -> None:
        _shut_out_writers(partial)
        clean_up()

    try:
        with taken_back_when_stopped(take_back):
            try:
                clean_up()
                partial.mkdir()
                yield partial
                if os.path.lexists(path):
                    path.rename(previous)
                partial.rename(path)
            finally:
                clean_up()
    except OSError as error:
        raise _named(error, path) from None


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    write_texts({path: text})


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write files that belong together (path → text, UTF-8): all are there in full before the first takes its place."""
    with ExitStack() as stack:
        for path, text in texts.items():
            stack.enter_context(replacing_file(path)).write_text(text, encoding="utf-8", newline="\n")


def read_file(path: Path, max_bytes: int) -> bytes:
    """The content of a file; the only way in which this package reads files that are not its own source.

    Args:
        path: The file, or a link to it.
        max_bytes: The largest size that such a file can have.

    Raises:
        FileNotFoundError: There is none.
        PipelineError: It is no regular file (a folder, a pipe, a device), is larger than `max_bytes`, or cannot be
            read.
    """
    n_bytes = check_file(path, max_bytes)
    with _named_reading(path), path.open("rb") as file:
        return file.read(n_bytes)  # Python takes as much memory as it is asked for, whatever there is to read


def check_file(path: Path, max_bytes: int) -> int:
    """Refuse what `read_file` refuses, for those libraries that open files by themselves.

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
        raise PipelineError(f"{path}: {kind}, not a file; remove it")
    if status.st_size > max_bytes:
        raise PipelineError(
            f"{path}: {status.st_size:,} bytes, more than the {max_bytes:,} that it can have; remove it"
        )
    return status.st_size


@contextmanager
def _named_reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:  # a looping link, no permission, a broken disk
        if is_exhausted(error):
            raise
        raise PipelineError(f"{path}: cannot be read: {error.strerror or error}") from None


@contextmanager
def taking_turns(path: Path, what: str) -> Iterator[None]:
    """Let one process at a time into the block; the others wait, and say for what.

    The kernel forgets the lock when its process ends, however it does. Where there are no locks (Windows, some network
    file systems, a folder that cannot be written) nobody waits.

    Args:
        path: A file that is there for as long as the block runs and holds the number of the process.
        what: What the block does, for the line on standard error that those who wait write.

    Raises:
        PipelineError: Something else than a file has its place.
    """
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise PipelineError(f"{path}: not a file, as a lock is; remove it")
    with ExitStack() as held:
        is_told = False
        while fcntl is not None:
            try:
                if _lock(path, held):
                    break
                is_told = _wait(path, what, is_told)
            except OSError:
                break
        yield


def is_taken(path: Path) -> bool:
    """Whether a process is in a block of `taking_turns` with this file."""
    if fcntl is None:
        return False
    try:
        lock = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _lock(path: Path, held: ExitStack) -> bool:
    """Whether nobody else has it; then it is taken until `held` ends."""
    with signals_delayed(), ExitStack() as opened:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        opened.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            path.unlink()
            raise
        try:
            is_removed = not os.path.samestat(os.fstat(lock), path.stat())
        except FileNotFoundError:
            is_removed = True
        if is_removed:  # by the one before
            return False
        with suppress(OSError):  # the disk is full: the number is for people only
            os.ftruncate(lock, 0)
            os.write(lock, f"process {os.getpid()}".encode())
        remove = bind(path.unlink, missing_ok=True)
        opened.callback(remove)  # while it is locked: then it is nobody else's yet
        opened.enter_context(taken_back_when_stopped(remove))
        held.push(opened.pop_all())
        return True


def _wait(path: Path, what: str, is_told: bool) -> bool:
    """Until whoever has the lock lets go of it; whether it has been said."""
    with suppress(FileNotFoundError), ExitStack() as opened:
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        opened.callback(os.close, lock)
        if not is_told:
            holder = os.read(lock, 30).decode(errors="replace")
            who = holder if holder.isprintable() and holder else "another process"
            sys.stderr.write(f"{what}: {who} is doing this; waiting for it to end\n")
        fcntl.flock(lock, fcntl.LOCK_SH)
        return True
    return is_told


def _shut_out_writers(folder: Path) -> None:
    """Remove a folder that other threads of this process, which is about to end, still write into."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ECANCELED, "the process ends")

    os.mkdir = refuse  # or they would make the folder anew, the moment that it is gone
    remove(folder)
    time.sleep(0.05)  # for those that were within a call


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder and all that is in it; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _named(error: OSError, path: Path) -> OSError:
    # A full disk is reported by a write, which does not know the file's name.
    if error.errno is not None and error.filename is None:
        error.filename = str(path)
    return error
