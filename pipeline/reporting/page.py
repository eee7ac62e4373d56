"""The study on one page: every number from a metric file of this run, every picture inside the page."""

import base64
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from pipeline.data.datasets import Dataset
from pipeline.data.seeding import level_name
from pipeline.evaluation import results
from pipeline.evaluation.metrics import (
    NATURAL,
    Comparison,
    ModelName,
    aggregate_trials,
    compare_strategies,
    needed_accuracy,
    recall_by_class,
    summarize,
    summarize_ablation,
    summarize_strategy,
)
from pipeline.perturbations import PERTURBATIONS
from pipeline.recipes.recipe import Network
from pipeline.reporting import charts, published
from pipeline.reporting.plotting import Figure, save_figure
from pipeline.runtime import layout
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import read_file, replacing_folder
from pipeline.runtime.stopping import signals_delayed
from pipeline.runtime.workers import worker_pool
from pipeline.study.params import Params, Subset, changed_keys, read

_DPI = 150
# Many times the largest figure that params ask for.
_MAX_PICTURE_BYTES = 2**28
# Classes shown for each level.
_N_LOSSES = 3
# The letters of the paper's figures in its appendix.
_LETTERS = {"constant": "A", "incremental": "B", "transfer": "C"}
_FAMILIES = tuple(dict.fromkeys(perturbation.family for perturbation in PERTURBATIONS.values()))
# Values that do not change what is measured.
_NO_SETTINGS = ("device", "prepare", "impact.n_examples", "impact.batch_size", "evaluate.batch_size")
_ACCURACIES = {
    "clean_accuracy": "clean",
    "robust_accuracy": "robust",
    "worst_accuracy": "worst",
    "cross_accuracy": "cross",
}


@dataclass(frozen=True)
class Picture:
    """A PNG inside the page.

    Attributes:
        data: As a data address.
        alt: What it shows, in words.
        width: Pixels.
        height: Pixels.
    """

    data: str
    alt: str
    width: int
    height: int


class Album:
    """Draws figures into a folder and hands them to the page."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def draw(self, name: str, figure: Figure, alt: str) -> Picture:
        """Save a figure as `name`.png and return it."""
        path = self._folder / f"{name}.png"
        save_figure(figure, path, _DPI)
        return read_picture(path, alt, "python -m pipeline report")


def read_picture(path: Path, alt: str, made_by: str) -> Picture:
    """A PNG file as a picture.

    Raises:
        PipelineError: It is missing, no PNG, or cannot be read.
    """
    try:
        content = read_file(path, _MAX_PICTURE_BYTES)
        signature, width, height = struct.unpack(">12x4sII", content[:24])
    except FileNotFoundError:
        raise PipelineError(f"{path}: no such file; make it with `{made_by}`") from None
    except struct.error:
        raise PipelineError(f"{path}: no PNG; make it again with `{made_by}`") from None
    if signature != b"IHDR":
        raise PipelineError(f"{path}: no PNG; make it again with `{made_by}`")
    return Picture(f"data:image/png;base64,{base64.b64encode(content).decode()}", alt, width, height)


def write_report(params: Params, params_path: Path, folder: Path, n_workers: int) -> int:
    """Write index.html and its figures into `folder`, which is replaced as a whole; how many figures it drew.

    Args:
        params: The study.
        params_path: Where it was read from.
        folder: Where the page goes.
        n_workers: Processes that draw, each the figures of a data set.

    Raises:
        PipelineError: A metric file or picture is missing, damaged, or made with other params.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "percent": _percent,
        "points": _points,
        "level": level_name,
        "counted": lambda values, what: _counted(len(values), what),
        "zip": zip,
    }
    template = environment.from_string(
        resources.files("pipeline.reporting").joinpath("page.html.jinja").read_text("utf-8")
    )
    with replacing_folder(folder) as partial:
        album = Album(partial)
        studies = [_Study(params, params.dataset(name), album) for name in params.datasets]
        differences = _differences(params_path)
        with worker_pool(min(n_workers, len(studies)), uses_cuda=False) as pool:
            with signals_delayed("SIGINT", "SIGHUP"):  # a terminal sends them to the workers too
                contexts = [pool.submit(study.context) for study in studies]
            described = [context.result() for context in contexts]
        page = template.render(
            studies=described,
            params=params,
            letters=_LETTERS,
            families=_FAMILIES,
            units={name: perturbation.unit for name, perturbation in PERTURBATIONS.items()},
            is_paper=not differences,
            differences=differences,
        )
        (partial / "index.html").write_text(page, encoding="utf-8", newline="\n")
        return len(list(partial.glob("*.png")))


def _percent(share: float | None, digits: int = 1) -> str:
    """An accuracy as percent; a dash where there is none."""
    return "–" if share is None or pd.isna(share) else f"{100 * share:.{digits}f}"


def _points(difference: float) -> str:
    """A difference of accuracies in points, with its sign."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def describe_natural(clean: float, robust: float | None, worst: float | None, subset: Subset, where: str) -> str:
    """How far the natural model falls, in a sentence.

    Args:
        clean: Accuracy on undamaged test images, in [0, 1].
        robust: Mean accuracy under damage; None where there was none.
        worst: The least.
        subset: How many images.
        where: Under which damage.
    """
    falls = "" if robust is None else f", on {_percent(robust)} % {where}, and on {_percent(worst)} % at worst"
    return (
        f"The natural model, trained on {_counted(subset.n_train, 'undamaged image')}, is right on {_percent(clean)} % "
        f"of {_counted(subset.n_test, 'undamaged test image')}{falls}."
    )


def describe_verdict(comparisons: Sequence[Comparison], clean: float, n_classes: int) -> list[str]:
    """Whether training against damage beats doing nothing, and by how much, in sentences.

    Args:
        comparisons: From `compare_strategies`.
        clean: Clean accuracy of the natural model, in [0, 1].
        n_classes: Classes of the data set.
    """
    said = []
    if comparisons:
        best, *others = comparisons
        said = [_describe_best(best, is_only=not others)]
        also = [other.strategy for other in others if other.beats_natural]
        if also:
            said.append(f"{_listed(also)} {'beats' if len(also) == 1 else 'beat'} the natural model too.")
        cost = (
            f"{'loses' if best.clean_cost > 0 else 'gains'} {_size(best.clean_cost)}"
            if best.clean_cost
            else "is just as accurate"
        )
        said.append(f"On undamaged images {best.strategy} {cost}.")
        if best.mce is not None:
            said.append(f"Its relative error, in which every perturbation counts alike, is {best.mce:.2f}.")
    else:
        said.append("No model was trained against damage and tested on it.")
    needed = needed_accuracy(n_classes)
    if clean < needed:
        said.append(
            f"This natural model is too weak to conclude from: it is right on {_percent(clean)} % of undamaged images, "
            f"less than {_percent(needed)} %, two thirds of the way from guessing to no error."
        )
    return said


def _describe_best(best: Comparison, *, is_only: bool) -> str:
    who = best.strategy
    natural = f"the natural model's {_percent(best.baseline_robust_accuracy)} % on the same images"
    size = f"{_size(best.gain)} {'above' if best.gain > 0 else 'below'}" if best.gain else "as much as"
    found = f"{_percent(best.robust_accuracy)} % on the damage that its models were trained for, {size} {natural}"
    if best.beats_natural:
        return f"{who if is_only else f'The best strategy, {who},'} beats the natural model: {found}."
    found = f"{who if is_only else f'the best, {who},'} has {found}"
    if best.gain > 0:
        chance = f"with {_counted(best.n_examples, 'test image')} up to {_size(best.chance)} may be chance"
        return f"No strategy clearly beats the natural model here: {found}, and {chance}."
    return f"No strategy beats the natural model here: {found}."


def _listed(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])


@dataclass(frozen=True)
class Loss:
    """A class of which fewer images are classified correctly when they are damaged.

    Attributes:
        label: The class.
        before: Share of its undamaged images that are right, in [0, 1].
        after: The same of its damaged images.
        taken_for: The class that the wrong ones of these are most often taken for.
    """

    label: int
    before: float
    after: float
    taken_for: int


def find_losses(before: pd.DataFrame, after: pd.DataFrame) -> list[Loss]:
    """The classes that lose most, at most three.

    Args:
        before: Columns as the fields of `Confusion`, of one model on undamaged images.
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


def _size(difference: float) -> str:
    size = f"{100 * abs(difference):.1f}"
    return "less than 0.1 points" if float(size) == 0 else f"{size} points"


def _differences(params_path: Path) -> list[tuple[str, Any, Any]]:
    """What differs from profile `paper` and decides a number: (dotted key, there, here)."""
    paper = layout.PROFILES / "paper.yaml"
    changes = changed_keys(read(paper), read(params_path))
    return [change for change in changes if not change[0].startswith(_NO_SETTINGS)]


class _Study:
    """What the page says of one data set; reads all metric files and pictures before it draws anything."""

    def __init__(self, params: Params, dataset: Dataset, album: Album) -> None:
        self.params, self.dataset, self.album = params, dataset, album
        name, run = dataset.name, "python -m pipeline"
        self.cells, _ = results.read_impact(params, dataset)
        self.impact = results.read_summary(layout.impact_metrics(name), summarize(self.cells), f"{run} impact {name}")
        families = [family for family in _FAMILIES if any(PERTURBATIONS[p].family == family for p in self._tested())]
        self.pictures = {
            kind: [self._figure(f"{kind}_{family}", f"{what}, {family}") for family in families]
            for kind, what in (
                ("accuracy", "accuracy against level"),
                ("examples", "test images with the model's answers"),
                ("levels", "one image at every level"),
            )
        }
        self.models, self.numbers, self.authors = {}, {}, {}
        evaluated = {strategy: results.read_evaluation(params, dataset, strategy) for strategy in params.strategies}
        self.comparisons = compare_strategies(evaluated)
        for strategy, cells in evaluated.items():
            self.models[strategy] = charts.aggregate_models(cells)
            self.authors[strategy] = published.read_strategies(dataset, strategy)
            path = layout.evaluate_metrics(name, strategy)
            expected = summarize_strategy(cells)
            self.numbers[strategy] = results.read_summary(path, expected, f"{run} evaluate {name} {strategy}")
        self.ablations = {ablation: results.read_ablation(params, dataset, ablation) for ablation in params.ablations}
        self.variants = {
            ablation: {
                variant: results.read_summary(
                    layout.ablation_metrics(name, ablation) / f"{variant}.json",
                    expected,
                    f"{run} ablations {name} {ablation}",
                )
                for variant, expected in summarize_ablation(cells).items()
            }
            for ablation, cells in self.ablations.items()
        }
        self.confusions = results.read_confusions(params, dataset)

    def context(self) -> dict[str, Any]:
        """All that the template shows of this data set."""
        name = self.dataset.name
        return {
            "name": name,
            "subset": self.params.datasets[name],
            "impact": self.impact,
            "impact_rows": aggregate_trials(self.cells).to_dict("records"),
            **self.pictures,
            "natural": self._natural(),
            "verdict": describe_verdict(self.comparisons, self.impact["clean_accuracy"], len(self.dataset.classes)),
            "answer": list(self._answer()),
            "summary": self._summary(),
            "strategies": {strategy: list(self._strategy(strategy)) for strategy in self.params.strategies},
            "best_and_worst": list(self._best_and_worst()),
            "cross": {strategy: self._cross(strategy) for strategy in self.params.strategies},
            "ablations": {ablation: self._ablation(ablation) for ablation in self.params.ablations},
            "confusion": self._confusion(),
        }

    def _tested(self) -> list[str]:
        return [name for name in dict.fromkeys(self.cells["perturbation"]) if name != NATURAL]

    def _figure(self, name: str, what: str) -> Picture:
        """One of the pictures that stage figures has drawn."""
        path = layout.figures(self.dataset.name) / f"{name}.png"
        alt = f"{self.dataset.name}, natural model: {what}. The numbers are in the table of this section."
        return read_picture(path, alt, f"python -m pipeline figures {self.dataset.name}")

    def _natural(self) -> str:
        """The sentence about the natural model; of the images of the table below it, where there are any."""
        numbers, subset = self.impact, self.params.datasets[self.dataset.name]
        clean = numbers["clean_accuracy"]
        for compared in self.comparisons[:1]:
            worst = self.numbers[compared.strategy]["baseline_worst_accuracy"]
            where = "on average over the damage that the strategies train for"
            return describe_natural(clean, compared.baseline_robust_accuracy, worst, subset, where)
        where = "on average over all damage of the next section"
        return describe_natural(clean, numbers.get("robust_accuracy"), numbers.get("worst_accuracy"), subset, where)

    def _answer(self) -> Iterator[dict[str, Any]]:
        """A row per strategy, the natural model first."""
        compared = {comparison.strategy: comparison for comparison in self.comparisons}
        for number, (strategy, numbers) in enumerate(self.numbers.items()):
            if number == 0:
                natural = {key: numbers.get(f"baseline_{key}") for key in _ACCURACIES}
                mce = 1.0 if "mce" in numbers else None
                yield {"strategy": NATURAL, **natural, "mce": mce, "compared": None}
            row = {key: numbers.get(key) for key in (*_ACCURACIES, "mce")}
            yield {"strategy": strategy, **row, "compared": compared.get(strategy)}

    def _summary(self) -> Picture | None:
        rows = list(self._answer())
        if not rows:
            return None
        table = pd.DataFrame(rows).set_index("strategy")[list(_ACCURACIES)].astype(float).rename(columns=_ACCURACIES)
        said = "; ".join(
            f"{row['strategy']} {_percent(row['clean_accuracy'])} % clean, {_percent(row['robust_accuracy'])} % robust"
            for row in rows
        )
        figure = charts.draw_summary(table, self.dataset)
        return self.album.draw(f"summary_{self.dataset.name}", figure, f"Bars for {self.dataset.name}: {said}.")

    def _strategy(self, strategy: str) -> Iterator[dict[str, Any]]:
        """Figures A.1 to C.3, this data set's column, each with how far the authors' values are from ours."""
        models = self.models[strategy][self.models[strategy]["strategy"] == strategy]
        authors = self.authors[strategy]
        key = ["train_perturbation", "train_level", "perturbation", "level"]
        matched = models.merge(authors, on=key, suffixes=("", "_authors"))
        for number, family in enumerate(_FAMILIES, start=1):
            of_family = [name for name, one in PERTURBATIONS.items() if one.family == family]
            if not models["train_perturbation"].isin(of_family).any():
                continue
            rows = matched[matched["train_perturbation"].isin(of_family)]
            difference = rows["mean"] - rows["mean_authors"]
            own = models[models["train_perturbation"].isin(of_family) & models["perturbation"].isin(of_family)]
            picture = self.album.draw(
                f"{strategy}_{family}_{self.dataset.name}",
                charts.draw_strategy(models, authors, self.dataset, strategy, family),
                f"{self.dataset.name}, {strategy}, {family}: accuracy against training level; ours between "
                f"{_percent(own['mean'].min())} and {_percent(own['mean'].max())} % on {family}.",
            )
            yield {
                "family": family,
                "figure": f"{_LETTERS[strategy]}.{number}" if strategy in _LETTERS else None,
                "picture": picture,
                "n_matched": len(rows),
                "mean_difference": difference.mean() if len(rows) else None,
                "mean_absolute_difference": difference.abs().mean() if len(rows) else None,
                "max_absolute_difference": difference.abs().max() if len(rows) else None,
            }

    def _best_and_worst(self) -> Iterator[dict[str, Any]]:
        """Per family and strategy the models with the highest and lowest mean accuracy on that family."""
        for family in _FAMILIES:
            of_family = [name for name, one in PERTURBATIONS.items() if one.family == family]
            for strategy, models in self.models.items():
                own = models[models["perturbation"].isin(of_family)]
                natural = own.loc[own["strategy"] == NATURAL, "mean"].mean()
                own = own[own["train_perturbation"].isin(of_family)]
                if own.empty:
                    continue
                ours = own.groupby(["train_perturbation", "train_level"], sort=False)["mean"].mean()
                authors = self.authors[strategy]
                authors = authors[
                    authors["train_perturbation"].isin(of_family) & authors["perturbation"].isin(of_family)
                ]
                theirs = authors.groupby(["train_perturbation", "train_level"], sort=False)["mean"].mean()
                yield {
                    "family": family,
                    "strategy": strategy,
                    "natural": natural,
                    "best": _extreme(ours, highest=True),
                    "worst": _extreme(ours, highest=False),
                    "authors_best": _extreme(theirs, highest=True),
                    "authors_worst": _extreme(theirs, highest=False),
                }

    def _cross(self, strategy: str) -> Picture:
        matrix = charts.cross_matrix(self.models[strategy])
        rows = "; ".join(
            f"trained on {trained_on}: "
            + ", ".join(f"{tested} {_percent(value, 0)}" for tested, value in zip(matrix.columns, values, strict=True))
            for trained_on, values in zip(matrix.index, matrix.to_numpy(float), strict=True)
        )
        figure = charts.draw_cross_matrix(matrix, self.dataset, strategy)
        return self.album.draw(
            f"cross_{strategy}_{self.dataset.name}", figure, f"{self.dataset.name}, {strategy}, accuracy in %. {rows}."
        )

    def _ablation(self, ablation: str) -> dict[str, Any]:
        """The figure, and a row per variant; for Table I with the authors' values."""
        name = self.dataset.name
        cells = self.ablations[ablation]
        recipes = self.params.ablation(ablation, name)
        rows: list[dict[str, Any]] = []
        for variant, recipe in recipes.items():
            rows.append({"variant": variant, "recipe": recipe, "authors": None, **self.variants[ablation][variant]})
            network = recipe.network
            if ablation == "components" and name == "cifar10" and isinstance(network, Network):
                table = published.read_components()
                same = table[
                    table["batch_norm"].eq(network.batch_norm)
                    & table["dropout"].eq(network.dropout > 0)
                    & table["activation"].eq(network.activation)
                ]
                rows[-1]["authors"] = float(same["test"].iloc[0]) / 100 if len(same) else None
        tested = {variant: cells[cells["variant"].eq(variant) & cells["split"].eq("test")] for variant in recipes}
        said = "; ".join(
            f"{row['variant']} {_percent(row['clean_accuracy'])} % clean, "
            f"{_percent(row.get('robust_accuracy'))} % robust"
            for row in rows
        )
        picture = None
        if self._tested():
            figure = charts.draw_ablation(tested, self.dataset, ablation)
            picture = self.album.draw(f"{ablation}_{name}", figure, f"{name}, {ablation}: {said}.")
        return {"rows": rows, "picture": picture, "perturbations": self._tested()}

    def _confusion(self) -> dict[str, Any]:
        """Pictures of the matrices, and the classes that lose most."""
        confusions, classes = self.confusions, self.dataset.classes
        is_natural = confusions["strategy"] == NATURAL
        before = confusions[is_natural & confusions["perturbation"].eq(NATURAL)]
        groups = [[self._matrix("natural_natural", before, "natural model, natural images")]]
        losses = []
        for perturbation, (level,) in results.hardest_levels(self.params).items():
            tested = confusions[confusions["perturbation"] == perturbation]
            variant = charts.name_variant(perturbation, level)
            natural, best = tested[tested["strategy"] == NATURAL], tested[tested["strategy"] != NATURAL]
            groups.append([self._matrix(f"{perturbation}_natural", natural, f"natural model, {variant}")])
            recall_best = recall_by_class(best) if len(best) else None
            model = None
            if len(best):
                first = best.iloc[0]
                name = ModelName(str(first["strategy"]), str(first["train_perturbation"]), float(first["train_level"]))
                model = f"{name.strategy}, trained on {name.trained_on}"
                groups[-1].append(self._matrix(f"{perturbation}_best", best, f"best ({model}), {variant}"))
            losses += [
                {
                    "variant": variant,
                    "label": classes[loss.label],
                    "before": loss.before,
                    "after": loss.after,
                    "taken_for": classes[loss.taken_for],
                    "best": None if recall_best is None else recall_best[loss.label],
                    "model": model,
                }
                for loss in find_losses(before, natural)
            ]
        return {"groups": groups, "losses": losses}

    def _matrix(self, name: str, confusions: pd.DataFrame, title: str) -> Picture:
        recall = recall_by_class(confusions)
        said = ", ".join(
            f"{label} {_percent(share, 0)}" for label, share in zip(self.dataset.classes, recall, strict=True)
        )
        return self.album.draw(
            f"confusion_{self.dataset.name}_{name}",
            charts.draw_confusion(confusions, self.dataset.classes, title),
            f"Confusion matrix, {self.dataset.name}, {title}. Percent of each class that is right: {said}.",
        )


def _extreme(means: "pd.Series[float]", *, highest: bool) -> dict[str, Any] | None:
    """The model with the highest or lowest value: how it was trained, and the value."""
    if means.empty:
        return None
    position = int(means.argmax() if highest else means.argmin())
    perturbation, level = means.index.tolist()[position]
    return {"model": charts.name_variant(perturbation, level), "mean": float(means.iloc[position])}
