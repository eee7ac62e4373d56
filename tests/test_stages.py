"""Every stage from the command line, on tiny data: what it writes, and what it says and leaves alone when it cannot."""

import csv
import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import zarr
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from pipeline.commands import main
from pipeline.data import store
from pipeline.data.sources import Arrays
from pipeline.evaluation import metrics
from pipeline.perturbations import generation
from pipeline.runtime import layout
from pipeline.runtime.values import to_yaml
from pipeline.study.reading import changed_keys, read
from tests.conftest import COMMANDS, ROOT, TEST_LEVELS, differing, tree, write_yaml
from tests.conftest import run as in_folder
from tests.test_params import changed

N_TEST, N_EXAMPLES = 200, 4
CELLS, EXAMPLES = layout.cells("impact", "mnist"), layout.examples("mnist")
METRICS, CURVE = layout.summary("impact", "mnist"), layout.natural_curves("mnist")
MODEL = layout.model("mnist", "natural", "clean", 1)
NOISE, CLEAN = layout.perturbed_store("mnist", "noise"), layout.clean_store("mnist")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def succeed(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def fail(*arguments: str) -> str:
    """The one error of a command, and the lines before it."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)  # anything else is a traceback
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    return result.output


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# What the stages write.


def test_the_stages_write_the_files_that_layout_names_and_no_others(finished: Path) -> None:
    expected = {layout.PARAMS, layout.LOCK, EXAMPLES, METRICS, CURVE, layout.report() / "index.html"}
    expected |= {layout.cells(stage, "mnist") for stage in ("impact", "evaluate", "ablations")}
    expected |= {layout.strategy_curves("mnist"), layout.summary("evaluate", "mnist", "constant")}
    expected |= {layout.summary("ablations", "mnist", "standardization", name) for name in ("pixel", "channel", "none")}
    expected |= {layout.confusion("mnist")}
    models = [MODEL, layout.model("mnist", "constant", "noise-0.05", 1)]
    models += [layout.ablation_models("mnist") / f"standardization/{name}-seed1.json" for name in ("channel", "none")]
    expected |= {model.with_suffix(suffix) for model in models for suffix in (".safetensors", ".json")}
    stores = {CLEAN, *(layout.perturbed_store("mnist", name) for name in TEST_LEVELS)}
    assert all(path.is_dir() for path in stores)
    found = {path.relative_to(finished) for path in finished.rglob("*") if path.is_file()}
    elsewhere = {*stores, layout.cached_models(), layout.PROFILES, Path("originals")}
    outside = {path for path in found if not elsewhere & set(path.parents)}
    assert outside == expected


def test_there_is_a_cell_for_every_level_and_trial(finished: Path) -> None:
    expected = {("clean", 0.0, 0)}
    for name, levels in TEST_LEVELS.items():
        expected |= {(name, level, trial) for level in levels for trial in range(1 if name == "blur" else 2)}
    cells = read_rows(CELLS)
    assert {(cell["perturbation"], float(cell["level"]), int(cell["trial"])) for cell in cells} == expected
    assert len(cells) == len(expected)
    assert {(cell["dataset"], cell["n_examples"]) for cell in cells} == {("mnist", str(N_TEST))}


def stored(path: Path, name: str) -> NDArray[np.uint8]:
    """An array as anyone reads it, without this project."""
    array = zarr.open_group(path, mode="r")[name]
    assert isinstance(array, zarr.Array)
    return np.array(array[...], np.uint8)


def test_metrics_are_those_of_the_cells(finished: Path) -> None:
    expected = metrics.summarize(pd.read_csv(CELLS))
    assert json.loads(METRICS.read_text()) == expected
    assert expected["clean_accuracy"] > 0.5  # the model has learned, so that the numbers above mean something
    assert expected["worst_accuracy"] < 0.8
    assert len(set(expected.values())) > 5


def test_examples_are_the_first_test_images_at_every_level(finished: Path, tiny_datasets: dict[str, Arrays]) -> None:
    rows = read_rows(EXAMPLES)
    shown = list(dict.fromkeys((cell["perturbation"], cell["level"]) for cell in read_rows(CELLS)))
    labels = tiny_datasets["mnist"]["test", "labels"]
    assert [(row["perturbation"], row["level"]) for row in rows] == [key for key in shown for _ in range(N_EXAMPLES)]
    expected = list(enumerate(labels[:N_EXAMPLES].tolist()))
    assert [(int(row["index"]), int(row["actual"])) for row in rows] == expected * len(shown)
    assert all(0.1 <= float(row["confidence"]) <= 1 for row in rows)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stage_run_again_writes_the_same_bytes(command: str, finished: Path) -> None:
    before = tree(finished)
    succeed(*command.split())
    assert differing(before, tree(finished)) == []


def test_params_may_lie_elsewhere(finished: Path) -> None:
    before = tree(finished)
    elsewhere = finished / "elsewhere.yaml"
    layout.PARAMS.rename(elsewhere)
    succeed("perturb", "mnist", "noise", "--params", str(elsewhere))
    elsewhere.rename(layout.PARAMS)
    assert differing(before, tree(finished)) == []


# What they say of bad input.

Mend = Callable[[Path], object]


def with_params(changes: dict[str, Any]) -> Mend:
    """Params with other values at dotted keys."""

    def edit(folder: Path) -> None:
        path = folder / layout.PARAMS
        write_yaml(path, changed(read(path), changes))

    return edit


def without(path: Path) -> Mend:
    def delete(folder: Path) -> None:
        if (folder / path).is_dir():
            shutil.rmtree(folder / path)
        else:
            (folder / path).unlink()

    return delete


def with_bytes(path: Path, content: bytes) -> Mend:
    def write(folder: Path) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)

    return write


def shard(path: Path, array: str) -> Path:
    """The only shard of an array of a tiny store."""
    rank = {"images": "c.0.0.0.0", "labels": "c.0", "train": "c.0.0.0.0", "test": "c.0.0.0.0.0"}
    return path / array / rank[array.split("/")[1]]


def with_flipped_byte(path: Path) -> Mend:
    def flip(folder: Path) -> None:
        content = bytearray((folder / path).read_bytes())
        content[len(content) // 2] ^= 0x10
        (folder / path).write_bytes(content)

    return flip


def with_values(path: Path, changes: dict[str, Any]) -> Mend:
    """JSON with other values at dotted keys."""

    def edit(folder: Path) -> None:
        values = changed(json.loads((folder / path).read_text()), changes)
        (folder / path).write_text(json.dumps(values))

    return edit


def with_attribute(path: Path, name: str, value: Any) -> Mend:
    return with_values(path / "zarr.json", {f"attributes.{name}": value})


def with_other_images(path: Path, name: str, digest_too: bool, at: int | slice = 12345) -> Mend:
    """A store whose checksums are right, but which holds other images: their bytes `at` these places differ."""

    def edit(folder: Path) -> None:
        array = zarr.open_group(folder / path, mode="r+")[name]
        assert isinstance(array, zarr.Array)
        values: NDArray[np.uint8] = np.array(array[...])
        values.reshape(-1)[at] ^= 1
        array[...] = values
        if digest_too:
            store.finish(array, store.sha256(values))

    return edit


BAD: dict[str, list[tuple[Mend | None, str]]] = {
    # command: what is wrong, and what the message says of it
    "prepare svhn": [(None, "data set: unknown 'svhn'; params.yaml has ")],
    "perturb mnist fog": [(None, "perturbation: unknown 'fog'; params.yaml has ")],
    "verify svhn": [(None, "Error: data set: unknown 'svhn'; params.yaml has mnist\n")],
    "verify mnist fog": [(None, "Error: perturbation: unknown 'fog'; params.yaml has stuck, hot, dead, noise, blur\n")],
    "evaluate mnist": [(with_bytes(layout.PARAMS, b"a: [1"), "params.yaml: not valid YAML")],
    "profile x": [(without(layout.PROFILES), "unknown 'x'; choose from none")],
    "prepare mnist": [
        (without(layout.PARAMS), "params.yaml: no such file"),
        (with_params({"prepare.local_folder": None}), "mnist: no source gave the data set"),
        (with_flipped_byte(Path("originals/train-images-idx3-ubyte")), "wrong content: train images"),
    ],
    "perturb mnist noise": [
        (without(CLEAN), "python -m pipeline prepare mnist"),
        (with_flipped_byte(shard(CLEAN, "train/images")), "damaged data"),
        (with_bytes(CLEAN / "zarr.json", b"{"), "damaged metadata"),
    ],
    "train mnist --params mine.yaml": [(None, "mine.yaml: no such file")],
    "train mnist": [
        (without(CLEAN), "python -m pipeline prepare mnist"),
        (with_params({"device": "cuda:99"}), "device: 'cuda:99' is not there"),
    ],
    "impact mnist": [
        (with_params({"perturb.trials": 0}), "perturb.trials: 0"),
        (without(CLEAN), "python -m pipeline prepare mnist"),
        (without(NOISE), "python -m pipeline perturb mnist noise"),
        (without(MODEL), f"{MODEL}: no such model; make it with"),
        (with_flipped_byte(shard(NOISE, "0.05/test")), "damaged data"),
        (with_other_images(NOISE, "0.8/test", digest_too=False), "0.8/test: damaged data (SHA-256"),
        (with_attribute(NOISE, "schema_version", 99), "schema version 99"),
        (with_params({"perturb.seed": 5}), "made with other params (seed is 2004"),
        (with_params({"perturb.trials": 3}), "made with other params (shape is [2, 200, 28"),
        (
            with_params({"perturbations.hot.scope": "sensor"}),
            "made with other params (options is {'scope': 'image'}, params.yaml asks for {'scope': 'sensor'})",
        ),
        (with_flipped_byte(MODEL), "damaged model (not the weights that"),
        (
            with_params({"train.seeds": [9]}),
            "natural/clean-seed9.json: no such model; make it with `python -m pipeline train mnist`",
        ),
        (
            with_params({"train.recipes.mnist.epochs": 3}),
            "made with other params (perturbed_share is [0.0, 0.0], params.yaml asks for [0.0, 0.0, 0.0]); make it "
            "again with `python -m pipeline train mnist`",
        ),
    ],
}


@pytest.mark.parametrize(
    ("command", "spoil", "expected"),
    [pytest.param(command, *case, id=f"{command}-{case[1]}") for command, cases in BAD.items() for case in cases],
)
def test_bad_input_is_one_error_and_changes_nothing(
    command: str, spoil: Mend | None, expected: str, finished: Path
) -> None:
    if spoil is not None:
        spoil(finished)
    before = tree(finished)
    # Before the error there is nothing but the lines on sources that failed.
    said = [line for line in fail(*command.split()).splitlines(keepends=True) if not line.startswith("mnist: local: ")]
    message = "".join(said)
    assert message.startswith("Error: ")
    assert expected in message
    assert differing(before, tree(finished)) == []


def test_a_full_disk_is_one_error_that_names_the_store_and_leaves_it_whole(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(generation, "perturb_images", Mock(side_effect=full))
    before = tree(finished)
    assert fail("perturb", "mnist", "noise").startswith(f"Error: {NOISE}: No space")
    assert differing(before, tree(finished)) == []


# Command profile.


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the profiles of this repository and the params of `quick`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "profiles", layout.PROFILES)
    shutil.copy(layout.PROFILES / "quick.yaml", layout.PARAMS)
    return tmp_path


def test_a_profile_takes_the_place_of_params_and_shows_what_changes(profiles: Path) -> None:
    output = succeed("profile", "paper")
    assert layout.PARAMS.read_bytes() == (layout.PROFILES / "paper.yaml").read_bytes()
    changes = changed_keys(read(layout.PROFILES / "quick.yaml"), read(layout.PARAMS))
    assert output.splitlines() == [
        *(f"{key}: {to_yaml(old)} -> {to_yaml(new)}" for key, old, new in changes),
        f"params.yaml: profile paper, {len(changes)} value(s) changed",
    ]
    assert "perturbations.blur.mix_channels: false -> true" in output.splitlines()


def test_what_a_profile_changes_is_said_key_by_key_as_params_would_have_it(profiles: Path) -> None:
    said = succeed("profile", "own").splitlines()
    assert {
        "datasets.mnist.source.kind: canonical -> null",
        "datasets.photos.source.size: null -> [64, 64]",
        "train.recipes.photos.shuffle: null -> true",
    } <= set(said)
    network = "train.recipes.mnist.network.convolutions"
    assert f"{network}: [{{filters: 10, kernel: 7, stride: 3, padding: 0, pool: 2}}] -> null" in said


QUICK = (ROOT / "profiles/quick.yaml").read_bytes()


@pytest.mark.parametrize(
    "content", [None, b"a: [1", b"a: 1", QUICK + b"# mine\n"], ids=["missing", "no-yaml", "invalid", "in-place"]
)
def test_a_profile_takes_the_place_of_whatever_is_there(content: bytes | None, profiles: Path) -> None:
    layout.PARAMS.unlink()
    if content is not None:
        layout.PARAMS.write_bytes(content)
    said = succeed("profile", "quick")
    assert layout.PARAMS.read_bytes() == QUICK
    if content is not None and content.startswith(QUICK):
        assert said == "params.yaml: profile quick, 0 value(s) changed\n"
    kept = Path("params.yaml.bak")
    assert kept.exists() == (content in (b"a: [1", b"a: 1"))  # what is no profile might be somebody's work
    assert not kept.exists() or kept.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("incomplete", "profiles/incomplete.yaml: 10 problem(s)"),
        ("list", "profiles/list.yaml: expected keys and values"),
        ("binary", "profiles/binary.yaml: not valid YAML"),
        *(
            (name, f"profile: unknown '{name}'; choose from binary, fast, incomplete, list, own, paper, quick\n")
            for name in ("papper", "../params", "paper.yaml", "")
        ),
    ],
)
def test_a_bad_or_unknown_profile_leaves_params_as_they_were(name: str, expected: str, profiles: Path) -> None:
    for bad, content in {"incomplete": b"device: auto\n", "list": b"- 1\n", "binary": b"\xff\xfe"}.items():
        (layout.PROFILES / f"{bad}.yaml").write_bytes(content)
    before = tree(profiles)
    assert fail("profile", name).startswith(f"Error: {expected}")
    assert differing(before, tree(profiles)) == []


# The command line itself.


def test_help_lists_the_commands_in_the_order_of_the_pipeline() -> None:
    listed = succeed("--help").split("Commands:")[1].split("\n")
    order = "check prepare perturb train import-model impact strategies evaluate ablations report"
    order += " describe plan verify profile clean"
    assert [line.split()[0] for line in listed if line.strip()] == order.split()


@pytest.mark.parametrize("command", list(main.commands))
def test_every_command_explains_itself(command: str) -> None:
    output = succeed(command, "--help")
    assert output.startswith(f"Usage: main {command} [OPTIONS]")
    if command != "describe":  # which is there to write one
        assert "--params FILE" in output
        assert "The params file.  [default: params.yaml]" in output


@pytest.mark.parametrize(
    "arguments",
    [
        *("prepare", "perturb mnist", "perturb mnist noise --workers 0", "train mnist cifar10"),
        *("strategies mnist constant", "evaluate mnist --workers 2", "plan prepare"),
    ],
)
def test_a_command_that_is_not_understood_is_a_usage_error(arguments: str) -> None:
    result = run(*arguments.split())
    assert result.exit_code == 2
    assert result.output.startswith("Usage: ")
    assert "Error: " in result.output


def test_help_imports_none_of_the_slow_libraries() -> None:
    said = in_folder(ROOT, sys.executable, "-X", "importtime", "-m", "pipeline", "--help").splitlines()
    assert said[0].startswith("Usage: python -m pipeline ")
    imported = {line.rpartition("|")[2].strip() for line in said if line.startswith("import time:")}
    assert "pipeline.stages.evaluate" in imported
    assert imported & {"torch", "torchvision", "zarr", "cv2", "pandas", "matplotlib", "numpy", "pydantic"} == set()
