"""Stages ablations and report on a whole tiny study, and the page in a real browser."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from pipeline.data.datasets import DATASETS
from pipeline.evaluation import metrics, results
from pipeline.evaluation.metrics import Comparison, Confusion
from pipeline.recipes.recipe import PaperRecipe
from pipeline.reporting import page, published
from pipeline.reporting.figures import N_COLORS, Point, Series, assign_colors, draw_bars, draw_lines, encode_image
from pipeline.reporting.verdict import (
    Robustness,
    compare_robustness,
    describe_ablations,
    describe_certainty,
    describe_repair,
    describe_robustness,
    describe_weakness,
    percent,
    points,
)
from pipeline.runtime import layout
from pipeline.study.params import load
from pipeline.study.planning import plan_study
from pipeline.training import work
from tests.conftest import MakeOnce, WriteParams, tree
from tests.test_params import REMOVED
from tests.test_stages import fail, succeed, with_params

N_TRAIN, N_TEST, TRIALS = 300, 100, 2
STRATEGIES = ("constant", "incremental", "transfer")
PAGE = layout.report() / "index.html"


@pytest.fixture
def reported(made_once: MakeOnce, write_params: WriteParams, in_process: None) -> Path:
    """The current folder, with the whole study of both data sets done."""

    def fill(values: dict[str, Any]) -> None:
        for subset in values["datasets"].values():
            subset.update(n_train=N_TRAIN, n_test=N_TEST)
        values["perturb"]["trials"] = TRIALS
        for block in (values["train"]["recipes"], values["strategies"]["transfer"]["recipes"]):
            for recipe in block.values():
                recipe["batch_size"] = 20
        values["ablations"]["beta"] = {"low": {"adam": {"beta1": 0.5}}}
        write_params(values)
        for dataset in values["datasets"]:
            for name in values["perturbations"]:
                succeed("perturb", dataset, name)
            for stage in ("train", "impact", "strategies", "evaluate", "ablations"):
                succeed(stage, dataset)
        succeed("report")

    return made_once(fill)


def report() -> str:
    """The page, made anew, with single spaces."""
    succeed("report")
    return " ".join(PAGE.read_text().split())


# Ablations.


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize(("ablation", "variant"), [("components", "full"), ("standardization", "pixel")])
def test_a_variant_that_changes_nothing_is_the_natural_model(
    reported: Path, dataset: str, ablation: str, variant: str
) -> None:
    cells = read(layout.cells("ablations", dataset))
    own = cells.query("strategy == @ablation and label == @variant and split == 'test'")
    columns = ["perturbation", "level", "trial", "n_correct", "n_examples"]
    assert own[columns].to_numpy().tolist() == read(layout.cells("impact", dataset))[columns].to_numpy().tolist()
    assert not (layout.ablation_models(dataset) / ablation / f"{variant}-seed1.safetensors").exists()


def test_every_other_variant_is_trained_by_its_own_recipe(reported: Path) -> None:
    recipe = load().train.recipes["mnist"]
    assert isinstance(recipe, PaperRecipe)
    for ablation, variant, changes in (
        ("components", "no_dropout", {"network": {"dropout": 0.0}}),
        ("components", "tanh", {"network": {"activation": "tanh"}}),
        ("standardization", "channel", {"recipe": {"standardize": "channel"}}),
        ("beta", "low", {"recipe": {"adam": {**recipe.adam.model_dump(), "beta1": 0.5}}}),
    ):
        described = json.loads((layout.ablation_models("mnist") / ablation / f"{variant}-seed1.json").read_text())
        natural = json.loads(layout.model("mnist", "natural", "clean", 1).with_suffix(".json").read_text())
        for block, values in changes.items():
            natural[block] |= values
        results = dict.fromkeys(("weights_sha256", "computed_in", "learning_curve", "sha256"))
        assert described | results == natural | results


def test_the_summary_of_a_variant_follows_from_its_cells(reported: Path) -> None:
    summary = json.loads(layout.summary("ablations", "mnist", "standardization", "channel").read_text())
    cells = read(layout.cells("ablations", "mnist")).query("strategy == 'standardization' and label == 'channel'")
    train = cells[cells["split"] == "train"]
    noise = cells.query("perturbation == 'noise'").groupby("level")["n_correct"]
    assert train["n_examples"].tolist() == [N_TRAIN]
    assert summary["train_accuracy"] == pytest.approx(train["n_correct"].sum() / N_TRAIN, abs=1e-6)
    assert (noise.size() == TRIALS).all()
    assert summary["noise_accuracy"] == pytest.approx(noise.mean().mean() / N_TEST, abs=1e-6)


def test_one_more_variant_costs_one_model(reported: Path) -> None:
    variant = {"standardize": "none", "network": {"activation": "tanh"}}
    with_params({"ablations.standardization.tanh": variant})(reported)
    with mock.patch.object(work, "train", side_effect=work.train) as train:
        succeed("ablations", "mnist")
    assert [call.args[0].key.label for call in train.call_args_list] == ["tanh"]


# Confusion.

KEY = ["strategy", "label", "perturbation", "level"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_confusions_count_every_image_of_every_trial_and_agree_with_the_cells(reported: Path, dataset: str) -> None:
    confusions, cells = read(layout.confusion(dataset)), read(layout.cells("evaluate", dataset))
    totals = confusions.groupby(KEY)["n_examples"].sum()
    assert len(totals) == 1 + 2 * 5  # clean images, and two models at five hardest levels
    n_trials = [1 if name in ("clean", "blur") else TRIALS for name in totals.index.get_level_values("perturbation")]
    assert totals.tolist() == [N_TEST * n for n in n_trials]
    right = confusions[confusions["actual"] == confusions["predicted"]].groupby(KEY)["n_examples"].sum()
    assert right.to_dict() == cells.groupby(KEY)["n_correct"].sum()[totals.index].to_dict()


def test_the_best_model_is_of_the_family_and_none_of_it_is_better(reported: Path) -> None:
    tested = read(layout.cells("evaluate", "mnist")).query("perturbation == 'noise' and level == 0.05")
    family = tested[tested["label"].str.startswith("noise-")]
    best = metrics.find_best(results.read_cells(plan_study(load(), "mnist"), "evaluate"), "noise", 0.05)
    assert best is not None
    n_correct = family.groupby(["strategy", "label"])["n_correct"].sum()
    assert n_correct[best.strategy, best.label] == n_correct.max()


# The authors' values.


def test_the_authors_pixel_labels_are_one_below_what_they_trained_with() -> None:
    table = published.read_strategies(DATASETS["mnist"], "constant")
    levels = {name: sorted(rows["train_level"].unique()) for name, rows in table.groupby("train_perturbation")}
    assert levels["hot"] == list(range(2, 12))
    assert levels["noise"] == [0.001, 0.01325, 0.0255, 0.03775, 0.05]
    total = sum(len(published.read_strategies(dataset, name)) for dataset in DATASETS.values() for name in STRATEGIES)
    assert total == 960


# The page.


def test_the_page_is_one_file_with_every_figure_and_needs_no_network(reported: Path) -> None:
    assert [path.name for path in layout.report().iterdir()] == ["index.html"]
    page = PAGE.read_text()
    charts = re.findall(r"<svg [^>]*>", page)
    assert len(charts) == 2 * (1 + 3 + 3 + 3)  # summary, impact and strategies by family, ablations
    assert all(re.search(r'role="img" aria-label="[^"]{31,}"', chart) for chart in charts)
    images = re.findall(r"<img[^>]*>", page)
    assert len(images) > 60
    assert all('src="data:image/png;base64,' in image and re.search(r'alt="[^"]{10,}"', image) for image in images)
    addresses = set(re.findall(r'(?:src|href)="((?!data:|#)[^"]*)"', page))
    assert addresses == {"https://arxiv.org/abs/2004.03452"}
    assert "url(" not in page
    assert "<script" not in page


def test_the_numbers_are_those_of_the_metric_files(reported: Path) -> None:
    page = " ".join(PAGE.read_text().split())
    for dataset in DATASETS:
        for strategy in STRATEGIES:
            numbers = json.loads(layout.summary("evaluate", dataset, strategy).read_text())
            # There is none where the natural model makes no error at all.
            error = f"{numbers['relative_error']:.2f}" if "relative_error" in numbers else "–"
            gain = 100 * (numbers["robust_accuracy"] - numbers["baseline_robust_accuracy"])
            for name, prefix, values in (
                ("natural", "baseline_", ("–", "–" if error == "–" else "1.00")),
                (strategy, "", (rf"{gain:+.1f}".replace("-", "−"), error)),
            ):
                clean, robust, worst, cross = (
                    f"{100 * numbers[f'{prefix}{key}_accuracy']:.1f}" for key in ("clean", "robust", "worst", "cross")
                )
                row = "</td><td>".join([name, clean, robust, re.escape(values[0]) + r"[^<]*", worst, cross, values[1]])
                assert re.search(f"<tr><td>{row}</td></tr>", page), row
        impact = json.loads(layout.summary("impact", dataset).read_text())
        given = read(layout.confusion(dataset)).query("strategy == 'natural' and perturbation == 'clean'")
        guessing = float(given.groupby("actual")["n_examples"].sum().max() / N_TEST)
        is_warned = f"(train.recipes.{dataset}.epochs, now " in page
        assert is_warned is metrics.is_weak(impact["clean_accuracy"], N_TEST, guessing)
        shown = (f"{100 * impact[f'{name}_accuracy']:.1f} %" for name in ("clean", "robust"))
        assert "<dd>{} right on clean images, {} under damage ".format(*shown) in page


def test_the_authors_numbers_stand_only_beside_their_settings(reported: Path) -> None:
    allowed = r"\(the authors' way\)|the authors' numbers are left out|compare with the authors"
    assert "authors" not in re.sub(allowed, "", PAGE.read_text())
    shutil.copy(layout.PARAMS, layout.PROFILES / "paper.yaml")
    said = report()
    assert "Not the paper's settings" not in said
    assert "The authors' values are those behind" in said
    # The device decides no number.
    with_params({"device": "auto", "train.recipes.cifar10.drop_last": False})(reported)
    assert report().count("Not the paper's settings") == 1
    differences = [("train.recipes.cifar10.drop_last", True, False)]
    assert page.is_as_published("mnist", differences)
    assert not page.is_as_published("cifar10", differences)
    of_others = ("datasets.noise.n_test", "train.recipes.noise.epochs", "strategies.transfer.recipes.noise.epochs")
    theirs = ("models.mine.path", "strategies.repair.share")
    assert page.is_as_published("mnist", [(key, None, 1) for key in (*of_others, *theirs)])
    for key in ("perturbations.noise.test_levels", "datasets.mnist.n_test", "strategies.incremental.start"):
        assert not page.is_as_published("mnist", [(key, None, 1)])


def test_what_files_say_is_text_on_the_page(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, image = "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'
    mnist = DATASETS["mnist"]
    monkeypatch.setitem(DATASETS, "mnist", replace(mnist, classes=(script, image, *mnist.classes[2:])))
    paper = layout.PROFILES / "paper.yaml"
    paper.write_text(f"{paper.read_text()}\n'{script}': 1\nmine: '{image}'\n")
    page = report()
    assert page.count("&lt;script&gt;alert(1)") > 2
    assert page.count("&lt;img src=x onerror") > 2
    assert "<script" not in page
    assert "<img src=x" not in page


@pytest.mark.parametrize(
    ("path", "command"),
    [
        (layout.cells("impact", "mnist"), "impact mnist"),
        (layout.examples("mnist"), "impact mnist"),
        (layout.cells("evaluate", "cifar10"), "evaluate cifar10"),
        (layout.cells("ablations", "mnist"), "ablations mnist"),
        (layout.confusion("mnist"), "evaluate mnist"),
    ],
)
@pytest.mark.parametrize("length", [None, 0, 20], ids=["missing", "empty", "cut"])
def test_a_missing_or_damaged_metric_file_is_one_clear_error(
    reported: Path, path: Path, command: str, length: int | None
) -> None:
    before = tree(layout.report())
    path.unlink() if length is None else path.write_bytes(path.read_bytes()[:length])
    said = fail("report")
    assert said.startswith(f"Error: {path}: ")
    assert f"`python -m pipeline {command}`" in said
    assert said.count("\n") == 1
    assert tree(layout.report()) == before


@pytest.mark.parametrize("block", ["strategies", "ablations"])
def test_a_study_without_strategies_or_ablations_has_a_page_too(reported: Path, block: str) -> None:
    with_params({block: {}})(reported)
    for dataset in DATASETS:
        succeed("evaluate" if block == "strategies" else "ablations", dataset)
    page = report()
    assert "How this was made" in page
    assert all(f'id="{name}"' in page for name in re.findall('href="#([^"]*)"', page))
    if block == "strategies":
        assert page.count("Not tried: it was not trained on damage and tested on it.") == len(DATASETS)


def test_one_of_each_is_in_the_singular(reported: Path) -> None:
    shutil.copy(layout.PARAMS, layout.PROFILES / "paper.yaml")
    with_params({"strategies": {"constant": {}}})(reported)
    for dataset in DATASETS:
        succeed("evaluate", dataset)
    assert "; 1 way of training against it" in report()
    with_params({"datasets.cifar10": REMOVED})(reported)
    page = report()
    assert "<p>mnist under blur, dead" in page
    assert re.findall(r"[^\d.,]1 (values|images|points|ways|classes|models|trials)\b", page) == []


def test_with_several_seeds_the_gain_of_each_is_shown_and_their_spread_is_part_of_the_error(reported: Path) -> None:
    blocks = {"datasets.cifar10": REMOVED, "strategies": {"constant": {}}, "ablations": {"beta": {"low": {}}}}
    with_params({**blocks, "train.seeds": [2, 1]})(reported)
    for stage in ("train", "impact", "strategies", "evaluate", "ablations"):
        succeed(stage, "mnist")
    said = report()
    (compared,) = metrics.compare_strategies(read(layout.cells("evaluate", "mnist")))
    assert len(compared.gains) == 2
    alone = [metrics.compare_strategies(rows) for _, rows in read(layout.cells("evaluate", "mnist")).groupby("seed")]
    assert compared.gains == pytest.approx([alone[1][0].gain, alone[0][0].gain], abs=1e-6)  # in the order of params
    assert compared.chance > replace(compared, gains=()).chance
    gains = ", ".join(points(gain) for gain in compared.gains)
    assert f"<td>{points(compared.gain)} ± {percent(compared.chance)}</td><td>{gains}</td>" in said
    assert "Means over 2 training seeds, which vary besides: the ± of a difference includes that." in said
    assert "Another training seed may change more" not in said


# What it says.


def compare(strategy: str, robust: float, *, clean: float = 0.9) -> Comparison:
    """Beside a model that is right on 60 % of 2,000 damaged images."""
    return Comparison(strategy, 2000, clean, 0.9, robust, 0.6, 0.5, cross_accuracy=0.4, baseline_cross_accuracy=0.3)


BRINGS = (
    "its models, each on the family of damage that it was trained on, keep {} % instead of 60.0 % ({}). On other "
    "families they keep 40.0 % instead of 30.0 %."
)
GAINS = BRINGS.format("75.0", "+15.0 ± 2.9 points")
CHANCE = ", which may be chance"
UNCLEAR = f"0.0 ± 3.1 points{CHANCE}"
SAME = f"On clean images they gain 0.0 ± 1.9 points{CHANCE}."


@pytest.mark.parametrize(
    ("comparisons", "said"),
    [
        ([], "Not tried: it was not trained on damage and tested on it."),
        (
            [compare("constant", 0.75, clean=0.88)],
            f"Strategy constant: {GAINS} On clean images they lose 2.0 ± 2.0 points.",
        ),
        (
            [compare("transfer", 0.75, clean=0.91), compare("constant", 0.7, clean=0.88), compare("incremental", 0.61)],
            f"Strategy transfer: {GAINS} On clean images they gain 1.0 ± 1.9 points{CHANCE}. Strategy constant gains "
            "+10.0 points under damage (on clean images −2.0).",
        ),
        (
            [compare("transfer", 0.75), compare("constant", 0.7, clean=0.89), compare("incremental", 0.69)],
            f"Strategy transfer: {GAINS} {SAME} Strategies constant and incremental gain +10.0 and +9.0 points under "
            "damage (on clean images −1.0 and 0.0).",
        ),
        (
            [compare("transfer", 0.6004), compare("constant", 0.5)],
            f"Nothing clearly. The best, strategy transfer: {BRINGS.format('60.0', UNCLEAR)} {SAME}",
        ),
        (
            [compare("constant", 0.5)],
            f"Nothing clearly. Strategy constant: {BRINGS.format('50.0', '−10.0 ± 3.1 points')} {SAME}",
        ),
    ],
    ids=["none", "one-wins", "two-win", "three-win", "chance", "one-loses"],
)
def test_what_repairs_a_model_in_sentences(comparisons: list[Comparison], said: str) -> None:
    assert describe_repair(comparisons) == said


def test_a_weak_network_is_called_weak_if_that_is_no_chance_and_nothing_is_concluded_from_it() -> None:
    described = [describe_weakness("the network trained here", 0.65, n, 0.1, "Train it longer.") for n in (100, 1000)]
    assert described[0] is None
    assert described[1] is not None
    assert described[1].startswith("Too weak to conclude from: the network trained here is right on 65.0 % of clean")
    assert described[1].endswith(
        "clearly less than 70.0 %, two thirds of the way from guessing to no error. What training "
        "on damage gains or costs may be what it had still to learn. Train it longer."
    )
    found = describe_repair([compare("constant", 0.75), compare("transfer", 0.7)], is_weak=True)
    assert found.startswith("Cannot be told of a weak network. Strategy constant: its models, each on the family")
    assert "transfer" not in found


def test_how_robust_a_model_is_in_sentences() -> None:
    guessing = Robustness(0.82, 0.4, ("stuck 400 pixels", 0.2), ["stuck 100 pixels", "noise σ = 0.2"])
    for found, words in (
        (Robustness(0.82), "82.0 % right on clean images; no damage was tested."),
        (
            Robustness(0.82, 0.4, ("stuck 400 pixels", 0.31)),
            "under damage (all test levels), 31.0 % at worst (stuck 400 pixels).",
        ),
        (guessing, "Not clearly better than guessing (20 %) from stuck 100 pixels and noise σ = 0.2 on."),
    ):
        assert describe_robustness(found, 0.2).endswith(words)
    # That a model cannot be told from another is said of damaged images, not of clean ones.
    beside = [compare_robustness(compare("mine", robust, clean=0.5)) for robust in (0.61, 0.7, 0.5)]
    assert beside == [
        "Under damage it cannot be told from the network trained here (60.0 %).",
        "Under damage it keeps 10.0 ± 3.0 points more than the network trained here (60.0 %).",
        "Under damage it keeps 10.0 ± 3.1 points less than the network trained here (60.0 %).",
    ]
    assert describe_certainty(430, 1) == (
        "430 test images: these alone leave an accuracy uncertain by up to ± 4.8 points (two standard errors). One "
        "training seed: another may change more."
    )
    assert describe_certainty(430, 3).endswith(
        "3 training seeds, which vary besides: the ± of a difference includes that."
    )


@pytest.mark.parametrize(
    ("ablation", "robust", "n", "helps"),
    [
        ("standardization", {"pixel": 0.7, "channel": 0.9, "none": 0.8}, 2000, "Standardizing inputs by channel"),
        ("standardization", {"pixel": 0.7, "none": 0.9}, 2000, "Leaving inputs as they are"),
        ("standardization", {"pixel": 0.7, "channel": 0.74}, 2000, None),
        ("standardization", {"pixel": 0.7, "channel": 0.9}, 20, None),  # chance
        ("mine", {"a": 0.7}, 2000, None),
    ],
)
def test_what_helps_without_training_on_damage_is_said(
    ablation: str, robust: dict[str, float], n: int, helps: str | None
) -> None:
    variants = [Comparison(name, n, 0.9, 0.9, value, 0.7, None) for name, value in robust.items()]
    said = describe_ablations({ablation: variants})
    keeps = "keeps 90.0 % under damage instead of 70.0 % (+20.0 ± 2.5 points)."
    assert said == ([f"{helps} {keeps}"] if helps else [])


def test_a_chart_shows_every_number_where_it_belongs() -> None:
    chart = draw_lines("title <b>", "level", [Series("a & b", [Point(1, 0.5, 0.1), Point(3, 1.0)], 2)], reference=0.75)
    svg = str(chart.svg)
    assert "title &lt;b&gt;. a &amp; b: 1 50 %, 3 100 %." in svg
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', svg)]
    lines = {float(text): float(y) - 4 for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">(\d+)</text>', svg)}
    assert heights == pytest.approx([lines[50], lines[100]])
    assert float(re.search(r'class="reference" d="M38 ([\d.]+)', svg)[1]) == pytest.approx(lines[75])  # type: ignore[index]
    assert chart.legend == [("a & b", 2, False)]
    bars = str(draw_bars("title", {"clean": [0.5, None], "robust": [0.25, 1.0]}, {"natural": 0, "constant": 3}).svg)
    full = lines[0] - lines[100]
    sizes = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', bars)]
    assert sizes == pytest.approx([0.5 * full, 0.25 * full, full], abs=0.1)
    assert re.findall(r'class="s(\d+)"><rect', bars) == ["0", "0", "3"]


def test_a_picture_is_shown_however_long_it_is() -> None:
    for shape in ((2, 512, 3), (4096, 1, 1), (1, 1, 3)):
        assert encode_image(np.zeros(shape, np.uint8)).startswith("data:image/png;base64,")


def test_no_other_model_is_grey_and_colours_repeat_only_when_all_are_used() -> None:
    colors = list(assign_colors([f"model{number}" for number in range(2 * N_COLORS)]).values())
    assert colors[:N_COLORS] == list(range(N_COLORS))
    assert 0 not in colors[1:]
    style = (Path(page.__file__).parent / "page.html.jinja").read_text()
    assert all(style.count(f"--s{color}: #") == 2 and f".s{color} {{" in style for color in colors)


def confusions_of(perturbation: str, level: float, counts: list[list[int]]) -> list[Confusion]:
    return [
        Confusion("natural", "clean", 1, perturbation, level, actual, predicted, n)
        for actual, row in enumerate(counts)
        for predicted, n in enumerate(row)
    ]


@pytest.mark.parametrize(
    ("clean", "damaged", "expected"),
    [
        ([[9, 1], [2, 8]], [[7, 3], [3, 7]], [(0, 0.9, 0.7, 1), (1, 0.8, 0.7, 0)]),
        ([[9, 1], [2, 8]], [[9, 1], [1, 9]], []),  # nobody loses
        ([[9, 1], [0, 0]], [[8, 2], [0, 0]], [(0, 0.9, 0.8, 1)]),  # no image of the second
        (
            np.diag([4, 4, 4, 4]).tolist(),
            [[3, 1, 0, 0], [0, 2, 2, 0], [0, 0, 3, 1], [0, 0, 3, 1]],
            [(3, 1.0, 0.25, 2), (1, 1.0, 0.5, 2), (0, 1.0, 0.75, 1)],  # of equal ones the first
        ),
    ],
    ids=["two-classes", "none", "class-without-images", "four-classes"],
)
def test_the_classes_that_lose_most_lose_and_exist(
    clean: list[list[int]], damaged: list[list[int]], expected: list[tuple[int, float, float, int]]
) -> None:
    table = metrics.to_frame(confusions_of("clean", 0, clean) + confusions_of("noise", 0.1, damaged), Confusion)
    before, after = (table[table["perturbation"] == name] for name in ("clean", "noise"))
    found = page.find_losses(before, after)
    assert [(loss.label, loss.before, loss.after, loss.taken_for) for loss in found] == expected


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")

# What is seen at first, then everything unfolded.
_MEASURE = """
const light = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number)
  .map(v => v / 255).map(v => v <= 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const paper = getComputedStyle(document.querySelector('section')).backgroundColor;
const verdict = document.querySelector('.verdict');
const lights = [light(paper), light(getComputedStyle(verdict).color)].sort((a, b) => b - a);
const verdictTop = verdict.getBoundingClientRect().top;
const chartTop = document.querySelector('#answer svg').getBoundingClientRect().top;
const openDetails = document.querySelectorAll('details[open]').length;
document.querySelectorAll('details').forEach(e => { e.open = true; });
const width = document.documentElement.clientWidth;
const scrolls = e => e && (getComputedStyle(e).overflowX === 'auto' || scrolls(e.parentElement));
return {
  verdictTop, chartTop, openDetails, width,
  contrast: (lights[0] + 0.05) / (lights[1] + 0.05),
  background: Number(paper.match(/\\d+/)[0]),
  broken: [...document.images].filter(i => !i.complete || i.naturalWidth === 0).length,
  images: document.images.length,
  tooWide: document.documentElement.scrollWidth - width,
  overflowing: [...document.querySelectorAll('body *')]
    .filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e)).map(e => e.tagName + ' ' + e.className),
  cutWithoutHint: [...document.querySelectorAll('.table, .gallery')].filter(
    e => e.scrollWidth > e.clientWidth && !getComputedStyle(e).backgroundImage.includes('gradient')).length,
  fetched: performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:')),
};
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    if not (CHROMIUM and CHROMEDRIVER):
        if os.environ.get("REQUIRE_CHROMIUM"):
            pytest.fail("no chromium and chromedriver on the PATH")
        pytest.skip("no chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(CHROMEDRIVER)))
    yield driver
    driver.quit()


@pytest.mark.parametrize(
    ("width", "scheme", "media"),
    [(width, scheme, "screen") for width, scheme in ((1400, "light"), (900, "dark"), (390, "light"), (390, "dark"))]
    + [(720, "light", "print")],
)
def test_the_page_is_whole_in_a_real_browser(
    reported: Path, browser: webdriver.Chrome, width: int, scheme: str, media: str
) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.get(PAGE.resolve().as_uri())
    measured = browser.execute_script(_MEASURE)
    assert measured["verdictTop"] < 500  # what was found is seen without scrolling
    assert measured["chartTop"] < (900 if width < 500 else 700)
    assert measured["contrast"] > 7
    assert (measured["background"] < 100) is (scheme == "dark")
    assert measured["openDetails"] == 0
    assert width - 20 < measured["width"] <= width  # a scroll bar may stand beside it
    assert measured["images"] > 60
    assert measured["tooWide"] <= 0
    assert [measured[name] for name in ("broken", "cutWithoutHint", "overflowing", "fetched")] == [0, 0, [], []]
    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]
