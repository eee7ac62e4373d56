"""Processes that work side by side: soon begun, and ended with the one that began them."""

import multiprocessing
import multiprocessing.util
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker

from pipeline.runtime.errors import PipelineError
from pipeline.runtime.stopping import signals_delayed, stop_on_signals, taken_back_when_stopped
from pipeline.runtime.streams import outlive_readers

try:
    from multiprocessing import forkserver
except ImportError:  # Windows
    forkserver = None  # type: ignore[assignment]

_KILLED = "a process was killed, perhaps because memory ran out; run again, with fewer --workers: finished work is kept"


@contextmanager
def imported_ahead(*modules: str) -> Iterator[None]:
    """Let a process of its own import `modules` while this one goes on; within the block workers are forked from it.

    Where it cannot have its socket (no folder for temporary files, or one whose path is too long) each imports anew.

    Imports of torch take seconds, which workers of a pool would otherwise each spend anew, and after this process.

    Args:
        modules: Names; none of them may touch a GPU.
    """
    if forkserver is None:
        yield
        return
    multiprocessing.set_forkserver_preload(list(modules))
    with taken_back_when_stopped(_stop):
        # A terminal sends SIGINT and SIGHUP to all; this process ends the others.
        with signals_delayed("SIGHUP"):
            resource_tracker.ensure_running()  # ignores SIGINT, and would let it in again
        with signals_delayed("SIGINT", "SIGHUP"), suppress(OSError):
            forkserver.ensure_running()
        try:
            yield
        finally:
            _kill_server()
            forkserver._forkserver._stop()  # type: ignore[attr-defined]


@contextmanager
def worker_pool(n_workers: int, uses_cuda: bool) -> Iterator[ProcessPoolExecutor]:
    """Processes that do what they are given; they are gone when the block ends, however it does.

    Args:
        n_workers: How many.
        uses_cuda: Whether they do; what CUDA has begun does not survive a fork.

    Raises:
        PipelineError: One of them was killed.
    """
    # Never forked from this process, whose threads they would not have.
    is_forked = _server_pid() is not None and not uses_cuda
    if is_forked:
        # Waits until the server has imported: then workers begin at once, and none is half begun when a signal comes.
        first = multiprocessing.get_context("forkserver").Process(target=_do_nothing)
        try:
            first.start()
        except EOFError:  # the server was killed
            raise PipelineError(_KILLED) from None
        first.join()
    context = multiprocessing.get_context("forkserver" if is_forked else "spawn")
    with (
        taken_back_when_stopped(_stop),
        ProcessPoolExecutor(n_workers, mp_context=context, initializer=_begin_worker) as pool,
    ):
        try:
            yield pool
        except BrokenProcessPool:
            raise PipelineError(_KILLED) from None
        except BaseException:
            _end_workers()  # or they would do what is under way to its end first
            raise


def _end_workers() -> None:
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + 1
    for worker in workers:
        worker.join(max(0, deadline - time.monotonic()))
        worker.kill()  # still importing, or computing


def _server_pid() -> int | None:
    pid: int | None = None if forkserver is None else forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


def _kill_server() -> None:
    pid = _server_pid()
    if pid is not None:
        os.kill(pid, signal.SIGKILL)  # it may be importing, and would see only then that it is not needed


def _stop() -> None:
    _kill_server()  # first: it may be about to begin another worker
    _end_workers()
    # Removes semaphores and the server's socket, which no process that a signal ends does.
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]


def _do_nothing() -> None:
    pass


def _begin_worker() -> None:
    """End this worker when asked to, and as soon as its parent is gone; or it would work on, beside the next run."""
    stop_on_signals()
    outlive_readers()
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
