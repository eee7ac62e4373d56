"""What a recipe does to optimizer, learning rate and batches, without training."""

import numpy as np
import pytest
import torch

from pipeline.data.sources import Arrays
from pipeline.models.classifier import build_network
from pipeline.training.schedules import FastSchedule, schedule_of
from tests.test_training import make_fast_recipe, make_recipe


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_a_batch_is_mirrored_where_told_and_shifted_as_a_whole(tiny_arrays: dict[str, Arrays], shift: int) -> None:
    images = tiny_arrays["cifar10"]["train", "images"][:50]
    schedule = FastSchedule(make_fast_recipe(shift=shift))
    flips = torch.arange(50) % 3 == 0
    mirrored = np.where(flips.numpy()[:, None, None, None], images[:, :, ::-1], images)
    padded = np.pad(mirrored, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="reflect")
    side = images.shape[1]
    places = [(y, x) for y in range(2 * shift + 1) for x in range(2 * shift + 1)]
    found = set()
    for seed in range(100):
        torch.manual_seed(seed)
        result = schedule.augment(torch.from_numpy(images), flips, epoch=1).numpy()
        matching = [(y, x) for y, x in places if np.array_equal(padded[:, y : y + side, x : x + side], result)]
        assert len(matching) == 1
        found |= set(matching)
    # Of 49 places, 100 draws miss 6 on average.
    assert len(found) > 0.6 * len(places)


def test_the_rate_rises_to_its_full_value_and_falls_to_a_fourteenth() -> None:
    rate = FastSchedule(make_fast_recipe()).rate
    assert [rate(done) for done in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0.2, 0.6, 1, 0.535, 0.07])


def test_images_are_small_for_the_first_share_of_steps() -> None:
    side = FastSchedule(make_fast_recipe(small_images={"side": 20, "share": 0.4})).side
    assert [side(done) for done in (0, 0.399, 0.4, 0.99)] == [20, 20, None, None]


def test_the_paper_changes_neither_rate_nor_images(tiny_arrays: dict[str, Arrays]) -> None:
    schedule = schedule_of(make_recipe())
    images = torch.from_numpy(tiny_arrays["cifar10"]["train", "images"][:50])
    assert torch.equal(schedule.augment(images, torch.ones(50, dtype=torch.bool), epoch=2), images)
    assert (schedule.rate(0.0), schedule.rate(0.9), schedule.side(0.0), schedule.label_smoothing) == (1, 1, None, 0)


def test_biases_learn_faster_and_decay_alike() -> None:
    recipe = make_fast_recipe()
    network = build_network(recipe.network, (32, 32, 3), 10)
    plain, biases = schedule_of(recipe).build_optimizer(network).param_groups
    names = {id(tensor): name for name, tensor in network.named_parameters()}
    assert {names[id(tensor)] for tensor in biases["params"]} == {
        name for name in names.values() if name.endswith("bias") and ("norm" in name or "patches" in name)
    }
    assert biases["lr"] == recipe.sgd.bias_factor * plain["lr"] == recipe.sgd.bias_factor * recipe.sgd.learning_rate
    assert biases["lr"] * biases["weight_decay"] == pytest.approx(plain["lr"] * plain["weight_decay"])
    trained = {id(tensor) for group in (plain, biases) for tensor in group["params"]}
    assert trained == {id(tensor) for tensor in network.parameters() if tensor.requires_grad}
