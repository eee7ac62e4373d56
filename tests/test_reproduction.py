"""docs/reproduction.md says what the committed results say, and a campaign's results are those of the stages."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner, Result
from ruamel.yaml import YAML

from benchmarks import campaign
from benchmarks.reproduction import PAGE, RESULTS, render
from pipeline.runtime import layout
from pipeline.study.planning import MEASURING
from tests.conftest import write_yaml


def test_every_table_is_made_from_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- table: ") == page.count("<!-- end -->") >= 5
    assert render(page) == page


@pytest.mark.parametrize("folder", [path.name for path in sorted(RESULTS.glob("*"))])
def test_results_are_whole_and_shown(folder: str) -> None:
    names = {path.name for path in (RESULTS / folder).iterdir()}
    assert {"params.yaml", "impact.csv"} <= names
    assert {"machine.json", "models.csv"} & names
    assert f" of {folder} -->" in PAGE.read_text(encoding="utf-8")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where campaigns of this test put what they find."""
    monkeypatch.setattr(campaign, "RESULTS", tmp_path)
    monkeypatch.setattr("os.nice", lambda increment: increment)
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
    content = {path: path.read_bytes() for path in results.rglob("*.csv")}
    again = CliRunner().invoke(campaign.main, command)
    assert "trained" not in again.output
    assert content == {path: path.read_bytes() for path in results.rglob("*.csv")}

    layout.PARAMS.write_text(layout.PARAMS.read_text() + "# another\n")
    refused = CliRunner().invoke(campaign.main, command)
    assert refused.exit_code == 1
    assert "differs from params.yaml; restore that, or choose another NAME" in refused.output


def test_a_campaign_goes_on_after_a_stop_and_on_another_machine(
    finished: Path, in_process: None, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which has the rows of the natural model, but not its weights."""

    def stop() -> None:
        raise KeyboardInterrupt

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
    measure = campaign._measure
    with monkeypatch.context() as patch:
        patch.setattr(campaign, "_measure", lambda study, stage: stop() if study.strategies else measure(study, stage))
        assert go().exit_code == 1
    assert "natural models: 1 of 1 done" in go("--list").output
    assert set(pd.read_csv(table).strategy) == {"natural"}
    shutil.rmtree(layout.natural_models("mnist"))
    assert go().exit_code == 0
    pd.testing.assert_frame_equal(pd.read_csv(table), expected)
