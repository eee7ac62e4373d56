"""Ends a process on a signal, within moments and with everything that it has started."""

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
# Callbacks that end what this process has started.
_ends: list[Callable[[], object]] = []
# An entry per block that delays signals, and the signals that came meanwhile. A mask would not do: it holds for one
# thread, and another may get the signal.
_delaying: list[None] = []
_delayed: list[int] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_delaying.clear)  # the child never reaches the end of such a block


@contextmanager
def ended_when_stopped(end: Callable[[], object]) -> Iterator[None]:
    """Call `end` if a signal stops the process within this block; then neither `except` nor `finally` runs."""
    _ends.append(end)
    try:
        yield
    finally:
        _ends.remove(end)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGHUP, which a terminal sends to all, in processes started here: their parent ends them.

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
    """Run a program and wait for it; a signal that stops this process ends the program too, and all that it started.

    Args:
        command: Program and arguments; its standard input is empty.
        timeout: Seconds.

    Returns:
        The finished process with its output.

    Raises:
        OSError: It cannot be run.
        subprocess.CalledProcessError: It failed.
        subprocess.TimeoutExpired: It took longer, and was ended.
    """
    import subprocess  # imported late: this module is a process's first, and signals should be handled early

    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,  # out of reach of the terminal's signals: neither process ends before the other
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
    """Have SIGINT, SIGTERM and SIGHUP end the process from now on, after `message` on standard error.

    An exception would end it too, but only after all threads that still compute, and some libraries' imports lose it.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if _delaying:
            _delayed.append(number)
            return
        for known in _STOPS:
            signal.signal(known, signal.SIG_DFL)  # a second one ends the process at once
        if message:
            # Not through a buffer, which a thread may hold. On a new line, since there may be a progress bar.
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
