"""Runs jobs on the workers of a Dask cluster, which share the stage's folder and have the same code."""

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

# Environment variable for the cluster that stages use: the address of a Dask scheduler, or its scheduler file.
ENGINE_VARIABLE = "PIPELINE_ENGINE"
# Timeouts in seconds: for the scheduler to answer, and for a first worker to be there.
_PATIENCE = 30
# Libraries that decide results beside our own code: cv2 and zarr write and decode, the others compute; the last two are
# extras.
_LIBRARIES = ("numpy", "torch", "torchvision", "opencv-python-headless", "zarr", "numcodecs", "onnxruntime", "timm")


def find_cluster(say: Callable[[str], object]) -> "DaskCluster | None":
    """Return the cluster that PIPELINE_ENGINE names, or None if it is not set.

    Args:
        say: Called with a line that says where to watch the cluster.
    """
    address = os.environ.get(ENGINE_VARIABLE)
    return DaskCluster(address, say) if address else None


def find_engine(local: Engine, say: Callable[[str], object]) -> Engine:
    """Return the cluster that PIPELINE_ENGINE names, or `local` if it is not set."""
    return find_cluster(say) or local


@dataclass(frozen=True)
class DaskCluster:
    """An `Engine` of the workers of a Dask cluster, one thread each.

    Attributes:
        address: The scheduler's address, such as `tcp://10.0.0.1:8786`, or its scheduler file.
        say: Called with a line that names Dask's dashboard.
    """

    address: str
    say: Callable[[str], object]
    is_in_process: ClassVar[bool] = False

    def run(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
        """Run jobs as `Engine.run` does; jobs that are lost when a worker dies are done again by another one.

        Raises:
            PipelineError: There is no such scheduler, or it goes away; it has no workers; a worker has another version
                of the code or of a library, does not see the folder, or has several threads; several workers died of
                one job.
        """
        jobs = list(jobs)
        if not jobs:
            return
        # Visible to workers that share this very folder, but not to those with another folder of the same name.
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
        waiting = {future.key: (future, job) for future, job in zip(futures, jobs, strict=True)}
        del futures
        try:
            for future in as_completed([future for future, _ in waiting.values()], loop=client.loop):  # type: ignore[no-untyped-call]
                result = future.result()
                _, job = waiting.pop(future.key)
                # Or Dask would keep the result with its worker, and compute it again if that worker dies.
                future.release()
                yield job, result
        except KilledWorker as error:
            raise PipelineError(
                f"{ENGINE_VARIABLE}: {error.allowed_failures + 1} workers died of one job, the last at "
                f"{error.last_worker.address}, perhaps because memory ran out; give them more (--memory-limit) and "
                "run again: finished work is kept"
            ) from None
        except CancelledError:  # Dask's client cancels its futures when it loses its connection
            raise PipelineError(
                f"{ENGINE_VARIABLE}: the Dask scheduler at {self.address} has gone; run again: finished work is kept"
            ) from None
        finally:
            if client.status == "running":
                client.cancel([future for future, _ in waiting.values()])  # type: ignore[no-untyped-call]

    @contextmanager
    def _connected(self, mark: str) -> Iterator["Client"]:
        try:
            from distributed import Client
        except ImportError:
            raise PipelineError(
                f"{ENGINE_VARIABLE}: needs Dask: `pip install -c constraints.txt -e '.[dask]'`"
            ) from None
        for name in ("distributed", "distributed.client"):  # we report errors ourselves, once
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            client = Client(_scheduler_address(self.address), timeout=_PATIENCE, set_as_default=False)  # type: ignore[no-untyped-call]
        except (OSError, TimeoutError, ValueError) as error:
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
            # Returns unpickling errors too: a worker may not have our package at all.
            found = client.run(check_worker, expected, mark, on_error="return")
            problems = [f"{worker}: {_word(said)}" for worker, said in sorted(found.items()) if said is not None]
            if problems:
                raise PipelineError(f"{ENGINE_VARIABLE}: {'; '.join(problems)}")
            self.say(f"{len(found)} worker(s) of {self.address}; watch them at {client.dashboard_link}")
            yield client


def _scheduler_address(address: str) -> str:
    """Return the address itself, or the one in the scheduler file that `address` names.

    Raises:
        ValueError: It is not an address, and not the file of a scheduler.
    """
    if "://" not in address:
        try:
            content = json.loads(read_file(Path(address), 2**20))
        except PipelineError as error:  # a folder, a pipe
            raise ValueError(str(error)) from None
        if not isinstance(content, dict) or not isinstance(content.get("address"), str):
            raise ValueError("not the file of a Dask scheduler")
        address = content["address"]
    parts = urlsplit(address)
    if parts.scheme not in ("tcp", "tls", "ws", "wss") or not parts.hostname or not parts.port:
        raise ValueError("no address such as tcp://10.0.0.1:8786")
    return address


@dataclass(frozen=True)
class _Task:
    """A job on its way to a worker.

    Attributes:
        run: The ID of the run that the job belongs to.
        mark: A file in the folder where the stage runs; it exists as long as the run.
        expected: The stage's own `describe_process`.
        stores: The stage's own value of PIPELINE_STORES; empty if it is not set.
        content: Pickled `(work, job)`; unpickled only after the worker has been checked.
    """

    run: str
    mark: str
    expected: dict[str, str]
    stores: str
    content: bytes


_run_of_this_process = ""


def do_task(task: _Task) -> Any:
    """Do a job on a worker.

    Raises:
        PipelineError: The worker fails `check_worker`; the message names it.
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
        # A task that is cancelled while it runs stays with its worker, in one of these states, until it returns.
        state = worker.state.tasks.get(key)
        return state is not None and state.state not in ("cancelled", "resumed")

    set_wanted(is_wanted)
    work, job = pickle.loads(task.content)
    return work(job)


def check_worker(expected: dict[str, str], mark: str, dask_worker: Any) -> str | None:
    """Return why this worker might not do jobs as the process that sends them would; None if it is fit.

    Args:
        expected: `describe_process` of the sending process.
        mark: A file in the folder where that process runs.
        dask_worker: The worker; Dask fills in an argument of this name.
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
    """Return the versions that sender and worker must have in common: name → version or, of our code, digest."""
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
