"""Small synthetic data sets in the place of the real ones, and a folder in which every stage can run."""

import copy
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from pipeline.data import datasets, sources, store
from pipeline.data.datasets import Dataset
from pipeline.data.sources import Arrays
from pipeline.runtime import layout
from pipeline.runtime.engine import LocalProcesses

ROOT = Path(__file__).resolve().parent.parent
# Fetched once, for all test runs.
DOWNLOADS = ROOT / "data/downloads"

# Of the random moments in test_faults.py; set it to have a failure again.
FAULTS_SEED = int(os.environ.get("FAULTS_SEED", time.time_ns() % 2**32))

# Not multiples of the block, chunk or shard size.
N_TRAIN, N_TEST = 1230, 620

# Tests that count cells, models and pictures know these; one that is added is covered by those that walk the table.
COUNTED = {"stuck", "hot", "dead", "noise", "blur"}


# Test files that take minutes, the longest first: begun last, one of them would keep a core waiting.
LONG = ("test_faults", "test_report", "test_determinism")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


def pytest_report_header() -> str:
    return f"FAULTS_SEED={FAULTS_SEED}"


def command_environment() -> dict[str, str]:
    """For commands in other folders: those of this Python, and this package where the folder has none of its own."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def run(folder: Path, *command: str, status: int = 0) -> str:
    """What a command run in `folder` says; it must end with `status`."""
    result = subprocess.run(command, cwd=folder, env=command_environment(), capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below `folder`: relative path to content, None for a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def differing(before: dict[str, bytes | None], after: dict[str, bytes | None]) -> list[str]:
    """The paths that are not alike in two trees."""
    missing = object()
    return [path for path in sorted({*before, *after}) if before.get(path, missing) != after.get(path, missing)]


def make_arrays(shape: tuple[int, int, int], seed: int) -> Arrays:
    """Images in which each class is bright in a stripe of its own, so that a network can learn them."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, n in (("train", N_TRAIN), ("test", N_TEST)):
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        images = rng.integers(0, 80, (n, *shape), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 6, 4:-4] += 150
        arrays[split, "images"], arrays[split, "labels"] = images, labels
    return arrays


def write_originals(folder: Path, arrays: Arrays) -> None:
    """The four IDX files of MNIST."""
    folder.mkdir()
    for split, stem in (("train", "train"), ("test", "t10k")):
        for kind, n_dimensions in (("images", 3), ("labels", 1)):
            values = arrays[split, kind]
            header = struct.pack(f">HBB{n_dimensions}I", 0, 8, n_dimensions, *values.shape[:n_dimensions])
            (folder / f"{stem}-{kind}-idx{n_dimensions}-ubyte").write_bytes(header + values.tobytes())


def tiny_dataset(real: Dataset, arrays: Arrays) -> Dataset:
    """The data set `real` with these arrays as its content."""
    return replace(
        real,
        n_examples={"train": N_TRAIN, "test": N_TEST},
        digests={key: store.sha256(values) for key, values in arrays.items()},
    )


@pytest.fixture(scope="session")
def tiny_arrays() -> dict[str, Arrays]:
    """Arrays of tiny stand-ins for both data sets."""
    return {name: make_arrays(dataset.shape, len(name)) for name, dataset in datasets.DATASETS.items()}


@pytest.fixture
def tiny_datasets(tiny_arrays: dict[str, Arrays], monkeypatch: pytest.MonkeyPatch) -> dict[str, Arrays]:
    """`DATASETS` describes the tiny stand-ins for the duration of a test."""
    for name, arrays in tiny_arrays.items():
        monkeypatch.setitem(datasets.DATASETS, name, tiny_dataset(datasets.DATASETS[name], arrays))
    return tiny_arrays


@pytest.fixture(scope="session")
def quick_values() -> dict[str, Any]:
    """The content of profiles/quick.yaml, with levels of noise and variants of ablations that tests count on."""
    values: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "profiles/quick.yaml").read_text())
    values["perturbations"]["noise"].update(train_levels=[0.05], test_levels=[0.01325, 0.0255, 0.05])
    values["evaluate"]["levels"]["noise"] = [0.0255, 0.05]
    values["ablations"]["components"] = {
        "full": {},
        "no_dropout": {"network": {"dropout": 0.0}},
        "tanh": {"network": {"activation": "tanh"}},
    }
    return values


@pytest.fixture
def tiny_values(quick_values: dict[str, Any]) -> dict[str, Any]:
    """Params with which every stage takes a second on the tiny data sets."""
    values = copy.deepcopy(quick_values)
    for name in values["perturbations"].keys() - COUNTED:
        del values["perturbations"][name], values["evaluate"]["levels"][name]
    for subset in values["datasets"].values():
        subset.update(n_train=1100, n_test=600)
    values["perturb"]["trials"] = 2
    for recipe in values["train"]["recipes"].values():
        recipe.update(epochs=2, batch_size=100, precision="float32")
        recipe["network"]["convolutions"] = [{"filters": 4, "kernel": 5, "stride": 3, "padding": 0, "pool": 2}]
    for tuning in values["strategies"]["transfer"]["recipes"].values():
        tuning.update(fully_connected=[8], epochs=2, batch_size=100)
    values["device"] = "cpu"
    return values


WriteParams = Callable[[dict[str, Any]], Path]


@pytest.fixture
def write_params() -> WriteParams:
    """Writes values as params.yaml of the current folder."""

    def write(values: dict[str, Any]) -> Path:
        with layout.PARAMS.open("w") as file:
            YAML(typ="safe", pure=True).dump(values, file)
        return layout.PARAMS

    return write


@pytest.fixture
def study(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_datasets: dict[str, Arrays],
    tiny_values: dict[str, Any],
    write_params: WriteParams,
) -> Path:
    """The current folder, with params.yaml and the clean stores of the tiny data sets."""
    monkeypatch.chdir(tmp_path)
    write_params(tiny_values)
    for name, arrays in tiny_datasets.items():
        sources.write_clean(layout.clean_store(name), datasets.DATASETS[name], arrays)
    return tmp_path


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What processes are given is done in this one, which alone knows the tiny data sets."""

    def run(self: LocalProcesses, work: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        for job in jobs:
            yield job, work(job)

    monkeypatch.setattr(LocalProcesses, "run", run)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread of torch, as models trained side by side have; more wait longer than tiny networks compute."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
