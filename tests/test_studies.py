"""Whatever `check` accepts, the ints graph can run: every stage, on params that nobody thought of, and then verify."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

from pipeline.perturbations import PERTURBATIONS
from pipeline.runtime import layout
from pipeline.runtime.errors import PipelineError
from pipeline.study.params import validate
from tests.conftest import ROOT, WriteParams
from tests.test_params import changed
from tests.test_properties import examples
from tests.test_stages import run

# How many images there are decides how long a study takes.
MOST_IMAGES = 40
LEVELS: dict[str, list[float]] = {
    **{"stuck": [1, 2.0, 300], "hot": [1, 3, 200.0], "dead": [1, 5, 784]},
    **{"noise": [1e-05, 0.05, 1], "blur": [0.1, 1, 2.5, 7.0]},
}
NAMES = st.from_regex(r"\A[a-z0-9_]{1,6}\Z") | st.sampled_from(
    ["natural", "components", "standardization", "test", "1"]
)


def some_of(values: list[Any], least: int = 0, most: int | None = None) -> st.SearchStrategy[list[Any]]:
    """Some of `values`, in any order, each once."""
    return st.lists(st.sampled_from(values), unique=True, min_size=least, max_size=most)


def blocks(**values: Any) -> st.SearchStrategy[dict[str, Any]]:
    """A block with these keys; what is no strategy is a value."""
    return st.fixed_dictionaries(
        {name: value if isinstance(value, st.SearchStrategy) else st.just(value) for name, value in values.items()}
    )


ints = st.integers
CONVOLUTIONS = blocks(filters=ints(1, 4), kernel=ints(1, 7), stride=ints(1, 3), padding=ints(0, 2), pool=ints(1, 3))
WIDTHS = st.lists(ints(1, 6), max_size=2)


def tunings(n_train: int) -> st.SearchStrategy[dict[str, Any]]:
    batch_size = ints(2, max(2, n_train))
    return blocks(fully_connected=WIDTHS, learning_rate=0.001, batch_size=batch_size, epochs=ints(1, 2))


def recipes(n_train: int) -> st.SearchStrategy[dict[str, Any]]:
    shared: dict[str, Any] = {
        "standardize": st.sampled_from(["pixel", "channel", "none"]),
        "epochs": ints(1, 2),
        "batch_size": ints(2, max(2, n_train)),
        "shuffle": st.booleans(),
        "drop_last": st.booleans(),
        "precision": st.sampled_from(["float32", "bfloat16", "auto"]),
    }
    paper = blocks(
        recipe="paper",
        network=blocks(
            convolutions=st.lists(CONVOLUTIONS, max_size=2),
            fully_connected=WIDTHS,
            activation=st.sampled_from(["relu", "tanh"]),
            batch_norm=st.booleans(),
            dropout=st.sampled_from([0, 0.0, 0.3]),
        ),
        adam=blocks(learning_rate=st.sampled_from([0.01, 0.001]), beta1=st.sampled_from([0, 0.9]), beta2=0.999),
        **shared,
    )
    fast = blocks(
        recipe="fast",
        network=blocks(
            widths=st.lists(ints(1, 8), min_size=1, max_size=3),
            fully_connected=WIDTHS,
            activation=st.sampled_from(["relu", "tanh", "gelu"]),
            whiten=st.booleans(),
        ),
        sgd=blocks(
            learning_rate=0.01,
            momentum=0.85,
            weight_decay=st.sampled_from([0, 0.001]),
            bias_factor=st.sampled_from([1, 4.0]),
            warm_up=st.sampled_from([0, 0.23]),
        ),
        label_smoothing=st.sampled_from([0, 0.2]),
        flip=st.booleans(),
        shift=ints(0, 3),
        small_images=blocks(side=st.sampled_from([9, 16, 40]), share=st.sampled_from([0, 0.5, 1])),
        **shared,
    )
    return st.one_of(paper, fast)


NETWORKS = ({"activation": "tanh"}, {"fully_connected": [3]}, {"dropout": 0.0}, {"batch_norm": False})
CHANGES = st.sampled_from(
    [
        *({}, {"standardize": "none"}, {"standardize": "channel", "epochs": 1}),
        *({"network": changes} for changes in NETWORKS),
        {"shuffle": False, "precision": "float32"},
    ]
)


@st.composite
def studies(draw: st.DrawFn) -> dict[str, Any]:
    """Values of a params.yaml, valid more often than not."""
    subsets: dict[str, dict[str, Any]] = {
        name: {
            "source": {"kind": "canonical", "path": "pipeline/data/datasets.py"},
            "n_train": draw(ints(1, MOST_IMAGES)),
            "n_test": draw(ints(1, MOST_IMAGES)),
        }
        for name in draw(some_of(["mnist", "cifar10"], least=1))
    }
    perturbations = {}
    for name in draw(some_of(list(PERTURBATIONS), least=1)):
        options = {option: draw(st.sampled_from(choices)) for option, choices in PERTURBATIONS[name].options.items()}
        levels = {kind: draw(some_of(LEVELS[name], most=2)) for kind in ("train_levels", "test_levels")}
        perturbations[name] = {**levels, **options}
    tested = draw(some_of(list(PERTURBATIONS)).map(lambda others: list(dict.fromkeys([*perturbations, *others]))))
    sizes = {name: subset["n_train"] for name, subset in subsets.items()}
    settings_of = {
        "constant": st.just({}),
        "incremental": blocks(start=st.sampled_from([0, 0.3, 1.0]), end=st.sampled_from([0, 0.5, 1])),
        "transfer": blocks(
            freeze=st.booleans(),
            recipes=blocks(**{name: tunings(n_train) for name, n_train in sizes.items()}),
        ),
    }
    return {
        "device": draw(st.sampled_from(["cpu", "auto"])),
        "datasets": subsets,
        "prepare": {"sources": ["local"], "local_folder": None, "download_folder": "downloads"},
        "perturbations": perturbations,
        "perturb": {"seed": draw(st.sampled_from([0, 2004, 2**70])), "trials": draw(ints(1, 3))},
        "train": {
            "seeds": draw(some_of([0, 1, 2**40], least=1, most=2)),
            "recipes": {name: draw(recipes(n_train)) for name, n_train in sizes.items()},
        },
        "impact": {"batch_size": draw(ints(1, 50)), "n_examples": draw(ints(1, 20))},
        "models": {},
        "strategies": {name: draw(settings_of[name]) for name in draw(some_of(list(settings_of)))},
        "evaluate": {
            "batch_size": draw(ints(1, 50)),
            "levels": {name: draw(some_of(LEVELS[name], most=2)) for name in tested},
            "cross_trials": draw(ints(1, 3)),
        },
        "ablations": draw(st.dictionaries(NAMES, st.dictionaries(NAMES, CHANGES, min_size=1, max_size=2), max_size=2)),
    }


def is_valid(values: dict[str, Any]) -> bool:
    try:
        validate(values, layout.PARAMS)
    except PipelineError:
        return False
    return True


def commands(values: dict[str, Any]) -> list[list[str]]:
    """The stages of dvc.yaml, in an order that it allows, and verify; without prepare, which no other block decides."""
    made = [["check"]]
    for dataset in values["datasets"]:
        made += [["perturb", dataset, name] for name in values["perturbations"]]
        made += [[stage, dataset] for stage in ("train", "impact", "strategies", "evaluate", "ablations")]
    return [*made, ["report"], ["verify"]]


@pytest.fixture
def place(study: Path, in_process: None) -> Path:
    """The current folder, with profiles, and the clean stores in `clean`."""
    shutil.copytree(ROOT / "profiles", "profiles")
    Path("data/clean").rename("clean")
    return study


def run_all(values: dict[str, Any], write_params: WriteParams) -> None:
    for folder in ("models", "metrics", "data"):
        shutil.rmtree(folder, ignore_errors=True)
    for dataset in values["datasets"]:  # others would be leftovers
        shutil.copytree(f"clean/{dataset}.zarr", layout.clean_store(dataset))
    write_params(values)
    for command in commands(values):
        result = run(*command)
        assert result.exit_code == 0, (command, result.output, result.exception, values)


# A smaller study that fails too would take minutes to find.
PATIENT: dict[str, Any] = {"phases": (Phase.explicit, Phase.generate), "suppress_health_check": list(HealthCheck)}


NO_LEVELS = (("perturbations", ".train_levels"), ("perturbations", ".test_levels"), ("evaluate.levels", ""))


@pytest.mark.parametrize(
    "changes",
    [
        {"datasets.mnist.n_test": 3, "impact.n_examples": 8, "perturbations.noise.train_levels": []},
        {"evaluate.levels.noise": []},
        {"strategies": {}, "evaluate.levels.noise": [], "perturbations.noise.test_levels": []},
        {f"{block}.noise{of}": [] for block, of in NO_LEVELS},
    ],
    ids=["fewer-test-images-than-examples", "nothing-tested", "nothing-measured", "no-levels"],
)
def test_a_small_study_can_run(
    changes: dict[str, Any], tiny_values: dict[str, Any], place: Path, write_params: WriteParams
) -> None:
    tiny_values["datasets"] = {"mnist": {**tiny_values["datasets"]["mnist"], "n_train": 40, "n_test": 20}}
    tiny_values["perturbations"] = {"noise": {"train_levels": [0.05], "test_levels": [0.05]}}
    tiny_values["evaluate"]["levels"] = {"noise": [0.1]}
    tiny_values["ablations"] = {"mine": {"none": {"standardize": "none"}}}
    for block in (tiny_values["train"]["recipes"], tiny_values["strategies"]["transfer"]["recipes"]):
        block["mnist"].update(batch_size=20, epochs=1)
    run_all(changed(tiny_values, changes), write_params)


@examples(1, **PATIENT)
@given(values=studies().filter(is_valid))
def test_what_check_accepts_can_run(values: dict[str, Any], place: Path, write_params: WriteParams) -> None:
    run_all(values, write_params)


@pytest.mark.slow
@examples(int(os.environ.get("N_STUDIES", "60")), **PATIENT)
@given(values=studies().filter(is_valid))
def test_what_check_accepts_can_run_whatever_it_is(
    values: dict[str, Any], place: Path, write_params: WriteParams
) -> None:
    run_all(values, write_params)
