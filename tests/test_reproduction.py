"""docs/reproduction.md says what the committed results say, and a campaign's results are those of the stages."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from ruamel.yaml import YAML

from benchmarks import blur_channels, campaign, reproduction, rounding
from benchmarks.campaign import Results
from benchmarks.reproduction import _BLOCK, PAGES, RESULTS, render
from pipeline.evaluation.measuring import Predictions, measure
from pipeline.evaluation.metrics import Cell
from pipeline.models.classifier import Classifier, build_network, fit_standardization
from pipeline.models.layers import Standardize
from pipeline.perturbations.blur import gaussian_blur
from pipeline.recipes.plan import CLEAN, NATURAL
from pipeline.runtime import layout
from pipeline.study.params import load
from pipeline.study.planning import MEASURING, plan_study
from tests.conftest import ROOT, write_yaml


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_table_is_made_from_the_results(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert page.count("<!-- table: ") == page.count("<!-- end -->") == len(_BLOCK.findall(page)) >= 1
    assert render(page) == page


@pytest.mark.parametrize("folder", [path.name for path in sorted(RESULTS.glob("*"))])
def test_results_are_whole_and_shown(folder: str) -> None:
    names = {path.name for path in (RESULTS / folder).iterdir()}
    assert {"params.yaml", "impact.csv"} <= names
    assert {"machine.json", "models.csv"} & names
    assert any(f" of {folder} -->" in page.read_text(encoding="utf-8") for page in PAGES)


def stop() -> None:
    """Stop as Ctrl-C does."""
    raise KeyboardInterrupt


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where campaigns of this test put what they find."""
    monkeypatch.setattr(campaign, "RESULTS", tmp_path)
    monkeypatch.setattr(campaign, "lowest_priority", nullcontext)
    return tmp_path


def test_a_campaign_gives_the_rows_of_the_stages_and_repeats_none(
    finished: Path, in_process: None, results: Path
) -> None:
    command = ["tiny", "mnist"]
    listed = CliRunner().invoke(campaign.main, [*command, "--list"])
    assert "natural models: 0 of 1 done" in listed.output
    assert not list(results.iterdir())
    assert CliRunner().invoke(campaign.main, command).exit_code == 0
    for stage in MEASURING:
        found, expected = (
            pd.read_csv(path).sort_values(["strategy", "label", "perturbation", "level", "split", "trial"])
            for path in (results / f"tiny-mnist/{stage}.csv", layout.cells(stage, "mnist"))
        )
        pd.testing.assert_frame_equal(found.reset_index(drop=True), expected.reset_index(drop=True))
    models = pd.read_csv(results / "tiny-mnist/models.csv")
    assert set(models.columns) >= {"processor", "precision", "threads", "seconds", "commit"}
    assert (models["threads"] >= 1).all()
    content = {path: path.read_bytes() for path in results.rglob("*.csv")}
    again = CliRunner().invoke(campaign.main, command)
    assert "trained" not in again.output
    assert content == {path: path.read_bytes() for path in results.rglob("*.csv")}

    layout.PARAMS.write_text(layout.PARAMS.read_text() + "# a comment\n")
    assert CliRunner().invoke(campaign.main, [*command, "--list"]).exit_code == 0
    values = YAML(typ="safe").load(layout.PARAMS)
    values["impact"]["batch_size"] += 1
    write_yaml(layout.PARAMS, values)
    for options in ([], ["--list"]):
        refused = CliRunner().invoke(campaign.main, [*command, *options])
        assert refused.exit_code == 1
        assert "differs from params.yaml; copy it there, or choose another NAME" in refused.output


def test_a_campaign_measures_the_damage_that_a_model_was_trained_on_before_other_damage(
    finished: Path, in_process: None, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only the models of the strategy that is asked for."""

    def go(*options: str) -> Result:
        return CliRunner().invoke(campaign.main, ["tiny", "mnist", "--only", *options])

    run = campaign.run
    with monkeypatch.context() as patch:
        patch.setattr(campaign, "run", lambda study, group, *of: run(study, group, *of) if group.only_own else stop())
        assert go("constant").exit_code == 1
    *own, other = go("constant", "--list").output.splitlines()
    assert own
    assert not any(": 0 of " in line for line in own)
    assert other.startswith("other damage: 0 of ")
    expected = pd.read_csv(layout.cells("evaluate", "mnist")).query("strategy == 'constant'")
    found = pd.read_csv(results / "tiny-mnist/evaluate.csv")
    pd.testing.assert_frame_equal(found, expected.query("seen or perturbation == 'clean'").reset_index(drop=True))
    assert len(found) < len(expected)

    # Weights that are here are measured, whatever the cache has; without weights nothing is trained for other damage.
    table, away = results / "tiny-mnist/evaluate.csv", layout.strategy_models("mnist").with_name("away")
    shutil.rmtree(layout.cached_models())
    layout.strategy_models("mnist").rename(away)
    assert re.search(r"other damage: 0 of (\d+) done\n\1 models are left", go("constant").output)
    away.rename(layout.strategy_models("mnist"))
    went_on = go("constant")
    assert went_on.exit_code == 0
    assert "measured" in went_on.output
    assert "trained" not in went_on.output
    pd.testing.assert_frame_equal(pd.read_csv(table), expected.reset_index(drop=True))
    pd.read_csv(table).drop(0).to_csv(table, index=False)  # a row is lost
    assert go("constant").exit_code == 0
    pd.testing.assert_frame_equal(pd.read_csv(table), expected.reset_index(drop=True), check_like=True)

    refused = go("constatn")
    assert refused.exit_code == 1
    assert "--only: unknown 'constatn'; params.yaml has natural, " in refused.output


@pytest.mark.slow
def test_a_campaign_goes_on_after_a_stop_and_on_another_machine(
    finished: Path, in_process: None, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which has the rows of the natural model, but not its weights."""

    def go(*options: str) -> Result:
        return CliRunner().invoke(campaign.main, ["tiny", "mnist", *options])

    values = YAML(typ="safe").load(layout.PARAMS)
    tuning = {"fully_connected": [8], "learning_rate": 0.01, "batch_size": 20, "epochs": 1}
    values["strategies"] = {"transfer": {"freeze": False, "recipes": {"mnist": tuning}}}
    write_yaml(layout.PARAMS, values)
    table = results / "tiny-mnist/evaluate.csv"
    assert go().exit_code == 0
    expected = pd.read_csv(table)
    assert set(expected.strategy) == {"natural", "transfer"}
    shutil.rmtree(results / "tiny-mnist")
    part = campaign._measure
    with monkeypatch.context() as patch:
        patch.setattr(campaign, "_measure", lambda *of: part(*of) if of[2].key.strategy == NATURAL else stop())
        assert go().exit_code == 1
    assert "natural models: 1 of 1 done" in go("--list").output
    assert set(pd.read_csv(table).strategy) == {"natural"}
    shutil.rmtree(layout.natural_models("mnist"))
    assert go().exit_code == 0
    pd.testing.assert_frame_equal(pd.read_csv(table), expected)


@pytest.mark.slow
def test_a_campaign_stopped_while_it_measures_keeps_the_cells(
    finished: Path, in_process: None, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on with those that are left, unless the model is another one now."""
    measured: list[Cell] = []
    n_most = 4

    def counted(study: Any, stage: str, models: Any, data: Any, keep: Any, engine: Any) -> Any:
        def keep_and_count(predictions: Predictions) -> None:
            if len(measured) == n_most:
                raise KeyboardInterrupt
            measured.extend(predictions.cells)
            keep(predictions)

        return measure(study, stage, models, data, keep_and_count, engine)

    def go() -> int:
        measured.clear()
        return CliRunner().invoke(campaign.main, ["tiny", "mnist"]).exit_code

    monkeypatch.setattr(campaign, "measure", counted)
    table = results / "tiny-mnist/impact.csv"
    assert go() == 1
    assert len(pd.read_csv(table)) == len(measured) == 4
    n_most = 100_000
    assert go() == 0
    expected = table.read_bytes()
    of_damage = [cell.images for cell in measured if cell.strategy == NATURAL and cell.perturbation != CLEAN]
    assert len(of_damage) == len(set(of_damage)) > 4  # by whichever stage
    n_rest = len(measured)

    kept = {path: path.read_bytes() for path in table.parent.iterdir()}
    cells, curves = pd.read_csv(table), table.with_name("curves.csv")
    images, other = ["perturbation", "level", "trial"], table.with_name("evaluate.csv")
    cells.iloc[:-1].to_csv(table, index=False)  # stopped before the last one, which no other stage has measured
    of_other = pd.read_csv(other)
    is_last = of_other["strategy"].eq(NATURAL) & of_other[images].eq(cells[images].iloc[-1]).all(axis=1)
    of_other[~is_last].to_csv(other, index=False)
    assert go() == 0
    assert 1 <= len(measured) < n_rest
    assert kept == {path: path.read_bytes() for path in table.parent.iterdir()}

    models = table.with_name("models.csv")
    pd.read_csv(models).assign(processor="another").to_csv(models, index=False)
    cells.assign(n_correct=0).iloc[:-1].to_csv(table, index=False)
    curve = pd.read_csv(curves)
    curve.assign(train_loss=curve.train_loss + 1).to_csv(curves, index=False)  # of another model
    add = Results.add
    with monkeypatch.context() as patch:
        patch.setattr(Results, "add", lambda self, name, *of: stop() if name == "curves" else add(self, name, *of))
        assert go() == 1
    assert go() == 0
    assert table.read_bytes() == expected
    assert "another" not in set(pd.read_csv(models).query("strategy == 'natural'").processor)


@pytest.mark.skipif(not os.access("/proc/self/autogroup", os.W_OK), reason="only Linux weighs sessions")
def test_a_campaign_gives_way_to_other_terminals_and_leaves_its_own_as_it_was() -> None:
    shown = "print(os.nice(0), open('/proc/self/autogroup').read().split()[-1])"
    code = f"import os; from benchmarks.campaign import lowest_priority\nwith lowest_priority(): {shown}\n{shown}"
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=ROOT, start_new_session=True, capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n") == ["19 19", "19 0", ""]


def test_pages_are_made_from_a_campaign_that_has_only_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "paper-cifar10")
    monkeypatch.setattr(reproduction, "RESULTS", tmp_path)
    monkeypatch.setattr(reproduction, "_cells", cache(reproduction._cells.__wrapped__))
    n_rows = reproduction.headline("paper").count("|  |\n")  # nothing is measured
    begun = shutil.copytree(tmp_path / "paper-mnist", tmp_path / "paper-cifar10")
    assert reproduction.headline("paper").count("|  |\n") == 0
    cells = pd.read_csv(begun / "evaluate.csv")
    cells[cells["label"].isin(["clean", "hot-3"])].to_csv(begun / "evaluate.csv", index=False)
    assert reproduction.headline("paper").count("|  |\n") == 3 < n_rows == 10
    models = cells["strategy"].isin(["natural", "transfer"]) | cells["label"].eq("hot-3")
    on_own = cells["seen"] | cells["perturbation"].eq(CLEAN) | cells["strategy"].eq(NATURAL)
    cells[models & on_own].to_csv(begun / "evaluate.csv", index=False)
    reproduction._cells.cache_clear()
    for table in set(reproduction.TABLES) - {"blur", "rounding", "labels"}:
        made = reproduction.TABLES[table]("paper-cifar10")
        assert made, table
        assert "nan" not in made, table
    panels = reproduction.strategy_panels("paper-cifar10").splitlines()
    assert [line.split("|")[2] for line in panels if "constant" in line] == [" 4 of 40 "]
    assert [line.split("|")[-2] for line in panels if "constant" in line] == ["  "]
    assert len([line for line in panels if "transfer" in line and " of " not in line]) == 5
    (begun / "evaluate.csv").unlink()
    assert reproduction.headline("paper").count("|  |\n") == 3
    assert "| 97.2, **no** |" in reproduction.claims("paper-cifar10")


@pytest.mark.parametrize("mixes", [True, False])
def test_the_blur_of_the_experiment_is_that_of_the_study_but_for_rounding(mixes: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    found = blur_channels.blur(images.astype(np.float64), 0.7, mixes=mixes)
    assert np.abs(found - gaussian_blur(images, 0.7, mix_channels=mixes)).max() <= 2
    assert np.abs(found - gaussian_blur(images, 0.7, mix_channels=not mixes)).max() > 20


def test_the_experiment_about_rounding_has_the_network_and_standardization_of_the_study() -> None:
    recipe = plan_study(load(ROOT / "profiles/paper.yaml"), "mnist").natural[0].plan.recipe
    assert (recipe.learning_rate, recipe.epochs, recipe.batch_size) == (0.05, 50, 1500)
    images = np.random.default_rng(0).integers(0, 256, (300, 28, 28, 1), np.uint8)
    images[:, :3] = 0  # as at the border of digits
    standardize = Standardize(*fit_standardization(images, "pixel"))
    study = Classifier((28, 28, 1), standardize, build_network(recipe.network, (28, 28, 1), 10)).eval()
    network, grey = rounding.PaperNetwork().eval(), images[..., 0] / 255
    own = network.state_dict()
    values = zip(own.items(), study.network.state_dict().values(), strict=True)
    network.load_state_dict({name: value.reshape(like.shape) for (name, like), value in values})
    with torch.inference_mode():
        found, expected = network(rounding.Standardization(grey)(grey)), study(torch.from_numpy(images))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_experiment_about_rounding_has_the_damage_of_the_study() -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    blurred = 255 * rounding.store_as("uint8", rounding.damage(images / 255, "blur", 1.0))
    assert (
        gaussian_blur(images[..., None], rounding.TRAINED_ON)[..., 0] == images
    ).all()  # the study's weights: 0, 1, 0
    expected = gaussian_blur(images[..., None], 1.0)[..., 0]
    assert np.abs(blurred - expected).max() <= 2
    assert np.abs(images - expected.astype(int)).max() > 50
    noise = 255 * rounding.damage(np.full((20, 28, 28), 0.5), "noise", 0.01) - 127.5
    assert 2.4 < noise.std() < 2.7
