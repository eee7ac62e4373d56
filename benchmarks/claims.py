"""The claims of the paper's text, checked on the authors' own numbers and on ours; docs/claims.md shows them.

A claim is a number computed from accuracies, and the range of that number in which we say that the claim holds.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path

import numpy as np
import pandas as pd
from ruamel.yaml import YAML

from pipeline.data.datasets import Dataset
from pipeline.data.seeding import level_name
from pipeline.evaluation.metrics import Cell
from pipeline.recipes.plan import CLEAN, NATURAL
from pipeline.reporting import published
from pipeline.runtime import layout
from pipeline.study.planning import MEASURING

PIXELS = ("stuck", "hot", "dead")
STRATEGIES = ("constant", "incremental", "transfer")
# What section VI tests models on: (perturbation, level).
TESTS = [(name, 2.0) for name in PIXELS]
TESTS += [("noise", sigma) for sigma in (0.0255, 0.03775, 0.05)]
TESTS += [("blur", sigma) for sigma in (0.5, 0.75, 1.0)]
# Table I: (batch normalization, dropout, activation) → its name in `ablations.components`.
COMPONENTS = {
    (True, True, "relu"): "full",
    (True, False, "relu"): "no_dropout",
    (False, True, "relu"): "no_batch_norm",
    (True, True, "tanh"): "tanh",
    (False, False, "relu"): "plain_relu",
    (False, False, "tanh"): "plain_tanh",
}
_Key = tuple[str, str, str, float]


class NotMeasuredError(Exception):
    """A claim needs an accuracy that is not there."""


class Accuracies:
    """Accuracies in percent, means over trials and seeds, by model and by what it was tested on."""

    def __init__(
        self, table: pd.DataFrame, levels: Mapping[str, Collection[float]], clean: Mapping[str, float]
    ) -> None:
        """Take the means of a table.

        Args:
            table: Columns strategy, label, perturbation, level and accuracy.
            levels: Perturbation → the levels that models were to be trained on.
            clean: Perturbation → clean accuracy of the natural model that its cells belong to, where there are several.
        """
        means = table.groupby(["strategy", "label", "perturbation", "level"], as_index=False)["accuracy"].mean()
        self._of: dict[_Key, float] = {tuple(row[:4]): row[4] for row in means.itertuples(index=False)}
        self._levels, self._clean = levels, clean

    def __call__(self, strategy: str, label: str, perturbation: str = CLEAN, level: float = 0) -> float:
        """Accuracy of one model on one level.

        Raises:
            NotMeasuredError: It is not there.
        """
        try:
            return self._of[strategy, label, perturbation, float(level)]
        except KeyError:
            raise NotMeasuredError from None

    def natural(self, perturbation: str = CLEAN, level: float = 0) -> float:
        """Accuracy of the natural model."""
        return self(NATURAL, CLEAN, perturbation, level)

    def clean(self, perturbation: str) -> float:
        """Accuracy on clean images of the natural model that was tested on a perturbation."""
        return self._clean.get(perturbation) or self.natural()

    def loss(self, perturbation: str, level: float) -> float:
        """How far a level of damage is below clean images, for the natural model, in points."""
        return self.clean(perturbation) - self.natural(perturbation, level)

    def labels(self, strategy: str, trained_on: str) -> list[str]:
        """The models that a strategy trained on one perturbation.

        Raises:
            NotMeasuredError: Not all of those planned are there.
        """
        planned = [f"{trained_on}-{level_name(level)}" for level in self._levels.get(trained_on, ())]
        if not planned or not {(strategy, label) for label in planned} <= {key[:2] for key in self._of}:
            raise NotMeasuredError
        return planned

    def mean(self, strategy: str, trained_on: str, perturbation: str, level: float) -> float:
        """Mean accuracy of the models that a strategy trained on one perturbation."""
        return float(np.mean([self(strategy, m, perturbation, level) for m in self.labels(strategy, trained_on)]))

    def on(self, strategy: str, trained_on: str, perturbation: str, level: float) -> float:
        """The highest accuracy on one level of the models that a strategy trained on one perturbation."""
        return max(self(strategy, m, perturbation, level) for m in self.labels(strategy, trained_on))

    def lowest(self, strategy: str, label: str, perturbation: str) -> float:
        """The lowest accuracy of a model over the levels of one perturbation in section VI."""
        return min(self(strategy, label, name, level) for name, level in TESTS if name == perturbation)

    def best(self, strategy: str, perturbation: str) -> float:
        """The highest such accuracy among the models that a strategy trained on that perturbation."""
        return max(self.lowest(strategy, label, perturbation) for label in self.labels(strategy, perturbation))

    def behind(self, strategy: str, perturbation: str) -> float:
        """How far that is below the natural model's clean accuracy, in points."""
        return self.clean(perturbation) - self.best(strategy, perturbation)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper's text.

    Attributes:
        section: Where it stands.
        says: What it says, in our words.
        value: The number that decides; accuracies are in percent, changes in points.
        low: The claim holds from here.
        high: To here.
    """

    section: str
    says: str
    value: Callable[[Accuracies], float]
    low: float = -inf
    high: float = inf

    @property
    def condition(self) -> str:
        """The range in which it holds, in words."""
        if self.high == inf:
            return f"at least {self.low:g}"
        return f"at most {self.high:g}" if self.low == -inf else f"{self.low:g} to {self.high:g}"

    def check(self, of: Accuracies) -> tuple[float, bool] | None:
        """The number, and whether the claim holds; None where it is not measured."""
        value = measured(lambda: self.value(of))
        return None if value is None else (value, self.low <= value <= self.high)


def measured(value: Callable[[], float]) -> float | None:
    """A value computed from accuracies; None if one of them is not there."""
    try:
        return value()
    except NotMeasuredError:
        return None


def accuracy(section: str, says: str, given: float, value: Callable[[Accuracies], float]) -> Claim:
    """The text gives an accuracy: another run may be five points away, our choice."""
    return Claim(section, says, value, given - 5, given + 5)


def change(section: str, says: str, given: float, value: Callable[[Accuracies], float]) -> Claim:
    """The text gives a change: another run may differ by a quarter of it, and by one point anyhow, our choice."""
    return Claim(section, says, value, given - max(1, given / 4), given + max(1, given / 4))


def authors_strategies(dataset: Dataset, strategy: str) -> pd.DataFrame:
    """The authors' models of a strategy: columns strategy, label, perturbation, level and accuracy, in percent."""
    table = published.read_strategies(dataset, strategy)
    pairs = zip(table["train_perturbation"], table["train_level"], strict=True)
    return table.assign(
        strategy=strategy,
        label=[f"{name}-{level_name(level)}" for name, level in pairs],
        perturbation=table["perturbation"].replace(NATURAL, CLEAN),
        accuracy=100 * table["mean"],
    )


def authors(dataset: Dataset) -> Accuracies:
    """The numbers behind the authors' figures, and Table I."""
    impact = published.read_impact(dataset)
    natural = impact.assign(strategy=NATURAL, label=CLEAN, perturbation=impact["kind"], accuracy=impact["mean"])
    first = {"strategy": NATURAL, "label": CLEAN, "perturbation": CLEAN, "level": 0, "accuracy": impact["natural"]}
    table_1 = published.read_components(dataset)
    rows = zip(table_1["batch_norm"], table_1["dropout"], table_1["activation"], strict=True)
    variants = {"strategy": "components", "label": [COMPONENTS[row] for row in rows], "accuracy": table_1["test"]}
    tables = [pd.DataFrame(first).iloc[:1], natural, pd.DataFrame({**variants, "perturbation": CLEAN, "level": 0})]
    levels: dict[str, list[float]] = {}
    for strategy in STRATEGIES:
        table = authors_strategies(dataset, strategy)
        levels = {str(name): list(of["train_level"].unique()) for name, of in table.groupby("train_perturbation")}
        tables.append(table)
    return Accuracies(pd.concat(tables), levels, dict(zip(impact["kind"], impact["natural"], strict=True)))


def ours(folder: Path) -> Accuracies:
    """The cells under results/, those of training images aside; none if there is no such folder."""
    paths = [folder / f"{stage}.csv" for stage in MEASURING]
    tables = [pd.read_csv(path) for path in paths if path.exists()]
    cells = pd.concat(tables) if tables else pd.DataFrame(columns=[field.name for field in fields(Cell)])
    cells = cells[cells["split"] == "test"]
    params = YAML(typ="safe").load(folder / layout.PARAMS) if tables else {"perturbations": {}}
    levels = {name: given["train_levels"] for name, given in params["perturbations"].items()}
    return Accuracies(cells.assign(accuracy=100 * cells["n_correct"] / cells["n_examples"]), levels, {})


def list_claims(dataset: str) -> list[Claim]:
    """The claims about a data set, in the order of the text."""
    return MNIST if dataset == "mnist" else CIFAR10


def _all_components(a: Accuracies) -> float:
    """How far the network of Table I with all components is above the next best."""
    full, *others = (a("components", label) for label in COMPONENTS.values())
    return full - max(others)


def _linearity(a: Accuracies, names: Iterable[str]) -> float:
    """The lowest squared correlation of accuracy with the number of pixels, 0 to 5, in percent."""
    of = [[a.clean(name), *(a.natural(name, n) for n in range(1, 6))] for name in names]
    return float(100 * min(np.corrcoef(range(6), accuracies)[0, 1] ** 2 for accuracies in of))


def _spread(a: Accuracies, strategy: str, label: str, *more: float) -> float:
    on_pixels = [a(strategy, label, name, 2) for name in PIXELS]
    return max(*on_pixels, *more) - min(*on_pixels, *more)


def _mean_spread(a: Accuracies, trained_on: str) -> float:
    return float(np.mean([_spread(a, "constant", label) for label in a.labels("constant", trained_on)]))


def _gain(a: Accuracies, strategy: str, trained_on: str, tested_on: str) -> float:
    """What training on one kind of pixels gains on two pixels of another, mean over its models."""
    return a.mean(strategy, trained_on, tested_on, 2) - a.natural(tested_on, 2)


def _hardest(a: Accuracies, strategy: str, perturbation: str, level: float) -> float:
    """What the best model of a strategy gains on one level."""
    return a.on(strategy, perturbation, perturbation, level) - a.natural(perturbation, level)


def _clean_cost(a: Accuracies, strategy: str, perturbation: str, level: float) -> float:
    """What the model that is best on a level loses on clean images."""
    best = max(a.labels(strategy, perturbation), key=lambda label: a(strategy, label, perturbation, level))
    return a.clean(perturbation) - a(strategy, best)


def _robust(a: Accuracies, strategy: str) -> float:
    """The lowest accuracy on a perturbation of the best model trained on it, mean over perturbations."""
    return float(np.mean([a.best(strategy, name) for name in (*PIXELS, "noise", "blur")]))


def _constant_behind(a: Accuracies) -> float:
    return max(_robust(a, "incremental"), _robust(a, "transfer")) - _robust(a, "constant")


def _both_ahead(a: Accuracies) -> float:
    return min(_robust(a, "incremental"), _robust(a, "transfer")) - _robust(a, "constant")


def _furthest(a: Accuracies) -> float:
    """How far the best models of all are below the natural model's clean accuracy, the worst perturbation."""
    return max(min(a.behind(strategy, name) for strategy in STRATEGIES) for name in (*PIXELS, "noise", "blur"))


def _two_pixels(a: Accuracies) -> float:
    return max(a.loss(name, 2) for name in PIXELS)


def _transfer_pixels(a: Accuracies) -> float:
    return max(a.behind("transfer", name) for name in PIXELS)


def _dead_gain(a: Accuracies) -> float:
    return max(a.best(strategy, "dead") for strategy in STRATEGIES) - a.natural("dead", 2)


def _blur_lead(a: Accuracies) -> float:
    """How far incremental training on the strongest blur is above the next best level, mean over tests."""
    tests, labels = [test for test in TESTS if test[0] == "blur"], a.labels("incremental", "blur")
    of = {label: float(np.mean([a("incremental", label, *test) for test in tests])) for label in labels}
    if "blur-1" not in of:
        raise NotMeasuredError
    return of.pop("blur-1") - max(of.values())


MNIST = [
    Claim("IV", "The natural model reaches 97.42 % on clean images", lambda a: a.natural(), 96.92, 97.92),
    Claim(
        "V-A",
        "Stuck and hot pixels cost accuracy in proportion to their number (r², %)",
        lambda a: _linearity(a, ("stuck", "hot")),
        98,
    ),
    Claim("V-A", "Five dead pixels cost next to nothing", lambda a: a.loss("dead", 5), high=1),
    change("V-A", "Five stuck pixels cost about 30 points", 30, lambda a: a.loss("stuck", 5)),
    change("V-A", "Five hot pixels cost about 45 points", 45, lambda a: a.loss("hot", 5)),
    accuracy("V-B", "Noise of 0.05 leaves about 18 %", 18, lambda a: a.natural("noise", 0.05)),
    change("V-C", "Blur of 1 costs 7 points", 7, lambda a: a.loss("blur", 1)),
    Claim(
        "VI-A",
        "Constant training with hot pixels, labelled 7: above 97 % on all kinds of pixels",
        lambda a: min(a("constant", "hot-8", name, 2) for name in PIXELS),
        97,
    ),
    change(
        "VI-A",
        "It gains 20 points on two hot pixels",
        20,
        lambda a: a("constant", "hot-8", "hot", 2) - a.natural("hot", 2),
    ),
    Claim(
        "VI-B",
        "Incremental training with hot pixels: all kinds of pixels and clean images within 0.5 points, at every level",
        lambda a: max(
            _spread(a, "incremental", label, a("incremental", label)) for label in a.labels("incremental", "hot")
        ),
        high=0.5,
    ),
    change(
        "VI-B",
        "Incremental training gains 75 points under noise of 0.05",
        75,
        lambda a: _hardest(a, "incremental", "noise", 0.05),
    ),
    change("VII", "Two pixels of the worst kind cost 19 points", 19, _two_pixels),
    Claim("VII", "Transfer: every kind of pixels within 1 point of natural clean accuracy", _transfer_pixels, high=1),
    Claim("VII", "Dead pixels gain little, however trained", _dead_gain, high=1),
    Claim(
        "VII",
        "All three strategies bring noise to within 1 point of natural clean accuracy",
        lambda a: max(a.behind(strategy, "noise") for strategy in STRATEGIES),
        high=1,
    ),
    Claim("VII", "Transfer brings blur to within 1 point", lambda a: a.behind("transfer", "blur"), high=1),
    Claim(
        "VII",
        "Transfer is the best strategy against blur (points ahead)",
        lambda a: a.best("transfer", "blur") - max(a.best("constant", "blur"), a.best("incremental", "blur")),
        0,
    ),
    Claim("VII", "Incremental and transfer training beat constant training (points, the lesser)", _both_ahead, 0),
    Claim("VII", "Constant training is not the best strategy (points behind)", _constant_behind, 0),
    Claim("IX", "In the worst case, accuracy drops by more than 80 points", lambda a: a.loss("noise", 0.05), 80),
    accuracy("IX", "That is no better than a guess, 10 %", 10, lambda a: a.natural("noise", 0.05)),
    Claim("IX", "Against every perturbation, some model stays within 3 points", _furthest, high=3),
]

CIFAR10 = [
    Claim("IV", "The natural model reaches 86.92 % on clean images", lambda a: a.natural(), 85.92, 87.92),
    Claim("IV", "The network with all components of Table I is the best (points ahead)", _all_components, 0),
    Claim(
        "V-A",
        "All pixels cost accuracy in proportion to their number (r², %)",
        lambda a: _linearity(a, PIXELS),
        98,
    ),
    Claim(
        "V-A",
        "Stuck pixels cost least (points less than the next, at five)",
        lambda a: min(a.loss("hot", 5), a.loss("dead", 5)) - a.loss("stuck", 5),
        0,
    ),
    Claim(
        "V-A",
        "Hot pixels cost most (points more than the next, at five)",
        lambda a: a.loss("hot", 5) - max(a.loss("stuck", 5), a.loss("dead", 5)),
        0,
    ),
    change("V-A", "Five hot pixels cost about 6 points", 6, lambda a: a.loss("hot", 5)),
    accuracy("V-B", "Noise of 0.05 leaves about 63 %", 63, lambda a: a.natural("noise", 0.05)),
    accuracy("V-C", "Blur of 1 leaves 31 %", 31, lambda a: a.natural("blur", 1)),
    change("V-C", "It costs 55 points", 55, lambda a: a.loss("blur", 1)),
    Claim(
        "VI-A",
        "Constant training with stuck pixels is the most even over kinds of pixels (points less spread than the next)",
        lambda a: min(_mean_spread(a, "hot"), _mean_spread(a, "dead")) - _mean_spread(a, "stuck"),
        0,
    ),
    Claim(
        "VI-A",
        "Constant training with stuck pixels, labelled 2: clean accuracy above the natural model's (points)",
        lambda a: a("constant", "stuck-3") - a.clean("stuck"),
        0,
    ),
    Claim(
        "VI-A",
        "It stays above 86 % on all kinds of pixels",
        lambda a: min(a("constant", "stuck-3", name, 2) for name in PIXELS),
        86,
    ),
    change(
        "VI-A",
        "It gains 2 points over kinds of pixels",
        2,
        lambda a: float(np.mean([a("constant", "stuck-3", name, 2) - a.natural(name, 2) for name in PIXELS])),
    ),
    Claim(
        "VI-A",
        "Constant training with hot pixels gains on hot and stuck ones (points, the lesser)",
        lambda a: min(_gain(a, "constant", "hot", name) for name in ("hot", "stuck")),
        0,
    ),
    Claim("VI-A", "It gains nothing on dead ones", lambda a: _gain(a, "constant", "hot", "dead"), high=0),
    change(
        "VI-A",
        "Constant training with dead pixels costs up to 4 points on hot ones",
        4,
        lambda a: max(a.natural("hot", 2) - a("constant", label, "hot", 2) for label in a.labels("constant", "dead")),
    ),
    change(
        "VI-A",
        "Constant training gains 21 points under noise of 0.05",
        21,
        lambda a: _hardest(a, "constant", "noise", 0.05),
    ),
    change("VI-A", "It gains 40 points under blur of 1", 40, lambda a: _hardest(a, "constant", "blur", 1)),
    Claim(
        "VI-A",
        "Both keep their accuracy on clean images (points lost, the more)",
        lambda a: max(_clean_cost(a, "constant", "noise", 0.05), _clean_cost(a, "constant", "blur", 1)),
        high=1,
    ),
    change(
        "VI-B",
        "Incremental training gains 50 points under blur of 1",
        50,
        lambda a: _hardest(a, "incremental", "blur", 1),
    ),
    Claim("VI-B", "Training on the strongest blur is best for all blur (points ahead)", _blur_lead, 0),
    accuracy(
        "VI-C",
        "Transfer with noise of 0.05: about 85 % under all noise and on clean images (the lowest)",
        85,
        lambda a: min(a("transfer", "noise-0.05"), a.lowest("transfer", "noise-0.05", "noise")),
    ),
    change("VI-C, VII", "Two pixels of the worst kind cost 2 points", 2, _two_pixels),
    Claim(
        "VI-C",
        "Transfer with hot pixels stays above 87 % on them (mean over its models)",
        lambda a: a.mean("transfer", "hot", "hot", 2),
        87,
    ),
    Claim(
        "VI-C",
        "These models are worst on dead pixels (points below the next)",
        lambda a: (
            min(a.mean("transfer", "hot", name, 2) for name in ("hot", "stuck")) - a.mean("transfer", "hot", "dead", 2)
        ),
        0,
    ),
    Claim("VII", "Transfer: every kind of pixels within 1 point of natural clean accuracy", _transfer_pixels, high=1),
    Claim("VII", "Dead pixels gain little, however trained", _dead_gain, high=1),
    Claim(
        "VII",
        "Incremental training brings all noise to within 1 point of natural clean accuracy",
        lambda a: a.behind("incremental", "noise"),
        high=1,
    ),
    Claim(
        "VII",
        "The other two strategies do not (points below, the better)",
        lambda a: min(a.behind("constant", "noise"), a.behind("transfer", "noise")),
        1,
    ),
    Claim(
        "VII",
        "Incremental training on blur of 1 brings all blur to within 3 points",
        lambda a: a.clean("blur") - a.lowest("incremental", "blur-1", "blur"),
        high=3,
    ),
    change(
        "VII",
        "It gains 60 points under blur of 1",
        60,
        lambda a: a("incremental", "blur-1", "blur", 1) - a.natural("blur", 1),
    ),
    Claim("VII", "Incremental and transfer training beat constant training (points, the lesser)", _both_ahead, 0),
    Claim("VII", "Constant training is not the best strategy (points behind)", _constant_behind, 0),
    Claim("IX", "Against every perturbation, some model stays within 3 points", _furthest, high=3),
]
