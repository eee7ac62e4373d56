"""An end on request: stopped by a signal, the process takes back what is half done and is gone within moments."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial as bind
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
# What to take back, the last first.
_half_done: list[Callable[[], object]] = []
# How many blocks delay signals, and those that came meanwhile: masks are of one thread, and another may get the signal.
_delaying: list[None] = []
_delayed: list[int] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_delaying.clear)  # which never comes to the end of such a block


@contextmanager
def taken_back_when_stopped(take_back: Callable[[], object]) -> Iterator[None]:
    """Call `take_back` if a signal stops the process within this block; then neither `except` nor `finally` runs."""
    _half_done.append(take_back)
    try:
        yield
    finally:
        _half_done.remove(take_back)


@contextmanager
def signals_delayed(*names: str) -> Iterator[None]:
    """Signals that stop wait for the end of the block; processes begun in it never see those of these names, or all."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.Signals[name] for name in names] or _known())
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

    with ExitStack() as stack:
        with signals_delayed():  # until it is known how to end it
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                process_group=0,  # a terminal sends signals to its own group: neither half ends before the other
            )
            stack.enter_context(taken_back_when_stopped(bind(_end, process.pid)))
        stack.enter_context(process)  # closes its pipes
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
        for known in _known():
            signal.signal(known, signal.SIG_DFL)  # a second one ends the process at once
        if message:
            # Not through a buffer, which a thread may hold. Before it an end of line: there may be a progress bar.
            text = f"{message.format(signal=signal.Signals(number).name)}\n"
            with suppress(OSError):
                os.write(2, (f"\n{text}" if os.isatty(2) else text).encode())
        for take_back in reversed(_half_done):
            with suppress(Exception):
                take_back()
        signal.raise_signal(number)  # so that a shell, or DVC, sees what ended it

    for known in _known():
        if signal.getsignal(known) is not signal.SIG_IGN:  # as under nohup
            signal.signal(known, stop)


def _end(group: int) -> None:
    os.killpg(group, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(group, 0)


def _known() -> list[signal.Signals]:
    return [signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__]
