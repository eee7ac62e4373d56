"""Aggregates against plain arithmetic."""

import dataclasses
import math
import statistics

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from pipeline.evaluation.metrics import (
    Cell,
    Comparison,
    aggregate_trials,
    compare_seeds,
    compare_strategies,
    error_over_seeds,
    find_guessing,
    is_weak,
    needed_accuracy,
    pair_with_natural,
    summarize,
    summarize_strategy,
    to_frame,
)
from pipeline.perturbations import PERTURBATIONS
from pipeline.recipes.plan import CLEAN, NATURAL


def make_cell(
    strategy: str, label: str, perturbation: str, level: float, trial: int, n_correct: int, n: int, seed: int = 1
) -> Cell:
    trained = PERTURBATIONS[label.split("-")[0]].family if label != CLEAN else None
    seen = perturbation != CLEAN and PERTURBATIONS[perturbation].family == trained
    return Cell("mnist", strategy, label, seed, seen, "test", perturbation, level, trial, n, n_correct)


def make_cells() -> pd.DataFrame:
    rows = [(CLEAN, 0.0, 0, 95), ("noise", 0.05, 0, 20), ("noise", 0.05, 1, 30)]
    rows += [("noise", 0.01, 0, 70), ("noise", 0.01, 1, 70), ("blur", 1.0, 0, 90)]
    return to_frame([make_cell(NATURAL, CLEAN, *row, 100) for row in rows])


def test_trials_become_mean_and_population_standard_deviation() -> None:
    table = aggregate_trials(make_cells()).set_index(["perturbation", "level"])
    assert table.loc[("noise", 0.05), "mean"] == pytest.approx(0.25)
    assert table.loc[("noise", 0.05), "std"] == pytest.approx(statistics.pstdev([0.2, 0.3]))
    assert table.loc[("noise", 0.05), "trials"] == 2
    assert table.loc[("blur", 1.0), "std"] == 0


def test_the_order_of_the_cells_is_kept() -> None:
    assert list(aggregate_trials(make_cells())["perturbation"]) == [CLEAN, "noise", "noise", "blur"]


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
    assert summarize(to_frame([make_cell(NATURAL, CLEAN, CLEAN, 0, 0, 1, 2)])) == {"clean_accuracy": 0.5}


# A strategy beside the natural model. Two pixel models and one noise model, so that what is weighed by models and what
# is not differ; noise has two trials, of which pixel models were shown the first only.
N = 1000
TESTED = {  # (perturbation, level, trial) -> right answers of the natural model
    (CLEAN, 0, 0): 900,
    ("hot", 2, 0): 600,
    ("noise", 0.1, 0): 300,
    ("noise", 0.1, 1): 500,
}
ANSWERS = {
    ("hot", 1): {(CLEAN, 0, 0): 850, ("hot", 2, 0): 700, ("noise", 0.1, 0): 350},
    ("dead", 1): {(CLEAN, 0, 0): 870, ("hot", 2, 0): 650, ("noise", 0.1, 0): 250},
    ("noise", 0.1): {(CLEAN, 0, 0): 800, ("hot", 2, 0): 500, ("noise", 0.1, 0): 700, ("noise", 0.1, 1): 740},
}


def make_models(strategy: str = "constant", shift: int = 0) -> pd.DataFrame:
    """Cells of the natural model and of the three above, each with `shift` more right answers under damage."""
    rows = [make_cell(NATURAL, CLEAN, *key, n, N) for key, n in TESTED.items()]
    for (perturbation, level), answers in ANSWERS.items():
        rows += [
            make_cell(strategy, f"{perturbation}-{level}", *key, n + shift * (key[0] != CLEAN), N)
            for key, n in answers.items()
        ]
    return to_frame(rows)


def test_the_natural_model_is_measured_on_the_same_images_with_the_same_weights() -> None:
    summary = summarize_strategy(make_models())
    assert summary == {
        "baseline": NATURAL,
        "clean_accuracy": 0.84,
        "robust_accuracy": round((0.70 + 0.65 + 0.72) / 3, 6),
        "worst_accuracy": 0.65,
        "cross_accuracy": round((0.35 + 0.25 + 0.50) / 3, 6),
        "relative_error": round((0.325 / 0.4 + 0.28 / 0.6) / 2, 6),
        "baseline_clean_accuracy": 0.9,
        "baseline_robust_accuracy": round((0.6 + 0.6 + 0.4) / 3, 6),  # hot twice: two pixel models
        "baseline_worst_accuracy": 0.4,
        "baseline_cross_accuracy": round((0.3 + 0.3 + 0.6) / 3, 6),  # the first trial of noise
    }


def test_the_relative_error_is_of_means_over_all_levels_of_a_perturbation() -> None:
    rows = [make_cell(NATURAL, CLEAN, "noise", level, 0, n, 10) for level, n in ((0.1, 5), (0.2, 2))]
    rows += [make_cell("constant", "noise-0.1", "noise", level, 0, n, 10) for level, n in ((0.1, 9), (0.2, 4))]
    assert summarize_strategy(to_frame(rows))["relative_error"] == round((0.1 + 0.6) / (0.5 + 0.8), 6)


def test_the_rows_of_a_pairing_are_the_cells_of_the_strategy() -> None:
    table = pair_with_natural(make_models()).set_index(["label", "perturbation"])
    assert len(table) == 9
    pair = ["accuracy", "baseline_accuracy", "seen"]
    assert list(table.loc[("noise-0.1", "noise"), pair]) == [0.72, 0.4, True]
    assert list(table.loc[("dead-1", "noise"), pair]) == [0.25, 0.3, False]
    assert table.loc[("dead-1", "hot"), "seen"]  # of the same family
    assert not table.loc[("hot-1", CLEAN), "seen"]


def test_a_model_is_paired_with_the_natural_one_of_its_seed() -> None:
    keys = (NATURAL, CLEAN, "noise", 0.1, 0), ("constant", "noise-0.1", "noise", 0.1, 0)
    rows = [
        make_cell(*key, n, 10, seed)
        for seed, counts in ((1, (2, 7)), (2, (4, 9)))
        for key, n in zip(keys, counts, strict=True)
    ]
    table = pair_with_natural(to_frame(rows))
    assert table[["seed", "accuracy", "baseline_accuracy"]].to_numpy().tolist() == [[1, 0.7, 0.2], [2, 0.9, 0.4]]
    assert summarize_strategy(to_frame(rows))["robust_accuracy"] == 0.8


def test_a_model_without_a_natural_one_beside_it_is_not_compared() -> None:
    cells = make_models()
    assert compare_strategies(cells[cells["strategy"] == "constant"]) == []
    assert compare_strategies(cells[cells["strategy"] == NATURAL]) == []
    assert compare_strategies(to_frame([])) == []


def test_strategies_stand_in_the_order_of_their_gain() -> None:
    shifts = {"constant": -200, "incremental": 50, "transfer": 0, "other": 50}
    models = [make_models(name, shift) for name, shift in shifts.items()]
    others = [cells[cells["strategy"] != NATURAL] for cells in models[1:]]
    compared = compare_strategies(pd.concat([models[0], *others]))
    assert [comparison.strategy for comparison in compared] == ["incremental", "other", "transfer", "constant"]
    gains = [0.69 + shift - 1.6 / 3 for shift in (0.05, 0.05, 0, -0.2)]
    assert [comparison.gain for comparison in compared] == pytest.approx(gains, abs=1e-5)
    assert [comparison.clean_gain for comparison in compared] == pytest.approx([-0.06] * 4, abs=1e-6)
    assert [comparison.n_examples for comparison in compared] == [N] * 4
    assert [comparison.beats_baseline for comparison in compared] == [True, True, True, False]


def compare(robust: float, baseline: float, n: int) -> Comparison:
    return Comparison("constant", n, 0.9, 0.9, robust, baseline, None)


@pytest.mark.parametrize(
    ("robust", "baseline", "n", "beats"),
    [
        (0.5425, 0.5504, 2000, False),  # quick's CIFAR-10: a loss
        (0.58, 0.55, 2000, False),  # three points are chance there,
        (0.59, 0.55, 2000, True),  # four are not,
        (0.58, 0.55, 10_000, True),  # and with all test images three are not either
        (0.93, 0.77, 2000, True),
        (0.5, 0.5, 2000, False),
        (1.0, 1.0, 2000, False),
        (1.0, 0.0, 1, False),  # one image says nothing
        (1.0, 0.0, 2, False),
        (1.0, 0.0, 20, True),
    ],
)
def test_a_gain_counts_if_it_is_larger_than_chance(robust: float, baseline: float, n: int, beats: bool) -> None:
    assert compare(robust, baseline, n).beats_baseline is beats
    assert compare(baseline, robust, n).beats_baseline is False


def test_chance_is_two_standard_errors_of_a_difference_of_two_shares_of_the_images() -> None:
    large = compare(0.6, 0.5, 10**6)
    assert large.chance == pytest.approx(2 * math.sqrt((0.6 * 0.4 + 0.5 * 0.5) / 10**6), rel=1e-4)
    # Agresti and Caffo's interval, as they write it, leaves out 0 where the gain is above chance.
    for right, right_baseline, n in ((9, 4, 10), (17, 9, 20), (30, 10, 40), (5, 3, 8)):
        one, other = (right + 1) / (n + 2), (right_baseline + 1) / (n + 2)
        lower = one - other - 2 * math.sqrt(one * (1 - one) / (n + 2) + other * (1 - other) / (n + 2))
        assert compare(right / n, right_baseline / n, n).beats_baseline is (lower > 0)


def test_chance_alone_hardly_ever_beats_the_natural_model() -> None:
    rng = np.random.default_rng(0)
    n, found = 500, 0
    for _ in range(1000):
        # Ten damaged versions of the same images, half of whose errors are the image's own.
        hard = rng.random(n) < 0.3
        one, other = (np.where(hard, rng.random((10, n)) < 0.5, rng.random((10, n)) < 0.9).mean() for _ in range(2))
        found += compare(float(one), float(other), n).beats_baseline
    assert found <= 25  # an upper bound: 2.5 % if the two were of other images


def test_training_seeds_that_vary_hardly_ever_make_a_gain() -> None:
    rng = np.random.default_rng(0)
    found, found_without = 0, 0
    for n_seeds in (2, 3, 5):
        for _ in range(1000):
            one, other = 0.7 + 0.03 * rng.standard_normal((2, n_seeds))
            gains = (one - other).tolist()
            both = Comparison("constant", 10_000, 0.9, 0.9, one.mean(), other.mean(), None, gains=gains)
            found += both.beats_baseline
            found_without += dataclasses.replace(both, gains=()).beats_baseline
    assert found <= 75  # 2.5 %
    assert found_without > 600  # what the images alone would have called gains


def test_the_error_over_seeds_is_half_of_a_confidence_interval_of_the_mean() -> None:
    gains = [0.11, 0.14, 0.12, 0.19]
    low, high = scipy.stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert error_over_seeds(gains) == pytest.approx((high - low) / 2)
    assert error_over_seeds([]) == error_over_seeds([0.1]) == 0


def test_a_strategy_has_a_gain_for_every_seed() -> None:
    models = pd.concat(make_models(shift=shift).assign(seed=seed) for seed, shift in ((1, 0), (2, 100), (3, 50)))
    (compared,) = compare_strategies(models)
    gains = [0.69 + shift - 1.6 / 3 for shift in (0, 0.1, 0.05)]
    assert compared.gains == pytest.approx(gains, abs=1e-5)
    assert compared.gain == pytest.approx(np.mean(gains), abs=1e-5)
    assert compared.clean_gains == pytest.approx([-0.06] * 3)
    alone = dataclasses.replace(compared, gains=())
    assert compared.chance == pytest.approx(math.hypot(alone.chance, error_over_seeds(compared.gains)))
    assert compared.clean_chance == dataclasses.replace(compared, clean_gains=()).clean_chance  # they do not vary


def test_a_model_of_the_user_is_compared_with_the_natural_model_of_every_seed() -> None:
    tested = (CLEAN, 0), ("noise", 0.1), ("noise", 0.2)
    natural = [
        make_cell(NATURAL, CLEAN, name, level, 0, n, 10, seed) for seed, n in ((1, 2), (2, 4)) for name, level in tested
    ]
    mine = to_frame([make_cell("mine", CLEAN, name, level, 0, 9, 10, 0) for name, level in tested])
    compared = compare_seeds("mine", mine, to_frame(natural))
    assert compared is not None
    assert compared.gains == pytest.approx([0.7, 0.5])
    assert (compared.gain, compared.robust_accuracy, compared.n_examples) == pytest.approx((0.6, 0.9, 10))
    only_clean = to_frame(natural).query("perturbation == 'clean'")
    assert compare_seeds("mine", mine.query("perturbation == 'clean'"), only_clean) is None


def test_a_model_that_errs_much_is_too_weak_to_conclude_from() -> None:
    assert needed_accuracy(0.1) == pytest.approx(0.7)
    assert needed_accuracy(0.5) == pytest.approx(5 / 6)
    assert needed_accuracy(0.01) == pytest.approx(0.67)
    assert is_weak(0.95, 1000, 0.95)  # of two classes it knows the more frequent one only


def test_a_model_is_weak_if_chance_does_not_explain_it() -> None:
    assert not is_weak(0.749, 430, 0.25)  # 0.75 is needed
    assert is_weak(0.7, 430, 0.25)
    assert not is_weak(0.7, 43, 0.25)
    assert is_weak(0.0, 10, 0.25)


def test_a_model_guesses_from_the_mildest_level_on_that_no_better_one_follows() -> None:
    accuracies = {"stuck": [0.9, 0.23, 0.2], "hot": [0.21, 0.9, 0.5], "blur": [0.1, 0.23, 0.1]}
    levels = pd.DataFrame(
        [(name, level, mean) for name, means in accuracies.items() for level, mean in enumerate(means, 1)]
        + [("clean", 0, 0.9)],
        columns=["perturbation", "level", "mean"],
    )
    assert find_guessing(levels, 430, 0.2) == {"stuck": 2, "blur": 1}
    assert find_guessing(levels, 10_000, 0.2) == {"stuck": 3, "blur": 3}  # 23 % is better than 20 %
