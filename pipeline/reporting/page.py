"""Writes the report: one page with every number from a metric file of this run, and every figure inside the page."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from pipeline.data.datasets import DATASETS
from pipeline.data.seeding import level_name
from pipeline.evaluation import results
from pipeline.evaluation.metrics import (
    Comparison,
    aggregate_trials,
    compare_seeds,
    compare_strategies,
    find_guessing,
    is_weak,
    recall_by_class,
)
from pipeline.perturbations import PERTURBATIONS
from pipeline.perturbations.variants import split_label
from pipeline.recipes.plan import CLEAN, NATURAL
from pipeline.recipes.recipe import Network
from pipeline.reporting import published
from pipeline.reporting.figures import (
    N_COLORS,
    Chart,
    Point,
    Series,
    assign_colors,
    draw_bars,
    draw_lines,
    encode_image,
    explain_level,
    name_level,
)
from pipeline.reporting.verdict import (
    TRAINED_HERE,
    Robustness,
    compare_robustness,
    describe_ablations,
    describe_certainty,
    describe_repair,
    describe_robustness,
    describe_weakness,
    percent,
    points,
    unbroken,
)
from pipeline.runtime import layout
from pipeline.runtime.files import replacing_folder
from pipeline.study.opening import read_examples
from pipeline.study.params import Params
from pipeline.study.planning import Study, plan_studies
from pipeline.study.reading import changed_keys, read

# Number of classes shown for each level.
_N_LOSSES = 3
# Letters of the figures in the paper's appendix.
_LETTERS = {"constant": "A", "incremental": "B", "transfer": "C"}
_FAMILIES = tuple(dict.fromkeys(perturbation.family for perturbation in PERTURBATIONS.values()))
# The most classes that a confusion matrix is drawn for, and the number of pairs that are listed if there are more.
_MAX_MATRIX, _N_PAIRS = 25, 10
# Values that do not change what is measured.
_NO_SETTINGS = ("device", "prepare", "impact.n_examples", "impact.batch_size", "evaluate.batch_size")
# Further values that do not change what the authors measured.
_NOT_THEIRS = ("ablations", "evaluate.cross_trials", "models", "perturb.seed", "strategies.repair", "train.seeds")
_ACCURACIES = {
    "clean_accuracy": "clean",
    "robust_accuracy": "robust",
    "worst_accuracy": "worst",
    "cross_accuracy": "cross",
}


def write_report(params: Params, params_path: Path, folder: Path) -> int:
    """Write index.html into `folder`, which is replaced as a whole, and return its number of charts.

    Args:
        params: The study.
        params_path: Where it was read from.
        folder: Where the page goes.

    Raises:
        PipelineError: A metric file or store is missing, damaged, or made with other params.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "unbroken": unbroken,
        "level": level_name,
        "number": lambda value: f"{value:,}" if isinstance(value, int) else f"{value:g}",
        "counted": lambda values, what: _counted(len(values), what),
    }
    template = environment.from_string(resources.files(__package__).joinpath("page.html.jinja").read_text("utf-8"))
    has_canonical = any(name in DATASETS for name in params.datasets)
    differences = _differences(params_path) if has_canonical else []
    described = [_Described(study, params, differences).context() for study in plan_studies(params).values()]
    families = [[name for name in params.perturbations if PERTURBATIONS[name].family == one] for one in _FAMILIES]
    page = template.render(
        studies=described,
        params=params,
        families=[names for names in families if len(names) > 1],
        units={name: perturbation.unit for name, perturbation in PERTURBATIONS.items()},
        differences=differences,
        has_canonical=has_canonical,
    )
    with replacing_folder(folder) as staged:
        (staged / "index.html").write_text(page, encoding="utf-8", newline="\n")
    return page.count("<svg ")


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _differences(params_path: Path) -> list[tuple[str, Any, Any]]:
    """List the values that affect a number and differ from profile `paper`: (dotted key, there, here)."""
    changes = changed_keys(read(layout.PROFILES / "paper.yaml"), read(params_path))
    return [change for change in changes if not change[0].startswith(_NO_SETTINGS)]


def is_as_published(dataset: str, differences: Sequence[tuple[str, Any, Any]]) -> bool:
    """Whether what the authors measured of a data set was measured here with their settings.

    Args:
        dataset: Name of the data set.
        differences: Keys whose values differ, with the values in profile `paper` and here.
    """
    return all(key.startswith(_NOT_THEIRS) or _dataset_of(key) not in (None, dataset) for key, _, _ in differences)


def _dataset_of(key: str) -> str | None:
    """The data set that a key of params.yaml belongs to; None if it belongs to all."""
    found = re.match(r"(?:datasets|train\.recipes|strategies\.[^.]+\.recipes)\.([^.]+)", key)
    return found and found[1]


@dataclass(frozen=True)
class Loss:
    """A class whose recall is lower on damaged images.

    Attributes:
        label: The class.
        before: Share of its clean images that are classified correctly, in [0, 1].
        after: The same for its damaged images.
        taken_for: The class that its misclassified damaged images are most often taken for.
    """

    label: int
    before: float
    after: float
    taken_for: int


def find_losses(before: pd.DataFrame, after: pd.DataFrame) -> list[Loss]:
    """Find the classes that lose most recall, at most three.

    Args:
        before: Columns as the fields of `Confusion`, of one model on clean images.
        after: The same on damaged ones.
    """
    shares = pd.DataFrame({"before": recall_by_class(before), "after": recall_by_class(after)})
    losses = (shares["before"] - shares["after"]).sort_values(ascending=False, kind="stable")
    found = []
    for label in losses[losses > 0].index[:_N_LOSSES].tolist():  # a class without images has none
        wrong = after[after["actual"].eq(label) & after["predicted"].ne(label)]
        taken_for = int(wrong["predicted"].iloc[int(wrong["n_examples"].argmax())])
        found.append(Loss(label, float(shares["before"][label]), float(shares["after"][label]), taken_for))
    return found


class _Described:
    """What the page says about one data set; reads all metric files before it draws anything."""

    def __init__(self, study: Study, params: Params, differences: Sequence[tuple[str, Any, Any]]) -> None:
        self.study, self.name = study, study.dataset.name
        self.recipe = params.train.recipes[self.name]
        self.is_canonical = self.name in DATASETS  # what the authors measured
        self.is_published = self.is_canonical and is_as_published(self.name, differences)
        self.impact, self.evaluated, self.ablated = (
            results.read_cells(study, stage) for stage in ("impact", "evaluate", "ablations")
        )
        self.examples = results.read_examples(study)
        self.confusions = results.read_confusions(study, self.evaluated)
        self.colors = _assign_colors(params)
        self.n_seeds, self.variants = len(params.train.seeds), params.ablations
        sizes = self.confusions[self.confusions["perturbation"] == CLEAN].groupby(["strategy", "actual"])["n_examples"]
        self.guessing = float(sizes.sum().loc[NATURAL].max() / study.n_examples["test"])  # the most frequent class
        self.comparisons = compare_strategies(self.evaluated, study.baselines)
        self.summaries = {
            stage: results.summarize_stage(study, stage, cells)
            for stage, cells in (("evaluate", self.evaluated), ("ablations", self.ablated))
        }
        self.by_model = {str(name): rows for name, rows in self.impact.groupby("strategy", sort=False)}
        levels = {name: aggregate_trials(rows) for name, rows in self.by_model.items()}
        self.levels = levels.pop(NATURAL)
        self.external = levels  # name of a user's model → its levels, as for the natural models
        self.models = _aggregate_models(self.evaluated)

    def context(self) -> dict[str, Any]:
        """Return all that the template shows of this data set."""
        clean = self._robustness(self.levels).clean
        ablations = {ablation: dict(self._variants(ablation)) for ablation in self.study.ablations}
        return {
            "name": self.name,
            "n_train": self.study.n_examples["train"],
            "n_test": self.study.n_examples["test"],
            "recipe": self.recipe,
            "is_canonical": self.is_canonical,
            "is_published": self.is_published,
            # A user with a model of their own asks about that first.
            "findings": [*map(self._find_external, self.external), self._find_natural()],
            "certainty": describe_certainty(self.study.n_examples["test"], self.n_seeds),
            "answer": list(self._answer()),
            "external": self._external(),
            "summary": self._summary(),
            "impact": list(self._impact(clean)),
            "impact_rows": self.levels.to_dict("records"),
            "galleries": list(self._galleries()),
            "strategies": list(self._strategies()),
            "best_and_worst": list(self._best_and_worst()),
            "cross": {strategy: self._cross(strategy) for strategy in self.study.strategies},
            "ablations": {ablation: self._ablation(ablation, rows) for ablation, rows in ablations.items()},
            "confusion": self._confusion(),
            "training": list(self._training()),
            "models": {model.key.strategy: model.spec for model in self.study.external},
        }

    def _find_external(self, name: str) -> dict[str, Any]:
        """Return the findings about a user's model."""
        found, n = self._robustness(self.external[name]), self.study.n_examples["test"]
        robust = describe_robustness(found, self.guessing)
        compared = compare_seeds(name, self.by_model[name], self.by_model[NATURAL])
        if compared is not None:
            robust += " " + compare_robustness(compared)
        repairs = [one for one in self.comparisons if one.baseline == name]
        repair = describe_repair(repairs, is_weak(found.clean, n, self.guessing))
        (spec,) = (model.spec for model in self.study.external if model.key.strategy == name)
        if not repairs:
            repair += " Strategy repair does that (docs/own-data.md)." if spec.kind != "onnx" else ""
        remedy = "Train it longer, and compare its accuracy here with the one that you know."
        warning = describe_weakness(name, found.clean, n, self.guessing, remedy)
        return {"title": f"Your model {name}", "robust": robust, "repair": repair, "others": [], "warning": warning}

    def _find_natural(self) -> dict[str, Any]:
        """Return the findings about the natural model, with a warning if it is weak."""
        found, n = self._robustness(self.levels), self.study.n_examples["test"]
        compared = [one for one in self.comparisons if one.baseline == NATURAL]
        weak = is_weak(found.clean, n, self.guessing)
        key = f"train.recipes.{self.name}"
        remedy = f"Train it longer ({key}.epochs, now {self.recipe.epochs}), or choose another network ({key}.network)."
        return {
            "title": f"{TRAINED_HERE.capitalize()} ({NATURAL})",
            "robust": describe_robustness(found, self.guessing),
            "repair": describe_repair(compared, weak),
            "others": [] if weak else describe_ablations(self._compare_ablations()),
            "warning": describe_weakness(TRAINED_HERE, found.clean, n, self.guessing, remedy),
        }

    def _compare_ablations(self) -> dict[str, list[Comparison]]:
        """Compare the variants of each ablation with the natural models, under damage; empty if none was tested."""
        compared: dict[str, list[Comparison]] = {}
        tested = self.ablated[self.ablated["split"] == "test"]
        for (ablation, variant), rows in tested.groupby(["strategy", "label"], sort=False):
            one = compare_seeds(str(variant), rows, self.by_model[NATURAL])
            if one is not None:
                compared.setdefault(str(ablation), []).append(one)
        return compared

    def _robustness(self, levels: pd.DataFrame) -> Robustness:
        """Compute the robustness of one model from its levels."""
        clean = float(levels.loc[levels["perturbation"] == CLEAN, "mean"].iloc[0])
        damaged = levels[levels["perturbation"] != CLEAN]
        if damaged.empty:
            return Robustness(clean)
        row = damaged.iloc[int(damaged["mean"].argmin())]
        worst = explain_level(str(row["perturbation"]), float(row["level"])), float(row["mean"])
        guessed = find_guessing(levels, self.study.n_examples["test"], self.guessing)
        return Robustness(
            clean, float(damaged["mean"].mean()), worst, [explain_level(*level) for level in guessed.items()]
        )

    def _tested(self) -> list[str]:
        return [name for name in dict.fromkeys(self.levels["perturbation"]) if name != CLEAN]

    @property
    def _compared(self) -> dict[str, str]:
        """Strategy → its baseline: first the strategies compared with the natural model, then the others."""
        return dict(sorted(self.study.baselines.items(), key=lambda item: item[1] != NATURAL))

    @property
    def _bar_colors(self) -> dict[str, int]:
        """Name of a bar → its colour, every baseline before its strategies."""
        names = [name for strategy, baseline in self._compared.items() for name in (baseline, strategy)]
        return {name: self.colors[name] for name in names}

    def _summary_of(self, strategy: str) -> Mapping[str, Any]:
        return self.summaries["evaluate"][layout.summary("evaluate", self.name, strategy)]

    def _answer(self) -> Iterator[dict[str, Any]]:
        """Yield a row per strategy, after the row of its baseline."""
        compared = {comparison.strategy: comparison for comparison in self.comparisons}
        shown = set()
        for strategy, baseline in self._compared.items():
            numbers = self._summary_of(strategy)
            if baseline not in shown:
                shown.add(baseline)
                own = {key: numbers.get(f"baseline_{key}") for key in _ACCURACIES}
                error = 1.0 if "relative_error" in numbers else None
                yield {"strategy": baseline, **own, "relative_error": error, "compared": None}
            row = {key: numbers.get(key) for key in (*_ACCURACIES, "relative_error")}
            yield {"strategy": strategy, **row, "compared": compared.get(strategy)}

    def _external(self) -> dict[str, Any] | None:
        """Compare the user's models with the natural one: accuracies on clean images and under each damage."""
        if not self.external:
            return None
        models = {NATURAL: self.levels, **self.external}
        means = {name: levels.groupby("perturbation", sort=False)["mean"].mean() for name, levels in models.items()}
        damages = [CLEAN, *self._tested()]
        groups = {damage: [float(means[name][damage]) for name in models] for damage in damages}
        rows = [
            {"name": name, "means": dict(means[name]), **vars(self._robustness(levels))}
            for name, levels in models.items()
        ]
        colors = {name: self.colors[name] for name in models}
        chart = draw_bars(f"{self.name}, your models: accuracy, mean over test levels, %", groups, colors)
        return {"rows": rows, "damages": damages, "chart": chart}

    def _summary(self) -> Chart | None:
        rows = list(self._answer())
        if not rows:
            return None
        groups = {words: [row[key] for row in rows] for key, words in _ACCURACIES.items()}
        title = f"{self.name}: accuracy of each way of training, %"
        return draw_bars(title, groups, self._bar_colors)

    def _impact(self, clean: float) -> Iterator[Chart]:
        """Draw figures 4, 6 and 8 of the paper."""
        authors = published.read_impact(self.study.dataset)
        for family in _FAMILIES:
            names = [name for name in self._tested() if PERTURBATIONS[name].family == family]
            series = []
            for color, name in enumerate(names):
                ours = self.levels[self.levels["perturbation"] == name].sort_values("level")
                series.append(Series(name, _to_points(ours), color))
                theirs = authors[(authors["kind"] == name) & authors["level"].isin(ours["level"])].sort_values("level")
                if self.is_published and len(theirs):
                    theirs = theirs.assign(mean=theirs["mean"] / 100, std=theirs["std"] / 100)
                    series.append(Series(f"{name}, authors", _to_points(theirs), color, is_dashed=True))
            if series:
                units = " / ".join(dict.fromkeys(PERTURBATIONS[name].unit_text for name in names))
                title = f"{self.name}, natural model under {family}: accuracy, %; dotted: clean images"
                yield draw_lines(title, units, series, reference=clean)

    def _galleries(self) -> Iterator[dict[str, Any]]:
        """Yield the pictured images with the natural model's predictions, clean and at every level, by family."""
        images, labels = read_examples(self.study, "test")
        n, classes = self.study.n_pictured, self.study.dataset.classes
        pictures = {(CLEAN, 0.0): images[:n]}
        for array in self.study.tested("impact"):
            pictures[array.variant.perturbation, array.variant.level] = array.opened().first(n)
        for family in _FAMILIES:
            shown = [key for key in pictures if key[0] != CLEAN and PERTURBATIONS[key[0]].family == family]
            rows = []
            for perturbation, level in [(CLEAN, 0.0), *shown] if shown else []:
                said = self.examples[self.examples["perturbation"].eq(perturbation) & self.examples["level"].eq(level)]
                cells = [
                    {
                        "picture": encode_image(image),
                        "predicted": classes[predicted],
                        "actual": classes[label],
                        "confidence": confidence,
                    }
                    for image, label, predicted, confidence in zip(
                        pictures[perturbation, level], labels[:n], said["predicted"], said["confidence"], strict=True
                    )
                ]
                rows.append({"name": explain_level(perturbation, level), "cells": cells})
            if rows:
                yield {"family": family, "rows": rows}

    def _strategies(self) -> Iterator[dict[str, Any]]:
        """Draw, by family, bars if every perturbation has one training level, else figures A.1 to C.3 of the paper."""
        trained = self.models[self.models["strategy"].isin(self.study.strategies)]
        for number, family in enumerate(_FAMILIES, start=1):
            of_family = [name for name in self.study.arrays if PERTURBATIONS[name].family == family]
            rows = trained[trained["trained"].isin(of_family)]
            if rows.empty:
                continue
            if rows.groupby("trained")["trained_level"].nunique().max() == 1:
                bars = self._bars(rows, family)
                charts: list[dict[str, Any]] = [{"chart": bars, "figure": None, "differences": None}] if bars else []
            else:
                charts = [
                    {
                        "chart": self._lines(rows[rows["strategy"] == strategy], strategy, name, family),
                        "figure": f"{_LETTERS[strategy]}.{number}"
                        if self.is_canonical and strategy in _LETTERS
                        else None,
                        "differences": self._distance(strategy, name) if self.is_published else None,
                    }
                    for strategy in self.study.strategies
                    for name in dict.fromkeys(rows["trained"])
                ]
            yield {"family": family, "charts": charts}

    def _bars(self, rows: pd.DataFrame, family: str) -> Chart | None:
        """Draw the accuracy of each strategy, at the levels of the perturbation trained on, beside its baseline.

        None if no such level was tested.
        """
        own = rows[rows["perturbation"] == rows["trained"]]
        shown = pd.concat([own, self.models[self.models["strategy"].isin(self.study.baselines.values())]])
        means = shown.groupby(["perturbation", "level", "strategy"])["mean"].mean()
        groups: dict[str, list[float | None]] = {}
        for key in dict.fromkeys(zip(own["perturbation"], own["level"], strict=True)):
            bars = [(*key, name) for name in self._bar_colors]
            groups[name_level(*key)] = [float(means[bar]) if bar in means.index else None for bar in bars]
        trained = zip(rows["trained"], rows["trained_level"], strict=True)
        levels = dict.fromkeys(name_level(*key) for key in trained)
        title = f"{self.name}, trained on {', '.join(levels)}: accuracy on {family}, %"
        return draw_bars(title, groups, self._bar_colors) if groups else None

    def _lines(self, rows: pd.DataFrame, strategy: str, trained: str, family: str) -> Chart:
        """Draw accuracy against training level, with a line for clean images and for each level of the family."""
        authors = published.read_strategies(self.study.dataset, strategy)
        rows = rows[rows["trained"] == trained]
        shown = [
            key
            for key in dict.fromkeys(zip(rows["perturbation"], rows["level"], strict=True))
            if key[0] == CLEAN or PERTURBATIONS[key[0]].family == family
        ]
        series = []
        for color, (perturbation, level) in enumerate(shown):
            one = rows[rows["perturbation"].eq(perturbation) & rows["level"].eq(level)].sort_values("trained_level")
            points = _to_points(one, "trained_level")
            series.append(Series(name_level(perturbation, level), points, color % N_COLORS))
            theirs = authors[
                authors["train_perturbation"].eq(trained)
                & authors["perturbation"].replace(NATURAL, CLEAN).eq(perturbation)
                & authors["level"].eq(level)
            ].sort_values("train_level")
            if self.is_published and len(theirs):
                points = _to_points(theirs, "train_level")
                series.append(
                    Series(f"{name_level(perturbation, level)}, authors", points, color % N_COLORS, is_dashed=True)
                )
        title = f"{self.name}, {strategy}, trained on {trained}: accuracy, %"
        return draw_lines(title, f"training level: {PERTURBATIONS[trained].unit_text}", series)

    def _distance(self, strategy: str, trained: str) -> dict[str, Any] | None:
        """Compute how far our values are from the authors'."""
        theirs = published.read_strategies(self.study.dataset, strategy)
        theirs = theirs.assign(perturbation=theirs["perturbation"].replace(NATURAL, CLEAN))
        rows = self.models[(self.models["strategy"] == strategy) & (self.models["trained"] == trained)]
        both = rows.merge(
            theirs.rename(columns={"train_perturbation": "trained", "train_level": "trained_level"}),
            on=["trained", "trained_level", "perturbation", "level"],
            suffixes=("", "_authors"),
        )
        if both.empty:
            return None
        difference = both["mean"] - both["mean_authors"]
        return {"n": len(both), "mean": difference.mean(), "largest": difference.abs().max()}

    def _best_and_worst(self) -> Iterator[dict[str, Any]]:
        """Yield, per family and strategy, the models with the highest and lowest mean accuracy on that family."""
        for family in _FAMILIES:
            of_family = [name for name, one in PERTURBATIONS.items() if one.family == family]
            own = self.models[self.models["perturbation"].isin(of_family)]
            for strategy, baseline in self._compared.items():
                rows = own[own["strategy"].eq(strategy) & own["trained"].isin(of_family)]
                if rows.empty:
                    continue
                means = rows.groupby(["trained", "trained_level"], sort=False)["mean"].mean()
                (best, worst) = (means.index[int(position)] for position in (means.argmax(), means.argmin()))
                yield {
                    "family": family,
                    "strategy": strategy,
                    "baseline": (own.loc[own["strategy"] == baseline, "mean"].mean(), baseline),
                    "best": (float(means.max()), name_level(*best)),
                    "worst": (float(means.min()), name_level(*worst)),
                }

    def _cross(self, strategy: str) -> dict[str, Any]:
        """Tabulate accuracy by the damage trained on (rows) and tested on (columns), mean over training levels.

        The first row is the baseline of the strategy.
        """
        baseline = self.study.baselines[strategy]
        rows = pd.concat([self.models[self.models["strategy"] == name] for name in (baseline, strategy)])
        columns = list(dict.fromkeys(zip(rows["perturbation"], rows["level"], strict=True)))
        table = []
        for trained, group in rows.groupby("trained", sort=False):
            means, seen = (group.groupby(["perturbation", "level"])[key] for key in ("mean", "seen"))
            values, own = means.mean(), seen.any()
            cells = [
                {"value": float(values[key]) if key in values.index else None, "own": bool(own.get(key, False))}
                for key in columns
            ]
            table.append({"trained": f"no damage ({baseline})" if trained == CLEAN else trained, "cells": cells})
        return {"columns": [name_level(*key) for key in columns], "rows": table}

    def _training(self) -> Iterator[dict[str, Any]]:
        """Yield how models were trained: a row for the natural models and for those of every strategy."""
        for strategy, jobs in {NATURAL: self.study.natural, **self.study.strategies}.items():
            if jobs:
                plan = jobs[0].plan
                shares = dict.fromkeys(f"{share:.3g}" for share in (plan.perturbed_share[0], plan.perturbed_share[-1]))
                yield {
                    "strategy": strategy,
                    "start": plan.repairs or (NATURAL if plan.starts_from_natural else None),
                    "share": " to ".join(shares),
                    "recipe": plan.recipe,
                    "standardize": f"as {plan.repairs}" if plan.repairs else plan.recipe.standardize,
                }

    def _variants(self, ablation: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for variant in self.variants[ablation]:
            yield variant, self.summaries["ablations"][layout.summary("ablations", self.name, ablation, variant)]

    def _ablation(self, ablation: str, variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return a row and bars for every variant, with the authors' values for Table I."""
        recipes = {job.key.label: job.plan.recipe for job in self.study.ablations[ablation]}
        rows: list[dict[str, Any]] = []
        for variant, numbers in variants.items():
            recipe = recipes[variant]
            rows.append({"variant": variant, "recipe": recipe, "authors": None, **numbers})
            network = recipe.network
            if self.is_published and isinstance(network, Network):
                table = published.read_components(self.study.dataset)
                same = table[
                    table["batch_norm"].eq(network.batch_norm)
                    & table["dropout"].eq(network.dropout > 0)
                    & table["activation"].eq(network.activation)
                ]
                rows[-1]["authors"] = float(same["test"].iloc[0]) / 100 if len(same) else None
        groups = {"clean": [row["clean_accuracy"] for row in rows]}
        groups |= {name: [row.get(f"{name}_accuracy") for row in rows] for name in self._tested()}
        colors = {
            name: self.colors[NATURAL if recipes[name] == self.recipe else f"{ablation} {name}"] for name in variants
        }
        title = f"{self.name}, {ablation}: accuracy, %"
        chart = draw_bars(title, groups, colors) if self._tested() else None
        return {"rows": rows, "chart": chart, "perturbations": self._tested()}

    def _confusion(self) -> dict[str, Any]:
        """Return the confusion matrices of the user's models and the natural one, and the classes that lose most."""
        by_model = [*((name, f"your model {name}") for name in self.external), (NATURAL, "natural model")]
        matrices = []
        for name, title in by_model:
            of_model = self.confusions[self.confusions["strategy"] == name]
            matrices.append(self._matrix(of_model[of_model["perturbation"] == CLEAN], f"{title}, clean images"))
            for perturbation, level in self.study.hardest.items():
                damage = explain_level(perturbation, level)
                matrices.append(self._matrix(of_model[of_model["perturbation"] == perturbation], f"{title}, {damage}"))
                best = self._best_on(perturbation)
                if name == NATURAL and best is not None:
                    matrices.append(self._matrix(best[1], f"best ({best[0]}), {damage}"))
        return {"matrices": matrices, "losses": {title: list(self._losses(name)) for name, title in by_model}}

    def _best_on(self, perturbation: str) -> tuple[str, pd.DataFrame] | None:
        """Return the model trained on this family that is best at its hardest level, in words, and its confusions."""
        confusions = self.confusions
        of_best = confusions["perturbation"].eq(perturbation) & confusions["strategy"].isin(self.study.strategies)
        if not of_best.any():
            return None
        best = confusions[of_best]
        first = best.iloc[0]
        return f"{first['strategy']}, trained on {name_level(*split_label(str(first['label'])))}", best

    def _losses(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the classes in which a model loses most recall, at every perturbation's hardest level."""
        classes = self.study.dataset.classes
        of_model = self.confusions[self.confusions["strategy"] == name]
        before = of_model[of_model["perturbation"] == CLEAN]
        for perturbation, level in self.study.hardest.items():
            best = self._best_on(perturbation)
            for loss in find_losses(before, of_model[of_model["perturbation"] == perturbation]):
                yield {
                    "damage": explain_level(perturbation, level),
                    "label": classes[loss.label],
                    "before": loss.before,
                    "after": loss.after,
                    "taken_for": classes[loss.taken_for],
                    "best": None if best is None else recall_by_class(best[1])[loss.label],
                    "model": None if best is None else best[0],
                }

    def _matrix(self, confusions: pd.DataFrame, title: str) -> dict[str, Any]:
        """Return a confusion matrix or, if there are too many classes, the pairs that are confused most often."""
        classes = self.study.dataset.classes
        if len(classes) > _MAX_MATRIX:
            wrong = confusions[confusions["actual"] != confusions["predicted"]]
            most = wrong.sort_values("n_examples", ascending=False, kind="stable").head(_N_PAIRS)
            pairs = zip(most["actual"], most["predicted"], most["n_examples"], strict=True)
            return {
                "title": title,
                "pairs": [(classes[actual], classes[predicted], n) for actual, predicted, n in pairs],
            }
        counts = np.zeros((len(classes), len(classes)))
        counts[confusions["actual"], confusions["predicted"]] = confusions["n_examples"]
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        return {"title": title, "classes": classes, "rows": shares.tolist()}


def _assign_colors(params: Params) -> dict[str, int]:
    """Assign every model in bar charts a colour, the same on the whole page; the natural model is grey."""
    variants = [f"{ablation} {name}" for ablation, of_it in params.ablations.items() for name in of_it]
    return assign_colors([NATURAL, *params.strategies, *params.models, *variants])


def _aggregate_models(cells: pd.DataFrame) -> pd.DataFrame:
    """Compute mean and standard deviation of accuracy over trials and seeds, for every kind of model and level.

    Returns:
        Columns strategy, label, seen, perturbation, level, mean, std (ddof 0), and trained and trained_level: what the
        models were trained on, `clean` and 0 for the natural ones and the user's.
    """
    accuracy = cells.assign(accuracy=cells["n_correct"] / cells["n_examples"])
    groups = accuracy.groupby(["strategy", "label", "seen", "perturbation", "level"], sort=False)["accuracy"]
    table = pd.DataFrame({"mean": groups.mean(), "std": groups.std(ddof=0)}).reset_index()
    trained = [(CLEAN, 0.0) if label == CLEAN else split_label(label) for label in table["label"]]
    return table.assign(trained=[name for name, _ in trained], trained_level=[level for _, level in trained])


def _to_points(table: pd.DataFrame, x: str = "level") -> list[Point]:
    columns = (table[name].to_numpy(float).tolist() for name in (x, "mean", "std"))
    return [Point(*values) for values in zip(*columns, strict=True)]
