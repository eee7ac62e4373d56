"""Stages strategies and evaluate: what they write, keep, train again, and say of bad input."""

import csv
import itertools
import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from ruamel.yaml import YAML

from pipeline.evaluation import metrics
from pipeline.models import storage
from pipeline.perturbations import PERTURBATIONS
from pipeline.runtime import layout
from pipeline.training import jobs, loop
from pipeline.training.jobs import Task
from tests.conftest import WriteParams, differing, tree
from tests.test_stages import run, stored, succeed, with_params

N_TRAIN, N_TEST, TRIALS, CROSS_TRIALS = 300, 200, 3, 2
TRAIN_LEVELS: dict[str, list[float]] = {"stuck": [200], "dead": [], "noise": [0.05, 0.8], "blur": [2.0]}
EVALUATE_LEVELS: dict[str, list[float]] = {"stuck": [200], "dead": [150], "noise": [0.3, 0.8], "blur": [2.0, 4.0]}
LABELS = ["blur-2", "noise-0.05", "noise-0.8", "stuck-200"]
# In this order: transfer needs the natural model.
STRATEGIES = ["constant", "incremental", "transfer"]
CELLS = {strategy: layout.evaluate_cells("mnist", strategy) for strategy in STRATEGIES}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def done_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("done") / "study"


@pytest.fixture
def done(
    study: Path,
    done_once: Path,
    tiny_values: dict[str, Any],
    write_params: WriteParams,
    monkeypatch: pytest.MonkeyPatch,
    in_process: None,
) -> Path:
    """The current folder, with all strategies of the tiny MNIST trained and evaluated."""
    if not done_once.exists():
        tiny_values["datasets"]["mnist"].update(n_train=N_TRAIN, n_test=N_TEST)
        tiny_values["perturb"]["trials"] = TRIALS
        tiny_values["evaluate"].update(levels=EVALUATE_LEVELS, cross_trials=CROSS_TRIALS)
        del tiny_values["perturbations"]["hot"]
        for name, block in tiny_values["perturbations"].items():
            block.update(train_levels=TRAIN_LEVELS[name], test_levels=[1])
        for block in (tiny_values["train"]["recipes"], tiny_values["strategies"]["transfer"]["recipes"]):
            block["mnist"]["batch_size"] = 20  # more steps, so that the few images teach something
        write_params(tiny_values)
        for name in tiny_values["perturbations"]:
            succeed("perturb", "mnist", name)
        succeed("train", "mnist")
        for strategy in STRATEGIES:
            succeed("strategies", "mnist", strategy)
            succeed("evaluate", "mnist", strategy)
        shutil.copytree(study, done_once)
    else:
        shutil.rmtree(study / "data")
        shutil.copytree(done_once, study, dirs_exist_ok=True)
    return study


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of the models that are trained from now on."""
    labels: list[str] = []
    train_one = jobs.train_one

    def count(task: Task) -> None:
        labels.append(task.label)
        train_one(task)

    monkeypatch.setattr(jobs, "train_one", count)
    return labels


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def is_own(trained_on: str, tested_on: str) -> bool:
    if "natural" in (trained_on, tested_on):
        return True
    return PERTURBATIONS[trained_on].family == PERTURBATIONS[tested_on].family


# What they write.


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_training_level_has_a_model_with_a_description_and_a_curve(strategy: str, done: Path) -> None:
    files = sorted(path.name for path in layout.strategy_models("mnist", strategy).iterdir())
    assert files == sorted(f"{label}.{suffix}" for label in LABELS for suffix in ("json", "safetensors"))
    rows = read_rows(layout.strategy_curves("mnist", strategy))
    assert list(rows[0]) == ["model", "epoch", "train_loss", "train_accuracy", "test_accuracy"]
    shown = [(row["model"], row["epoch"]) for row in rows]
    assert sorted(shown) == [(label, epoch) for label in LABELS for epoch in ("1", "2")]
    finished = [path.name.split(".", 1)[1] for path in layout.finished_models().iterdir()]
    assert sorted(finished) == sorted(["safetensors", "json"] * (len(LABELS) * len(STRATEGIES) + 1))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_curves_end_with_the_accuracy_of_the_saved_models_on_clean_images(strategy: str, done: Path) -> None:
    clean = {
        f"{cell['train_perturbation']}-{cell['train_level']}": int(cell["n_correct"]) / N_TEST
        for cell in read_rows(CELLS[strategy])
        if cell["perturbation"] == "natural"
    }
    for row in read_rows(layout.strategy_curves("mnist", strategy)):
        if row["epoch"] == "2":
            assert float(row["test_accuracy"]) == pytest.approx(clean[row["model"]], abs=1e-6)


def test_the_models_of_all_strategies_and_levels_differ(done: Path) -> None:
    paths = [path for name in STRATEGIES for path in layout.strategy_models("mnist", name).glob("*.safetensors")]
    assert len({path.read_bytes() for path in paths}) == len(LABELS) * len(STRATEGIES)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_own_family_is_tested_on_all_trials_and_others_on_fewer(strategy: str, done: Path) -> None:
    models = [("natural", "natural", 0.0)]
    models += [(strategy, name, level) for name, levels in TRAIN_LEVELS.items() for level in levels]
    expected = set()
    for model in models:
        expected.add((*model, "natural", 0.0, 0))
        for name, levels in EVALUATE_LEVELS.items():
            stored_trials = 1 if name == "blur" else TRIALS
            n_trials = stored_trials if is_own(model[1], name) else min(CROSS_TRIALS, stored_trials)
            expected |= {(*model, name, level, trial) for level in levels for trial in range(n_trials)}
    rows = read_rows(CELLS[strategy])
    found = {
        (
            row["strategy"],
            row["train_perturbation"],
            float(row["train_level"]),
            row["perturbation"],
            float(row["level"]),
            int(row["trial"]),
        )
        for row in rows
    }
    assert found == expected
    assert len(rows) == len(expected)
    assert {(row["dataset"], row["n_examples"]) for row in rows} == {("mnist", str(N_TEST))}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("model", ["natural", *LABELS])
def test_cells_are_what_the_saved_model_says_of_the_stored_images(model: str, strategy: str, done: Path) -> None:
    path: Path
    key: tuple[str, ...]
    if model == "natural":
        path, key = layout.natural_model("mnist"), ("natural", "natural", "0")
    else:
        path, key = layout.strategy_models("mnist", strategy) / f"{model}.safetensors", (strategy, *model.split("-"))
    classifier = storage.load(path, "train it")
    labels = stored(layout.clean_store("mnist"), "test/labels")[:N_TEST]
    cells = [
        cell
        for cell in read_rows(CELLS[strategy])
        if (cell["strategy"], cell["train_perturbation"], cell["train_level"]) == key
    ]
    for cell in (cells[0], cells[1], cells[len(cells) // 2], cells[-1]):
        if cell["perturbation"] == "natural":
            images = stored(layout.clean_store("mnist"), "test/images")[:N_TEST]
        else:
            perturbed = layout.perturbed_store("mnist", cell["perturbation"])
            images = stored(perturbed, f"{cell['level']}/test")[int(cell["trial"])]
        with torch.no_grad():
            predicted = classifier(torch.from_numpy(images)).argmax(1).numpy()
        assert int(cell["n_correct"]) == int(np.sum(predicted == labels)), cell


KEY = ("train_perturbation", "train_level", "perturbation", "level", "trial")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_metrics_are_what_plain_arithmetic_makes_of_the_cells(strategy: str, done: Path) -> None:
    trials: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for row in read_rows(CELLS[strategy]):
        key = (row["train_perturbation"], row["train_level"], row["perturbation"], row["level"])
        trials[key].append(int(row["n_correct"]) / int(row["n_examples"]))
    means = {key: fmean(values) for key, values in trials.items()}
    ours = {key: mean for key, mean in means.items() if key[0] != "natural" and key[2] != "natural"}
    own = {key: mean for key, mean in ours.items() if is_own(key[0], key[2])}
    baseline = {key: mean for key, mean in means.items() if key[0] == "natural" and key[2] != "natural"}
    ratios = [
        (1 - fmean(mean for key, mean in own.items() if key[2] == name))
        / (1 - fmean(mean for key, mean in baseline.items() if key[2] == name))
        for name in EVALUATE_LEVELS
    ]
    # Of the natural model, the trials that the other models were measured on.
    rows = {tuple(row[name] for name in KEY): row for row in read_rows(CELLS[strategy])}
    beside: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for (trained_on, train_level, tested, level, trial), _ in rows.items():
        row = rows["natural", "0", tested, level, trial]
        beside[trained_on, train_level, tested, level].append(int(row["n_correct"]) / int(row["n_examples"]))
    paired = {key: fmean(values) for key, values in beside.items() if key in ours}
    expected = {
        "clean_accuracy": fmean(mean for key, mean in means.items() if key[0] != "natural" and key[2] == "natural"),
        "robust_accuracy": fmean(own.values()),
        "worst_accuracy": min(own.values()),
        "cross_accuracy": fmean(mean for key, mean in ours.items() if key not in own),
        "mce": fmean(ratios),
        "baseline_clean_accuracy": means["natural", "0", "natural", "0"],
        "baseline_robust_accuracy": fmean(paired[key] for key in own),
        "baseline_worst_accuracy": min(paired[key] for key in own),
        "baseline_cross_accuracy": fmean(mean for key, mean in paired.items() if key not in own),
    }
    found = json.loads(layout.evaluate_metrics("mnist", strategy).read_text())
    assert found.pop("baseline") == "natural"
    assert found == pytest.approx(expected, abs=1e-6)
    assert expected["baseline_clean_accuracy"] > 0.5  # it has learned, so that the numbers above mean something
    assert len(set(expected.values())) > 5


def test_a_baseline_without_errors_gives_metrics_that_json_knows() -> None:
    cells = [
        metrics.ModelCell("natural", "natural", 0, "mnist", "noise", 0.1, 0, 10, 10),
        metrics.ModelCell("constant", "noise", 0.1, "mnist", "noise", 0.1, 0, 9, 10),
    ]
    json.dumps(metrics.summarize_strategy(metrics.to_frame(cells)), allow_nan=False)


# What is trained again, and what is not.


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_run_again_nothing_is_trained_and_nothing_changes(strategy: str, done: Path, trained: list[str]) -> None:
    before = tree(done)
    output = succeed("strategies", "mnist", strategy)
    succeed("evaluate", "mnist", strategy)
    assert trained == []
    assert output.count("kept from an earlier run") == len(LABELS)
    assert differing(before, tree(done)) == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trained_again_from_nothing_the_bytes_are_the_same(strategy: str, done: Path, trained: list[str]) -> None:
    folders = [layout.strategy_models("mnist", strategy), Path("metrics")]
    before = [tree(folder) for folder in folders]
    shutil.rmtree(layout.finished_models())
    shutil.rmtree(folders[0])
    succeed("strategies", "mnist", strategy, "--workers", "3")
    succeed("evaluate", "mnist", strategy)
    assert sorted(trained) == LABELS
    assert [differing(old, tree(folder)) for old, folder in zip(before, folders, strict=True)] == [[], []]


def test_one_training_level_more_trains_one_model_more(done: Path, trained: list[str]) -> None:
    before = tree(layout.strategy_models("mnist", "constant"))
    with_params(perturbations__noise__train_levels=[0.05, 0.4, 0.8])(done)
    succeed("perturb", "mnist", "noise")
    succeed("strategies", "mnist", "constant")
    assert trained == ["noise-0.4"]
    after = tree(layout.strategy_models("mnist", "constant"))
    assert differing(before, after) == ["noise-0.4.json", "noise-0.4.safetensors"]


def test_one_training_level_fewer_removes_its_model_from_the_output(done: Path, trained: list[str]) -> None:
    with_params(perturbations__noise__train_levels=[0.8])(done)
    succeed("perturb", "mnist", "noise")
    succeed("strategies", "mnist", "constant")
    assert trained == []
    assert not layout.strategy_model("mnist", "constant", "noise", "0.05").exists()
    succeed("evaluate", "mnist", "constant")
    assert {row["train_level"] for row in read_rows(CELLS["constant"])} == {"0", "200", "0.8", "2"}


@pytest.mark.parametrize(
    ("changes", "strategy"),
    [
        ({"train__seed": 7}, "constant"),
        ({"train__recipes__mnist__epochs": 1}, "constant"),
        ({"strategies__incremental__end": 0.5}, "incremental"),
    ],
    ids=str,
)
def test_what_decides_the_weights_trains_all_anew(
    changes: dict[str, Any], strategy: str, done: Path, trained: list[str]
) -> None:
    with_params(**changes)(done)
    succeed("strategies", "mnist", strategy)
    assert sorted(trained) == LABELS


def test_another_natural_model_trains_transfer_anew(done: Path, trained: list[str]) -> None:
    with_params(train__recipes__mnist__standardize="channel")(done)
    succeed("train", "mnist")
    succeed("strategies", "mnist", "transfer")
    assert sorted(trained) == LABELS


def test_killed_half_way_the_finished_models_are_kept_and_the_old_output_whole(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(layout.finished_models())
    before = tree(Path("models/mnist")), tree(Path("metrics"))
    train_one, calls = jobs.train_one, itertools.count()

    def stop_half_way(task: Task) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        train_one(task)

    monkeypatch.setattr(jobs, "train_one", stop_half_way)
    result = run("strategies", "mnist", "constant")
    assert result.exit_code == 1
    assert "Aborted!" in result.output
    assert len(list(layout.finished_models().glob("*.json"))) == 2
    assert (tree(Path("models/mnist")), tree(Path("metrics"))) == before

    labels: list[str] = []

    def count(task: Task) -> None:
        labels.append(task.label)
        train_one(task)

    monkeypatch.setattr(jobs, "train_one", count)
    succeed("strategies", "mnist", "constant")
    assert len(labels) == 2
    assert (tree(Path("models/mnist")), tree(Path("metrics"))) == before


def test_the_natural_model_goes_on_from_its_last_epoch_to_the_same_bytes(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = [layout.natural_model("mnist"), layout.natural_model("mnist").with_suffix(".json")]
    outputs.append(layout.learning_curve("mnist"))
    before = [path.read_bytes() for path in outputs]
    shutil.rmtree(layout.finished_models())
    save = loop._save_checkpoint

    def save_and_die(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save_checkpoint", save_and_die)
    assert run("train", "mnist").exit_code == 1
    assert len(list(layout.finished_models().glob("*.checkpoint"))) == 1
    monkeypatch.setattr(loop, "_save_checkpoint", save)
    output = succeed("train", "mnist")
    assert "kept from an earlier run" not in output
    assert [path.read_bytes() for path in outputs] == before
    assert not list(layout.finished_models().glob("*.checkpoint"))
    assert "kept from an earlier run" in succeed("train", "mnist")
    assert [path.read_bytes() for path in outputs] == before


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 100])
def test_a_damaged_checkpoint_is_trained_anew(done: Path, content: bytes) -> None:
    before = layout.natural_model("mnist").read_bytes()
    (described,) = (path for path in layout.finished_models().glob("*.json") if "natural" in strategy_of(path))
    described.with_suffix(".checkpoint").write_bytes(content)
    described.unlink()
    succeed("train", "mnist")
    assert layout.natural_model("mnist").read_bytes() == before


def strategy_of(described: Path) -> str:
    """The strategy of a model in the cache."""
    return str(json.loads(described.read_text())["strategy"])


def test_a_checkpoint_left_by_a_run_killed_as_a_model_was_finished_is_removed(done: Path, trained: list[str]) -> None:
    for path in list(layout.finished_models().glob("*.safetensors")):
        path.with_suffix(".checkpoint").write_bytes(b"")
    succeed("train", "mnist")
    for strategy in STRATEGIES:
        succeed("strategies", "mnist", strategy)
    assert trained == []
    assert list(layout.finished_models().glob("*.checkpoint")) == []


def test_a_worker_that_is_killed_is_one_error_that_says_what_to_do(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def be_killed(task: Task) -> None:
        raise BrokenProcessPool("a process in the process pool was terminated abruptly")

    monkeypatch.setattr(jobs, "train_one", be_killed)
    shutil.rmtree(layout.finished_models())
    result = run("strategies", "mnist", "constant")
    assert result.exit_code == 1
    assert result.output.startswith("Error: a process was killed, perhaps because memory ran out; run again")


@pytest.mark.parametrize("damage", ["flipped", "missing", "description"])
def test_a_kept_model_that_is_damaged_is_trained_again(damage: str, done: Path, trained: list[str]) -> None:
    before = tree(layout.strategy_models("mnist", "constant"))
    content = layout.strategy_model("mnist", "constant", "stuck", "200").read_bytes()
    (kept,) = [path for path in layout.finished_models().glob("*.safetensors") if path.read_bytes() == content]
    if damage == "missing":
        kept.unlink()
    elif damage == "description":
        kept.with_suffix(".json").write_bytes(b"")
    else:
        kept.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    succeed("strategies", "mnist", "constant")
    assert trained == ["stuck-200"]
    assert differing(before, tree(layout.strategy_models("mnist", "constant"))) == []


# What they say of bad input.


def with_edited_description(folder: Path) -> None:
    path = layout.strategy_model("mnist", "constant", "noise", "0.8").with_suffix(".json")
    described = json.loads(path.read_text())
    described["trained_on"]["level"] = 0.7
    storage.write(path.with_suffix(".safetensors"), path.with_suffix(".safetensors").read_bytes(), described)


def with_swapped_weights(folder: Path) -> None:
    one, other = (layout.strategy_model("mnist", "constant", "noise", level) for level in ("0.05", "0.8"))
    one.write_bytes(other.read_bytes())


def with_swapped_models(folder: Path) -> None:
    one, other = (layout.strategy_model("mnist", "constant", "noise", level) for level in ("0.05", "0.8"))
    for suffix in (".safetensors", ".json"):
        one.with_suffix(suffix).write_bytes(other.with_suffix(suffix).read_bytes())


def with_other_weights(folder: Path) -> None:
    path = layout.strategy_model("mnist", "constant", "blur", "2")
    tensors = safetensors.torch.load(path.read_bytes())
    tensors["network.output.bias"] += 1
    path.write_bytes(safetensors.torch.save(tensors))


def without_strategy(folder: Path) -> None:
    yaml = YAML(typ="safe", pure=True)
    values = yaml.load(layout.PARAMS.read_text())
    del values["strategies"]["constant"]
    with layout.PARAMS.open("w") as file:
        yaml.dump(values, file)


UNKNOWN = "strategy: unknown 'incremntal'; params.yaml has constant, incremental, transfer"
BAD: list[tuple[str, Callable[[Path], Any] | None, str, str]] = [
    # id, what is wrong, command, expected in the message
    ("train-unknown", None, "strategies mnist incremntal", UNKNOWN),
    ("evaluate-unknown", None, "evaluate mnist incremntal", UNKNOWN),
    ("train-unknown-data-set", None, "strategies svhn constant", "data set: unknown 'svhn'"),
    ("evaluate-unknown-data-set", None, "evaluate svhn constant", "data set: unknown 'svhn'"),
    ("strategy-not-asked-for", without_strategy, "strategies mnist constant", "strategy: unknown 'constant'; params"),
    (
        "transfer-without-natural",
        lambda _: layout.natural_model("mnist").unlink(),
        "strategies mnist transfer",
        "natural.safetensors: no such model; make it with `python -m pipeline train mnist`",
    ),
    (
        "evaluate-without-natural",
        lambda _: layout.natural_model("mnist").unlink(),
        "evaluate mnist constant",
        "natural.safetensors: no such model; make it with `python -m pipeline train mnist`",
    ),
    (
        "evaluate-before-training",
        lambda _: shutil.rmtree(layout.strategy_models("mnist", "constant")),
        "evaluate mnist constant",
        "no such model; make it with `python -m pipeline strategies mnist constant`",
    ),
    ("description-edited", with_edited_description, "evaluate mnist constant", "made with other params (trained_on is"),
    (
        "weights-swapped",
        with_swapped_weights,
        "evaluate mnist constant",
        "not the weights that noise-0.05.json describes",
    ),
    ("models-swapped", with_swapped_models, "evaluate mnist constant", "made with other params (trained_on is"),
    ("weights-changed", with_other_weights, "evaluate mnist constant", "not the weights that blur-2.json describes"),
    (
        "train-on-a-store-of-another-seed",
        with_params(perturb__seed=5),
        "strategies mnist constant",
        "made with other params (seed is 2004, params.yaml asks for 5)",
    ),
    (
        "evaluate-on-a-store-of-another-seed",
        with_params(perturb__seed=5),
        "evaluate mnist constant",
        "made with other params (seed is 2004, params.yaml asks for 5)",
    ),
    (
        "models-of-another-seed",
        with_params(strategies__incremental__end=0.5),
        "evaluate mnist incremental",
        "made with other params (perturbed_share is",
    ),
    (
        "store-missing",
        lambda _: shutil.rmtree(layout.perturbed_store("mnist", "blur")),
        "strategies mnist constant",
        "python -m pipeline perturb mnist blur",
    ),
    (
        "evaluate-level-not-generated",
        with_params(evaluate__levels={**EVALUATE_LEVELS, "noise": [0.31]}),
        "evaluate mnist constant",
        "0.31/test: not in the store; make it again with `python -m pipeline perturb mnist noise`",
    ),
]


@pytest.mark.parametrize(("spoil", "command", "expected"), [pytest.param(*case, id=name) for name, *case in BAD])
def test_bad_input_is_one_error_and_changes_nothing(
    spoil: Callable[[Path], Any] | None, command: str, expected: str, done: Path, trained: list[str]
) -> None:
    if spoil is not None:
        spoil(done)
    before = tree(done)
    result = run(*command.split())
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert expected in result.output
    assert trained == []
    assert differing(before, tree(done)) == []
