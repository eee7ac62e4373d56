"""The formulas of docs/claims.md, on accuracies whose consequences are known."""

from collections.abc import Iterator

import pandas as pd
import pytest

from benchmarks.claims import COMPONENTS, PIXELS, STRATEGIES, TESTS, Accuracies, change, list_claims
from pipeline.data.seeding import level_name
from pipeline.recipes.plan import CLEAN, NATURAL

LEVELS = {name: [3, 5, 8] for name in PIXELS} | {"noise": [0.01325, 0.05], "blur": [0.52, 1]}
# What a natural model of 90 % loses per unit of a level, and what strategies stay below 90 %.
COSTS = {"stuck": 1, "hot": 2, "dead": 3, "noise": 1000, "blur": 40}
BEHIND = {"constant": 5, "incremental": 3, "transfer": 1}
# (trained on, tested on) → points more or less.
EXTRA = {("hot", "dead"): -2.0, ("dead", "hot"): -1.0}


def rows() -> Iterator[tuple[str, str, str, float, float]]:
    yield NATURAL, CLEAN, CLEAN, 0, 90
    for name, cost in COSTS.items():
        for level in {1, 2, 3, 4, 5} if name in PIXELS else {0.0255, 0.03775, 0.05, 0.5, 0.75, 1}:
            yield NATURAL, CLEAN, name, level, 90 - cost * level
    for variant in COMPONENTS.values():
        yield "components", variant, CLEAN, 0, 88 if variant == "full" else 85
    for strategy in STRATEGIES:
        for name, levels in LEVELS.items():
            for level in levels:
                of_all = 90 - BEHIND[strategy]
                label = f"{name}-{level_name(level)}"
                yield strategy, label, CLEAN, 0, of_all
                for tested, test_level in TESTS:
                    more = 0.5 if label == "blur-1" and tested == "blur" else EXTRA.get((name, tested), 0)
                    yield strategy, label, tested, test_level, of_all + more


TABLE = pd.DataFrame(rows(), columns=["strategy", "label", "perturbation", "level", "accuracy"])
EXPECTED = {
    "mnist": [90, 100, 15, 5, 10, 40, 40, 83, -1, 2, 47, 6, 1, 5, 5, 0.5, 2, 2, 4, 50, 40, 1],
    "cifar10": [
        *(90, 3, 100, 5, -5, 10, 40, 50, 40),  # sections IV and V
        *(1, -5, 85, -1, -3, -1, 2, 45, 35.5, 5, 37.5, 0.5),  # constant and incremental training
        *(89, 6, 89, 2, 1, 5, 3, 1, 2.5, 37.5, 2, 4, 1),  # transfer, sections VII and IX
    ],
}


@pytest.mark.parametrize("dataset", EXPECTED)
def test_every_claim_is_what_follows_from_the_accuracies(dataset: str) -> None:
    of = Accuracies(TABLE, LEVELS, {})
    found = {f"{claim.section}: {claim.says}": claim.value(of) for claim in list_claims(dataset)}
    assert found == pytest.approx(dict(zip(found, EXPECTED[dataset], strict=True)))


def test_a_loss_is_counted_from_the_natural_model_of_the_same_figure() -> None:
    assert Accuracies(TABLE, LEVELS, {"noise": 92}).loss("noise", 0.05) == pytest.approx(52)
    assert Accuracies(TABLE, LEVELS, {"noise": 92}).loss("blur", 1) == pytest.approx(40)


def test_claims_about_strategies_wait_for_all_of_their_models() -> None:
    of = Accuracies(TABLE[TABLE["label"] != "hot-5"], LEVELS, {})
    measured = {claim.says for claim in list_claims("mnist") if claim.check(of)}
    assert "Noise of 0.05 leaves about 18 %" in measured
    assert "Dead pixels gain little, however trained" in measured
    assert not any(says.startswith(("Constant training is", "Incremental training with hot")) for says in measured)
    nothing = Accuracies(TABLE.iloc[:0], {}, {})
    assert [claim.check(nothing) for claim in list_claims("cifar10")] == [None] * len(list_claims("cifar10"))


@pytest.mark.parametrize(
    ("given", "value", "holds"), [(2, 0.99, False), (2, 1, True), (2, 3.01, False), (40, 30, True), (40, 50.1, False)]
)
def test_a_change_may_differ_by_a_quarter_and_by_one_point(given: float, value: float, holds: bool) -> None:
    assert change("", "", given, lambda of: value).check(Accuracies(TABLE, LEVELS, {})) == (value, holds)
