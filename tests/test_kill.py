"""Training that is really killed, on real MNIST: nobody survives, and run again it ends with the same bytes."""

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from safetensors import safe_open

from pipeline import layout
from tests.conftest import DOWNLOADS, command_environment, differing, run, tree

N_MODELS = 3
TRAIN = ("python", "-m", "pipeline", "strategies", "mnist", "incremental", "--workers", "2")
MODELS, CURVES = layout.strategy_models("mnist", "incremental"), layout.strategy_curves("mnist", "incremental")
# Kind of file in models/.finished to wait for, and how to kill: the workers too, or only the process that was started,
# as `kill -9` does.
KILLS: list[tuple[str, Callable[[int, int], None]]] = [
    (".checkpoint", os.killpg),
    (".checkpoint", os.kill),
    (".curve.json", os.killpg),
    (".checkpoint", os.killpg),
]


@pytest.fixture
def prepared(tmp_path: Path, quick_values: dict[str, Any]) -> Path:
    """A folder with all that `strategies mnist incremental` needs for three models of a few seconds each."""
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
    values["prepare"]["download_folder"] = str(DOWNLOADS)
    values["device"] = "cpu"  # others need not give the same bytes twice
    YAML(typ="safe", pure=True).dump(values, folder / layout.PARAMS)
    for command in ("prepare mnist", "perturb mnist hot", "perturb mnist noise"):
        run(folder, "python", "-m", "pipeline", *command.split())
    return folder


def epochs_in(folder: Path) -> dict[str, int]:
    """Epochs behind every checkpoint and learning curve, by file name."""
    epochs = {}
    for path in (folder / layout.finished_models()).glob("*.checkpoint"):
        with suppress(FileNotFoundError), safe_open(path, framework="np") as file:  # its model may be finished by now
            epochs[path.name] = len(json.loads(file.metadata()["curve"]))
    for path in (folder / layout.finished_models()).glob("*.curve.json"):
        epochs[path.name] = len(json.loads(path.read_text()))
    return epochs


def train_and_kill(folder: Path, kind: str, delay: float, kill: Callable[[int, int], None]) -> None:
    """Start training, wait for the next epoch or finished model and then `delay` seconds, and kill it."""
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
            kill(process.pid, signal.SIGKILL)
            # Reads to the end of the pipe, so it ends when no worker that could write to it is left.
            output, _ = process.communicate(timeout=30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, output


def test_training_that_is_killed_again_and_again_ends_with_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        shutil.copytree(prepared, folder)
    assert run(undisturbed, *TRAIN).count(": trained") == N_MODELS
    assert len(tree(undisturbed / MODELS)) == 2 * N_MODELS

    delays = random.Random(9)
    for kind, kill in KILLS:
        train_and_kill(killed, kind, delays.uniform(0, 0.3), kill)
        assert not (killed / MODELS).exists()
        assert not (killed / CURVES).exists()
    weights = (killed / layout.finished_models()).glob("*.safetensors")
    kept = {path: path.stat().st_mtime_ns for path in weights if path.with_suffix(".curve.json").exists()}
    assert 1 <= len(kept) < N_MODELS

    output = run(killed, *TRAIN)
    assert output.count("kept from an earlier run") == len(kept)
    assert output.count(": trained") == N_MODELS - len(kept)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert differing(tree(undisturbed / MODELS), tree(killed / MODELS)) == []
    assert (undisturbed / CURVES).read_bytes() == (killed / CURVES).read_bytes()
    leftovers = [path for suffix in ("partial", "checkpoint") for path in killed.rglob(f"*.{suffix}")]
    assert leftovers == []
