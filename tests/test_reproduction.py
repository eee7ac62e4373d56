"""docs/reproduction.md says what the committed results say."""

import pytest

from benchmarks.reproduction import PAGE, RESULTS, render


def test_every_table_is_made_from_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- table: ") == page.count("<!-- end -->") >= 5
    assert render(page) == page


@pytest.mark.parametrize("folder", [path.name for path in sorted(RESULTS.glob("*"))])
def test_results_are_whole_and_shown(folder: str) -> None:
    names = {path.name for path in (RESULTS / folder).iterdir()}
    assert {"params.yaml", "machine.json", "impact.csv"} <= names
    assert f" of {folder} -->" in PAGE.read_text(encoding="utf-8")
