"""Strategies are plans as data, and the training loop does what a plan says, to the image and to the bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.arrays import Images
from pipeline.data.sources import Arrays
from pipeline.models.classifier import Classifier
from pipeline.recipes.plan import Plan, plan_natural
from pipeline.recipes.recipe import Recipe
from pipeline.recipes.strategies import (
    STRATEGIES,
    FineTuning,
    NoSettings,
    Ramp,
    Repair,
    Repairing,
    Transfer,
    plan_constant,
    plan_incremental,
    plan_transfer,
)
from pipeline.runtime.errors import PipelineError
from pipeline.training.loop import Epoch, Examples, TrainingData, train_model
from tests.test_training import CPU, Splits, make_fast_recipe, make_recipe, same

TUNING = {"fully_connected": (8,), "learning_rate": 0.02, "batch_size": 50, "epochs": 2}


def make_transfer(freeze: bool = False, **changes: Any) -> Transfer:
    return Transfer(freeze=freeze, recipes={"cifar10": FineTuning.model_validate({**TUNING, **changes})})


@pytest.fixture(scope="module")
def splits(tiny_arrays: dict[str, Arrays]) -> Splits:
    arrays = tiny_arrays["cifar10"]
    train, test = (
        Examples(arrays[split, "images"][:n], arrays[split, "labels"][:n], 10)
        for split, n in (("train", 330), ("test", 100))
    )
    return train, test


@pytest.fixture(scope="module")
def perturbed(splits: Splits) -> Images:
    """The training images, inverted."""
    return 255 - splits[0].images


@pytest.fixture(scope="module")
def natural(splits: Splits) -> Classifier:
    return train_model(plan_natural(make_recipe(epochs=1)), TrainingData(*splits), (1,), CPU)[0]


def weights_of(
    plan: Plan, splits: Splits, perturbed: Images | None, natural: Classifier | None = None
) -> dict[str, torch.Tensor]:
    return train_model(plan, TrainingData(splits[0], splits[1], perturbed), (1,), CPU, natural)[0].state_dict()


# Plans.


def test_constant_is_all_perturbed_in_every_epoch_and_for_standardization_too() -> None:
    recipe = make_recipe(epochs=4)
    assert plan_constant(NoSettings(), recipe, "mnist") == Plan(recipe, (1.0,) * 4, fits_on_perturbed=True)


@pytest.mark.parametrize(("epochs", "batch_size"), [(50, 1500), (20, 100), (7, 100), (100, 200), (10, 1000)])
def test_incremental_takes_as_many_images_as_the_authors(epochs: int, batch_size: int) -> None:
    plan = plan_incremental(Ramp(start=0, end=1), make_recipe(epochs=epochs), "mnist")
    taken = [int(share * batch_size) for share in plan.perturbed_share]
    assert taken == [int(epoch / epochs * batch_size) for epoch in range(epochs)]
    assert not plan.fits_on_perturbed
    assert not plan.starts_from_natural


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.05, 0.95), (1.0, 0.25), (0.5, 0.5)])
def test_a_ramp_rises_in_equal_steps_from_its_start_towards_its_end(start: float, end: float) -> None:
    shares = plan_incremental(Ramp(start=start, end=end), make_recipe(epochs=8), "mnist").perturbed_share
    assert shares == pytest.approx(np.linspace(start, end, 9)[:-1])
    assert shares[0] == start
    assert all(0 <= share <= 1 for share in shares)


@pytest.mark.parametrize("freeze", [False, True])
def test_transfer_appends_a_head_and_replaces_rate_batch_and_epochs(freeze: bool) -> None:
    recipe = make_recipe(network={**make_recipe().network.model_dump(), "fully_connected": (16,)})
    before = recipe.model_dump()
    plan = plan_transfer(make_transfer(freeze), recipe, "cifar10")
    expected = {
        **before,
        "network": {**before["network"], "fully_connected": (16, 8)},
        "adam": {**before["adam"], "learning_rate": 0.02},
        "batch_size": 50,
        "epochs": 2,
    }
    assert plan.recipe.model_dump() == expected
    assert plan == Plan(plan.recipe, (1.0, 1.0), True, starts_from_natural=True, freezes_start=freeze)
    assert recipe.model_dump() == before


REPAIRING = Repairing(model="mine", learning_rate=0.01, batch_size=50, epochs=3)
SETTINGS = {
    "constant": NoSettings(),
    "incremental": Ramp(start=0, end=1),
    "transfer": make_transfer(),
    "repair": Repair(share=0.5, recipes={"cifar10": REPAIRING}),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_has_a_share_for_every_epoch(name: str) -> None:
    strategy = STRATEGIES[name]
    assert type(SETTINGS[name]) is strategy.settings
    plan = strategy.plan(SETTINGS[name], make_recipe(epochs=5), "cifar10")
    assert len(plan.perturbed_share) == plan.recipe.epochs
    assert all(0 <= share <= 1 for share in plan.perturbed_share)


# What the loop makes of them.


def test_at_share_0_the_perturbed_images_do_not_matter(splits: Splits, perturbed: Images) -> None:
    plan = plan_natural(make_recipe(epochs=2))
    assert same(weights_of(plan, splits, None), weights_of(plan, splits, perturbed))
    flat = plan_incremental(Ramp(start=0, end=0), plan.recipe, "cifar10")
    assert same(weights_of(plan, splits, None), weights_of(flat, splits, perturbed))


def test_at_share_1_the_clean_images_do_not_matter(splits: Splits, perturbed: Images) -> None:
    train, test = splits
    black = Examples(np.zeros_like(train.images), train.labels, 10)
    plan = plan_constant(NoSettings(), make_recipe(epochs=2), "cifar10")
    found = weights_of(plan, splits, perturbed)
    assert same(found, weights_of(plan, (black, test), perturbed))
    assert not same(found, weights_of(plan, splits, train.images))
    as_natural = plan_natural(plan.recipe)
    assert same(found, weights_of(as_natural, (Examples(perturbed, train.labels, 10), test), None))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The largest value of every image of every batch that is trained on."""
    seen: list[list[int]] = []
    forward = Classifier.forward

    def spy(self: Classifier, images: torch.Tensor, side: int | None = None) -> torch.Tensor:
        if self.training:
            seen.append(images.flatten(1).amax(1).tolist())
        return forward(self, images, side)

    monkeypatch.setattr(Classifier, "forward", spy)
    return seen


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_share_in_between_is_that_share_of_every_batch_rounded_down(
    drop_last: bool, splits: Splits, batches: list[list[int]]
) -> None:
    train = Examples(np.full_like(splits[0].images, 10), splits[0].labels, 10)
    recipe = make_recipe(epochs=3, drop_last=drop_last)
    plan = Plan(recipe, (0.0, 0.333, 0.5), fits_on_perturbed=False)
    weights_of(plan, (train, splits[1]), np.full_like(train.images, 200))
    sizes = [100] * 3 + ([] if drop_last else [30])
    expected = [(int(share * size), size - int(share * size)) for share in (0, 0.333, 0.5) for size in sizes]
    assert [(batch.count(200), batch.count(10)) for batch in batches] == expected


def test_perturbed_images_keep_their_labels_and_are_not_the_clean_ones_again(
    splits: Splits, batches: list[list[int]]
) -> None:
    train = Examples(splits[0].images[:120].copy(), splits[0].labels[:120], 10)
    train.images[:] = 2 * np.arange(120)[:, None, None, None]
    plan = Plan(make_recipe(epochs=1, batch_size=60), (0.5,), fits_on_perturbed=False)
    weights_of(plan, (train, splits[1]), train.images + np.uint8(1))
    assert [[value % 2 for value in batch] for batch in batches] == [[1] * 30 + [0] * 30] * 2
    assert sorted(value // 2 for batch in batches for value in batch) == list(range(120))


@pytest.mark.parametrize("fits_on_perturbed", [False, True])
def test_standardization_is_fitted_on_the_images_that_the_plan_names(
    fits_on_perturbed: bool, splits: Splits, perturbed: Images
) -> None:
    plan = replace(plan_natural(make_recipe(epochs=1)), fits_on_perturbed=fits_on_perturbed)
    images = perturbed if fits_on_perturbed else splits[0].images
    mean = weights_of(plan, splits, perturbed)["standardize.mean"]
    assert torch.allclose(mean.flatten(), torch.from_numpy(images.mean(axis=(0, 1, 2))).float())


@pytest.mark.parametrize(
    ("make", "blocks"), [(make_recipe, ["block1"]), (make_fast_recipe, ["patches", "group1", "group2"])]
)
def test_transfer_starts_with_the_natural_layers_and_a_new_head(
    make: Callable[..., Recipe], blocks: list[str], splits: Splits, perturbed: Images
) -> None:
    recipe = make(epochs=1)
    natural = train_model(plan_natural(recipe), TrainingData(*splits), (1,), CPU)[0]
    plan = plan_transfer(make_transfer(learning_rate=1e-30), recipe, "cifar10")
    found, given = weights_of(plan, splits, perturbed, natural), natural.state_dict()
    for block in blocks:
        kept = [name for name in found if f".{block}." in name and name.endswith(("weight", "bias"))]
        assert kept
        assert [name for name in kept if not torch.equal(found[name], given[name])] == []
    assert found["network.hidden1.weight"].shape == (8, given["network.output.weight"].shape[1])
    assert found["network.output.weight"].shape == (10, 8)
    assert plan.recipe.learning_rate == 1e-30


def test_a_new_output_of_the_old_size_does_not_start_as_the_old_one(
    splits: Splits, perturbed: Images, natural: Classifier
) -> None:
    plan = plan_transfer(make_transfer(fully_connected=(), learning_rate=1e-30), make_recipe(), "cifar10")
    found = weights_of(plan, splits, perturbed, natural)
    assert not torch.equal(found["network.output.weight"], natural.state_dict()["network.output.weight"])


def test_transfer_leaves_the_natural_model_as_it_was(splits: Splits, perturbed: Images, natural: Classifier) -> None:
    before = {name: tensor.clone() for name, tensor in natural.state_dict().items()}
    weights_of(plan_transfer(make_transfer(freeze=True), make_recipe(), "cifar10"), splits, perturbed, natural)
    assert same(before, natural.state_dict())
    assert all(weights.requires_grad for weights in natural.parameters())


def test_frozen_layers_stay_bit_identical_while_the_head_learns(
    splits: Splits, perturbed: Images, natural: Classifier
) -> None:
    recipe = make_recipe()
    found = weights_of(plan_transfer(make_transfer(freeze=True), recipe, "cifar10"), splits, perturbed, natural)
    start = plan_transfer(make_transfer(freeze=True, learning_rate=1e-30), recipe, "cifar10")
    begun = weights_of(start, splits, perturbed, natural)
    given = natural.state_dict()
    shared = [name for name in found if name.split(".")[1] == "block1"]
    assert "network.block1.norm.running_mean" in shared
    assert [name for name in shared if not torch.equal(found[name], given[name])] == []
    assert not torch.equal(found["network.hidden1.weight"], begun["network.hidden1.weight"])
    assert not torch.equal(found["network.output.weight"], begun["network.output.weight"])


def test_without_freezing_all_layers_learn(splits: Splits, perturbed: Images, natural: Classifier) -> None:
    found = weights_of(plan_transfer(make_transfer(), make_recipe(), "cifar10"), splits, perturbed, natural)
    assert not torch.equal(found["network.block1.conv.weight"], natural.state_dict()["network.block1.conv.weight"])


def test_a_strategy_that_starts_from_a_natural_model_needs_one(splits: Splits, perturbed: Images) -> None:
    with pytest.raises(PipelineError, match="starts from another model, and there is none"):
        weights_of(plan_transfer(make_transfer(), make_recipe(), "cifar10"), splits, perturbed)


class KilledError(Exception):
    pass


RESUMED = {
    "incremental": plan_incremental(Ramp(start=0.2, end=1), make_recipe(epochs=4), "cifar10"),
    "transfer": plan_transfer(make_transfer(epochs=4), make_recipe(), "cifar10"),
    "frozen": plan_transfer(make_transfer(freeze=True, epochs=4), make_recipe(), "cifar10"),
    "fast": plan_incremental(Ramp(start=0.2, end=1), make_fast_recipe(epochs=4), "cifar10"),
}


@pytest.mark.parametrize("plan", RESUMED.values(), ids=RESUMED)
def test_training_that_was_killed_goes_on_to_the_same_weights_and_curve(
    plan: Plan, splits: Splits, perturbed: Images, natural: Classifier, tmp_path: Path
) -> None:
    def train(kill_after: int | None, checkpoint: Path | None) -> tuple[Classifier, list[Epoch], list[int]]:
        reported: list[int] = []

        def report(epoch: Epoch) -> None:
            reported.append(epoch.epoch)
            if epoch.epoch == kill_after:
                raise KilledError

        found = train_model(plan, TrainingData(splits[0], splits[1], perturbed), (1,), CPU, natural, checkpoint, report)
        return *found, reported

    whole, whole_curve, _ = train(None, None)
    for n_done in (1, 4):
        checkpoint = tmp_path / f"{n_done}.checkpoint"
        with pytest.raises(KilledError):
            train(n_done, checkpoint)
        torch.rand(5)
        resumed, curve, reported = train(None, checkpoint)
        assert reported == list(range(n_done + 1, 5))
        assert curve == whole_curve
        assert same(whole.state_dict(), resumed.state_dict())
    assert {path.name for path in tmp_path.iterdir()} == {"1.checkpoint", "4.checkpoint"}
