"""The committed params files hold what they promise, and every mistake in one is a message that names its key."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.datasets import DATASETS
from pipeline.perturbations import PERTURBATIONS
from pipeline.recipes.recipe import Network, PaperRecipe
from pipeline.runtime.errors import PipelineError
from pipeline.study import params
from pipeline.study.arrays import find_dataset, plan_arrays
from pipeline.study.params import Params
from pipeline.study.reading import changed_keys, read
from tests.conftest import ROOT

PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))
WHERE = Path("params.yaml")
REMOVED = object()

FIRST_CONVOLUTION = "train.recipes.mnist.network.convolutions.0"


def change(values: dict[str, Any], key: str, value: Any) -> None:
    """Set, add or (with `REMOVED`) delete the value at a dotted key; numbers in it are indices of lists."""
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    block: Any = values
    for part in parents:
        block = block[part]
    if value is REMOVED:
        del block[last]
    else:
        block[last] = value


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    values = copy.deepcopy(values)
    for key, value in changes.items():
        change(values, key, value)
    return values


def problems_of(values: dict[str, Any]) -> list[str]:
    """The lines of the message, its heading aside, checked for their number."""
    with pytest.raises(PipelineError) as caught:
        params.validate(values, WHERE)
    heading, *problems = str(caught.value).splitlines()
    assert heading == f"{WHERE}: {len(problems)} problem(s)"
    return [problem.strip() for problem in problems]


PUBLISHED = {"source": {"kind": "canonical", "path": "pipeline/data/datasets.py"}}
OWN = {"kind": "folder", "path": "../photos", "size": [48, 64], "channels": 3, "test_share": 0.2}


def test_the_committed_params_are_profile_quick() -> None:
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / "profiles/quick.yaml").read_bytes()


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_is_valid_and_complete(path: Path) -> None:
    values = read(path)
    loaded = params.load(path)
    # Nothing was converted, filled in or dropped on the way.
    assert changed_keys(values, loaded.model_dump(mode="json", serialize_as_any=True)) == []


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
    ("name", "filters", "learning_rate", "epochs", "batch_size"),
    [
        pytest.param("mnist", [10], 0.05, 50, 1500, id="mnist"),
        pytest.param("cifar10", [64, 64, 128, 128, 256, 256, 512, 512], 0.0005, 20, 100, id="cifar10"),
    ],
)
def test_the_paper_trains_as_its_authors_did(
    paper: Params, name: str, filters: list[int], learning_rate: float, epochs: int, batch_size: int
) -> None:
    recipe = paper.train.recipes[name]
    assert isinstance(recipe, PaperRecipe)
    assert isinstance(recipe.network, Network)
    assert [layer.filters for layer in recipe.network.convolutions] == filters
    assert (recipe.adam.learning_rate, recipe.epochs, recipe.batch_size) == (learning_rate, epochs, batch_size)
    assert (recipe.adam.beta1, recipe.adam.beta2) == (0.9, 0.999)
    assert recipe.standardize == "pixel"
    assert not recipe.shuffle
    assert recipe.drop_last
    assert recipe.precision == "auto"
    network = recipe.network
    assert (network.activation, network.batch_norm, network.dropout) == ("relu", True, 0.2)
    assert network.fully_connected == ()


def test_a_store_holds_the_levels_of_impact_and_of_evaluate_once_each(paper: Params) -> None:
    held = [(array.variant.split, array.variant.level) for array in plan_arrays(paper, DATASETS["mnist"], "blur")]
    assert [level for split, level in held if split == "train"] == [0.04, 0.28, 0.52, 0.76, 1.0]
    assert [level for split, level in held if split == "test"] == [0.4, 0.5, 0.55, 0.7, 0.75, 0.85, 1.0]


BAD = [
    # id, changes, expected in one line of the message
    ("unknown-key", {"extra": 1}, "extra: unknown key"),
    ("unknown-key-in-block", {"perturb.extra": 1}, "perturb.extra: unknown key"),
    ("ablation-unknown-key", {"ablations.x": {"y": {"speed": 1}}}, "ablations.x.y.speed: unknown key"),
    ("ablation-no-recipe", {"ablations.x": {"y": {"network": 3}}}, "ablations.x.y.network: 3"),
    ("ablation-batch", {"ablations.x": {"y": {"batch_size": 10**6}}}, "ablations.x.y.batch_size: 1000000 is more than"),
    ("ablation-name", {"ablations.x": {"../y": {}}}, "a name may have small letters, digits and underscores only"),
    (
        "recipe-missing",
        {"train.recipes.mnist.recipe": REMOVED},
        "train.recipes.mnist.recipe: missing; choose from paper",
    ),
    ("recipe-unknown", {"train.recipes.mnist.recipe": "slow"}, "train.recipes.mnist.recipe: unknown 'slow'; choose"),
    ("recipe-of-another", {"train.recipes.mnist.recipe": "fast"}, "train.recipes.mnist.sgd: missing"),
    ("unknown-key-in-layer", {f"{FIRST_CONVOLUTION}.dilation": 2}, f"{FIRST_CONVOLUTION}.dilation: unknown key"),
    ("unknown-option", {"perturbations.noise.scope": "image"}, "perturbations.noise.scope: unknown key"),
    ("missing-block", {"impact": REMOVED}, "impact: missing"),
    ("missing-key", {"perturb.seed": REMOVED}, "perturb.seed: missing"),
    (
        "missing-scope",
        {"perturbations.hot.scope": REMOVED},
        "perturbations.hot.scope: missing; choose from image, sensor",
    ),
    ("missing-recipe", {"train.recipes.cifar10": REMOVED}, "train.recipes: no recipe for 'cifar10'"),
    ("null-block", {"perturb": None}, "perturb: None: "),
    ("text-for-int", {"perturb.trials": "3"}, "perturb.trials: '3': Input should be a valid integer"),
    ("bool-for-int", {"perturb.trials": True}, "perturb.trials: True: Input should be a valid integer"),
    ("float-for-int", {"perturb.trials": 3.0}, "perturb.trials: 3.0: Input should be a valid integer"),
    ("int-for-bool", {"train.recipes.mnist.shuffle": 1}, "train.recipes.mnist.shuffle: 1: "),
    ("int-for-text", {"prepare.download_folder": 5}, "prepare.download_folder: 5: Input should be a valid string"),
    ("text-for-list", {"prepare.sources": "npm"}, "prepare.sources: 'npm': "),
    ("number-for-levels", {"perturbations.hot.test_levels": 3}, "perturbations.hot.test_levels: 3: "),
    ("bool-for-level", {"perturbations.noise.test_levels": [True]}, "perturbations.noise.test_levels.0: True: "),
    ("no-pixels", {"perturbations.dead.test_levels": [0]}, "perturbations.dead.test_levels: n_pixels 0 is out"),
    (
        "more-pixels-than-mnist-has",
        {"perturbations.stuck.train_levels": [785]},
        "perturbations.stuck.train_levels: n_pixels 785 is out of range for mnist; give a value above 0 and at most",
    ),
    (
        "more-pixels-than-a-float-holds",
        {"perturbations.stuck.train_levels": [10**400]},
        "perturbations.stuck.train_levels",
    ),
    ("half-a-pixel", {"perturbations.hot.test_levels": [2.5]}, "perturbations.hot.test_levels: 2.5 is not a whole"),
    ("no-noise", {"perturbations.noise.test_levels": [0]}, "perturbations.noise.test_levels: sigma 0 is out"),
    (
        "blur-wider-than-mnist",
        {"perturbations.blur.test_levels": [7.1]},
        "perturbations.blur.test_levels: sigma 7.1 is out of range for mnist; give a value above 0 and at most 7",
    ),
    ("nan-level", {"perturbations.noise.test_levels": [float("nan")]}, "perturbations.noise.test_levels.0: nan: "),
    (
        "inf-rate",
        {"train.recipes.mnist.adam.learning_rate": float("inf")},
        "train.recipes.mnist.adam.learning_rate: inf",
    ),
    (
        "level-twice",
        {"perturbations.hot.test_levels": [3, 1, 3]},
        "perturbations.hot.test_levels: a level",
    ),
    (
        "unknown-perturbation",
        {"perturbations.fog": {"train_levels": [], "test_levels": [1]}},
        f"perturbations: unknown 'fog'; choose from {', '.join(PERTURBATIONS)}",
    ),
    (
        "unknown-data-set",
        {"datasets.svhn": {**PUBLISHED, "n_train": 1000, "n_test": 1000}},
        "datasets: unknown 'svhn'; published are mnist, cifar10",
    ),
    ("no-data-set", {"datasets": {}}, "datasets: empty; name at least one of mnist, cifar10"),
    ("no-variants", {"ablations.mine": {}}, "ablations.mine: no variants; give it at least one, or remove it"),
    ("number-as-name", {"datasets.1": {**PUBLISHED, "n_train": 1000, "n_test": 1000}}, "datasets.1: "),
    ("unknown-source", {"prepare.sources": ["web"]}, "prepare.sources.0: unknown 'web'; choose from 'local'"),
    ("no-source", {"prepare.sources": []}, "prepare.sources: "),
    (
        "unknown-activation",
        {"train.recipes.mnist.network.activation": "gelu"},
        "network.activation: unknown 'gelu'",
    ),
    ("scope-as-bool", {"perturbations.dead.scope": True}, "perturbations.dead.scope: unknown True; choose from"),
    ("mix-as-int", {"perturbations.blur.mix_channels": 1}, "perturbations.blur.mix_channels: unknown 1; choose from"),
    ("no-training-images", {"datasets.mnist.n_train": 0}, "datasets.mnist.n_train: 0: "),
    (
        "more-training-images",
        {"datasets.mnist.n_train": 60_001},
        "datasets.mnist.n_train: 60001 is more than",
    ),
    (
        "kernel-larger-than-the-image",
        {f"{FIRST_CONVOLUTION}.kernel": 29, f"{FIRST_CONVOLUTION}.padding": 0},
        "train.recipes.mnist.network: convolution 1 leaves nothing of a 28x28 image",
    ),
    ("no-filters", {f"{FIRST_CONVOLUTION}.filters": 0}, f"{FIRST_CONVOLUTION}.filters: 0: "),
    ("dropout-of-all", {"train.recipes.mnist.network.dropout": 1.0}, "train.recipes.mnist.network.dropout: 1.0: "),
    (
        "batch-larger-than-the-set",
        {"datasets.mnist.n_train": 499, "train.recipes.mnist.batch_size": 500},
        "train.recipes.mnist.batch_size: 500 is more than the 499 training images",
    ),
    ("batch-of-one", {"train.recipes.mnist.batch_size": 1}, "train.recipes.mnist.batch_size: 1: "),
    ("no-epochs", {"train.recipes.mnist.epochs": 0}, "train.recipes.mnist.epochs: 0: "),
    ("no-learning", {"train.recipes.mnist.adam.learning_rate": 0.0}, "train.recipes.mnist.adam.learning_rate: 0.0: "),
    ("negative-seed", {"perturb.seed": -1}, "perturb.seed: -1: "),
    ("no-training-seed", {"train.seeds": []}, "train.seeds: empty; give at least one"),
    ("a-training-seed-twice", {"train.seeds": [1, 2, 1]}, "train.seeds: a seed stands there twice"),
    (
        "ablation-named-as-a-strategy",
        {"ablations.transfer": {"a": {}}},
        "ablations.transfer: the name of a way of training; choose another",
    ),
    ("too-many-examples", {"impact.n_examples": 21}, "impact.n_examples: 21: "),
    ("unknown-device", {"device": "gpu"}, "device: unknown 'gpu'; choose from auto, cpu, cuda, cuda:N"),
    ("device-with-more-behind-it", {"device": "cuda:1\n"}, r"device: unknown 'cuda:1\n'; choose"),
    ("unknown-strategy", {"strategies.incremntal": {}}, "strategies: unknown 'incremntal'; choose from constant, "),
    ("setting-of-no-strategy", {"strategies.constant.share": 1.0}, "strategies.constant.share: unknown key"),
    ("missing-setting", {"strategies.incremental.end": REMOVED}, "strategies.incremental.end: missing"),
    ("ramp-below-0", {"strategies.incremental.start": -0.1}, "strategies.incremental.start: -0.1: "),
    ("freeze-as-int", {"strategies.transfer.freeze": 1}, "strategies.transfer.freeze: 1: "),
    (
        "transfer-without-recipe",
        {"strategies.transfer.recipes.cifar10": REMOVED},
        "strategies.transfer.recipes: no recipe for 'cifar10'",
    ),
    (
        "fine-tuning-with-a-batch-larger-than-the-set",
        {"strategies.transfer.recipes.mnist.batch_size": 20_001},
        "strategies.transfer.recipes.mnist.batch_size: 20001 is more than the 20000 training images",
    ),
    ("no-strategies", {"strategies": None}, "strategies: "),
    (
        "evaluate-level-out-of-range",
        {"evaluate.levels.noise": [1.5]},
        "evaluate.levels.noise: sigma 1.5 is out of range for mnist; give a value above 0 and at most 1",
    ),
    ("evaluate-without-a-perturbation", {"evaluate.levels.blur": REMOVED}, "evaluate.levels.blur: missing"),
    ("no-cross-trials", {"evaluate.cross_trials": 0}, "evaluate.cross_trials: 0: "),
]


@pytest.mark.parametrize(("changes", "expected"), [pytest.param(*case, id=name) for name, *case in BAD])
def test_a_bad_value_is_refused_with_its_key(
    changes: dict[str, Any], expected: str, quick_values: dict[str, Any]
) -> None:
    problems = problems_of(changed(quick_values, changes))
    assert [problem for problem in problems if expected in problem], problems


GOOD = [
    ("whole-sigma", {"perturbations.noise.test_levels": [1], "perturbations.blur.test_levels": [1, 2]}),
    ("whole-pixels-as-float", {"perturbations.hot.test_levels": [2.0]}),
    ("largest-levels", {"perturbations.hot.test_levels": [784], "perturbations.blur.test_levels": [7.0]}),
    ("no-train-levels", {"perturbations.noise.train_levels": []}),
    ("no-levels", {"perturbations.noise.train_levels": [], "perturbations.noise.test_levels": []}),
    ("levels-in-any-order", {"perturbations.stuck.test_levels": [5, 1, 3]}),
    ("sensor-scope", {"perturbations.stuck.scope": "sensor", "perturbations.dead.scope": "sensor"}),
    ("mix-channels", {"perturbations.blur.mix_channels": True}),
    ("one-data-set", {"datasets.mnist": REMOVED}),
    (
        "levels-that-only-the-other-data-set-refuses",
        {"datasets.mnist": REMOVED, "perturbations.hot.test_levels": [900]},
    ),
    ("one-perturbation-fewer", {"perturbations.stuck": REMOVED}),
    ("one-source", {"prepare.sources": ["local"], "prepare.local_folder": "/somewhere"}),
    ("second-gpu", {"device": "cuda:1"}),
    ("any-gpu", {"device": "cuda"}),
    ("large-seed", {"perturb.seed": 2**200, "train.seeds": [0, 2**63 - 1]}),
    ("whole-rate", {"train.recipes.mnist.adam.learning_rate": 1, "train.recipes.mnist.adam.beta1": 0}),
    ("no-convolutions", {"train.recipes.mnist.network.convolutions": []}),
    ("hidden-layers", {"train.recipes.mnist.network.fully_connected": [256, 512]}),
    ("all-images", {"datasets.mnist.n_train": 60_000, "datasets.mnist.n_test": 10_000}),
    ("no-strategies", {"strategies": {}}),
    ("no-ablations", {"ablations": {}}),
    ("fewer-test-images-than-examples", {"datasets.mnist.n_test": 1}),
    ("one-strategy", {"strategies": {"constant": {}}}),
    ("falling-ramp", {"strategies.incremental": {"start": 1, "end": 0.5}}),
    ("no-evaluate-levels", {"evaluate.levels.noise": []}),
    ("batch-of-the-whole-set", {"datasets.mnist.n_train": 500, "train.recipes.mnist.batch_size": 500}),
]


@pytest.mark.parametrize("changes", [pytest.param(changes, id=name) for name, changes in GOOD])
def test_a_good_value_is_taken_as_it_is(changes: dict[str, Any], quick_values: dict[str, Any]) -> None:
    values = changed(quick_values, changes)
    kept = params.validate(values, WHERE).model_dump(mode="json", serialize_as_any=True)
    assert changed_keys(values, kept) == []


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"perturb.seed": "x", "impact": REMOVED, "extra": 1}, id="of-type"),
        pytest.param(
            {"datasets.mnist.n_train": 70_000, "perturbations.hot.scope": "lens", f"{FIRST_CONVOLUTION}.kernel": 29},
            id="of-meaning",
        ),
        pytest.param(
            {"perturb.seed": "x", "perturbations.hot.scope": "lens", "datasets.mnist.n_train": 70_000}, id="of-both"
        ),
    ],
)
def test_all_problems_are_listed_at_once(changes: dict[str, Any], quick_values: dict[str, Any]) -> None:
    problems = problems_of(changed(quick_values, changes))
    keys = [key.removesuffix(".convolutions.0.kernel") for key in changes]
    assert sorted(problem.split(":")[0] for problem in problems) == sorted(keys)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"perturbations.noise.test_levels": ["5"]}, id="level-as-text"),
        pytest.param({"perturbations.noise.test_levels": [float("nan")]}, id="level-that-is-no-number"),
        pytest.param({"prepare.sources": ["web"]}, id="unknown-source"),
    ],
)
def test_one_mistake_is_one_problem(changes: dict[str, Any], quick_values: dict[str, Any]) -> None:
    assert len(problems_of(changed(quick_values, changes))) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(None, "no such file", id="missing"),
        pytest.param(b"a: [1, 2\nb: 3\n", "not valid YAML", id="unclosed-list"),
        pytest.param(b"seed: 1\nseed: 2\n", "duplicate key", id="key-twice"),
        pytest.param(b"seed: 2004-13-01\n", "not valid YAML", id="date-that-does-not-exist"),
        pytest.param(b"seed: !!int many\n", "not valid YAML", id="tag-that-does-not-fit"),
        pytest.param(b"seed: !!python/object/apply:os.getpid []\n", "not valid YAML", id="tag-that-runs-code"),
        pytest.param(b"a: " + b"[" * 1200, "recursion depth", id="nested-too-deeply"),
        pytest.param(b"a: &a [*a]\n", "more than 100,000 values", id="list-that-contains-itself"),
        pytest.param(b"- device\n- auto\n", "expected keys and values, found list", id="list"),
        pytest.param(b"auto\n", "expected keys and values, found str", id="text"),
        pytest.param(b"", "expected keys and values, found NoneType", id="empty"),
        pytest.param(bytes(range(256)), "not valid YAML", id="binary"),
        pytest.param(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not valid YAML", id="picture"),
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


def test_the_current_folders_params_are_read_by_default(
    tiny_values: dict[str, Any],
    write_params: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_params(changed(tiny_values, {"perturb.seed": 77}))
    assert params.load().perturb.seed == 77


def test_params_cannot_be_changed_after_loading(paper: Params) -> None:
    with pytest.raises(ValueError, match="frozen"):
        paper.perturb.seed = 3  # type: ignore[misc]


def test_a_data_set_that_params_do_not_have_is_refused_with_the_choices(quick_values: dict[str, Any]) -> None:
    loaded = params.validate(changed(quick_values, {"datasets.mnist": REMOVED}), WHERE)
    assert find_dataset(loaded, "cifar10") is DATASETS["cifar10"]
    with pytest.raises(PipelineError, match=r"data set: unknown 'mnist'; params\.yaml has cifar10$"):
        find_dataset(loaded, "mnist")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        pytest.param({"a": 1, "b": {"c": [2]}}, {"b": {"c": [2]}, "a": 1}, [], id="same-in-another-order"),
        pytest.param({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}, [("a.b.c", 1, 2)], id="deep"),
        pytest.param({"a": [1, 2]}, {"a": [2, 1]}, [("a", [1, 2], [2, 1])], id="order-of-a-list"),
        pytest.param({"a": {"b": 1}}, {"a": {}}, [("a.b", 1, None)], id="removed"),
        pytest.param({}, {"a": {"b": 1}}, [("a", None, {"b": 1})], id="added-block"),
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
