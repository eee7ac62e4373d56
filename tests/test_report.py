"""Stages ablations, confusion and report on a whole tiny study, and the page in a real browser."""

import csv
import json
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from ruamel.yaml import YAML
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from pipeline.data.datasets import DATASETS
from pipeline.evaluation import metrics, results
from pipeline.evaluation.metrics import Comparison, ModelConfusion
from pipeline.recipes.recipe import PaperRecipe
from pipeline.reporting import page, published
from pipeline.runtime import layout
from pipeline.study.params import load
from pipeline.training import jobs
from pipeline.training.jobs import Task
from tests.conftest import ROOT, WriteParams, tree
from tests.test_stages import run, succeed

N_TRAIN, N_TEST, TRIALS = 300, 100, 2
STRATEGIES = ("constant", "incremental", "transfer")
PAGE = layout.report() / "index.html"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def reported_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reported") / "study"


@pytest.fixture
def reported(
    study: Path,
    reported_once: Path,
    tiny_values: dict[str, Any],
    write_params: WriteParams,
    monkeypatch: pytest.MonkeyPatch,
    in_process: None,
) -> Path:
    """The current folder, with the whole study of both data sets done."""
    if not reported_once.exists():
        shutil.copytree(ROOT / "profiles", "profiles")
        for subset in tiny_values["datasets"].values():
            subset.update(n_train=N_TRAIN, n_test=N_TEST)
        tiny_values["perturb"]["trials"] = TRIALS
        for block in (tiny_values["train"]["recipes"], tiny_values["strategies"]["transfer"]["recipes"]):
            for recipe in block.values():
                recipe["batch_size"] = 20
        for name in ("no_batch_norm", "plain_relu", "plain_tanh"):
            del tiny_values["ablations"]["components"][name]
        tiny_values["ablations"]["beta"] = {"low": {"adam": {"beta1": 0.5}}}
        write_params(tiny_values)
        for dataset in tiny_values["datasets"]:
            for name in tiny_values["perturbations"]:
                succeed("perturb", dataset, name)
            for command in ("train", "impact", "figures"):
                succeed(command, dataset)
            for strategy in STRATEGIES:
                succeed("strategies", dataset, strategy)
                succeed("evaluate", dataset, strategy)
            for ablation in tiny_values["ablations"]:
                succeed("ablations", dataset, ablation)
            succeed("confusion", dataset)
        succeed("report")
        shutil.copytree(study, reported_once)
    else:
        shutil.rmtree(study / "data")
        shutil.copytree(reported_once, study, dirs_exist_ok=True)
    return study


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# Ablations.


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_variant_that_changes_nothing_is_the_natural_model(reported: Path, dataset: str) -> None:
    for ablation, variant in (("components", "full"), ("standardization", "pixel")):
        cells = read_rows(layout.ablation_cells(dataset, ablation))
        own = [row for row in cells if row["variant"] == variant and row["split"] == "test"]
        columns = ("perturbation", "level", "trial", "n_correct", "n_examples")
        assert [[row[name] for name in columns] for row in own] == [
            [row[name] for name in columns] for row in read_rows(layout.impact_cells(dataset))
        ]
        assert not (layout.ablation_models(dataset, ablation) / f"{variant}.safetensors").exists()


def test_every_other_variant_is_trained_by_its_own_recipe(reported: Path) -> None:
    recipe = load().train.recipes["mnist"]
    assert isinstance(recipe, PaperRecipe)
    for ablation, variant, changes in (
        ("components", "no_dropout", {"network": {"dropout": 0.0}}),
        ("components", "tanh", {"network": {"activation": "tanh"}}),
        ("standardization", "channel", {"recipe": {"standardize": "channel"}}),
        ("beta", "low", {"recipe": {"adam": {**recipe.adam.model_dump(), "beta1": 0.5}}}),
    ):
        described = json.loads((layout.ablation_models("mnist", ablation) / f"{variant}.json").read_text())
        natural = json.loads(layout.natural_model("mnist").with_suffix(".json").read_text())
        for block, values in changes.items():
            natural[block] |= values
        results = dict.fromkeys(("weights_sha256", "computed_in", "learning_curve", "sha256"))
        assert described | results == natural | results


def test_the_summary_of_a_variant_follows_from_its_cells(reported: Path) -> None:
    summary = json.loads((layout.ablation_metrics("mnist", "standardization") / "channel.json").read_text())
    rows = [row for row in read_rows(layout.ablation_cells("mnist", "standardization")) if row["variant"] == "channel"]
    (train,) = (row for row in rows if row["split"] == "train")
    assert int(train["n_examples"]) == N_TRAIN
    assert summary["train_accuracy"] == pytest.approx(int(train["n_correct"]) / N_TRAIN, abs=1e-6)
    noise = defaultdict(list)
    for row in rows:
        if row["perturbation"] == "noise":
            noise[row["level"]].append(int(row["n_correct"]) / N_TEST)
    means = [sum(values) / TRIALS for values in noise.values()]
    assert summary["noise_accuracy"] == pytest.approx(sum(means) / len(means), abs=1e-6)


def test_one_more_variant_costs_one_model(
    reported: Path, write_params: WriteParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = YAML(typ="safe", pure=True).load(layout.PARAMS.read_text())
    values["ablations"]["standardization"]["tanh"] = {"standardize": "none", "network": {"activation": "tanh"}}
    write_params(values)
    trained: list[str] = []
    train_one = jobs.train_one

    def count(task: Task) -> None:
        trained.append(task.label)
        train_one(task)

    monkeypatch.setattr(jobs, "train_one", count)
    succeed("ablations", "mnist", "standardization")
    assert trained == ["tanh"]


def test_an_unknown_ablation_is_named_with_the_choices(reported: Path) -> None:
    result = run("ablations", "mnist", "colour")
    assert result.exit_code == 1
    assert result.output == ("Error: ablation: unknown 'colour'; params.yaml has beta, components, standardization\n")


# Confusion.


@pytest.mark.parametrize("dataset", DATASETS)
def test_confusions_count_every_image_of_every_trial_and_agree_with_the_cells(reported: Path, dataset: str) -> None:
    totals: Counter[tuple[str, ...]] = Counter()
    right: Counter[tuple[str, ...]] = Counter()
    for row in read_rows(layout.confusion(dataset)):
        key = tuple(row[name] for name in ("strategy", "train_perturbation", "train_level", "perturbation", "level"))
        totals[key] += int(row["n_examples"])
        right[key] += int(row["n_examples"]) * (row["actual"] == row["predicted"])
    cells: Counter[tuple[str, ...]] = Counter()
    for strategy in STRATEGIES:
        rows = read_rows(layout.evaluate_cells(dataset, strategy))
        for row in rows if strategy == "constant" else [row for row in rows if row["strategy"] != "natural"]:
            key = tuple(
                row[name] for name in ("strategy", "train_perturbation", "train_level", "perturbation", "level")
            )
            cells[key] += int(row["n_correct"])
    assert len(totals) == 1 + 2 * 5  # natural images, and two models at five hardest levels
    for key, total in totals.items():
        assert total == N_TEST * (1 if key[3] in ("natural", "blur") else TRIALS)
        assert right[key] == cells[key], key


def test_the_best_model_is_of_the_family_and_none_of_it_is_better(reported: Path) -> None:
    params, mnist = load(), DATASETS["mnist"]
    cells = [results.read_evaluation(params, mnist, strategy) for strategy in STRATEGIES]
    accuracy: dict[tuple[str, str, float], float] = {}
    for table in cells:
        for row in table[(table["perturbation"] == "noise") & (table["level"] == 0.05)].itertuples():
            if row.train_perturbation == "noise":
                key = (str(row.strategy), str(row.train_perturbation), float(str(row.train_level)))
                accuracy[key] = accuracy.get(key, 0) + int(str(row.n_correct))
    best = metrics.find_best(pd.concat(cells), "noise", 0.05)
    assert best is not None
    assert accuracy[best.strategy, best.train_perturbation, best.train_level] == max(accuracy.values())


# The authors' values.


def test_the_authors_pixel_labels_are_one_below_what_they_trained_with() -> None:
    table = published.read_strategies(DATASETS["mnist"], "constant")
    assert sorted(set(table.loc[table["train_perturbation"] == "hot", "train_level"])) == list(range(2, 12))
    assert sorted(set(table.loc[table["train_perturbation"] == "noise", "train_level"])) == [
        0.001, 0.01325, 0.0255, 0.03775, 0.05,
    ]  # fmt: skip
    total = sum(len(published.read_strategies(dataset, name)) for dataset in DATASETS.values() for name in STRATEGIES)
    assert total == 960


# The page.


def test_the_page_holds_every_picture_with_a_text_alternative_and_needs_no_network(reported: Path) -> None:
    page = PAGE.read_text()
    images = re.findall(r"<img[^>]*>", page)
    files = sorted(layout.report().glob("*.png"))
    drawn_before = sum(len(list(layout.figures(name).glob("*.png"))) for name in DATASETS)
    assert len(images) == len(files) + drawn_before
    assert len(files) == 2 * (1 + 3 * 3 + 3 + 3 + 11)  # summary, A.1 to C.3, cross, ablations, confusion
    for image in images:
        assert 'src="data:image/png;base64,' in image
        alt = re.search(r'alt="([^"]*)"', image)
        assert alt is not None
        assert len(alt.group(1)) > 30
    addresses = set(re.findall(r'(?:src|href)="((?!data:|#)[^"]*)"', page))
    assert addresses == {"https://arxiv.org/abs/2004.03452"}
    assert "url(" not in page
    assert "<script" not in page


def test_the_numbers_are_those_of_the_metric_files(reported: Path) -> None:
    page = " ".join(PAGE.read_text().split())
    for dataset in DATASETS:
        for strategy in STRATEGIES:
            numbers = json.loads(layout.evaluate_metrics(dataset, strategy).read_text())
            # There is none where the natural model makes no error at all.
            mce = f"{numbers['mce']:.2f}" if "mce" in numbers else "–"
            gain = 100 * (numbers["robust_accuracy"] - numbers["baseline_robust_accuracy"])
            for name, prefix, values in (
                ("natural", "baseline_", ("–", "–" if mce == "–" else "1.00")),
                (strategy, "", (rf"{gain:+.1f}".replace("-", "−"), mce)),
            ):
                clean, robust, worst, cross = (
                    f"{100 * numbers[f'{prefix}{key}_accuracy']:.1f}" for key in ("clean", "robust", "worst", "cross")
                )
                row = "</td><td>".join([name, clean, robust, re.escape(values[0]) + r"[^<]*", worst, cross, values[1]])
                assert re.search(f"<tr><td>{row}</td></tr>", page), row
        # The sentence is about the images of the table.
        robust, worst = (f"{100 * numbers[f'baseline_{name}_accuracy']:.1f} %" for name in ("robust", "worst"))
        assert f"on {robust} on average over the damage that the strategies train for, and on {worst} at worst" in page


def test_the_page_says_whether_these_are_the_papers_settings(reported: Path, write_params: WriteParams) -> None:
    assert "These are not the paper's settings" in PAGE.read_text()
    shutil.copy(layout.PARAMS, layout.PROFILES / "paper.yaml")
    succeed("report")
    assert "These are not the paper's settings" not in PAGE.read_text()
    values = YAML(typ="safe", pure=True).load(layout.PARAMS.read_text())
    values["device"] = "auto"  # decides no number
    write_params(values)
    succeed("report")
    assert "These are not the paper's settings" not in PAGE.read_text()


def test_what_files_say_is_text_on_the_page(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, image = "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'
    mnist = DATASETS["mnist"]
    monkeypatch.setitem(DATASETS, "mnist", replace(mnist, classes=(script, image, *mnist.classes[2:])))
    paper = layout.PROFILES / "paper.yaml"
    paper.write_text(f"{paper.read_text()}\n'{script}': 1\nmine: '{image}'\n")
    succeed("report")
    page = PAGE.read_text()
    assert page.count("&lt;script&gt;alert(1)") > 2
    assert page.count("&lt;img src=x onerror") > 2
    assert "<script" not in page
    assert "<img src=x" not in page


def test_the_same_metrics_give_the_same_bytes(reported: Path) -> None:
    before = tree(layout.report())
    succeed("report")
    assert tree(layout.report()) == before


@pytest.mark.parametrize(
    ("path", "command"),
    [
        (layout.impact_cells("mnist"), "impact mnist"),
        (layout.evaluate_cells("cifar10", "transfer"), "evaluate cifar10 transfer"),
        (layout.evaluate_metrics("cifar10", "transfer"), "evaluate cifar10 transfer"),
        (layout.ablation_cells("mnist", "components"), "ablations mnist components"),
        (layout.ablation_metrics("mnist", "components") / "tanh.json", "ablations mnist components"),
        (layout.confusion("mnist"), "confusion mnist"),
        (layout.figures("mnist") / "levels_blur.png", "figures mnist"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_missing_or_damaged_metric_file_is_one_clear_error(
    reported: Path, path: Path, command: str, damage: str
) -> None:
    before = tree(layout.report())
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else 20])
    result = run("report")
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {path}: ")
    assert f"`python -m pipeline {command}`" in result.output
    assert result.output.count("\n") == 1
    assert tree(layout.report()) == before


def test_metric_files_made_with_other_params_are_refused(reported: Path, write_params: WriteParams) -> None:
    values = YAML(typ="safe", pure=True).load(layout.PARAMS.read_text())
    values["perturb"]["trials"] = TRIALS + 1
    write_params(values)
    result = run("report")
    assert result.exit_code == 1
    assert "made with other params" in result.output


@pytest.mark.parametrize("block", ["strategies", "ablations"])
def test_a_study_without_strategies_or_ablations_has_a_page_too(
    reported: Path, write_params: WriteParams, block: str
) -> None:
    values = YAML(typ="safe", pure=True).load(layout.PARAMS.read_text())
    values[block] = {}
    write_params(values)
    for dataset in DATASETS:
        succeed("confusion", dataset)
    succeed("report")
    page = PAGE.read_text()
    assert "How this was made" in page
    assert all(f'id="{name}"' in page for name in re.findall('href="#([^"]*)"', page))
    if block == "strategies":
        impact = json.loads(layout.impact_metrics("mnist").read_text())
        assert f"{100 * impact['worst_accuracy']:.1f} % at worst" in page
        assert page.count("No model was trained against damage and tested on it.") == len(DATASETS)


def test_one_of_each_is_in_the_singular(reported: Path, write_params: WriteParams) -> None:
    values = YAML(typ="safe", pure=True).load(layout.PARAMS.read_text())
    write_params(values)
    shutil.copy(layout.PARAMS, layout.PROFILES / "paper.yaml")
    values["strategies"] = {"constant": {}}
    write_params(values)
    for dataset in DATASETS:
        succeed("confusion", dataset)
    succeed("report")
    page = " ".join(PAGE.read_text().split())
    assert "and 1 way of training against it" in page
    del values["datasets"]["cifar10"]
    write_params(values)
    succeed("report")
    page = " ".join(PAGE.read_text().split())
    assert "<p>mnist classifiers under the damage that cameras do" in page
    for found in re.findall(r"[^\d.,]1 (values|images|points|ways|classes|models|trials)\b", page):
        pytest.fail(f"1 {found}")


def test_a_pipe_in_the_place_of_a_picture_is_refused(reported: Path) -> None:
    path = layout.figures("mnist") / "levels_blur.png"
    path.unlink()
    os.mkfifo(path)
    result = run("report")
    assert result.exit_code == 1
    assert result.output == f"Error: {path}: a pipe, socket or device, not a file; remove it\n"


# What it says.


def compare(strategy: str, robust: float, *, clean: float = 0.9, mce: float | None = 0.5) -> Comparison:
    """Beside a natural model that is right on 60 % of 2,000 damaged images."""
    return Comparison(strategy, 2000, clean, 0.9, robust, 0.6, mce)


NATURAL_HAS = "the natural model's 60.0 % on the same images."


@pytest.mark.parametrize(
    ("comparisons", "sentences"),
    [
        ([], ["No model was trained against damage and tested on it."]),
        (
            [compare("constant", 0.75, clean=0.88)],
            [
                "constant beats the natural model: 75.0 % on the damage that its models were trained for, 15.0 points "
                f"above {NATURAL_HAS}",
                "On undamaged images constant loses 2.0 points.",
                "Its relative error, in which every perturbation counts alike, is 0.50.",
            ],
        ),
        (
            [compare("transfer", 0.75, clean=0.91, mce=None), compare("constant", 0.7), compare("incremental", 0.61)],
            [
                "The best strategy, transfer, beats the natural model: 75.0 % on the damage that its models were "
                f"trained for, 15.0 points above {NATURAL_HAS}",
                "constant beats the natural model too.",
                "On undamaged images transfer gains 1.0 points.",
            ],
        ),
        (
            [compare("transfer", 0.75), compare("constant", 0.7), compare("incremental", 0.69), compare("a", 0.68)],
            [
                "The best strategy, transfer, beats the natural model: 75.0 % on the damage that its models were "
                f"trained for, 15.0 points above {NATURAL_HAS}",
                "constant, incremental and a beat the natural model too.",
                "On undamaged images transfer is just as accurate.",
                "Its relative error, in which every perturbation counts alike, is 0.50.",
            ],
        ),
        (
            [compare("transfer", 0.6004, clean=0.9004, mce=1.02), compare("constant", 0.5)],
            [
                "No strategy clearly beats the natural model here: the best, transfer, has 60.0 % on the damage that "
                "its models were trained for, less than 0.1 points above the natural model's 60.0 % on the same "
                "images, and with 2,000 test images up to 3.1 points may be chance.",
                "On undamaged images transfer gains less than 0.1 points.",
                "Its relative error, in which every perturbation counts alike, is 1.02.",
            ],
        ),
        (
            [compare("constant", 0.592, mce=1.02)],
            [
                "No strategy beats the natural model here: constant has 59.2 % on the damage that its models were "
                f"trained for, 0.8 points below {NATURAL_HAS}",
                "On undamaged images constant is just as accurate.",
                "Its relative error, in which every perturbation counts alike, is 1.02.",
            ],
        ),
        (
            [compare("constant", 0.6, mce=None)],
            [
                "No strategy beats the natural model here: constant has 60.0 % on the damage that its models were "
                f"trained for, as much as {NATURAL_HAS}",
                "On undamaged images constant is just as accurate.",
            ],
        ),
    ],
    ids=["none", "one-wins", "two-win", "four-win", "chance", "one-loses", "equal"],
)
def test_the_verdict_in_sentences(comparisons: list[Comparison], sentences: list[str]) -> None:
    assert page.describe_verdict(comparisons, 0.9, 10) == sentences


def test_a_weak_model_is_called_weak() -> None:
    weak = "This natural model is too weak to conclude from: it is right on 56.3 % of undamaged images, less than "
    weak += "70.0 %, two thirds of the way from guessing to no error."
    assert page.describe_verdict([compare("constant", 0.75)], 0.563, 10)[-1] == weak
    assert not any("too weak" in said for said in page.describe_verdict([compare("constant", 0.75)], 0.71, 10))


def confusions_of(perturbation: str, level: float, counts: list[list[int]]) -> list[ModelConfusion]:
    return [
        ModelConfusion("natural", "natural", 0, perturbation, level, actual, predicted, n)
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
            [[4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0], [0, 0, 0, 4]],
            [[3, 1, 0, 0], [0, 2, 2, 0], [0, 0, 3, 1], [0, 0, 3, 1]],
            [(3, 1.0, 0.25, 2), (1, 1.0, 0.5, 2), (0, 1.0, 0.75, 1)],  # of equal ones the first
        ),
    ],
    ids=["two-classes", "none", "class-without-images", "four-classes"],
)
def test_the_classes_that_lose_most_lose_and_exist(
    clean: list[list[int]], damaged: list[list[int]], expected: list[tuple[int, float, float, int]]
) -> None:
    table = metrics.to_frame(confusions_of("natural", 0, clean) + confusions_of("noise", 0.1, damaged))
    before, after = (table[table["perturbation"] == name] for name in ("natural", "noise"))
    found = page.find_losses(before, after)
    assert [(loss.label, loss.before, loss.after, loss.taken_for) for loss in found] == expected


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")

_MEASURE = """
const width = document.documentElement.clientWidth;
const scrolls = e => e && (getComputedStyle(e).overflowX === 'auto' || scrolls(e.parentElement));
return {
  width: width,
  broken: [...document.images].filter(i => !i.complete || i.naturalWidth === 0).length,
  images: document.images.length,
  tooWide: document.documentElement.scrollWidth - width,
  overflowing: [...document.querySelectorAll('body *')]
    .filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e)).map(e => e.tagName + ' ' + e.className),
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
    ("width", "height", "media"), [(1280, 900, "screen"), (390, 844, "screen"), (720, 1000, "print")]
)
def test_the_page_is_whole_in_a_real_browser(
    reported: Path, browser: webdriver.Chrome, width: int, height: int, media: str
) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media})
    browser.get(PAGE.resolve().as_uri())
    for details in browser.find_elements("css selector", "details > summary"):
        browser.execute_script("arguments[0].parentElement.open = true", details)
    measured = browser.execute_script(_MEASURE)
    assert width - 20 < measured["width"] <= width  # a scroll bar may stand beside it
    assert measured["images"] > 60
    assert measured["broken"] == 0
    assert measured["tooWide"] <= 0
    assert measured["overflowing"] == []
    assert measured["fetched"] == []
    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]
