"""A Dask cluster makes the bytes of a local run, and whatever happens to it is one error or a retry."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import dask
import pytest
from click.testing import CliRunner
from distributed import Client
from ruamel.yaml import YAML

from pipeline.commands import main
from pipeline.runtime import cluster
from pipeline.runtime.cluster import ENGINE_VARIABLE, DaskCluster, check_worker, describe_process
from pipeline.runtime.errors import PipelineError
from tests.conftest import FAULTS_SEED, ROOT, command_environment, differing, tree
from tests.photos import STAGES, copy_of, run_stages

SETTINGS = ROOT / "docs/dask.yaml"


@contextmanager
def begun(
    folder: Path, n_workers: int, allowed_failures: int = 1
) -> Iterator[tuple[str, list["subprocess.Popen[str]"]]]:
    """A cluster as a user begins it: the file of its scheduler, and its processes, the scheduler first."""
    file = folder / "scheduler.json"
    settings = {"DASK_CONFIG": str(SETTINGS), "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(allowed_failures)}
    environment = {**command_environment(), **settings}
    begin = partial(
        subprocess.Popen,
        env=environment,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    scheduler = ["dask", "scheduler", "--port", "0", "--host", "127.0.0.1", "--scheduler-file", str(file)]
    processes = [begin([*scheduler, "--no-dashboard"])]
    wait_for(file.exists, 60)
    worker = ["dask", "worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-dashboard"]
    processes += [begin([*worker, "--local-directory", str(folder)]) for _ in range(n_workers)]
    try:
        yield str(file), processes
    finally:
        # With what they began: asked to end, Dask's nanny may wait for ever for a worker that it has just begun anew.
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The scheduler's file of a cluster of two workers."""
    with begun(tmp_path_factory.mktemp("cluster"), 2) as (file, _):
        yield file


@pytest.fixture
def engine(address: str) -> DaskCluster:
    return DaskCluster(address, lambda line: None)


@pytest.mark.slow
def test_a_cluster_of_any_size_makes_the_bytes_of_a_local_run(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: None
) -> None:
    local = run_stages(copy_of(photos, tmp_path / "local"), monkeypatch, None)
    for n_workers in (1, 2, 4):
        folder = copy_of(photos, tmp_path / f"{n_workers}")
        with begun(folder, n_workers) as (file, _), connected(file) as client:
            client.wait_for_workers(n_workers)
            made = run_stages(folder, monkeypatch, file)
        assert differing(local, made) == [], n_workers
    assert len([name for name in local if name.endswith(".safetensors")]) == 12


def test_our_settings_are_ones_that_dask_has() -> None:
    def compare(prefix: str, settings: dict[str, Any]) -> None:
        for key, value in settings.items():
            if isinstance(value, dict):
                compare(f"{prefix}{key}.", value)
            else:
                assert dask.config.get(prefix + key) != value

    compare("", YAML(typ="safe").load(SETTINGS))


# Jobs of these tests.


def square(job: int) -> int:
    """Of 13 it makes an error."""
    if job == 13:
        raise PipelineError("thirteen")
    return job**2


def leave_trace(folder: Path) -> None:
    """Leave a file for every time that this job is done."""
    folder.mkdir(exist_ok=True)
    (folder / uuid4().hex).touch()
    time.sleep(0.1)


def die_once(mark: Path) -> int:
    """End the process, unless it did so before."""
    if not mark.exists():
        mark.touch()
        die(mark)
    return os.getpid()


def die(mark: Path) -> None:
    """End the process, as the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_every_job_is_done_once_and_the_first_error_ends_all(
    engine: DaskCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sorted(engine.run(square, range(9))) == [(job, job**2) for job in range(9)]
    assert list(engine.run(square, [])) == []
    assert list(Path.cwd().glob(".*.partial")) == []
    with pytest.raises(PipelineError, match="thirteen"):
        list(engine.run(square, [1, 13, *range(100, 1000)]))


@pytest.mark.slow
def test_a_job_whose_worker_dies_is_done_by_another(engine: DaskCluster, tmp_path: Path) -> None:
    [(_, process)] = engine.run(die_once, [tmp_path / "mark"])
    assert process != os.getpid()


@pytest.mark.slow
def test_a_job_whose_result_was_fetched_is_not_done_again_if_its_worker_dies(
    engine: DaskCluster, tmp_path: Path
) -> None:
    with connected(engine.address) as client:
        client.wait_for_workers(2)
        processes = client.run(os.getpid)
    run = engine.run(leave_trace, [tmp_path / f"job-{n}" for n in range(20)])
    fetched = [next(run) for _ in range(12)]
    os.kill(next(iter(processes.values())), signal.SIGKILL)
    assert len({job for job, _ in [*fetched, *run]}) == 20
    assert {len(list(job.iterdir())) for job, _ in fetched} == {1}


@pytest.mark.slow
def test_a_job_of_which_workers_die_is_an_error_with_advice(engine: DaskCluster, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"2 workers died of one job, the last at tcp://.*--memory-limit"):
        list(engine.run(die, [tmp_path]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "pipeline", "python"])
def test_a_worker_with_another_version_is_refused_by_name(
    engine: DaskCluster, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = describe_process()
    monkeypatch.setattr(cluster, "describe_process", lambda: {**own, name: "0.1"})
    with pytest.raises(PipelineError, match=rf"tcp://\S+: has {name} {own[name]} instead of 0.1; install the same"):
        list(engine.run(square, [1]))


def test_a_worker_that_sees_another_folder_or_has_several_threads_is_refused(tmp_path: Path) -> None:
    one, two = (SimpleNamespace(state=SimpleNamespace(nthreads=n)) for n in (1, 2))
    assert check_worker(describe_process(), str(tmp_path), one) is None
    assert "start it with --nthreads 1" in str(check_worker(describe_process(), str(tmp_path), two))
    assert f"does not see {tmp_path} as" in str(check_worker(describe_process(), str(tmp_path / "no"), one))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def saved(name: str, content: str) -> Path:
    Path(name).write_text(content)
    return Path(name)


BAD_ADDRESSES: dict[str, tuple[Callable[[], str], str]] = {
    "nobody": (lambda: f"tcp://127.0.0.1:{free_port()}", "no Dask scheduler answers at tcp"),
    "no port": (lambda: "tcp://127.0.0.1", "no address such as tcp"),
    "port": (lambda: "tcp://127.0.0.1:many", "Port could not be cast"),
    "scheme": (lambda: "ftp://127.0.0.1:8786", "no address such as tcp"),
    "no file": (lambda: "scheduler.json", "No such file or directory"),
    "file": (lambda: str(shutil.copy("empty.json", "bad.json")), "answers at bad.json"),
    "list": (lambda: str(saved("list.json", "[1]")), "not the file of a Dask scheduler"),
    "number": (lambda: str(saved("number.json", '{"address": 3}')), "not the file of a Dask scheduler"),
    "folder": (lambda: ".", "no Dask scheduler answers at ."),
}


@pytest.mark.parametrize("case", BAD_ADDRESSES)
def test_a_cluster_that_is_not_there_is_one_error(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.json").write_text("{}")
    monkeypatch.setattr(cluster, "_PATIENCE", 1)
    make, said = BAD_ADDRESSES[case]
    with pytest.raises(PipelineError, match=said):
        list(DaskCluster(make(), lambda line: None).run(square, [1]))


@pytest.mark.slow
def test_a_scheduler_without_workers_and_one_that_goes_away_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begun(tmp_path, 0) as (file, _), monkeypatch.context() as patched:
        patched.setattr(cluster, "_PATIENCE", 1)
        with pytest.raises(PipelineError, match="has no workers; start some"):
            list(DaskCluster(file, lambda line: None).run(square, [1]))
    with begun(tmp_path, 1) as (file, [scheduler, _]):
        results = DaskCluster(file, lambda line: None).run(time.sleep, [0.1, 60])
        next(results)
        scheduler.kill()
        with pytest.raises(PipelineError, match="has gone; run again: finished work is kept"):
            next(results)


# Processes that are stopped and killed. Time limits are those that docs/cluster.md promises.


def begin(folder: Path, stage: str, address: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *stage.split()],
        cwd=folder,
        env={**command_environment(), ENGINE_VARIABLE: address, "OMP_NUM_THREADS": "1"},  # as in this process
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def connected(file: str) -> Iterator[Client]:
    with Client(scheduler_file=file, set_as_default=False) as client:  # type: ignore[no-untyped-call]
        yield client


def wait_for(condition: Callable[[], bool], seconds: float) -> float:
    """How long it took until something was so."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.02)
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stage_that_is_stopped_leaves_the_cluster_idle(
    number: signal.Signals,
    photos: Path,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_process: None,
) -> None:
    folder = copy_of(photos, tmp_path / "study")
    params = folder / "params.yaml"
    params.write_text(params.read_text().replace("epochs: 3", "epochs: 3000"))
    monkeypatch.chdir(folder)
    assert CliRunner().invoke(main, ["prepare", "photos"]).exit_code == 0
    with connected(address) as client:

        def is_idle() -> bool:
            return not any(client.run(lambda dask_worker: dask_worker.state.executing_count).values())

        stage = begin(folder, "train photos", address)
        wait_for(lambda: any(Path("models/.finished").glob("*.checkpoint")), 60)
        stage.send_signal(number)
        assert wait_for(lambda: stage.poll() is not None, 60) < 2
        assert wait_for(is_idle, 60) < 10
    stage.communicate()
    assert stage.returncode == -number


@pytest.mark.slow
def test_workers_that_are_killed_change_no_byte(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: None
) -> None:
    """Fifty times, at random moments of generation, training and evaluation."""
    expected = run_stages(copy_of(photos, tmp_path / "local"), monkeypatch, None)
    folder, rng, n_killed = copy_of(photos, tmp_path / "cluster"), random.Random(FAULTS_SEED), 0
    monkeypatch.chdir(folder)
    assert CliRunner().invoke(main, ["prepare", "photos"]).exit_code == 0
    with begun(tmp_path, 2, allowed_failures=100) as (file, _), connected(file) as client:
        while n_killed < 50:
            for name in ("data/perturbed", "models", "metrics"):
                subprocess.run(["rm", "-rf", name], check=True)
            for command in STAGES:
                stage, most = begin(folder, command, file), n_killed + 20  # a slow machine would never get on
                while stage.poll() is None:
                    time.sleep(rng.uniform(0.2, 3))
                    busy = [worker for worker, keys in client.processing().items() if keys]  # type: ignore[no-untyped-call]
                    if busy and n_killed < most:
                        victim = rng.choice(busy)
                        process = client.run(os.getpid, workers=[victim], on_error="ignore").get(victim)
                        if process is not None:
                            os.kill(process, signal.SIGKILL)
                            n_killed += 1
                said = stage.communicate()[0]
                assert stage.returncode == 0, said
            made = {name: content for name, content in tree(folder).items() if name in expected}
            assert differing(expected, made) == []
