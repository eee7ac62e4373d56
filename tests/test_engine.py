"""Engines do every job once, end at the first error, and say when a process was killed."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch.multiprocessing  # noqa: F401  # or the fork server would be begun without it

from pipeline.runtime.engine import Engine, LocalProcesses, LocalThreads
from pipeline.runtime.errors import PipelineError

PROCESSES = LocalProcesses(2, preload=("tests.test_engine",))
either = pytest.mark.parametrize("engine", [LocalThreads(2), PROCESSES], ids=["threads", "processes"])


def square(job: int) -> int:
    """The work of these tests; of 13 it makes an error, and of 666 an end of its process."""
    if job == 13:
        raise PipelineError("thirteen")
    if job == 666:
        os.kill(os.getpid(), signal.SIGKILL)
    return job**2


@either
def test_every_job_is_done_once(engine: Engine) -> None:
    assert sorted(engine.run(square, range(9))) == [(job, job**2) for job in range(9)]
    assert list(engine.run(square, [])) == []


@either
def test_the_first_error_ends_all(engine: Engine) -> None:
    """However late its process begins: doing the others takes a minute."""
    done: list[int] = []
    with pytest.raises(PipelineError, match="thirteen"):
        done.extend(job for job, _ in engine.run(square, [1, 13, *range(100, 10**6)]))
    assert len(done) < 10**6 - 100


def test_a_process_that_was_killed_is_an_error_with_advice() -> None:
    with pytest.raises(PipelineError, match="a process was killed, perhaps because memory ran out; run again"):
        list(PROCESSES.run(square, [1, 666, 2]))


def test_jobs_are_taken_a_few_ahead_of_those_that_are_done() -> None:
    """Or results that nobody has fetched would fill memory."""
    taken = []

    def take() -> Iterator[int]:
        for job in range(100, 150):
            taken.append(job)
            yield job

    n_ahead = [len(taken) - n_done for n_done, _ in enumerate(LocalThreads(2).run(square, take()))]
    assert 2 <= max(n_ahead) <= 4


def test_threads_work_side_by_side() -> None:
    both = threading.Barrier(2, timeout=10)
    assert len(list(LocalThreads(2).run(lambda job: both.wait(), range(2)))) == 2


def test_an_abandoned_run_leaves_no_process() -> None:
    began = time.monotonic()
    run = PROCESSES.run(square, range(10))
    next(run)
    run.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 30
