"""Runs many jobs in parallel behind one interface: in threads or processes of this machine, or on a Dask cluster."""

import multiprocessing
import multiprocessing.util
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.context import BaseContext
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from pipeline.runtime.errors import PipelineError
from pipeline.runtime.memory import keep_freed_memory
from pipeline.runtime.stopping import ended_when_stopped, signals_blocked, stop_on_signals
from pipeline.runtime.streams import outlive_readers

Job = TypeVar("Job")
Result = TypeVar("Result")
Value = TypeVar("Value")

_KILLED = "a process was killed, perhaps because memory ran out; run again, with fewer --workers: finished work is kept"


class Engine(Protocol):
    """Runs jobs in parallel.

    Attributes:
        is_in_process: Whether jobs run in this process, and so can report their progress themselves.
    """

    is_in_process: ClassVar[bool]

    def run(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
        """Yield every job with its result, in the order in which they finish; the first error ends the run.

        Args:
            work: A function at the top level of a module, which other processes can import.
            jobs: Picklable, so that they can be sent to another machine.
        """
        ...


class Held(Generic[Value]):
    """A value of this process that a job needs; a process that the job is sent to loads it itself, once per run."""

    def __init__(self, value: Value, load: Callable[[], Value]) -> None:
        """Hold a value that this process has.

        Args:
            value: The value.
            load: Picklable; returns the same value in another process.
        """
        self._value, self._load = value, load

    def get(self) -> Value:
        """The value."""
        return self._value

    def __reduce__(self) -> tuple[Any, ...]:
        return _Loaded, (self._load,)


def shown_here(progress: Callable[[int], object]) -> Held[Callable[[int], object]]:
    """Return a progress callback that works for jobs of this process and does nothing in others."""
    return Held(progress, _show_nowhere)


def _show_nowhere() -> Callable[[int], object]:
    return lambda n: None


class _Loaded(Generic[Value]):
    """A `Held` that was sent to this process."""

    def __init__(self, load: Callable[[], Value]) -> None:
        self._load = load

    def get(self) -> Value:
        key = pickle.dumps(self._load)
        with _loading:
            if key not in _loaded:
                _loaded[key] = self._load()
        value: Value = _loaded[key]
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return _Loaded, (self._load,)


_loaded: dict[bytes, Any] = {}
_loading = threading.RLock()  # reentrant: one value's load may get another


def forget_loaded() -> None:
    """Drop the values that jobs of an earlier run have loaded in this process."""
    with _loading:
        _loaded.clear()


class UnwantedError(Exception):
    """The result of the job is no longer wanted."""


_is_wanted: ContextVar[Callable[[], bool]] = ContextVar("is_wanted", default=lambda: True)


def set_wanted(is_wanted: Callable[[], bool]) -> None:
    """Set the function that tells jobs of this thread whether their results are still wanted."""
    _is_wanted.set(is_wanted)


def check_wanted() -> None:
    """End the job of this thread if its result is no longer wanted; long jobs call this about every second.

    Raises:
        UnwantedError: The result is no longer wanted.
    """
    if not _is_wanted.get()():
        raise UnwantedError


@dataclass(frozen=True)
class LocalThreads:
    """Threads of this process, for work that releases Python's global lock, such as numpy's.

    Attributes:
        n_workers: Number of threads.
    """

    n_workers: int
    is_in_process: ClassVar[bool] = True

    def run(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
        """Run jobs as `Engine.run` does.

        Args:
            work: May be any function, importable or not.
            jobs: Consumed lazily, a few ahead of the workers, so that results not yet fetched do not fill memory.
        """
        has_ended = threading.Event()
        wanted = partial(set_wanted, lambda: not has_ended.is_set())
        with ThreadPoolExecutor(self.n_workers, initializer=wanted) as pool:
            try:
                yield from _run(pool, work, jobs, self.n_workers + 2)
            finally:
                has_ended.set()


def count_cores() -> int:
    """Return the number of cores that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@dataclass(frozen=True)
class LocalProcesses:
    """Processes of this machine; all are gone when `run` ends, for whatever reason.

    Attributes:
        n_workers: The largest number of processes.
        preload: Modules that they import before their first job, in addition to that of the work.
    """

    n_workers: int
    preload: tuple[str, ...] = ()
    is_in_process: ClassVar[bool] = False

    def run(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
        """Run jobs as `Engine.run` does.

        Raises:
            PipelineError: A process was killed.
        """
        jobs = list(jobs)
        if not jobs:
            return
        context = _begin_server(work.__module__, *self.preload)
        n_workers = min(self.n_workers, len(jobs))
        with ended_when_stopped(_stop), ProcessPoolExecutor(n_workers, context, _begin_worker) as pool:
            try:
                yield from _run(pool, work, jobs, n_workers + 2)
            except BrokenProcessPool:
                raise PipelineError(_KILLED) from None
            except BaseException:
                _end_workers()  # otherwise they would first finish the jobs under way
                raise


def _begin_server(*preload: str) -> BaseContext:
    """Return the context that starts processes. Not forks of this one: they would have its locks but not their holders.

    A fork server imports once what all of them need: torch takes seconds. Where there can be none (Windows, no place
    for its socket), each process imports by itself.
    """
    if "forkserver" in multiprocessing.get_all_start_methods():
        from multiprocessing import forkserver, resource_tracker

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preload))
        with signals_blocked():
            resource_tracker.ensure_running()  # unblocks SIGINT when it returns
        with suppress(OSError), signals_blocked():
            forkserver.ensure_running()
            return context
    return multiprocessing.get_context("spawn")


def _run(
    pool: Executor, work: Callable[[Job], Result], jobs: Iterable[Job], n_ahead: int
) -> Iterator[tuple[Job, Result]]:
    under_way: dict[Future[Result], Job] = {}
    waiting = iter(jobs)
    try:
        while True:
            with signals_blocked():  # the pool starts its processes with the first job
                for job in islice(waiting, n_ahead - len(under_way)):
                    under_way[pool.submit(work, job)] = job
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                yield under_way.pop(future), future.result()
    finally:
        for future in under_way:
            future.cancel()


def _end_workers() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()


def _stop() -> None:
    _end_workers()
    # Removes semaphores, which a process that is ended by a signal would leave behind.
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]


def _begin_worker() -> None:
    """Prepare a worker, which ends as soon as its parent is gone: else it would work on beside the next run."""
    stop_on_signals()
    outlive_readers()
    keep_freed_memory()
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
