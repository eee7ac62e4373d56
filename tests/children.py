"""Commands in real processes that have all imports behind them when they begin: tens of milliseconds, not seconds."""

import itertools
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from contextlib import suppress
from functools import partial as bind
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import torch
import torch._dynamo  # two seconds, which the first optimizer of every process would spend

# What the stages import when they run.
from pipeline import __main__, commands
from pipeline.data import datasets, sources  # noqa: F401
from pipeline.data.datasets import Dataset
from pipeline.evaluation import measuring  # noqa: F401
from pipeline.models.devices import select_device
from pipeline.perturbations import generation  # noqa: F401
from pipeline.reporting import page  # noqa: F401
from pipeline.runtime import engine
from pipeline.training import loop, work  # noqa: F401
from tests.conftest import ROOT

select_device("cpu")  # imports more of torch
# Where the server finds what it imports; without it, it would silently go on, and every command import for itself.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
_CONTEXT = multiprocessing.get_context("forkserver")
_NUMBERS = itertools.count()
_CONTEXT.set_forkserver_preload(["tests.children"])
_STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def _begin_worker() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _be_command(
    arguments: tuple[str, ...],
    folder: Path,
    said: Path,
    known: dict[str, Dataset],
    begun: Event,
    file_bytes: int | None,
) -> None:
    for number in _STOPS:  # the tests may run where some are ignored
        signal.signal(number, signal.SIG_DFL)
    os.setsid()  # so that signals can be sent to it and its workers
    os.chdir(folder)
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    cast(dict[str, Dataset], datasets.DATASETS).update(known)
    # Its workers are forked too; with one thread of torch they may be. They begin as those of the real server do, or
    # one that is stopped before it has a handler of its own would say so as if it were the command.
    mask = signal.pthread_sigmask
    os.register_at_fork(
        before=bind(mask, signal.SIG_BLOCK, _STOPS),
        after_in_parent=bind(mask, signal.SIG_UNBLOCK, _STOPS),
        after_in_child=_begin_worker,
    )
    multiprocessing.set_start_method("fork", force=True)
    fork = multiprocessing.get_context("fork")
    engine._begin_server = lambda *preload: fork
    sys.argv = ["pipeline", *arguments]
    main = commands.main

    def begin(**options: str) -> None:
        begun.set()
        main(**options)

    commands.main = begin  # type: ignore
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    __main__.start()


class Child:
    """`python -m pipeline` with these arguments in a process of its own, begun in the current folder.

    Knows the data sets that the test knows. When the block ends nothing of it is left. No file that it writes may be
    larger than `file_bytes`.
    """

    def __init__(self, *arguments: str, file_bytes: int | None = None) -> None:
        self._said = Path(tempfile.gettempdir(), f"pipeline-{os.getpid()}-{next(_NUMBERS)}.said")
        self._begun = _CONTEXT.Event()
        target = arguments, Path.cwd(), self._said, dict(datasets.DATASETS), self._begun, file_bytes
        self.process: BaseProcess = _CONTEXT.Process(target=_be_command, args=target)

    def __enter__(self) -> Self:
        self.process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.signal_all(signal.SIGKILL)
        self.process.join(30)
        self._said.unlink(missing_ok=True)

    def wait_until_begun(self) -> None:
        """Until it has left Python's own start behind it."""
        assert self._begun.wait(30)

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        """To the process that was started only; nothing if it has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def signal_all(self, number: int) -> None:
        """To its workers too, as a terminal does."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # it has not yet got so far as to lead a group
            self.signal(number)

    def end(self, timeout: float = 60) -> int:
        """Wait for it; its exit status, negative for a signal."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s; said {self.said()}"
        return self.process.exitcode

    def said(self) -> str:
        """What it has written to its outputs."""
        return self._said.read_text() if self._said.exists() else ""
