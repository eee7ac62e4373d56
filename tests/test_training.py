"""The training loop learns, is reproducible, and does what the recipe says."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.sources import Arrays
from pipeline.evaluation.measuring import Predictor
from pipeline.recipes.plan import plan_natural
from pipeline.recipes.recipe import RECIPES, FastRecipe, Recipe
from pipeline.training.loop import Epoch, Examples, TrainingData, train_model
from pipeline.training.schedules import FastSchedule

CPU = torch.device("cpu")
ADAM = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.999}
SHARED = {
    **{"standardize": "channel", "epochs": 3, "batch_size": 100},
    **{"shuffle": True, "drop_last": True, "precision": "float32"},
}
Splits = tuple[Examples, Examples]  # training and test images


def make_recipe(**changes: Any) -> Recipe:
    convolutions = [{"filters": 6, "kernel": 5, "stride": 2, "padding": 0, "pool": 2}]
    network = {"convolutions": convolutions, "fully_connected": [], "activation": "relu", "batch_norm": True}
    own = {"recipe": "paper", "network": {**network, "dropout": 0.2}, "adam": ADAM}
    return RECIPES.validate_python({**own, **SHARED, **changes})


def make_fast_recipe(**changes: Any) -> FastRecipe:
    own: dict[str, Any] = {
        "recipe": "fast",
        "network": {"widths": [16, 24], "fully_connected": [], "activation": "gelu", "whiten": True},
        "sgd": {"learning_rate": 0.5, "momentum": 0.85, "weight_decay": 0.002, "bias_factor": 16.0, "warm_up": 0.2},
        **{"label_smoothing": 0.1, "flip": True, "shift": 1, "small_images": {"side": 20, "share": 0.5}},
    }
    return FastRecipe.model_validate({**own, **SHARED, **changes})


@pytest.fixture(scope="module")
def splits(tiny_arrays: dict[str, Arrays]) -> Splits:
    arrays = tiny_arrays["cifar10"]
    train, test = (Examples(arrays[split, "images"], arrays[split, "labels"], 10) for split in ("train", "test"))
    return train, test


@pytest.fixture(scope="module")
def few(splits: Splits) -> Splits:
    """Enough for three steps and a part of one."""
    train, test = (Examples(split.images[:330], split.labels[:330], 10) for split in splits)
    return train, test


@pytest.fixture(scope="module")
def textures() -> Splits:
    """Images whose class is what they are covered with; where things lie does not matter to a fast network."""
    rng = np.random.default_rng(5)
    tiles = rng.integers(0, 150, (10, 4, 4, 3), dtype=np.uint8)

    def make(n: int) -> Examples:
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        return Examples(
            np.tile(tiles[labels], (1, 8, 8, 1)) + rng.integers(0, 100, (n, 32, 32, 3), np.uint8), labels, 10
        )

    return make(1230), make(620)


def train_weights(splits: Splits, recipe: Recipe, seed: int = 1) -> dict[str, torch.Tensor]:
    return train_model(plan_natural(recipe), TrainingData(*splits), (seed,), CPU)[0].state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("make", "data", "precision"),
    [
        (make_recipe, "splits", "float32"),
        (make_recipe, "splits", "bfloat16"),
        (make_fast_recipe, "textures", "float32"),
        # A minute on a processor that has no bfloat16.
        pytest.param(make_fast_recipe, "textures", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_it_learns_and_reports_what_the_model_then_does(
    make: Callable[..., Recipe], data: str, precision: str, request: pytest.FixtureRequest
) -> None:
    splits: Splits = request.getfixturevalue(data)
    reported: list[Epoch] = []
    seen: list[int] = []
    recipe = make(precision=precision)
    classifier, curve = train_model(
        plan_natural(recipe), TrainingData(*splits), (1,), CPU, report=reported.append, progress=seen.append
    )
    assert reported == curve
    assert [row.epoch for row in curve] == [1, 2, 3]
    assert sum(seen) == 3 * 1200  # 1,230 images, the last partial batch dropped
    assert curve[-1].train_loss < curve[0].train_loss
    assert curve[-1].test_accuracy > 0.9
    test = splits[1]
    predicted = Predictor(classifier, CPU, precision)(torch.from_numpy(test.images)).argmax(1)
    assert curve[-1].test_accuracy == np.mean(predicted.numpy() == test.labels)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(splits: Splits) -> None:
    recipe = make_recipe(epochs=1)
    first = train_weights(splits, recipe)
    torch.rand(7)  # the state of the global generator does not matter
    assert same(first, train_weights(splits, recipe))
    assert not same(first, train_weights(splits, recipe, seed=2))


FAST = make_fast_recipe().model_dump()
OTHER_SGD = {"learning_rate": 0.4, "momentum": 0.5, "weight_decay": 0.0, "bias_factor": 1.0, "warm_up": 0.0}
ENTRIES: dict[Callable[..., Recipe], list[dict[str, Any]]] = {
    make_recipe: [
        *({"shuffle": False}, {"drop_last": False}, {"standardize": "pixel"}, {"batch_size": 50}),
        *({"adam": {**ADAM, "learning_rate": 0.02}}, {"adam": {**ADAM, "beta1": 0.5}}, {"precision": "bfloat16"}),
    ],
    make_fast_recipe: [
        *({"label_smoothing": 0.0}, {"flip": False}, {"shift": 0}),
        *({"small_images": {"side": side, "share": share}} for side, share in ((20, 0.0), (16, 0.5))),
        *({"network": {**FAST["network"], **change}} for change in ({"activation": "relu"}, {"whiten": False})),
        *({"sgd": {**FAST["sgd"], name: value}} for name, value in OTHER_SGD.items()),
    ],
}


Unchanged = dict[Callable[..., Recipe], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def unchanged(few: Splits) -> Unchanged:
    return {make: train_weights(few, make(epochs=1)) for make in ENTRIES}


@pytest.mark.parametrize(
    ("make", "changes"), [pytest.param(make, one, id=str(one)) for make, all_of in ENTRIES.items() for one in all_of]
)
def test_every_entry_of_a_recipe_counts(
    make: Callable[..., Recipe], changes: dict[str, Any], few: Splits, unchanged: Unchanged
) -> None:
    assert not same(unchanged[make], train_weights(few, make(epochs=1, **changes)))


@pytest.mark.parametrize("whiten", [True, False])
def test_filters_for_patches_are_learned_if_they_do_not_whiten(few: Splits, whiten: bool) -> None:
    network = {**FAST["network"], "whiten": whiten}
    one, two = (train_weights(few, make_fast_recipe(epochs=n, network=network)) for n in (1, 2))
    assert torch.equal(one["network.patches.weight"], two["network.patches.weight"]) == whiten
    assert not torch.equal(one["network.patches.bias"], two["network.patches.bias"])


def test_every_image_is_shown_mirrored_in_every_other_epoch(few: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    is_mirrored: list[torch.Tensor] = []
    augment = FastSchedule.augment

    def spy(schedule: FastSchedule, images: torch.Tensor, flips: torch.Tensor, epoch: int) -> torch.Tensor:
        seen = augment(schedule, images, flips, epoch)
        is_mirrored.append((seen == images.flip(2)).flatten(1).all(1))
        return seen

    monkeypatch.setattr(FastSchedule, "augment", spy)
    train_weights(few, make_fast_recipe(epochs=3, shuffle=False, shift=0))
    first, second, third = (torch.cat(is_mirrored[start : start + 3]) for start in (0, 3, 6))
    assert torch.equal(first, ~second)
    assert torch.equal(first, third)
    assert 115 < first.sum() < 185  # of 300: four standard deviations


def test_it_equals_a_plain_loop_over_the_images_in_order(splits: Splits) -> None:
    train, test = splits
    # No BatchNorm: before one, a bias has no gradient but rounding, which Adam blows up.
    network = {**make_recipe().network.model_dump(), "dropout": 0.0, "batch_norm": False}
    recipe = make_recipe(epochs=1, shuffle=False, network=network)
    found = train_model(plan_natural(recipe), TrainingData(train, test), (3,), CPU)[0]

    frozen = {"learning_rate": 1e-30, "beta1": 0.9, "beta2": 0.999}  # leaves the initial weights
    start = plan_natural(make_recipe(epochs=1, network=network, adam=frozen))
    model = train_model(start, TrainingData(train, test), (3,), CPU)[0].train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.999))
    for first in range(0, 1200, 100):
        images = torch.from_numpy(train.images[first : first + 100])
        labels = torch.from_numpy(train.labels[first : first + 100]).long()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for name, weights in model.state_dict().items():
        assert torch.allclose(weights, found.state_dict()[name], atol=1e-4), name
