"""docs/reproduction.md says what the committed results say, and a campaign's results are those of the stages."""

from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from benchmarks import campaign
from benchmarks.reproduction import PAGE, RESULTS, render
from pipeline.runtime import layout
from pipeline.study.planning import MEASURING


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


def test_a_campaign_gives_the_rows_of_the_stages_and_repeats_none(
    finished: Path, in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "RESULTS", tmp_path)
    monkeypatch.setattr("os.nice", lambda increment: increment)
    command = ["tiny", "mnist"]
    listed = CliRunner().invoke(campaign.main, [*command, "--list"])
    assert "natural models: 0 of 1 done" in listed.output
    assert not list(tmp_path.iterdir())
    assert CliRunner().invoke(campaign.main, command).exit_code == 0
    for stage in MEASURING:
        found, expected = (
            pd.read_csv(path).sort_values(["strategy", "label", "perturbation", "level", "split", "trial"])
            for path in (tmp_path / f"tiny-mnist/{stage}.csv", layout.cells(stage, "mnist"))
        )
        pd.testing.assert_frame_equal(found.reset_index(drop=True), expected.reset_index(drop=True))
    content = {path: path.read_bytes() for path in tmp_path.rglob("*.csv")}
    again = CliRunner().invoke(campaign.main, command)
    assert "trained" not in again.output
    assert content == {path: path.read_bytes() for path in tmp_path.rglob("*.csv")}

    layout.PARAMS.write_text(layout.PARAMS.read_text() + "# another\n")
    refused = CliRunner().invoke(campaign.main, command)
    assert refused.exit_code == 1
    assert "differs from params.yaml; restore that, or choose another NAME" in refused.output
