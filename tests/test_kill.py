"""Training that is really killed or stopped, on real MNIST: nobody survives, and in the end the bytes are the same."""

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from ruamel.yaml import YAML

from pipeline.runtime import layout
from tests.conftest import DOWNLOADS, command_environment, differing, run, tree

N_MODELS = 3
# Measured: less than one; a machine may be busy.
STOP_SECONDS = 10
TRAIN = ("python", "-m", "pipeline", "strategies", "mnist", "--workers", "2")
MODELS, CURVES = layout.strategy_models("mnist"), layout.strategy_curves("mnist")
# Kind of file in models/.finished to wait for, and what to send to whom: to the workers too, as a terminal does, or
# only to the process that was started, as `kill` does.
KILLS: list[tuple[str, Callable[[int, int], None], signal.Signals]] = [
    (".checkpoint", os.killpg, signal.SIGKILL),
    (".checkpoint", os.kill, signal.SIGKILL),
    (".checkpoint", os.killpg, signal.SIGINT),
    (".json", os.killpg, signal.SIGKILL),
    (".checkpoint", os.kill, signal.SIGTERM),
    (".checkpoint", os.killpg, signal.SIGHUP),
]


@pytest.fixture
def prepared(tmp_path: Path, quick_values: dict[str, Any]) -> Path:
    """A folder with all that `strategies mnist` needs for three models of a few seconds each."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    values = copy.deepcopy(quick_values)
    del values["datasets"]["cifar10"]
    values["datasets"]["mnist"].update(n_train=4000, n_test=500)
    values["train"]["recipes"]["mnist"].update(epochs=40)
    train_levels: dict[str, list[float]] = {"hot": [3], "noise": [0.025, 0.05]}
    for name in list(values["perturbations"]):
        if name in train_levels:
            values["perturbations"][name].update(train_levels=train_levels[name], test_levels=[])
            values["evaluate"]["levels"][name] = []
        else:
            del values["perturbations"][name], values["evaluate"]["levels"][name]
    values["strategies"] = {"incremental": values["strategies"]["incremental"]}
    values["prepare"]["download_folder"] = str(DOWNLOADS)
    values["device"] = "cpu"  # others need not give the same bytes twice
    YAML(typ="safe", pure=True).dump(values, folder / layout.PARAMS)
    for command in ("prepare mnist", "perturb mnist hot", "perturb mnist noise"):
        run(folder, "python", "-m", "pipeline", *command.split())
    return folder


def epochs_in(folder: Path) -> dict[str, int]:
    """Epochs behind every checkpoint and learning curve, by file name."""
    epochs = {}
    for path in (folder / layout.cached_models()).glob("*.checkpoint"):
        with suppress(FileNotFoundError):  # its model may be finished by now
            curve = safetensors.numpy.load(path.read_bytes()[32:])["curve"]  # after the digest
            epochs[path.name] = len(json.loads(curve.tobytes()))
    for path in (folder / layout.cached_models()).glob("*.json"):
        epochs[path.name] = len(json.loads(path.read_text())["learning_curve"])
    return epochs


def train_and_kill(
    folder: Path, kind: str, delay: float, kill: Callable[[int, int], None], number: signal.Signals
) -> None:
    """Start training, wait for the next epoch or finished model and then `delay` seconds, and kill or stop it."""
    before = epochs_in(folder)
    with subprocess.Popen(
        TRAIN,
        cwd=folder,
        env=command_environment(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            now, deadline = before, time.monotonic() + 120
            while not any(name.endswith(kind) and n > before.get(name, 0) for name, n in now.items()):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.002)
                now = epochs_in(folder)
            assert all(now[name] >= n for name, n in before.items() if name in now)  # no model has begun anew
            time.sleep(delay)
            kill(process.pid, number)
            # Reads to the end of the pipe, so it ends when no worker that could write to it is left.
            output, _ = process.communicate(timeout=30 if number == signal.SIGKILL else STOP_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -number, output
    if number != signal.SIGKILL:
        check_stopped(output, number)


def half_done(folder: Path) -> set[Path]:
    """What only a run under way may have."""
    return {path for suffix in ("partial", "running") for path in folder.rglob(f"*.{suffix}")}


def check_stopped(output: str, number: signal.Signals) -> None:
    """That a run which a signal has stopped said so in one line."""
    *before, last = output.splitlines()
    assert last == f"Stopped by {number.name}: no output is half written; run again to go on."
    assert [line for line in before if not line.startswith("mnist incremental ")] == []


@pytest.fixture(autouse=True)
def signals_heard() -> Iterator[None]:
    """Processes begun by a test hear Ctrl-C also where the tests run in the background, or under nohup."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stop_as_workers_begin(folder: Path, delay: float, number: signal.Signals) -> None:
    """Ctrl-C in a terminal, or its end, while what workers need is imported, or as they begin."""
    with subprocess.Popen(
        TRAIN,
        cwd=folder,
        env=command_environment(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():  # not Linux
            process.kill()
            return
        while len(children.read_text().split()) < 2:  # what workers are forked from, and what looks after semaphores
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        time.sleep(delay)
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=STOP_SECONDS)
    assert process.returncode == -number, output
    check_stopped(output, number)


def test_training_that_is_killed_again_and_again_ends_with_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        shutil.copytree(prepared, folder)
    assert run(undisturbed, *TRAIN).count(": trained") == N_MODELS
    assert len(list((undisturbed / MODELS).rglob("*.safetensors"))) == N_MODELS

    delays = random.Random(9)
    for delay, number in ((0.5, signal.SIGINT), (delays.uniform(1, 6), signal.SIGINT), (0.5, signal.SIGHUP)):
        stop_as_workers_begin(killed, delay, number)
    for kind, kill, number in KILLS:
        train_and_kill(killed, kind, delays.uniform(0, 0.3), kill, number)
        assert not (killed / MODELS).exists()
        assert not (killed / CURVES).exists()
    weights = (killed / layout.cached_models()).glob("*.safetensors")
    kept = {path: path.stat().st_mtime_ns for path in weights if path.with_suffix(".json").exists()}
    assert 1 <= len(kept) < N_MODELS

    output = run(killed, *TRAIN)
    assert output.count("kept from an earlier run") == len(kept)
    assert output.count(": trained") == N_MODELS - len(kept)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert differing(tree(undisturbed / MODELS), tree(killed / MODELS)) == []
    assert (undisturbed / CURVES).read_bytes() == (killed / CURVES).read_bytes()
    assert half_done(killed) == set()
    assert list(killed.rglob("*.checkpoint")) == []
