"""Runs jobs on the workers of a Dask cluster, which see the same folder and have the same code."""

import hashlib
import json
import logging
import os
import pickle
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit
from uuid import uuid4

from pipeline.runtime.bucket import STORES_VARIABLE
from pipeline.runtime.engine import Engine, Job, Result, forget_loaded, set_wanted
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import PARTIAL_SUFFIX, read_file
from pipeline.runtime.memory import keep_freed_memory
from pipeline.runtime.stopping import ended_when_stopped

if TYPE_CHECKING:
    from distributed import Client

# Names the cluster that stages use: the address of a Dask scheduler, or its scheduler file.
ENGINE_VARIABLE = "PIPELINE_ENGINE"
# Seconds until a scheduler has to answer and a first worker has to be there.
_PATIENCE = 30
# What decides results beside our own code; cv2 and zarr write and decode, torch and numpy compute.
_LIBRARIES = ("numpy", "torch", "torchvision", "opencv-python-headless", "zarr", "numcodecs")


def find_cluster(say: Callable[[str], object]) -> "DaskCluster | None":
    """The cluster that PIPELINE_ENGINE names; None where it is not set.

    Args:
        say: Told where the cluster can be watched.
    """
    address = os.environ.get(ENGINE_VARIABLE)
    return DaskCluster(address, say) if address else None


def find_engine(local: Engine, say: Callable[[str], object]) -> Engine:
    """The cluster that PIPELINE_ENGINE names, or `local` where it is not set."""
    return find_cluster(say) or local


@dataclass(frozen=True)
class DaskCluster:
    """Workers of a Dask cluster, one thread each.

    Attributes:
        address: Of its scheduler, such as `tcp://10.0.0.1:8786`, or the scheduler's file.
        say: Told where Dask shows what the workers do.
    """

    address: str
    say: Callable[[str], object]
    is_in_process: ClassVar[bool] = False

    def run(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
        """As `Engine.run`; jobs that a worker took with it when it died are done again by another one.

        Raises:
            PipelineError: There is no such scheduler, or it goes away; it has no workers; a worker has another version
                of the code or of a library, does not see the folder, or has several threads; several workers died of
                one job.
        """
        jobs = list(jobs)
        if not jobs:
            return
        # Seen by workers that see this very folder, and by none that have another one of the same name.
        mark = Path.cwd() / f".{uuid4().hex}{PARTIAL_SUFFIX}"
        mark.touch()
        try:
            with ended_when_stopped(mark.unlink), self._connected(str(mark)) as client:
                yield from self._run(client, str(mark), work, jobs)
        finally:
            mark.unlink(missing_ok=True)

    def _run(
        self, client: "Client", mark: str, work: Callable[[Job], Result], jobs: list[Job]
    ) -> Iterator[tuple[Job, Result]]:
        from distributed import CancelledError, KilledWorker, as_completed

        run, expected = uuid4().hex, describe_process()
        stores = os.environ.get(STORES_VARIABLE, "")
        tasks = [_Task(run, mark, expected, stores, pickle.dumps((work, job))) for job in jobs]
        futures = client.map(do_task, tasks, key=f"{work.__name__}-{run}", pure=False)
        of_future = dict(zip((future.key for future in futures), jobs, strict=True))
        try:
            for future in as_completed(futures, loop=client.loop):  # type: ignore[no-untyped-call]
                yield of_future[future.key], future.result()
        except KilledWorker as error:
            raise PipelineError(
                f"{ENGINE_VARIABLE}: {error.allowed_failures + 1} workers died of one job, the last at "
                f"{error.last_worker.address}, perhaps because memory ran out; give them more (--memory-limit) and "
                "run again: finished work is kept"
            ) from None
        except CancelledError:  # what Dask's client does when its connection ends
            raise PipelineError(
                f"{ENGINE_VARIABLE}: the Dask scheduler at {self.address} has gone; run again: finished work is kept"
            ) from None
        finally:
            if client.status == "running":
                client.cancel(futures)  # type: ignore[no-untyped-call]

    @contextmanager
    def _connected(self, mark: str) -> Iterator["Client"]:
        try:
            from distributed import Client
        except ImportError:
            raise PipelineError(
                f"{ENGINE_VARIABLE}: needs Dask: `pip install -c constraints.txt -e '.[dask]'`"
            ) from None
        for name in ("distributed", "distributed.client"):  # what goes wrong is said here, once
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            client = Client(_scheduler_address(self.address), timeout=_PATIENCE, set_as_default=False)  # type: ignore[no-untyped-call]
        except (OSError, TimeoutError, ValueError, KeyError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise PipelineError(
                f"{ENGINE_VARIABLE}: no Dask scheduler answers at {self.address} ({said}); start one, or unset "
                f"{ENGINE_VARIABLE}"
            ) from None
        with client:
            try:
                client.wait_for_workers(1, timeout=_PATIENCE)
            except TimeoutError:
                raise PipelineError(
                    f"{ENGINE_VARIABLE}: the Dask scheduler at {self.address} has no workers; start some"
                ) from None
            expected = describe_process()
            # Errors of unpickling too: a worker may not have our package at all.
            found = client.run(check_worker, expected, mark, on_error="return")
            problems = [f"{worker}: {_word(said)}" for worker, said in sorted(found.items()) if said is not None]
            if problems:
                raise PipelineError(f"{ENGINE_VARIABLE}: {'; '.join(problems)}")
            self.say(f"{len(found)} worker(s) of {self.address}; watch them at {client.dashboard_link}")
            yield client


def _scheduler_address(address: str) -> str:
    """The address that a scheduler's file holds, or the address itself.

    Raises:
        ValueError: It is none.
    """
    if "://" not in address:
        address = json.loads(read_file(Path(address), 2**20))["address"]
    parts = urlsplit(address)
    if parts.scheme not in ("tcp", "tls", "ws", "wss") or not parts.hostname or not parts.port:
        raise ValueError("no address such as tcp://10.0.0.1:8786")
    return address


@dataclass(frozen=True)
class _Task:
    """A job on its way to a worker.

    Attributes:
        run: Of which run it is one.
        mark: A file in the folder where the stage runs, there as long as it does.
        expected: From `describe_process`, there.
        stores: Where object storage is, as there; empty if nowhere.
        content: Pickled `(work, job)`: unpickled once the worker is known to be able to.
    """

    run: str
    mark: str
    expected: dict[str, str]
    stores: str
    content: bytes


_run_of_this_process = ""


def do_task(task: _Task) -> Any:
    """What a worker does.

    Raises:
        PipelineError: It cannot do it right; the message names it.
    """
    from distributed import get_worker

    global _run_of_this_process
    worker = get_worker()
    problem = check_worker(task.expected, task.mark, worker)
    if problem is not None:
        raise PipelineError(f"{ENGINE_VARIABLE}: {worker.address}: {problem}")
    os.chdir(Path(task.mark).parent)
    os.environ[STORES_VARIABLE] = task.stores
    if task.run != _run_of_this_process:
        forget_loaded()
        keep_freed_memory()
        _run_of_this_process = task.run
    key = worker.get_current_task()

    def is_wanted() -> bool:
        # A task that is cancelled while it is done stays with its worker, in this state, until it returns.
        state = worker.state.tasks.get(key)
        return state is not None and state.state not in ("cancelled", "resumed")

    set_wanted(is_wanted)
    work, job = pickle.loads(task.content)
    return work(job)


def check_worker(expected: dict[str, str], mark: str, dask_worker: Any) -> str | None:
    """What keeps this worker from doing jobs as the process that sends them would; None if nothing does.

    Args:
        expected: From `describe_process`, there.
        mark: A file in the folder where that process runs.
        dask_worker: The worker; Dask fills an argument of this name in.
    """
    own = describe_process()
    different = [f"{name} {own[name]} instead of {value}" for name, value in expected.items() if own[name] != value]
    if different:
        return f"has {', '.join(different)}; install the same"
    if not Path(mark).exists():
        return f"does not see {Path(mark).parent} as the stage does; both need a file system that they share"
    if (n_threads := dask_worker.state.nthreads) != 1:
        return f"has {n_threads} threads; start it with --nthreads 1"
    return None


def _word(problem: str | BaseException) -> str:
    if isinstance(problem, str):
        return problem
    return f"cannot be asked ({' '.join(str(problem).split())}); install the same version of this package there"


@cache
def describe_process() -> dict[str, str]:
    """What must be equal where jobs are sent from and where they are done: name → version or digest."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(file for file in package.rglob("*") if file.suffix in (".py", ".c")):
        digest.update(f"{file.relative_to(package)}\0".encode() + read_file(file, 2**24))
    versions = {name: _version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), "pipeline": digest.hexdigest()[:12], **versions}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
