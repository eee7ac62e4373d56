"""The committed params files hold what they promise, and every mistake in one is a message that names its key."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.datasets import DATASETS
from pipeline.perturbations import PERTURBATIONS
from pipeline.recipes.recipe import Network, PaperRecipe
from pipeline.runtime.errors import PipelineError
from pipeline.study import params
from pipeline.study.arrays import plan_arrays
from pipeline.study.params import Params
from pipeline.study.planning import plan_studies
from pipeline.study.reading import changed_keys, read
from tests.conftest import ROOT

PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))
WHERE = Path("params.yaml")
REMOVED = ...

MNIST, TUNING = "train.recipes.mnist", "strategies.transfer.recipes"
FIRST_CONVOLUTION = f"{MNIST}.network.convolutions.0"


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """With other, more or (`REMOVED`) fewer values at dotted keys; numbers in those are indices of lists."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
        block: Any = values
        for part in parents:
            block = block[part]
        if value is REMOVED:
            del block[last]
        else:
            block[last] = value
    return values


def problems_of(values: dict[str, Any]) -> list[str]:
    """The lines of the message, its heading aside, checked for their number."""
    with pytest.raises(PipelineError) as caught:
        params.validate(values, WHERE)
    heading, *problems = str(caught.value).splitlines()
    assert heading == f"{WHERE}: {len(problems)} problem(s)"
    return [problem.strip() for problem in problems]


PUBLISHED = {"source": {"kind": "canonical", "path": "pipeline/data/datasets.py"}}
MODEL: dict[str, Any] = {
    "dataset": "mnist", "kind": "onnx", "path": "a.onnx", "architecture": None, "channels": "grey", "size": None,
    "scale": 255, "mean": [0], "std": [1],
}  # fmt: skip


def kept(loaded: Params) -> dict[str, Any]:
    """What should be the params as they were read, nothing converted, filled in or dropped."""
    return loaded.model_dump(mode="json", serialize_as_any=True)


def test_the_committed_params_are_profile_quick() -> None:
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / "profiles/quick.yaml").read_bytes()


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_is_valid_and_complete(path: Path) -> None:
    loaded = params.load(path)
    assert changed_keys(read(path), kept(loaded)) == []


def test_an_ablation_may_give_a_network_of_another_kind_whole(quick_values: dict[str, Any]) -> None:
    network = {"kind": "torchvision", "architecture": "resnet18", "weights": None, "stem": "small"}
    changes: dict[str, Any] = {"ablations": {"networks": {"resnet": {"network": network | {"fully_connected": []}}}}}
    recipe = params.validate(changed(quick_values, changes), WHERE).train.recipes["mnist"]
    assert params.change_recipe(recipe, changes["ablations"]["networks"]["resnet"]).network.summary == (
        "torchvision resnet18"
    )
    changes["ablations"]["networks"]["resnet"]["network"] = network
    assert problems_of(changed(quick_values, changes)) == ["ablations.networks.resnet.network.fully_connected: missing"]


def test_one_of_several_data_sets_can_be_repaired(quick_values: dict[str, Any]) -> None:
    model = MODEL | {"kind": "torchvision", "architecture": "resnet18", "channels": "rgb", "path": "../a.pt"}
    repair = {"model": "mine", "learning_rate": 0.1, "batch_size": 50, "epochs": 1}
    changes: dict[str, Any] = {"models": {"mine": model | {"classes": None}}}
    changes["strategies"] = {"repair": {"share": 0.5, "recipes": {"mnist": repair}}}
    studies = plan_studies(params.validate(changed(quick_values, changes), WHERE))
    assert {name: list(study.strategies) for name, study in studies.items()} == {"mnist": ["repair"], "cifar10": []}


@pytest.fixture(scope="module")
def paper() -> Params:
    return params.load(ROOT / "profiles/paper.yaml")


def test_the_paper_has_the_levels_of_its_section_v_and_trains_one_pixel_more_than_its_label(paper: Params) -> None:
    for name in ("stuck", "hot", "dead"):
        levels = paper.perturbations[name]
        assert (levels.test_levels, levels.train_levels) == (tuple(range(1, 6)), tuple(range(1, 12)))
    noise, blur = paper.perturbations["noise"], paper.perturbations["blur"]
    assert noise.test_levels == noise.train_levels == pytest.approx(np.linspace(0.001, 0.05, 5))
    assert blur.test_levels == pytest.approx(np.linspace(0.4, 1.0, 5))
    assert blur.train_levels == pytest.approx(np.linspace(0.04, 1.0, 5))
    assert blur.options == {"mix_channels": True}
    assert {(subset.n_train, subset.n_test) for subset in paper.datasets.values()} == {(50_000, 10_000)}
    assert paper.perturb.trials == 25


@pytest.mark.parametrize(
    ("name", "filters", "steps"),
    [("mnist", [10], (0.05, 50, 1500)), ("cifar10", [64, 64, 128, 128, 256, 256, 512, 512], (0.0005, 20, 100))],
)
def test_the_paper_trains_as_its_authors_did(
    paper: Params, name: str, filters: list[int], steps: tuple[float, int, int]
) -> None:
    recipe = paper.train.recipes[name]
    assert isinstance(recipe, PaperRecipe)
    network = recipe.network
    assert isinstance(network, Network)
    assert [layer.filters for layer in network.convolutions] == filters
    assert (network.activation, network.batch_norm, network.dropout, network.fully_connected) == ("relu", True, 0.2, ())
    assert (recipe.adam.learning_rate, recipe.epochs, recipe.batch_size) == steps
    assert (recipe.adam.beta1, recipe.adam.beta2, recipe.standardize, recipe.precision) == (0.9, 0.999, "pixel", "auto")
    assert (recipe.shuffle, recipe.drop_last) == (False, True)


def test_a_store_holds_the_levels_of_impact_and_of_evaluate_once_each(paper: Params) -> None:
    held = [(array.variant.split, array.variant.level) for array in plan_arrays(paper, DATASETS["mnist"], "blur")]
    assert [level for split, level in held if split == "train"] == [0.04, 0.28, 0.52, 0.76, 1.0]
    assert [level for split, level in held if split == "test"] == [0.4, 0.5, 0.55, 0.7, 0.75, 0.85, 1.0]


# Key, value, and what follows the key in one line of the message; more values of a wrong type in test_properties.py.
REFUSED: list[tuple[str, Any, str]] = [
    ("extra", 1, ": unknown key"),
    ("perturb.extra", 1, ": unknown key"),
    ("ablations.x", {"y": {"speed": 1}}, ".y.speed: unknown key"),
    ("ablations.x", {"y": {"network": 3}}, ".y.network: 3"),
    ("ablations.x", {"y": {"batch_size": 10**6}}, ".y.batch_size: 1000000 is more than"),
    (f"{MNIST}.recipe", REMOVED, ": missing; choose from paper"),
    (f"{MNIST}.recipe", "slow", ": unknown 'slow'; choose"),
    (f"{FIRST_CONVOLUTION}.dilation", 2, ": unknown key"),
    ("perturbations.noise.scope", "image", ": unknown key"),
    ("impact", REMOVED, ": missing"),
    ("perturb.seed", REMOVED, ": missing"),
    ("perturbations.hot.scope", REMOVED, ": missing; choose from image, sensor"),
    ("perturb", None, ": None: "),
    ("perturb.trials", "3", ": '3': Input should be a valid integer"),
    ("prepare.sources", "npm", ": 'npm': "),
    ("perturbations.hot.test_levels", 3, ": 3: "),
    ("perturbations.dead.test_levels", [0], ": n_pixels 0 is out"),
    ("perturbations.stuck.train_levels", [785], ": n_pixels 785 is out of range for mnist; give a value above 0"),
    ("perturbations.stuck.train_levels", [10**400], ""),  # more than a float holds
    ("perturbations.hot.test_levels", [2.5], ": 2.5 is not a whole"),
    ("perturbations.noise.test_levels", [0], ": sigma 0 is out"),
    ("perturbations.blur.test_levels", [7.1], ": sigma 7.1 is out of range for mnist; give a value above 0 and at"),
    (f"{MNIST}.adam.learning_rate", float("inf"), ": inf"),
    ("perturbations.hot.test_levels", [3, 1, 3], ": a level"),
    ("datasets", {}, ": empty; name at least one of mnist, cifar10"),
    ("ablations.mine", {}, ": no variants; give it at least one, or remove it"),
    ("datasets.1", {**PUBLISHED, "n_train": 1000, "n_test": 1000}, ": "),
    ("prepare.sources", ["web"], ".0: unknown 'web'; choose from 'local'"),
    ("prepare.sources", [], ": "),
    (f"{MNIST}.network.activation", "gelu", ": unknown 'gelu'"),
    ("perturbations.blur.mix_channels", 1, ": unknown 1; choose from"),
    ("datasets.mnist.n_train", 0, ": 0: "),
    ("datasets.mnist.n_train", 60_001, ": 60001 is more than"),
    (f"{FIRST_CONVOLUTION}.filters", 0, ": 0: "),
    (f"{MNIST}.network.dropout", 1.0, ": 1.0: "),
    (f"{MNIST}.batch_size", 1, ": 1: "),
    (f"{MNIST}.epochs", 0, ": 0: "),
    (f"{MNIST}.adam.learning_rate", 0.0, ": 0.0: "),
    ("perturb.seed", -1, ": -1: "),
    ("train.seeds", [], ": empty; give at least one"),
    ("train.seeds", [1, 2, 1], ": a seed is listed twice"),
    ("ablations.transfer", {"a": {}}, ": the name of a way of training; choose another"),
    ("impact.n_examples", 21, ": 21: "),
    ("device", "gpu", ": unknown 'gpu'; choose from auto, cpu, cuda, cuda:N"),
    ("device", "cuda:1\n", r": unknown 'cuda:1\n'; choose"),
    ("strategies.constant.share", 1.0, ": unknown key"),
    ("strategies.incremental.end", REMOVED, ": missing"),
    ("strategies.incremental.start", -0.1, ": -0.1: "),
    (f"{TUNING}.mnist.batch_size", 20_001, ": 20001 is more than the 20000 training images"),
    ("strategies", None, ": "),
    ("evaluate.levels.noise", [1.5], ": sigma 1.5 is out of range for mnist; give a value above 0 and at most 1"),
    ("evaluate.levels.blur", REMOVED, ": missing"),
    ("evaluate.cross_trials", 0, ": 0: "),
]
BAD: list[tuple[dict[str, Any], str]] = [
    *(({key: value}, f"{key}{said}") for key, value, said in REFUSED),
    # What is said of another key.
    ({"ablations.x": {"../y": {}}}, "a name may have small letters, digits and underscores only"),
    ({f"{MNIST}.recipe": "fast"}, f"{MNIST}.sgd: missing"),
    ({"train.recipes.cifar10": REMOVED}, "train.recipes: no recipe for 'cifar10'"),
    ({f"{TUNING}.cifar10": REMOVED}, f"{TUNING}: no recipe for 'cifar10'"),
    (
        {"perturbations.fog": {"train_levels": [], "test_levels": [1]}},
        f"perturbations: unknown 'fog'; choose from {', '.join(PERTURBATIONS)}",
    ),
    (
        {"datasets.svhn": {**PUBLISHED, "n_train": 1, "n_test": 1}},
        "datasets: unknown 'svhn'; published are mnist, cifar10",
    ),
    ({"strategies.incremntal": {}}, "strategies: unknown 'incremntal'; choose from constant, "),
    (
        {f"{FIRST_CONVOLUTION}.kernel": 29, f"{FIRST_CONVOLUTION}.padding": 0},
        f"{MNIST}.network: convolution 1 leaves nothing of a 28x28 image",
    ),
    # Of a published data set the classes are known before it is prepared.
    (
        {"models.mine": {**MODEL, "classes": [*"123456789", "ten"]}},
        "models.mine.classes: unknown 'ten', without '0'; give the names of mnist, '0', '1', '2', '3', '4' and 5 more",
    ),
    ({"models.mine": {**MODEL, "classes": [*"1234567890", "1"]}}, "models.mine.classes: '1' more than once"),
    ({"models.mine": MODEL}, "models.mine.classes: missing"),
    (
        {"datasets.mnist.n_train": 499, f"{MNIST}.batch_size": 500},
        f"{MNIST}.batch_size: 500 is more than the 499 training images",
    ),
]


@pytest.mark.parametrize(("changes", "expected"), [pytest.param(*case, id=str(case[0])[:80]) for case in BAD])
def test_a_bad_value_is_refused_with_its_key(
    changes: dict[str, Any], expected: str, quick_values: dict[str, Any]
) -> None:
    problems = problems_of(changed(quick_values, changes))
    assert [problem for problem in problems if expected in problem], problems


HOT, NOISE, BLUR = (f"perturbations.{name}.test_levels" for name in ("hot", "noise", "blur"))
GOOD: list[dict[str, Any]] = [
    {NOISE: [1], BLUR: [1, 2], HOT: [2.0], "perturbations.noise.train_levels": []},
    {NOISE: [], BLUR: [7.0], HOT: [784], "perturbations.noise.train_levels": [], "evaluate.levels.noise": []},
    {"perturbations.stuck.test_levels": [5, 1, 3], "perturbations.stuck.scope": "sensor"},
    {"perturbations.dead.scope": "sensor", "perturbations.blur.mix_channels": True, "perturbations.stuck": REMOVED},
    {"datasets.mnist": REMOVED},
    {"datasets.mnist": REMOVED, HOT: [900]},  # which MNIST alone refuses
    {"prepare.sources": ["local"], "prepare.local_folder": "/somewhere", "device": "cuda:1"},
    {"device": "cuda", "perturb.seed": 2**200, "train.seeds": [0, 2**63 - 1]},
    {f"{MNIST}.adam.learning_rate": 1, f"{MNIST}.adam.beta1": 0, f"{MNIST}.network.fully_connected": [256, 512]},
    {f"{MNIST}.network.convolutions": [], "datasets.mnist.n_train": 500, f"{MNIST}.batch_size": 500},
    {"datasets.mnist.n_train": 60_000, "datasets.mnist.n_test": 10_000},
    {"datasets.mnist.n_test": 1, "strategies": {}, "ablations": {}},  # fewer than examples are shown
    {"strategies": {"constant": {}}, "models.mine": {**MODEL, "classes": [*"1234567890"]}},
    {"strategies.incremental": {"start": 1, "end": 0.5}, "models.mine": {**MODEL, "classes": None}},
]


@pytest.mark.parametrize("changes", GOOD, ids=str)
def test_a_good_value_is_taken_as_it_is(changes: dict[str, Any], quick_values: dict[str, Any]) -> None:
    values = changed(quick_values, changes)
    assert changed_keys(values, kept(params.validate(values, WHERE))) == []


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        # Of type, of meaning, and of both.
        ({"perturb.seed": "x", "impact": REMOVED, "extra": 1}, ["extra", "impact", "perturb.seed"]),
        (
            {"datasets.mnist.n_train": 70_000, "perturbations.hot.scope": "lens", f"{FIRST_CONVOLUTION}.kernel": 29},
            ["datasets.mnist.n_train", "perturbations.hot.scope", f"{MNIST}.network"],
        ),
        (
            {"perturb.seed": "x", "perturbations.hot.scope": "lens", "datasets.mnist.n_train": 70_000},
            ["datasets.mnist.n_train", "perturb.seed", "perturbations.hot.scope"],
        ),
        ({"perturbations.noise.test_levels": ["5"]}, ["perturbations.noise.test_levels.0"]),
        ({"perturbations.noise.test_levels": [float("nan")]}, ["perturbations.noise.test_levels.0"]),
        ({"prepare.sources": ["web"]}, ["prepare.sources.0"]),
    ],
    ids=str,
)
def test_all_problems_are_listed_at_once_and_each_once(
    changes: dict[str, Any], keys: list[str], quick_values: dict[str, Any]
) -> None:
    assert sorted(problem.split(":")[0] for problem in problems_of(changed(quick_values, changes))) == keys


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(None, "no such file", id="missing"),
        pytest.param(b"a: [1, 2\nb: 3\n", "not valid YAML", id="unclosed-list"),
        pytest.param(b"seed: 1\nseed: 2\n", "the key seed is there a second time in line 2; put what", id="key-twice"),
        pytest.param(b"seed: 2004-13-01\n", "not valid YAML", id="date-that-does-not-exist"),
        pytest.param(b"seed: !!int many\n", "not valid YAML", id="tag-that-does-not-fit"),
        pytest.param(b"seed: !!python/object/apply:os.getpid []\n", "not valid YAML", id="tag-that-runs-code"),
        pytest.param(b"- device\n- auto\n", "expected keys and values, found list", id="list"),
        pytest.param(b"auto\n", "expected keys and values, found str", id="text"),
        pytest.param(b"", "expected keys and values, found NoneType", id="empty"),
        pytest.param(bytes(range(256)), "not valid YAML", id="binary"),
        pytest.param("device: auto\n".encode("utf-16"), "not valid YAML", id="utf-16"),
    ],
)
def test_a_file_that_holds_no_params_is_refused_by_name(content: bytes | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PipelineError) as caught:
        params.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)


def test_params_cannot_be_changed_after_loading(paper: Params) -> None:
    with pytest.raises(ValueError, match="frozen"):
        paper.perturb.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        pytest.param({"a": 1, "b": {"c": [2]}}, {"b": {"c": [2]}, "a": 1}, [], id="same-in-another-order"),
        pytest.param({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}, [("a.b.c", 1, 2)], id="deep"),
        pytest.param({"a": [1, 2]}, {"a": [2, 1]}, [("a", [1, 2], [2, 1])], id="order-of-a-list"),
        pytest.param({"a": {"b": 1}}, {"a": {}}, [("a.b", 1, None)], id="removed"),
        pytest.param({"a": {"b": {"c": []}, "d": 1}}, {}, [("a.b.c", [], None), ("a.d", 1, None)], id="removed-block"),
        pytest.param({"a": None}, {"a": {"b": None}}, [("a", None, {"b": None})], id="block-of-nothing"),
        pytest.param({"a": 0}, {"a": {"b": 1}}, [("a", 0, {"b": 1})], id="value-to-block"),
        pytest.param({}, {"a": {"b": 1}}, [("a.b", None, 1)], id="added-block"),
        pytest.param({"a": {"b": 1}}, {"a": 5}, [("a", {"b": 1}, 5)], id="block-becomes-value"),
        pytest.param({"a": 1, "b": 2}, {"c": 3, "b": 4}, [("a", 1, None), ("b", 2, 4), ("c", None, 3)], id="several"),
    ],
)
def test_changed_keys_are_those_whose_values_differ(
    old: dict[str, Any], new: dict[str, Any], expected: list[tuple[str, Any, Any]]
) -> None:
    before = copy.deepcopy((old, new))
    assert changed_keys(old, new) == expected
    assert (old, new) == before
