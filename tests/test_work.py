"""Stages strategies and evaluate: what they write, keep, train again, and say of bad input."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.evaluation import metrics
from pipeline.models import storage
from pipeline.perturbations import PERTURBATIONS
from pipeline.runtime import layout
from pipeline.training import loop, work
from pipeline.training.cache import CacheEntry
from pipeline.training.job import TrainingJob
from tests.conftest import MakeOnce, differing, tree, write_yaml
from tests.test_stages import Mend, fail, read_rows, stored, succeed, with_flipped_byte, with_params, without

N_TRAIN, N_TEST, TRIALS, CROSS_TRIALS = 300, 200, 3, 2
TRAIN_LEVELS: dict[str, list[float]] = {"stuck": [200], "dead": [], "noise": [0.05, 0.8], "blur": [2.0]}
EVALUATE_LEVELS: dict[str, list[float]] = {"stuck": [200], "dead": [150], "noise": [0.3, 0.8], "blur": [2.0, 4.0]}
LABELS = ["blur-2", "noise-0.05", "noise-0.8", "stuck-200"]
# In this order: transfer needs the natural model.
STRATEGIES = ["constant", "incremental", "transfer"]
CELLS, CURVES = layout.cells("evaluate", "mnist"), layout.strategy_curves("mnist")
MODELS = layout.strategy_models("mnist")
NATURAL, NATURAL_CURVE = layout.model("mnist", "natural", "clean", 1), layout.natural_curves("mnist")
ALL = sorted((strategy, label) for strategy in STRATEGIES for label in LABELS)


def done_once(values: dict[str, Any]) -> None:
    """Train and evaluate all strategies of the tiny MNIST, in the current folder."""
    values["datasets"]["mnist"].update(n_train=N_TRAIN, n_test=N_TEST)
    values["perturb"]["trials"] = TRIALS
    values["evaluate"].update(levels=EVALUATE_LEVELS, cross_trials=CROSS_TRIALS)
    del values["perturbations"]["hot"]
    for name, block in values["perturbations"].items():
        block.update(train_levels=TRAIN_LEVELS[name], test_levels=[1])
    for block in (values["train"]["recipes"], values["strategies"]["transfer"]["recipes"]):
        block["mnist"]["batch_size"] = 20  # more steps, so that the few images teach something
    write_yaml(layout.PARAMS, values)
    for name in values["perturbations"]:
        succeed("perturb", "mnist", name)
    for stage in ("train", "strategies", "evaluate"):
        succeed(stage, "mnist")


@pytest.fixture
def done(made_once: MakeOnce, in_process: None) -> Path:
    """The current folder, with all strategies of the tiny MNIST trained and evaluated."""
    return made_once(done_once)


def model_path(strategy: str, label: str) -> Path:
    return layout.model("mnist", strategy, label, 1)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Strategy and label of the models that are trained from now on."""
    names: list[tuple[str, str]] = []
    train = work.train

    def count(job: TrainingJob, *others: Any) -> CacheEntry:
        names.append((job.key.strategy, job.key.label))
        return train(job, *others)

    monkeypatch.setattr(work, "train", count)
    return names


def is_own(trained_on: str, tested_on: str) -> bool:
    if "clean" in (trained_on, tested_on):
        return True
    return PERTURBATIONS[trained_on].family == PERTURBATIONS[tested_on].family


# What they write.


def test_every_training_level_has_a_model_with_a_description_and_a_curve(done: Path) -> None:
    files = {path for path in MODELS.rglob("*") if path.is_file()}
    expected = [model_path(*names) for names in ALL]
    assert files == {path.with_suffix(suffix) for path in expected for suffix in (".json", ".safetensors")}
    rows = read_rows(CURVES)
    assert list(rows[0]) == ["strategy", "label", "seed", "epoch", "train_loss", "train_accuracy", "test_accuracy"]
    shown = [(row["strategy"], row["label"], row["epoch"]) for row in rows]
    assert sorted(shown) == [(*names, epoch) for names in ALL for epoch in ("1", "2")]
    finished = [path.name.split(".", 1)[1] for path in layout.cached_models().iterdir()]
    assert sorted(finished) == sorted(["safetensors", "json"] * (len(ALL) + 1))


def test_curves_end_with_the_accuracy_of_the_saved_models_on_clean_images(done: Path) -> None:
    clean = {
        (cell["strategy"], cell["label"]): int(cell["n_correct"]) / N_TEST
        for cell in read_rows(CELLS)
        if cell["perturbation"] == "clean"
    }
    ends = [row for path in (NATURAL_CURVE, CURVES) for row in read_rows(path) if row["epoch"] == "2"]
    assert len(ends) == len(clean)
    for row in ends:
        assert float(row["test_accuracy"]) == pytest.approx(clean[row["strategy"], row["label"]], abs=1e-6)


def test_the_models_of_all_strategies_and_levels_differ(done: Path) -> None:
    assert len({path.read_bytes() for path in MODELS.rglob("*.safetensors")}) == len(ALL)


def test_own_family_is_tested_on_all_trials_and_others_on_fewer(done: Path) -> None:
    models = [("natural", "clean"), *ALL]
    expected = set()
    for strategy, label in models:
        expected.add((strategy, label, "False", "clean", 0.0, 0))
        trained_on = label.split("-")[0]
        for name, levels in EVALUATE_LEVELS.items():
            stored_trials = 1 if name == "blur" else TRIALS
            n_trials = stored_trials if is_own(trained_on, name) else min(CROSS_TRIALS, stored_trials)
            seen = str(label != "clean" and is_own(trained_on, name))
            expected |= {(strategy, label, seen, name, level, trial) for level in levels for trial in range(n_trials)}
    rows = read_rows(CELLS)
    names = ("strategy", "label", "seen", "perturbation")
    found = {(*(row[name] for name in names), float(row["level"]), int(row["trial"])) for row in rows}
    assert found == expected
    assert len(rows) == len(expected)
    shared = {(row["dataset"], row["seed"], row["split"], row["n_examples"]) for row in rows}
    assert shared == {("mnist", "1", "test", str(N_TEST))}


@pytest.mark.parametrize("names", [("natural", "clean"), *ALL], ids=" ".join)
def test_cells_are_what_the_saved_model_says_of_the_stored_images(names: tuple[str, str], done: Path) -> None:
    classifier = storage.load(model_path(*names), "train it")
    labels = stored(layout.clean_store("mnist"), "test/labels")[:N_TEST]
    cells = [cell for cell in read_rows(CELLS) if (cell["strategy"], cell["label"]) == names]
    for cell in (cells[0], cells[1], cells[len(cells) // 2], cells[-1]):
        if cell["perturbation"] == "clean":
            images = stored(layout.clean_store("mnist"), "test/images")[:N_TEST]
        else:
            perturbed = layout.perturbed_store("mnist", cell["perturbation"])
            images = stored(perturbed, f"{cell['level']}/test")[int(cell["trial"])]
        with torch.no_grad():
            predicted = classifier(torch.from_numpy(images)).argmax(1).numpy()
        assert int(cell["n_correct"]) == int(np.sum(predicted == labels)), cell


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_metrics_are_those_of_the_cells_of_a_strategy_and_of_the_natural_model(strategy: str, done: Path) -> None:
    cells = pd.read_csv(CELLS)
    expected = metrics.summarize_strategy(cells[cells["strategy"].isin(["natural", strategy])])
    assert json.loads(layout.summary("evaluate", "mnist", strategy).read_text()) == expected
    assert expected["baseline"] == "natural"
    assert expected["baseline_clean_accuracy"] > 0.5  # it has learned, so that the numbers above mean something
    assert len(set(expected.values())) > 5


def test_a_baseline_without_errors_gives_metrics_that_json_knows() -> None:
    cells = [
        metrics.Cell("mnist", "natural", "clean", 1, False, "test", "noise", 0.1, 0, 10, 10),
        metrics.Cell("mnist", "constant", "noise-0.1", 1, True, "test", "noise", 0.1, 0, 10, 9),
    ]
    json.dumps(metrics.summarize_strategy(metrics.to_frame(cells)), allow_nan=False)


# What is trained again, and what is not.

Trained = list[tuple[str, str]]


def test_run_again_nothing_is_trained_and_what_a_killed_run_left_is_removed(done: Path, trained: Trained) -> None:
    before = tree(done)
    for path in list(layout.cached_models().glob("*.safetensors")):
        path.with_suffix(".checkpoint").write_bytes(b"")
    succeed("train", "mnist")
    assert succeed("strategies", "mnist").count("from the model cache") == len(ALL)
    succeed("evaluate", "mnist")
    assert trained == []
    assert differing(before, tree(done)) == []


def test_trained_again_from_nothing_the_bytes_are_the_same(done: Path, trained: Trained) -> None:
    folders = [MODELS, Path("metrics")]
    before = [tree(folder) for folder in folders]
    shutil.rmtree(layout.cached_models())
    shutil.rmtree(MODELS)
    succeed("strategies", "mnist", "--workers", "3")
    succeed("evaluate", "mnist")
    assert sorted(trained) == ALL
    assert [differing(old, tree(folder)) for old, folder in zip(before, folders, strict=True)] == [[], []]


def test_one_training_level_more_trains_one_model_more(done: Path, trained: Trained) -> None:
    before = tree(MODELS)
    with_params({"perturbations.noise.train_levels": [0.05, 0.4, 0.8]})(done)
    succeed("perturb", "mnist", "noise")
    succeed("strategies", "mnist")
    assert sorted(trained) == [(strategy, "noise-0.4") for strategy in STRATEGIES]
    new = {model_path(strategy, "noise-0.4").relative_to(MODELS) for strategy in STRATEGIES}
    files = {path.with_suffix(suffix).as_posix() for path in new for suffix in (".json", ".safetensors")}
    assert set(differing(before, tree(MODELS))) == files


def test_one_training_level_fewer_removes_its_model_from_the_output(done: Path, trained: Trained) -> None:
    with_params({"perturbations.noise.train_levels": [0.8]})(done)
    succeed("perturb", "mnist", "noise")
    succeed("strategies", "mnist")
    assert trained == []
    assert not model_path("constant", "noise-0.05").exists()
    succeed("evaluate", "mnist")
    assert {row["label"] for row in read_rows(CELLS)} == {"clean", "stuck-200", "noise-0.8", "blur-2"}


def test_a_second_seed_trains_every_model_once_more_and_changes_none(done: Path, trained: Trained) -> None:
    before, rows = tree(MODELS), read_rows(CELLS)
    with_params({"train.seeds": [1, 2]})(done)
    succeed("train", "mnist")
    succeed("strategies", "mnist")
    succeed("evaluate", "mnist")
    assert sorted(trained) == sorted([("natural", "clean"), *ALL])
    after = tree(MODELS)
    assert {name: after[name] for name in before} == before
    assert len(after) == 2 * len(before) - len(STRATEGIES)
    found = read_rows(CELLS)
    assert [row for row in found if row["seed"] == "1"] == rows
    assert len(found) == 2 * len(rows)
    one, other = (
        [row["n_correct"] for row in found if (row["seed"], row["strategy"]) == (seed, "transfer")] for seed in "12"
    )
    assert one != other


def test_the_longest_trainings_begin_first(done: Path, trained: Trained) -> None:
    with_params({"strategies.transfer.recipes.mnist.epochs": 3, "strategies.incremental.start": 0.1})(done)
    trained.clear()
    succeed("strategies", "mnist")
    # All else being equal, in planned order.
    assert [strategy for strategy, _ in trained] == ["transfer"] * len(LABELS) + ["incremental"] * len(LABELS)


@pytest.mark.parametrize(
    ("changes", "strategies"),
    [
        ({"train.recipes.mnist.epochs": 1}, STRATEGIES),
        ({"train.recipes.mnist.standardize": "channel"}, STRATEGIES),  # another natural model: transfer too
        ({"strategies.incremental.end": 0.5}, ["incremental"]),
    ],
    ids=str,
)
def test_what_decides_the_weights_trains_all_anew(
    changes: dict[str, Any], strategies: list[str], done: Path, trained: Trained
) -> None:
    with_params(changes)(done)
    succeed("train", "mnist")
    trained.clear()
    succeed("strategies", "mnist")
    assert sorted(trained) == [names for names in ALL if names[0] in strategies]


def test_killed_half_way_the_finished_models_are_kept_and_the_old_output_whole(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in layout.cached_models().iterdir():
        if described_by(path.with_suffix(".json"))["strategy"] == "constant":
            path.with_suffix(".safetensors").unlink(missing_ok=True)
    before = tree(Path("models/mnist")), tree(Path("metrics"))
    train, calls = work.train, itertools.count()

    def stop_half_way(job: TrainingJob) -> CacheEntry:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return train(job)

    monkeypatch.setattr(work, "train", stop_half_way)
    assert "Aborted!" in fail("strategies", "mnist")
    assert len(list(layout.cached_models().glob("*.safetensors"))) == len(ALL) + 1 - 2
    assert (tree(Path("models/mnist")), tree(Path("metrics"))) == before

    monkeypatch.setattr(work, "train", train)
    assert succeed("strategies", "mnist").count(": trained") == 2
    assert (tree(Path("models/mnist")), tree(Path("metrics"))) == before


def described_by(path: Path) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(path.read_text())
    return described


def test_the_natural_model_goes_on_from_its_last_epoch_to_the_same_bytes(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = [NATURAL, NATURAL.with_suffix(".json"), NATURAL_CURVE]
    before = [path.read_bytes() for path in outputs]
    shutil.rmtree(layout.cached_models())
    save = loop._save_checkpoint

    def save_and_die(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save_checkpoint", save_and_die)
    fail("train", "mnist")
    assert len(list(layout.cached_models().glob("*.checkpoint"))) == 1
    monkeypatch.setattr(loop, "_save_checkpoint", save)
    output = succeed("train", "mnist")
    assert "from the model cache" not in output
    assert [path.read_bytes() for path in outputs] == before
    assert not list(layout.cached_models().glob("*.checkpoint"))
    assert "from the model cache" in succeed("train", "mnist")
    assert [path.read_bytes() for path in outputs] == before


def test_kept_models_that_are_damaged_are_trained_again(done: Path, trained: Trained) -> None:
    before = tree(MODELS)
    kept = {path.read_bytes(): path for path in layout.cached_models().glob("*.safetensors")}
    flipped, missing, undescribed = (kept[model_path("constant", label).read_bytes()] for label in LABELS[:3])
    with_flipped_byte(flipped)(done)
    missing.unlink()
    undescribed.with_suffix(".json").write_bytes(b"")
    succeed("strategies", "mnist")
    assert sorted(trained) == [("constant", label) for label in LABELS[:3]]
    assert differing(before, tree(MODELS)) == []


# What they say of bad input.


def with_edited_description(folder: Path) -> None:
    path = model_path("constant", "noise-0.8").with_suffix(".json")
    described = json.loads(path.read_text())
    described["trained_on"]["level"] = 0.7
    storage.write(path.with_suffix(".safetensors"), path.with_suffix(".safetensors").read_bytes(), described)


CONSTANT = [model_path("constant", f"noise-{level}") for level in ("0.05", "0.8")]
BAD: dict[str, list[tuple[Mend, str]]] = {
    # command: what is wrong, and what the message says of it
    "strategies mnist": [
        (without(NATURAL), f"{NATURAL.name}: no such model; make it with `python -m pipeline train mnist`"),
        (with_params({"perturb.seed": 5}), "made with other params (seed is 2004, params.yaml asks for 5)"),
    ],
    "evaluate mnist": [
        (without(MODELS), "no such model; make it with `python -m pipeline strategies mnist`"),
        (with_edited_description, "made with other params (trained_on is"),
        (
            lambda _: shutil.copy(CONSTANT[1], CONSTANT[0]),
            "not the weights that noise-0.05-seed1.json describes",
        ),
        (with_params({"strategies.incremental.end": 0.5}), "made with other params (perturbed_share is"),
        (
            with_params({"evaluate.levels": {**EVALUATE_LEVELS, "noise": [0.31]}}),
            "0.31/test: not in the store; make it again with `python -m pipeline perturb mnist noise`",
        ),
    ],
}


@pytest.mark.parametrize(
    ("command", "spoil", "expected"),
    [pytest.param(command, *case, id=case[1]) for command, cases in BAD.items() for case in cases],
)
def test_bad_input_is_one_error_and_changes_nothing(
    command: str, spoil: Mend, expected: str, done: Path, trained: Trained
) -> None:
    spoil(done)
    before = tree(done)
    said = fail(*command.split())
    assert said.startswith("Error: ")
    assert expected in said
    assert trained == []
    assert differing(before, tree(done)) == []
