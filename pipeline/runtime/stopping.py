"""Ends a process on a signal: it and all that it has begun are gone within moments."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial as bind
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess

_STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# How to end what this process has begun.
_ends: list[Callable[[], object]] = []
# How many blocks delay signals, and those that came meanwhile: masks are of one thread, and another may get the signal.
_delaying: list[None] = []
_delayed: list[int] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_delaying.clear)  # which never comes to the end of such a block


@contextmanager
def ended_when_stopped(end: Callable[[], object]) -> Iterator[None]:
    """Call `end` if a signal stops the process within this block; then neither `except` nor `finally` runs."""
    _ends.append(end)
    try:
        yield
    finally:
        _ends.remove(end)


@contextmanager
def begun_deaf() -> Iterator[None]:
    """Processes begun in this block never see SIGINT and SIGHUP, which a terminal sends to all: their parent ends them.

    Signals that stop this process itself wait for the end of the block.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    _delaying.append(None)
    try:
        yield
    finally:
        _delaying.pop()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if _delayed and not _delaying:
            signal.raise_signal(_delayed.pop())


def run_command(command: list[str], timeout: float | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a program and wait for it; a signal that stops this process ends it, and all that it has begun.

    Args:
        command: Program and arguments; it has nothing to read from.
        timeout: Seconds.

    Returns:
        What it wrote.

    Raises:
        OSError: It cannot be run.
        subprocess.CalledProcessError: It failed.
        subprocess.TimeoutExpired: It took longer, and was ended.
    """
    import subprocess  # not before a command can be stopped: this module is the first of its process

    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,  # a terminal sends signals to its own group: neither half ends before the other
    )
    with ended_when_stopped(bind(_end, process.pid)), process:  # closes its pipes
        try:
            said, problem = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, said, problem)
    return subprocess.CompletedProcess(command, 0, said, problem)


def stop_on_signals(message: str = "") -> None:
    """From now on SIGINT, SIGTERM and SIGHUP end the process, after `message` on standard error.

    An exception would do so too, but wait for all threads that still compute, and be lost in some libraries' imports.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if _delaying:
            _delayed.append(number)
            return
        for known in _STOPS:
            signal.signal(known, signal.SIG_DFL)  # a second one ends the process at once
        if message:
            # Not through a buffer, which a thread may hold. Before it an end of line: there may be a progress bar.
            text = f"{message.format(signal=signal.Signals(number).name)}\n"
            with suppress(OSError):
                os.write(2, (f"\n{text}" if os.isatty(2) else text).encode())
        for end in reversed(_ends):
            with suppress(Exception):
                end()
        signal.raise_signal(number)  # so that a shell, or DVC, sees what ended it

    for known in _STOPS:
        if signal.getsignal(known) is not signal.SIG_IGN:  # as under nohup
            signal.signal(known, stop)


def _end(group: int) -> None:
    os.killpg(group, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(group, 0)
