"""Small synthetic data sets in the place of the real ones, and a folder in which every stage can run."""

import copy
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from ruamel.yaml import YAML

from pipeline.commands import main
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

# Where tests run in the background, Ctrl-C is ignored, and every process that they begin would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Not multiples of the block, chunk or shard size.
N_TRAIN, N_TEST = 1230, 620

# Of the study of fixture `finished`; harsh ones among them: the bright stripes are easy to tell apart. The stores hold
# both, impact and figures only show the former.
Levels = dict[str, list[float]]
TEST_LEVELS: Levels = {"stuck": [1, 300], "hot": [200], "dead": [200], "noise": [0.05, 0.8], "blur": [0.4, 4.0]}
EVALUATE_LEVELS: Levels = {"stuck": [1, 2], "hot": [], "dead": [200], "noise": [0.1], "blur": [4, 0.5]}
COMMANDS = [
    "prepare mnist",
    *(f"perturb mnist {name}" for name in TEST_LEVELS),
    *(f"{stage} mnist" for stage in ("train", "impact", "strategies", "evaluate", "ablations")),
    "report",
]

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
    """For commands in other folders: those of this Python, and this package where the folder has none of its own.

    DVC starts no process to report usage: it would outlive the command and write into the folder's .dvc.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1"}


def run(folder: Path, *command: str, status: int = 0) -> str:
    """What a command run in `folder` says; it must end with `status`."""
    result = subprocess.run(command, cwd=folder, env=command_environment(), capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(values, file)


def pasted(values: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    """Params with the blocks that `describe` prints in the place of those of the same names."""
    levels = {**values["evaluate"]["levels"], **block["evaluate"]["levels"]}
    return {
        **values,
        "datasets": block["datasets"],
        "perturbations": {**values["perturbations"], **block["perturbations"]},
        "evaluate": {**values["evaluate"], "levels": levels},
    }


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


def restore(folder: Path, content: dict[str, bytes | None]) -> None:
    """Give a folder the content that `tree` found."""
    changed = differing(content, tree(folder))
    for path in (folder / name for name in reversed(changed)):  # what a folder holds before it
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    for name in changed:
        if (part := content.get(name, b"")) is None:
            (folder / name).mkdir()
        elif name in content:
            (folder / name).write_bytes(part)


class TookTooLongError(BaseException):
    """Not an `Exception`, which the code under test may catch."""


def memory_of(name: str) -> int:
    """Bytes of this process, as Linux calls them."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@contextmanager
def bounded(n_bytes: int) -> Iterator[None]:
    """Makes an end of what takes so much more memory; a `TookTooLongError` is raised when the alarm rings."""

    def stop(*_: object) -> None:
        raise TookTooLongError

    limits = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (memory_of("VmSize") + n_bytes, limits[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, limits)


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


def idx_files(arrays: Arrays) -> dict[str, bytes]:
    """The four files of MNIST; images without their channel axis."""
    files = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        for kind, n_dimensions in (("images", 3), ("labels", 1)):
            values = arrays[split, kind]
            header = struct.pack(f">HBB{n_dimensions}I", 0, 8, n_dimensions, *values.shape[:n_dimensions])
            files[f"{stem}-{kind}-idx{n_dimensions}-ubyte"] = header + values.tobytes()
    return files


def write_originals(folder: Path, arrays: Arrays) -> None:
    folder.mkdir()
    for name, content in idx_files(arrays).items():
        (folder / name).write_bytes(content)


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
        write_yaml(layout.PARAMS, values)
        return layout.PARAMS

    return write


def write_clean_stores(arrays: dict[str, Arrays]) -> None:
    for name, values in arrays.items():
        sources.write_clean(layout.clean_store(name), datasets.DATASETS[name], values)


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
    write_clean_stores(tiny_datasets)
    return tmp_path


MakeOnce = Callable[[Callable[[dict[str, Any]], None]], Path]


@pytest.fixture(scope="session")
def made() -> dict[str, tuple[Path, dict[str, bytes | None]]]:
    """The studies of `made_once`: by the function that made it, a folder and what it holds."""
    return {}


@pytest.fixture
def made_once(
    made: dict[str, tuple[Path, dict[str, bytes | None]]],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    tiny_datasets: dict[str, Arrays],
    tiny_values: dict[str, Any],
) -> Iterator[MakeOnce]:
    """Gives the current folder, which a function has filled once for all tests; mends it when the test is over.

    The function is given `tiny_values`, and finds profiles/ and the clean stores.
    """
    used = []

    def make(fill: Callable[[dict[str, Any]], None]) -> Path:
        name = f"{fill.__module__}.{fill.__qualname__}"
        if name not in made:
            monkeypatch.chdir(tmp_path_factory.mktemp("study"))
            shutil.copytree(ROOT / "profiles", layout.PROFILES)
            write_clean_stores(tiny_datasets)
            fill(tiny_values)
            made[name] = Path.cwd(), tree(Path.cwd())
        used.append(made[name])
        monkeypatch.chdir(made[name][0])
        return made[name][0]

    yield make
    for folder, content in used:
        restore(folder, content)


@pytest.fixture
def finished(
    made_once: MakeOnce, tiny_datasets: dict[str, Arrays], write_params: WriteParams, in_process: None
) -> Path:
    """The current folder, with everything that the stages make of the tiny MNIST, originals and dvc.lock on."""

    def fill(values: dict[str, Any]) -> None:
        shutil.rmtree("data")
        write_originals(Path("originals"), tiny_datasets["mnist"])
        values["prepare"].update(sources=["local"], local_folder="originals")
        values["datasets"] = {"mnist": {**values["datasets"]["mnist"], "n_train": 300, "n_test": 200}}
        for name, levels in TEST_LEVELS.items():
            values["perturbations"][name].update(train_levels=[0.05] if name == "noise" else [], test_levels=levels)
        values["train"]["recipes"]["mnist"]["batch_size"] = 20  # more steps, so that the few images teach something
        values["impact"]["n_examples"] = 4
        values["strategies"] = {"constant": {}}
        values["evaluate"]["levels"] = EVALUATE_LEVELS
        del values["ablations"]["components"]
        write_params(values)
        for command in COMMANDS:
            result = CliRunner().invoke(main, command.split())
            assert result.exit_code == 0, result.output
        record()

    return made_once(fill)


def record() -> None:
    """Have DVC write the dvc.lock that it would have after `dvc repro` in the current folder."""
    graph = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())
    for stage in graph["stages"].values():
        said = stage.get("do", stage)
        said.pop("deps", None), said.pop("params", None)
    write_yaml(Path("dvc.yaml"), {"stages": graph["stages"]})
    for command in ("dvc init --quiet --no-scm", "dvc commit --quiet --force"):
        run(Path(), *command.split())
    shutil.rmtree(".dvc")
    Path("dvc.yaml").unlink()
    Path(".dvcignore").unlink()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What processes are given is done in this one, which alone knows the tiny data sets."""

    def run(self: LocalProcesses, work: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        for job in jobs:
            yield job, work(job)

    monkeypatch.setattr(LocalProcesses, "run", run)


def copy_index(folder: Path) -> Path:
    """A repository whose only commit is what git's index holds here."""
    run(ROOT, "git", "checkout-index", "--all", f"--prefix={folder}/")
    for line in ("init -q", "config user.name test", "config user.email test@localhost", "add -A", "commit -qm index"):
        run(folder, "git", *line.split())
    return folder


MakeOwnStudy = Callable[..., dict[str, Any]]


@pytest.fixture
def own_study(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_process: None,
    tiny_values: dict[str, Any],
    write_params: WriteParams,
) -> MakeOwnStudy:
    """Makes the current folder a study of one data set of the user's, and gives its params; profiles/ has them too."""
    (tmp_path / "here" / layout.PROFILES).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")

    def make(name: str, n_train: int = 2, n_test: int = 2, batch_size: int = 2, **source: Any) -> dict[str, Any]:
        values = copy.deepcopy(tiny_values)
        source = {"kind": "npz", "channels": 3, "test_share": None, **source, "size": list(source["size"])}
        values["datasets"] = {name: {"source": source, "n_train": n_train, "n_test": n_test}}
        train, transfer = values["train"], values["strategies"]["transfer"]
        for block in (train, transfer):
            block["recipes"] = {name: {**block["recipes"]["mnist"], "batch_size": batch_size}}
        train["recipes"][name]["network"]["convolutions"][0].update(stride=1, pool=2)
        noise = {**values["perturbations"]["noise"], "train_levels": [0.3], "test_levels": [0.3]}
        values["perturbations"], values["evaluate"]["levels"] = {"noise": noise}, {"noise": [0.3]}
        shutil.copy(write_params(values), layout.PROFILES / "paper.yaml")
        return values

    return make


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """One thread of torch, as models trained side by side have; more wait longer than tiny networks compute."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photos(
    tmp_path_factory: pytest.TempPathFactory, quick_values: dict[str, Any], tiny_arrays: dict[str, Arrays]
) -> Path:
    """The folder of a study of images of the user's, which workers know too; its clean store is made."""
    folder = tmp_path_factory.mktemp("photos")
    arrays = tiny_arrays["mnist"]
    n = {"train": 300, "test": 200}
    named: dict[str, Any] = {f"{s}_{kind}": arrays[s, kind][: n[s]] for s in n for kind in ("images", "labels")}
    np.savez(folder / "photos.npz", **named)
    from tests.photos import YAML_TEXT  # which imports this module

    values = YAML(typ="safe", pure=True).load(YAML_TEXT)
    recipe = quick_values["train"]["recipes"]["mnist"]
    network = {**recipe["network"], "convolutions": [{"filters": 4, "kernel": 5, "stride": 3, "padding": 0, "pool": 2}]}
    values["train"]["recipes"]["photos"] = {**recipe, "network": network, "epochs": 3, "batch_size": 20}
    values["impact"], values["prepare"] = quick_values["impact"], quick_values["prepare"]
    write_yaml(folder / "params.yaml", values)
    return folder
