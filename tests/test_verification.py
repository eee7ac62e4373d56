"""Command verify: finds every kind of damage, names what mends it, and changes nothing."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import zarr

from pipeline import layout, store, verification
from pipeline.params import load
from pipeline.sources import Arrays
from tests.conftest import ROOT, WriteParams, differing, tree
from tests.test_stages import (
    Finished,
    Mend,
    run,
    shard,
    succeed,
    with_attribute,
    with_bytes,
    with_flipped_byte,
    with_header,
    with_other_images,
    with_params,
    without,
)

CLEAN, NOISE = layout.clean_store("mnist"), layout.perturbed_store("mnist", "noise")
NATURAL = layout.natural_model("mnist")
CONSTANT = layout.strategy_model("mnist", "constant", "noise", "0.05")
SUMMARY, CELLS = layout.evaluate_metrics("mnist", "constant"), layout.impact_cells("mnist")
COMMANDS = [
    *(f"perturb mnist {name}" for name in ("hot", "noise", "blur")),
    *("train mnist", "impact mnist", "strategies mnist constant", "evaluate mnist constant"),
    *("ablations mnist standardization", "confusion mnist"),
]
N_FINE = 1 + 3 + 1 + 1 + 1  # clean, perturbed, models, metrics, kept models

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole_once(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("whole") / "study")


@pytest.fixture
def whole(
    request: pytest.FixtureRequest,
    whole_once: Finished,
    tiny_values: dict[str, Any],
    tiny_datasets: dict[str, Arrays],
    write_params: WriteParams,
    monkeypatch: pytest.MonkeyPatch,
    in_process: None,
) -> Iterator[Path]:
    """The current folder, with stores, models and metric files of a tiny study, all as they should be."""
    if not whole_once.content:
        study = request.getfixturevalue("study")
        shutil.rmtree(layout.clean_store("cifar10"))
        del tiny_values["datasets"]["cifar10"]
        for name in ("stuck", "dead"):
            del tiny_values["perturbations"][name], tiny_values["evaluate"]["levels"][name]
        tiny_values["strategies"] = {"constant": {}}
        del tiny_values["ablations"]["components"]
        write_params(tiny_values)
        for command in COMMANDS:
            succeed(*command.split())
        study.rename(whole_once.folder)
        study.mkdir()
        whole_once.content = tree(whole_once.folder)
    monkeypatch.chdir(whole_once.folder)
    yield whole_once.folder
    whole_once.mend()


def test_a_whole_study_is_as_it_should_be(whole: Path) -> None:
    for options in ([], ["--full"]):
        before = tree(whole)
        lines = succeed("verify", *options).splitlines()
        assert lines[-1] == f"0 problem(s), {N_FINE} thing(s) as they should be"
        assert len(lines) == N_FINE + 1
        assert all(line.startswith("ok ") for line in lines[:-1])
        n_noise = 1100 + 2 * 3 * 600
        n_again = n_noise if options else 100 + 3 * 100
        assert any(f"noise.zarr: 4 arrays, {n_noise:,} images, " in line for line in lines)
        if options:
            assert any(line.endswith(f"{n_noise:,} images, {n_again:,} made again, the same") for line in lines)
        assert differing(before, tree(whole)) == []


def test_what_is_looked_at_can_be_narrowed(whole: Path) -> None:
    assert succeed("verify", "mnist", "noise").splitlines()[-1].startswith("0 problem(s), 2 thing(s)")
    assert succeed("verify", "--data").splitlines()[-1].startswith("0 problem(s), 4 thing(s)")
    assert succeed("verify", "mnist").splitlines()[-1].startswith(f"0 problem(s), {N_FINE - 1} thing(s)")
    shutil.rmtree("models")
    assert run("verify", "--data").exit_code == 0
    assert run("verify", "mnist", "noise").exit_code == 0
    assert run("verify", "mnist").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("verify svhn", "Error: data set: unknown 'svhn'"),
        ("verify mnist fog", "Error: perturbation: unknown 'fog'"),
    ],
)
def test_an_unknown_name_is_one_error(arguments: str, expected: str, whole: Path) -> None:
    result = run(*arguments.split())
    assert result.exit_code == 1
    assert result.output.startswith(expected)
    assert result.output.count("\n") == 1


def with_file(path: Path) -> Mend:
    def write(folder: Path) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("mine\n")

    return write


def with_other_summary(path: Path, key: str) -> Mend:
    def edit(folder: Path) -> None:
        values = json.loads((folder / path).read_text())
        values[key] += 0.01
        (folder / path).write_text(json.dumps(values))

    return edit


def with_other_attributes(folder: Path) -> None:
    """An attribute more, which nothing reads."""
    group = zarr.open_group(folder / NOISE, mode="r+")
    group["0.05/test"].attrs["made_on"] = "tuesday"


def with_damaged_kept_model(folder: Path) -> None:
    weights = sorted((folder / layout.finished_models()).glob("*.safetensors"))
    with_flipped_byte(weights[1])(folder)
    weights[0].with_suffix(".json").write_text("[")


def with_all_forged(folder: Path) -> None:
    """Every image of an array another one, its digest right."""
    array = zarr.open_group(folder / NOISE, mode="r+")["0.05/test"]
    assert isinstance(array, zarr.Array)
    values = 255 - np.asarray(array[...], np.uint8)
    array[...] = values
    store.finish(array, store.sha256(values))


PERTURB, TRAIN = "`python -m pipeline perturb mnist noise`", "`python -m pipeline train mnist`"
DAMAGES = [
    # id, what is wrong, what the lines say
    ("no-clean-store", without(CLEAN), [f"{CLEAN}: no such store; make it with `python -m pipeline prepare mnist`"]),
    ("no-store", without(NOISE), [f"{NOISE}: no such store; make it with {PERTURB}"]),
    ("clean-byte", with_flipped_byte(shard(CLEAN, "test/images")), [f"{CLEAN}/test/images: damaged data"]),
    ("other-clean-images", with_other_images(CLEAN, "test/images", True), [f"{CLEAN}/test/images: not the mnist data"]),
    ("clean-stray", with_file(CLEAN / "notes"), [f"{CLEAN}/notes: does not belong there"]),
    ("byte", with_flipped_byte(shard(NOISE, "0.05/test")), [f"{NOISE}/0.05/test: damaged data"]),
    ("digest", with_other_images(NOISE, "0.05/test", False), [f"{NOISE}/0.05/test: damaged data (SHA-256"]),
    (
        "other-images-with-right-digest",
        with_all_forged,
        [f"{NOISE}/0.05/test: not what this code makes of the clean images (first: trial "],
    ),
    ("lost-shard", without(shard(NOISE, "0.05/train")), [f"{NOISE}/0.05/train: 1 shard(s) are missing"]),
    ("lost-array", without(NOISE / "0.05/train"), [f"{NOISE}/0.05/train: not in the store"]),
    ("lost-metadata", without(NOISE / "0.05/zarr.json"), [f"{NOISE}/0.05/zarr.json: is missing"]),
    ("bad-metadata", with_bytes(NOISE / "0.05/test/zarr.json", b"{"), [f"{NOISE}/0.05/test: damaged metadata"]),
    ("bad-root", with_bytes(NOISE / "zarr.json", b"{"), [f"{NOISE}: damaged metadata"]),
    (
        "other-seed",
        with_attribute(NOISE / "0.05/test", "seed", 1),
        [f"{NOISE}/0.05/test: made with other params (seed"],
    ),
    ("attribute-more", with_other_attributes, [f"{NOISE}/0.05/test: attributes are not those that the stage writes"]),
    ("other-root", with_attribute(NOISE, "perturbation", "hot"), [f"{NOISE}/zarr.json: attributes are not"]),
    ("stray-level", with_file(NOISE / "0.07/test/zarr.json"), [f"{NOISE}/0.07: does not belong there"]),
    ("stray-chunk", with_file(NOISE / "0.05/test/c/0/9/0/0/0"), [f"{NOISE}/0.05/test/c/0/9: does not belong there"]),
    (
        "level-removed-from-params",
        with_params(perturbations__noise__test_levels=[0.0255, 0.05]),
        [f"{NOISE}/0.01325: does not belong there; make the store again with {PERTURB}", f"{CELLS}: made with other"],
    ),
    (
        "stray-store",
        with_file(Path("data/perturbed/mnist/fog.zarr/zarr.json")),
        ["data/perturbed/mnist/fog.zarr: params.yaml does not ask for it; remove it with `rm -r data/"],
    ),
    ("weights", with_flipped_byte(NATURAL), [f"{NATURAL}: damaged model (not the weights that"]),
    (
        "no-model",
        without(CONSTANT),
        [f"{CONSTANT}: no such model; make it with `python -m pipeline strategies mnist c"],
    ),
    (
        "model-of-another-recipe",
        with_params(train__seed=9),
        [f"{NATURAL}: made with other params (seed is 1", f"{CONSTANT}: made with other params (seed is 1"],
    ),
    ("ablation-model", without(Path("models/ablations/mnist/standardization/none.json")), ["none.json: no such model"]),
    ("stray-model", with_file(Path("models/mnist/transfer/x.json")), ["models/mnist/transfer: params.yaml does not"]),
    ("kept", with_damaged_kept_model, ["damaged model", "make it again with `rm models/.finished/"]),
    ("cells", with_header(CELLS, "n_correct", "right"), [f"{CELLS}: damaged (columns are not"]),
    ("no-cells", without(CELLS), [f"{CELLS}: no such file; make it with `python -m pipeline impact mnist`"]),
    (
        "summary",
        with_other_summary(SUMMARY, "robust_accuracy"),
        [f"{SUMMARY}: robust_accuracy is not what the cells give; make it again with `p"],
    ),
    ("no-curve", without(layout.learning_curve("mnist")), [f"learning_curve.csv: no such file; make it with {TRAIN}"]),
    (
        "short-curve",
        with_bytes(
            layout.strategy_curves("mnist", "constant"), b"model,epoch,train_loss,train_accuracy,test_accuracy\n"
        ),
        ["metrics/strategies/mnist/constant.csv: made with other params"],
    ),
    ("no-confusion", without(layout.confusion("mnist")), ["metrics/confusion/mnist.csv: no such file"]),
    (
        "stray-metrics",
        with_file(Path("metrics/impact/summary/svhn.json")),
        ["metrics/impact/summary/svhn.json: params"],
    ),
]


@pytest.mark.parametrize(("spoil", "expected"), [pytest.param(*case, id=name) for name, *case in DAMAGES])
def test_damage_is_a_line_that_says_what_mends_it(spoil: Mend, expected: list[str], whole: Path) -> None:
    spoil(whole)
    before = tree(whole)
    result = run("verify")
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    problems = [line for line in result.output.splitlines() if line.startswith("PROBLEM ")]
    for text in expected:
        assert any(text in line for line in problems), result.output
    if len(expected) == 1:
        assert len(problems) == 1
    assert all("`" in line for line in problems)
    assert f"{len(problems)} problem(s), " in result.output
    assert "  dvc repro\n" in result.output
    assert differing(before, tree(whole)) == []


def test_it_does_not_stop_at_the_first_problem(whole: Path) -> None:
    spoilt = {
        CLEAN: with_flipped_byte(shard(CLEAN, "train/labels")),
        NOISE / "0.05/train": with_flipped_byte(shard(NOISE, "0.05/train")),
        NOISE / "0.0255/test": without(shard(NOISE, "0.0255/test")),
        CONSTANT: with_flipped_byte(CONSTANT),
        CELLS: with_bytes(CELLS, b""),
    }
    for spoil in spoilt.values():
        spoil(whole)
    problems = [line for line in run("verify").output.splitlines() if line.startswith("PROBLEM ")]
    assert len(problems) == len(spoilt)
    for path, line in zip(spoilt, problems, strict=True):
        assert str(path) in line


def test_without_the_clean_images_the_rest_is_still_checked(whole: Path) -> None:
    shutil.rmtree(CLEAN)
    with_flipped_byte(shard(NOISE, "0.05/test"))(whole)
    output = run("verify", "--data").output
    assert "hot.zarr: 5 arrays, 5,900 images, none made again: no clean images" in output
    assert f"{NOISE}/0.05/test: damaged data" in output
    assert "2 problem(s), 2 thing(s)" in output


def test_one_image_made_by_other_code_is_found_by_full_and_named(whole: Path) -> None:
    with_other_images(NOISE, "0.05/test", digest_too=True)(whole)
    (problem,) = [line for line in run("verify", "--full").output.splitlines() if line.startswith("PROBLEM ")]
    assert "(first: trial 0, image 15)" in problem  # the 12345th byte of 28×28 each


def test_another_opencv_is_noticed(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blur = cv2.GaussianBlur

    def other(*arguments: Any, **options: Any) -> Any:
        return blur(*arguments, **options) ^ 1

    monkeypatch.setattr(cv2, "GaussianBlur", other)
    lines = [line for line in run("verify", "--data").output.splitlines() if line.startswith("PROBLEM ")]
    assert len(lines) == 5
    assert all("blur.zarr" in line and "not what this code makes" in line for line in lines)


def test_what_systems_and_dvc_leave_behind_is_no_problem(whole: Path) -> None:
    for path in (NOISE / ".DS_Store", NOISE.parent / ".gitignore", NOISE.parent / ".hot.zarr.partial/zarr.json"):
        with_file(path)(whole)
    (NOISE / "0.07/test").mkdir(parents=True)  # `dvc checkout` leaves empty folders
    assert run("verify").exit_code == 0


def test_looking_at_data_only_does_not_import_torch() -> None:
    code = "import sys, pipeline.verification, pipeline.stages.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_folder_that_git_keeps_stays_and_what_else_lies_in_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_values: dict[str, Any], write_params: WriteParams
) -> None:
    monkeypatch.chdir(tmp_path)
    write_params({**quick_values, "strategies": {}, "ablations": {}})
    kept, left = Path("metrics/evaluate/cells/mnist"), Path("metrics/evaluate/cells/mnist/constant.csv")
    kept.mkdir(parents=True)
    (kept / ".gitkeep").touch()
    assert verification.verify_leftovers(load()) == []
    left.touch()
    (finding,) = verification.verify_leftovers(load())
    assert finding.text == f"{left}: params.yaml does not ask for it; remove it with `rm -r {left}`"
