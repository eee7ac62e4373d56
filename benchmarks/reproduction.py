"""Makes the tables of docs/reproduction.md and other pages from the cells under results/.

python -m benchmarks.reproduction collect NAME DATASET   # after dvc repro: keep its cells as results/NAME-DATASET/
python -m benchmarks.reproduction collect NAME DATASET --stage impact   # only those of `dvc repro impact@DATASET`
python -m benchmarks.reproduction write                  # put every table into its page
"""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch

from benchmarks.claims import (
    PIXELS,
    STRATEGIES,
    Accuracies,
    authors,
    authors_strategies,
    list_claims,
    measured,
    ours,
)
from pipeline.data.datasets import DATASETS
from pipeline.data.seeding import level_name
from pipeline.evaluation import results
from pipeline.evaluation.metrics import aggregate_trials, of_strategy, summarize, summarize_strategy, to_csv
from pipeline.models.devices import select_device, select_precision
from pipeline.perturbations import PERTURBATIONS
from pipeline.perturbations.variants import split_label
from pipeline.recipes.plan import CLEAN, NATURAL
from pipeline.reporting import published
from pipeline.runtime import layout
from pipeline.runtime.files import read_file, write_text
from pipeline.study.params import load
from pipeline.study.planning import MEASURING, Study, plan_study
from pipeline.study.reading import MAX_BYTES

ROOT = Path(__file__).parents[1]
# Stages that have learning curves.
CURVES = ("train", "strategies")
RESULTS = ROOT / "results"
# Results that stand beside others. README: data set → those of natural models, and of strategies; then the same seed on
# another processor; another network than the paper's.
_HALVES = {"mnist": ("seeds-mnist", "paper-mnist"), "cifar10": ("paper-cifar10", "paper-cifar10")}
_SECOND_RUNS = {"paper-cifar10": "trial-cifar10"}
_OTHER_NETWORK = {"cifar10": "fast-cifar10"}
PAGES = tuple(
    ROOT / page for page in ("docs/reproduction.md", "docs/claims.md", "docs/beyond-the-paper.md", "README.md")
)
_BLOCK = re.compile(r"(<!-- table: ([a-z-]+) of ([a-z0-9-]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


@click.group()
def main() -> None:
    """Keep the results of a study in the repository, and make the page from them."""


@main.command()
@click.argument("name")
@click.argument("dataset")
@click.option("--stage", "stages", multiple=True, type=click.Choice(CURVES + MEASURING), help="Only these; else all.")
@click.option("--seconds", multiple=True, metavar="STAGE=N", help="What a stage took on all cores; repeat it.")
def collect(name: str, dataset: str, stages: tuple[str, ...], seconds: tuple[str, ...]) -> None:
    """Copy params.yaml, cells and learning curves of DATASET, checked against params, to results/NAME-DATASET/."""
    study, folder = plan_study(load(), dataset), RESULTS / f"{name}-{dataset}"
    stages = stages or CURVES + MEASURING
    tables = {stage: results.read_cells(study, stage) for stage in stages if stage in MEASURING}
    tables |= {f"curves-{stage}": results.read_curves(study, stage) for stage in stages if stage in CURVES}
    took = {stage: float(n) for stage, _, n in (part.partition("=") for part in seconds)}
    keep(folder, study, tables, took)
    click.echo(f"{folder.relative_to(ROOT)}: {sum(map(len, tables.values())):,} rows")


def keep(folder: Path, study: Study, tables: Mapping[str, pd.DataFrame], seconds: Mapping[str, float]) -> None:
    """Write tables to a folder of results, with params.yaml and the machine that they were measured on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_text(folder / f"{name}.csv", to_csv(table))
    write_text(folder / "params.yaml", read_file(layout.PARAMS, MAX_BYTES).decode())
    threads = {"train": torch.get_num_threads(), "strategies": 1, "ablations": 1}
    facts = {**describe_machine(study), "threads": threads, "seconds": seconds}
    write_text(folder / "machine.json", json.dumps(facts, indent=2) + "\n")


def describe_machine(study: Study) -> dict[str, Any]:
    """Describe what determines a study's numbers besides params.yaml: machine, versions, this project's commit."""
    device = select_device(study.device)
    git = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "device": str(device),
        "precision": str(select_precision(study.precision, device)).removeprefix("torch."),
        "python": platform.python_version(),
        **{library: importlib.metadata.version(library) for library in ("torch", "numpy", "opencv-python-headless")},
        "commit": subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip(),
    }


@main.command()
def write() -> None:
    """Put every table into its page: those of docs that have some, and README.md."""
    for page in PAGES:
        write_text(page, render(page.read_text(encoding="utf-8")))


def render(page: str) -> str:
    """Return the page with every table made again from results/."""
    return _BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]](found[3])}{found[4]}", page)


@cache
def _cells(name: str, stage: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / name / f"{stage}.csv")


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def machine(name: str) -> str:
    """Where and how a study ran."""
    if (RESULTS / name / "models.csv").exists():  # of a campaign
        models = pd.read_csv(RESULTS / name / "models.csv", dtype={"commit": str})
        facts = ["processor", "capability", "cores", "device", "precision", "torch"]
        lines = [
            f"{len(rows)} model{'s'[: len(rows) - 1]}: {of[0]} ({of[1]}), {of[2]} cores, {of[3]}, {of[4]}, "
            f"torch {of[5]}, commit {', '.join(sorted(set(rows['commit'])))}.\n"
            for of, rows in models.groupby(facts)
        ]
        return "".join(lines)
    facts = json.loads((RESULTS / name / "machine.json").read_text(encoding="utf-8"))
    seeds = sorted(_cells(name, "impact")["seed"].unique())
    shown = f"Seed {seeds[0]}" if len(seeds) == 1 else f"Seeds {seeds[0]} to {seeds[-1]}"
    stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in facts["seconds"].items())
    return (
        f"{shown}; {facts['processor']} ({facts['capability']}), {facts['cores']} cores, {facts['device']}, "
        f"{facts['precision']}, torch {facts['torch']}, commit {facts['commit']}"
        f"{f'; seconds on all cores: {stages}' if stages else ''}.\n"
    )


def impact(name: str) -> str:
    """Every cell of the impact study beside the authors' value, and beside that of a second run."""
    cells, theirs = _cells(name, "impact"), authors(DATASETS[name.split("-")[1]])
    second = ours(RESULTS / _SECOND_RUNS[name]) if name in _SECOND_RUNS else None
    by_seed = pd.concat(aggregate_trials(rows).assign(seed=seed) for seed, rows in cells.groupby("seed"))
    n_seeds, n_trials, rows = cells["seed"].nunique(), cells["trial"].nunique(), []
    for (perturbation, level), group in by_seed.groupby(["perturbation", "level"], sort=False):
        test = (str(perturbation), float(str(level)))
        of_authors = measured(partial(theirs.natural, *test))
        value, spread = 100 * group["mean"].mean(), 100 * group["mean"].std()
        distance = None if of_authors is None else value - of_authors
        row = [CLEAN if test[0] == CLEAN else f"{test[0]} {level_name(test[1])}"]
        row += ["" if of_authors is None else f"{of_authors:.2f}", f"{value:.2f}"]
        row += [f"{second.natural(*test):.2f}"] if second else []
        row += [f"{spread:.2f}"] if n_seeds > 1 else []
        row += [f"{100 * group['std'].mean():.2f}"] if n_trials > 1 else []
        row += ["" if distance is None else f"{distance:+.2f}"]
        row += ["" if distance is None else f"{distance / spread:+.1f}"] if n_seeds > 1 else []
        rows.append(row)
    header = ["accuracy in %", "authors", f"ours, mean of {n_seeds} seeds" if n_seeds > 1 else "ours"]
    header += ["ours, second run"] if second else []
    header += ["sd over seeds"] if n_seeds > 1 else []
    header += ["sd over trials"] if n_trials > 1 else []
    header += ["ours - authors", "in sd over seeds"] if n_seeds > 1 else ["ours - authors"]
    return _table(header, rows)


def _ablation(name: str, ablation: str) -> str:
    cells = _cells(name, "ablations")
    cells = cells[(cells["strategy"] == ablation) & (cells["split"] == "test")]
    rows, columns = [], list(PERTURBATIONS)
    for variant, of_variant in cells.groupby("label", sort=False):
        numbers = summarize(of_variant)
        shown = ["clean_accuracy", *(f"{column}_accuracy" for column in columns), "robust_accuracy", "worst_accuracy"]
        rows.append([str(variant), *(_percent(numbers[key]) for key in shown)])
    return _table([ablation, "clean images", *columns, "all damage", "lowest cell"], rows)


def agreement(name: str) -> str:
    """How closely our cells agree with the authors', in words."""
    difference = pd.concat(_beside_authors(name))["difference"].abs()
    return (
        f"{len(difference)} cells: {100 * (difference <= 0.5).mean():.0f} % within half a point of accuracy, "
        f"{100 * (difference <= 1).mean():.0f} % within one; the median distance is {difference.median():.2f} points, "
        f"the largest {difference.max():.1f}.\n"
    )


def labels(name: str) -> str:
    """Whether the cells can tell that the authors' pixel models labelled k were trained with k + 1 pixels."""
    theirs, own, distances = authors(DATASETS[name.split("-")[1]]), ours(RESULTS / name), []
    tests = [*((kind, 2.0) for kind in PIXELS), (CLEAN, 0.0)]
    for shift in (0, 1):
        pairs = [
            (theirs(strategy, f"{kind}-{k + 1}", *test), own(strategy, f"{kind}-{k + shift}", *test))
            for strategy in STRATEGIES
            for kind in PIXELS
            for k in range(1, 11)
            for test in tests
        ]
        distances.append(sum(abs(one - other) for one, other in pairs) / len(pairs))
    return (
        f"Mean distance of the pixel models' cells: {distances[1]:.3f} points if label k stands for k + 1 pixels, "
        f"{distances[0]:.3f} if it stands for k.\n"
    )


def far(name: str) -> str:
    """The strategies' cells that are more than two points away from the authors'."""
    joined = pd.concat(_beside_authors(name))
    rows = [
        [
            f"{row['strategy']}, {row['label']}",
            f"{row['perturbation']} {level_name(row['level'])}",
            *(f"{row[key]:.1f}" for key in ("theirs", "mean")),
            f"{row['difference']:+.1f}",
        ]
        for row in joined[joined["difference"].abs() > 2].to_dict("records")
    ]
    return _table(["model", "tested on", "authors", "ours", "ours - authors"], rows)


def _beside_authors(name: str) -> list[pd.DataFrame]:
    cells, dataset = _cells(name, "evaluate"), DATASETS[name.split("-")[1]]
    cells = cells.assign(mean=100 * cells["n_correct"] / cells["n_examples"])
    tables = []
    for strategy in cells.loc[cells["strategy"] != NATURAL, "strategy"].unique():
        of_models = cells[cells["strategy"] == strategy].groupby(["label", "perturbation", "level"], as_index=False)
        ours = of_models["mean"].mean()
        theirs = authors_strategies(dataset, str(strategy)).rename(columns={"accuracy": "theirs"})
        columns = ["label", "perturbation", "level"]
        both = ours.merge(theirs[[*columns, "theirs"]], on=columns)
        trained = [split_label(label)[0] for label in both["label"]]
        tables.append(both.assign(strategy=strategy, trained=trained, difference=both["mean"] - both["theirs"]))
    return tables


def repair(name: str) -> str:
    """Every model on clean images and on its own damage, beside the authors' and beside the natural models."""
    natural = (authors(DATASETS[name.split("-")[1]]), ours(RESULTS / name))
    joined = pd.concat(_beside_authors(name))
    joined["is_damaged"], rows, names = joined["perturbation"] != CLEAN, [], joined["strategy"].unique()
    own = joined[~joined["is_damaged"] | (joined["trained"] == joined["perturbation"])]
    keys = ["label", "is_damaged", "trained", "perturbation", "level"]
    for key, group in own.sort_values(keys[:2], kind="stable").groupby(keys, sort=False):
        label, is_damaged, trained, perturbation, level = key
        test = (str(perturbation), float(str(level)))
        of_strategy = group.set_index("strategy")[["theirs", "mean"]].reindex(names)
        of_natural = [partial(of.natural, *test) if is_damaged else partial(of.clean, str(trained)) for of in natural]
        values = [measured(value) for value in of_natural]
        values += of_strategy.to_numpy().ravel().tolist()
        shown = ["" if value is None or pd.isna(value) else f"{value:.1f}" for value in values]
        rows.append([str(label), f"{test[0]} {level_name(test[1])}" if is_damaged else "clean images", *shown])
    columns = [f"{strategy}, {whose}" for strategy in (NATURAL, *names) for whose in ("authors", "ours")]
    return _table(["trained on", "tested on", *columns], rows)


def strategies(name: str) -> str:
    """Accuracies of every strategy, beside those of the natural model on the same images."""
    cells, rows = _cells(name, "evaluate"), []
    for strategy in cells.loc[cells["strategy"] != NATURAL, "strategy"].unique():
        numbers = summarize_strategy(of_strategy(cells, strategy))
        pairs = [(numbers.get(f"{key}_accuracy"), numbers.get(f"baseline_{key}_accuracy")) for key in _SHOWN]
        shown = [
            "" if own is None or natural is None else f"{_percent(own)} ({_percent(natural)})" for own, natural in pairs
        ]
        rows.append([strategy, *shown])
    return _table(["strategy (natural model)", *_SHOWN.values()], rows)


_SHOWN = {"clean": "clean images", "robust": "damage trained on", "worst": "lowest cell", "cross": "other damage"}


def cross(name: str) -> str:
    """Accuracy on every perturbation by the one trained on, mean over training and test levels."""
    cells = _cells(name, "evaluate")
    cells = cells.assign(
        accuracy=cells["n_correct"] / cells["n_examples"],
        trained=["nothing" if label == CLEAN else split_label(label)[0] for label in cells["label"]],
    )
    rows, columns = [], [CLEAN, *PERTURBATIONS]
    for (strategy, trained), group in cells.groupby(["strategy", "trained"], sort=False):
        levels = group.groupby(["label", "perturbation", "level"])["accuracy"].mean()
        means, seen = levels.groupby("perturbation").mean(), group.groupby("perturbation")["seen"].any()
        shown = [
            "" if c not in means else f"**{_percent(means[c])}**" if seen[c] else _percent(means[c]) for c in columns
        ]
        label = "nothing (natural)" if strategy == NATURAL else f"{trained}, {strategy}"
        rows.append([label, *shown])
    return _table(["trained on", *columns], rows)


_HARDEST = {f"five {name} pixels": (name, 5.0) for name in PIXELS}
_STRONGEST = {"noise, σ = 0.05": ("noise", 0.05), "blur, σ = 1 pixel": ("blur", 1.0)}


def headline(_profile: str) -> str:
    """Natural and repaired models on the hardest damage, beside the authors', for both data sets."""
    sources = []
    for dataset, (natural, trained) in _HALVES.items():
        sources += [(authors(DATASETS[dataset]),) * 2, (ours(RESULTS / natural), ours(RESULTS / trained))]
    two, rows = {"two hot pixels": ("hot", 2.0)}, []

    def add(words: str, shown: Iterable[Callable[[], float]]) -> None:
        rows.append([words, *("" if (value := measured(one)) is None else f"{value:.1f}" for one in shown)])

    add("clean images", [one.natural for one, _ in sources])
    for words, damage in (two | _HARDEST | _STRONGEST).items():
        add(words, [partial(one.natural, *damage) for one, _ in sources])
    for words, (name, level) in (two | _STRONGEST).items():
        best = [partial(_best_of_all, one, name, level) for _, one in sources]
        add(f"{words}, best training against it", best)
    header = ["accuracy in %", *(f"{dataset}, {whose}" for dataset in ("MNIST", "CIFAR-10") for whose in _WHOSE)]
    return _table(header, rows)


def _best_of_all(of: Accuracies, name: str, level: float) -> float:
    return max(of.on(strategy, name, name, level) for strategy in STRATEGIES)


_WHOSE = ("authors", "ours")
# How far two runs of the authors' script are apart on average, in points, where this is more than one: 1.13 standard
# deviations of a run, estimated from the two runs that they published; the larger end.
_RUN_TO_RUN = {("cifar10", "noise"): 1.7, ("cifar10", "blur"): 3.4}
_FIGURES = {"pixels": "4", "noise": "6", "blur": "8", "constant": "A", "incremental": "B", "transfer": "C"}


def impact_panels(name: str) -> str:
    """The panels of figures 4, 6 and 8, and how far the natural models' cells are from the authors'."""
    theirs = published.read_impact(DATASETS[name.split("-")[1]]).rename(columns={"kind": "perturbation"})
    ours_is = aggregate_trials(_cells(name, "impact"))[["perturbation", "level", "mean"]]
    ours_is = ours_is.assign(mean=100 * ours_is["mean"], strategy=NATURAL, trained=ours_is["perturbation"])
    columns = ["perturbation", "level"]
    theirs = theirs[[*columns, "mean"]].rename(columns={"mean": "theirs"})
    return _panels(name, ours_is.merge(theirs, on=columns), theirs["perturbation"].value_counts().to_dict())


def strategy_panels(name: str) -> str:
    """The panels of figures A, B and C, and how far the strategies' cells are from the authors'."""
    theirs = authors_strategies(DATASETS[name.split("-")[1]], STRATEGIES[0])
    return _panels(name, pd.concat(_beside_authors(name)), theirs["train_perturbation"].value_counts().to_dict())


def _panels(name: str, joined: pd.DataFrame, n_cells: Mapping[Any, int]) -> str:
    rows = []
    for (strategy, trained), panel in joined.groupby(["strategy", "trained"], sort=False):
        family = PERTURBATIONS[str(trained)].family
        difference = (panel["mean"] - panel["theirs"]).round(3)
        has_same_order = panel["mean"].corr(panel["theirs"], method="spearman") >= 0.9
        verdict = "shifted" if has_same_order else "not reproduced"
        tolerance = _RUN_TO_RUN.get((name.split("-")[1], family), 1)
        if difference.abs().mean() <= tolerance:
            verdict = "reproduced"
        is_whole = len(panel) == n_cells[trained]
        figure = _FIGURES[family if strategy == NATURAL else str(strategy)]
        numbers = [f"{difference.mean():+.2f}", f"{difference.abs().mean():.2f}", f"{difference.abs().max():.1f}"]
        numbers.append(f"{(difference.abs() > 2 * tolerance).sum()}")
        n_found = f"{len(panel)}" if is_whole else f"{len(panel)} of {n_cells[trained]}"
        rows.append([f"{figure}: {strategy}, {trained}", n_found, *numbers, verdict if is_whole else ""])
    header = ["figure: model, damage", "cells", "ours - authors", "mean distance", "largest", "far cells", "panel is"]
    return _table(header, rows)


def blur(name: str) -> str:
    """Natural models on images blurred in other ways than by the study, beside the study's and the authors'."""
    dataset = name.split("-")[1]
    theirs, own, cells = authors(DATASETS[dataset]), ours(RESULTS / f"paper-{dataset}"), _cells(name, "impact")
    accuracy = (100 * cells["n_correct"] / cells["n_examples"]).groupby(
        [cells["level"], cells["mixes_channels"], cells["values"]]
    )
    means, rows = accuracy.mean(), []
    for level in cells["level"].unique():
        others = [
            means[level, mixes, values] for mixes, values in ((True, "float"), (False, "float"), (False, "uint8"))
        ]
        shown = [theirs.natural("blur", level), own.natural("blur", level), *others]
        rows.append([f"blur {level_name(level)}", *(f"{value:.1f}" for value in shown)])
    header = ["tested on", "authors", "mixed, uint8 (the study)", "mixed, floating point"]
    return _table([*header, "not mixed, floating point", "not mixed, uint8"], rows)


def rounding(name: str) -> str:
    """Models trained and tested on images in floating point and in uint8, beside the authors'; mean ± sd over seeds."""
    cells, theirs, rows = _cells(name, "impact"), authors(DATASETS[name.split("-")[1]]), []
    cells = cells.assign(accuracy=100 * cells["n_correct"] / cells["n_examples"])
    keys = ["strategy", "label", "trained", "perturbation", "level"]
    for key, group in cells.groupby(keys, sort=False):
        strategy, label, trained, perturbation, level = map(str, key)
        published_is = measured(partial(theirs, strategy, label, perturbation, float(level)))
        of_tested = group.groupby("tested")["accuracy"].agg(["mean", "std"]).loc[["float", "uint8"]]
        row = [f"{strategy}, {label}, {_STORED[trained]}"]
        row += [CLEAN if perturbation == CLEAN else f"{perturbation} {level_name(float(level))}"]
        row += ["" if published_is is None else f"{published_is:.1f}"]
        rows.append(row + [f"{mean:.1f} ± {spread:.1f}" for mean, spread in of_tested.itertuples(index=False)])
    return _table(["model, images trained on", "tested on", "authors", "in floating point", "in uint8"], rows)


_STORED = {"float": "floating point", "uint8": "uint8"}


def claims(name: str) -> str:
    """The claims of the paper's text, on the authors' numbers, on a study's, and on those of another network."""
    sources, rows = _sources(name), []
    made, checked = list_claims(name.split("-")[1]), _check_claims(name)
    for claim, of_claim in zip(made, checked, strict=True):
        shown = ["" if found is None else f"{found[0]:.1f}, {'yes' if found[1] else '**no**'}" for found in of_claim]
        rows.append([f"{claim.section}: {claim.says}", claim.condition, *shown])
    return _table(["section: claim", "holds if", *sources], rows)


def summary(name: str) -> str:
    """How many claims hold by the authors' figures and by our models of their network, in words."""
    both = [of_claim[:2] for of_claim in _check_claims(name)]
    counts = [[found[1] for found in of_source if found] for of_source in zip(*both, strict=True)]
    hold = [f"{sum(holds)} of {len(holds)} by {whose}" for holds, whose in zip(counts, _sources(name), strict=False)]
    n_both = sum(all(found and not found[1] for found in of_claim) for of_claim in both)
    return f"Claims that hold: {', '.join(hold)}. {n_both} fail by both.\n"


def _sources(name: str) -> dict[str, Accuracies]:
    dataset = name.split("-")[1]
    sources = {"the authors' figures": authors(DATASETS[dataset]), "our models": ours(RESULTS / name)}
    if dataset in _OTHER_NETWORK:
        sources["our models of another network"] = ours(RESULTS / _OTHER_NETWORK[dataset])
    return sources


def _check_claims(name: str) -> list[list[tuple[float, bool] | None]]:
    sources = _sources(name).values()
    return [[claim.check(source) for source in sources] for claim in list_claims(name.split("-")[1])]


TABLES: Mapping[str, Callable[[str], str]] = {
    "machine": machine,
    "impact": impact,
    "standardization": lambda name: _ablation(name, "standardization"),
    "components": lambda name: _ablation(name, "components"),
    "agreement": agreement,
    "labels": labels,
    "far": far,
    "repair": repair,
    "strategies": strategies,
    "cross": cross,
    "headline": headline,
    "impact-panels": impact_panels,
    "strategy-panels": strategy_panels,
    "blur": blur,
    "rounding": rounding,
    "claims": claims,
    "summary": summary,
}


def _processor() -> Any:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    named = re.search(r"model name\s*: (.*)", text)
    return named[1] if named else platform.processor()


if __name__ == "__main__":
    main()
