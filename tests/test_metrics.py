"""Aggregates against plain arithmetic."""

import statistics

import pandas as pd
import pytest

from pipeline.metrics import NATURAL, Cell, aggregate_trials, summarize, to_frame


def make_cells() -> pd.DataFrame:
    return to_frame(
        [
            Cell("mnist", NATURAL, 0, 0, 95, 100),
            Cell("mnist", "noise", 0.05, 0, 20, 100),
            Cell("mnist", "noise", 0.05, 1, 30, 100),
            Cell("mnist", "noise", 0.01, 0, 70, 100),
            Cell("mnist", "noise", 0.01, 1, 70, 100),
            Cell("mnist", "blur", 1.0, 0, 90, 100),
        ]
    )


def test_trials_become_mean_and_population_standard_deviation() -> None:
    table = aggregate_trials(make_cells()).set_index(["perturbation", "level"])
    assert table.loc[("noise", 0.05), "mean"] == pytest.approx(0.25)
    assert table.loc[("noise", 0.05), "std"] == pytest.approx(statistics.pstdev([0.2, 0.3]))
    assert table.loc[("noise", 0.05), "trials"] == 2
    assert table.loc[("blur", 1.0), "std"] == 0


def test_the_order_of_the_cells_is_kept() -> None:
    assert list(aggregate_trials(make_cells())["perturbation"]) == [NATURAL, "noise", "noise", "blur"]


def test_robust_accuracy_weighs_every_level_alike_whatever_its_trials() -> None:
    summary = summarize(make_cells())
    assert summary == {
        "clean_accuracy": 0.95,
        "robust_accuracy": round((0.25 + 0.70 + 0.90) / 3, 6),
        "worst_accuracy": 0.25,
        "noise_accuracy": round((0.25 + 0.70) / 2, 6),
        "blur_accuracy": 0.9,
    }


def test_a_study_without_perturbations_has_a_clean_accuracy_only() -> None:
    assert summarize(to_frame([Cell("mnist", NATURAL, 0, 0, 1, 2)])) == {"clean_accuracy": 0.5}
