"""The builder, the standardization and the files of a network."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from torch import nn

from pipeline.errors import PipelineError
from pipeline.networks import (
    Classifier,
    Standardize,
    build_network,
    fit_standardization,
    load,
    logits_of,
    save,
)
from pipeline.recipes import Network
from tests.conftest import ROOT

CPU = torch.device("cpu")


def make_network(**changes: Any) -> Network:
    values: dict[str, Any] = {
        "convolutions": [
            {"filters": 4, "kernel": 3, "stride": 1, "padding": 1, "pool": 1},
            {"filters": 6, "kernel": 3, "stride": 1, "padding": 0, "pool": 2},
        ],
        "fully_connected": [],
        "activation": "relu",
        "batch_norm": True,
        "dropout": 0.2,
    }
    return Network.model_validate({**values, **changes})


def make_images(n: int, shape: tuple[int, int, int] = (12, 12, 3)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


def make_classifier(network: Network, shape: tuple[int, int, int] = (12, 12, 3)) -> Classifier:
    torch.manual_seed(0)
    standardize = Standardize(*fit_standardization(make_images(50, shape), "pixel"))
    return Classifier(shape, standardize, build_network(network, shape)).eval()


def layer_types(network: Network) -> list[str]:
    return [type(layer).__name__ for layer in build_network(network, (12, 12, 3))]


def test_a_block_is_convolution_norm_activation_pool_dropout() -> None:
    assert layer_types(make_network()) == [
        *("Conv2d", "BatchNorm2d", "ReLU"),
        *("Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Dropout"),
        *("Flatten", "Linear"),
    ]


@pytest.mark.parametrize(
    ("changes", "absent", "present"),
    [
        pytest.param({"batch_norm": False}, "BatchNorm2d", "Dropout", id="no-norm"),
        pytest.param({"dropout": 0.0}, "Dropout", "BatchNorm2d", id="no-dropout"),
        pytest.param({"activation": "tanh"}, "ReLU", "Tanh", id="tanh"),
    ],
)
def test_parts_of_table_1_can_be_left_out(changes: dict[str, Any], absent: str, present: str) -> None:
    types = layer_types(make_network(**changes))
    assert absent not in types
    assert present in types


def test_hidden_layers_come_before_the_output() -> None:
    network = build_network(make_network(fully_connected=[32, 16]), (12, 12, 3))
    widths = [(layer.in_features, layer.out_features) for layer in network if isinstance(layer, nn.Linear)]
    assert widths == [(6 * 5 * 5, 32), (32, 16), (16, 10)]


@pytest.mark.parametrize(
    ("dataset", "shape", "n_features", "n_weights"),
    [
        # One convolution with its norm, and the output layer.
        ("mnist", (28, 28, 1), 160, (49 * 10 + 10) + 2 * 10 + (160 * 10 + 10)),
        (
            "cifar10",
            (32, 32, 3),
            2048,
            sum(
                9 * before * after + after + 2 * after
                for before, after in itertools.pairwise([3, 64, 64, 128, 128, 256, 256, 512, 512])
            )
            + (2048 * 10 + 10),
        ),
    ],
)
def test_the_papers_networks(dataset: str, shape: tuple[int, int, int], n_features: int, n_weights: int) -> None:
    values = YAML(typ="safe", pure=True).load((ROOT / "profiles/paper.yaml").read_text())
    network = Network.model_validate(values["train"]["recipes"][dataset]["network"])
    assert network.n_features(shape) == n_features
    assert sum(weights.numel() for weights in build_network(network, shape).parameters()) == n_weights


@pytest.mark.parametrize("mode", ["pixel", "channel", "none"])
def test_standardization_is_numpys_mean_and_standard_deviation(mode: str) -> None:
    images = make_images(2345)
    scaled = images.astype(np.float64)
    expected = {
        "pixel": (scaled - scaled.mean(0)) / scaled.std(0),
        "channel": (scaled - scaled.mean((0, 1, 2))) / scaled.std((0, 1, 2)),
        "none": scaled / 255,
    }[mode]
    found = Standardize(*fit_standardization(images, mode))(torch.from_numpy(images))
    assert found.shape == (2345, 3, 12, 12)
    assert np.allclose(found.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


def test_positions_that_never_vary_become_zero_whatever_comes_in() -> None:
    images = make_images(100)
    images[:, 3, 4, 1] = 77
    standardize = Standardize(*fit_standardization(images, "pixel"))
    other = torch.from_numpy(make_images(5) ^ 0xFF)
    found = standardize(other)
    assert (found[:, 1, 3, 4] == 0).all()
    assert (found[:, 0, 3, 4] != 0).any()


def test_a_saved_network_comes_back_the_same(tmp_path: Path) -> None:
    network = make_network(fully_connected=[8])
    classifier = make_classifier(network)
    save(classifier, tmp_path / "a.safetensors", {"network": network.model_dump(mode="json"), "shape": [12, 12, 3]})
    images = make_images(20)
    loaded = load(tmp_path / "a.safetensors", "make it")
    expected, found = (logits_of(model, images, CPU, torch.float32, 7) for model in (classifier, loaded))
    assert np.array_equal(expected, found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.safetensors"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        pytest.param("network", None, "damaged model", id="no-network"),
        pytest.param("shape", [16, 16, 3], "damaged model", id="other-shape"),
        pytest.param("weights_sha256", "0" * 64, "not those that a.json describes", id="other-weights"),
        pytest.param("schema_version", 0, "schema version 0", id="other-version"),
        pytest.param("seed", 2, "seed is 2, params.yaml asks for 1", id="other-params"),
    ],
)
def test_a_description_that_disagrees_is_an_error(tmp_path: Path, key: str, value: Any, message: str) -> None:
    network = make_network()
    description = {"network": network.model_dump(mode="json"), "shape": [12, 12, 3], "seed": 1}
    save(make_classifier(network), tmp_path / "a.safetensors", description)
    file = tmp_path / "a.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(PipelineError, match=message):
        load(tmp_path / "a.safetensors", "make it", {"seed": 1})


def test_logits_do_not_depend_on_the_batch_size() -> None:
    classifier, images = make_classifier(make_network()), make_images(33)
    one, other = (logits_of(classifier, images, CPU, torch.float32, size) for size in (33, 8))
    assert np.allclose(one, other, atol=1e-5)
    assert np.array_equal(one.argmax(1), other.argmax(1))


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(PipelineError, match="do not fit"):
        logits_of(make_classifier(make_network()), make_images(2, (16, 16, 3)), CPU, torch.float32, 8)
