"""The builder, the standardization and the files of a network."""

import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from pipeline.data.datasets import DATASETS
from pipeline.evaluation.measuring import Predictor, _predict
from pipeline.models.accelerated import windows
from pipeline.models.classifier import Classifier, build_network, first_layer, fit_standardization
from pipeline.models.devices import images_per_pass
from pipeline.models.layers import Group, Standardize, Whitening
from pipeline.models.storage import load, save, write
from pipeline.recipes.recipe import Convolution, FastNetwork, Network
from pipeline.runtime.errors import PipelineError
from pipeline.study import params
from tests.conftest import ROOT, differing, tree

CPU = torch.device("cpu")
Shape = tuple[int, int, int]
# Convolved and pooled in one, where the windows cover all.
WINDOWED = [
    pytest.param((12, 12, 1), {"filters": 4, "kernel": 5, "stride": 1, "padding": 0, "pool": 2}, id="grey"),
    pytest.param((28, 28, 1), {"filters": 10, "kernel": 7, "stride": 3, "padding": 0, "pool": 2}, id="mnist"),
    pytest.param((14, 14, 1), {"filters": 5, "kernel": 3, "stride": 2, "padding": 3, "pool": 3}, id="padded-pool-3"),
    pytest.param((9, 12, 1), {"filters": 7, "kernel": 1, "stride": 1, "padding": 0, "pool": 3}, id="not-square"),
    pytest.param((16, 16, 1), {"filters": 64, "kernel": 16, "stride": 5, "padding": 7, "pool": 3}, id="largest-kernel"),
]
OTHERS = [
    # Side 13 after the convolution.
    pytest.param((13, 13, 1), {"filters": 4, "kernel": 3, "stride": 1, "padding": 1, "pool": 2}, id="leaves-a-row"),
    pytest.param((12, 12, 1), {"filters": 65, "kernel": 3, "stride": 1, "padding": 1, "pool": 2}, id="many-filters"),
    pytest.param((12, 12, 1), {"filters": 4, "kernel": 3, "stride": 1, "padding": 1, "pool": 1}, id="no-pool"),
    pytest.param((12, 12, 3), {"filters": 4, "kernel": 3, "stride": 1, "padding": 1, "pool": 2}, id="colour"),
]


def make_network(**changes: Any) -> Network:
    convolution = {"filters": 4, "kernel": 3, "stride": 1, "padding": 1, "pool": 1}
    values = {
        "convolutions": [convolution, {**convolution, "filters": 6, "padding": 0, "pool": 2}],
        **{"fully_connected": [], "activation": "relu", "batch_norm": True, "dropout": 0.2},
    }
    return Network.model_validate({**values, **changes})


def describe(network: Network | FastNetwork, *, n_classes: int = 10, **more: Any) -> dict[str, Any]:
    return {"network": network.model_dump(mode="json"), "shape": [12, 12, 3], "n_classes": n_classes, **more}


def make_images(n: int, shape: Shape = (12, 12, 3)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


def make_classifier(
    network: Network | FastNetwork, shape: Shape = (12, 12, 3), n_classes: int = 10, mode: str = "pixel"
) -> Classifier:
    """Standardizes by images with a corner that never varies."""
    torch.manual_seed(0)
    seen = make_images(50, shape)
    seen[:, :3, :3] = 7
    standardize = Standardize(*fit_standardization(seen, mode))
    return Classifier(shape, standardize, build_network(network, shape, n_classes)).eval()


def unsettle_norms(network: nn.Module) -> None:
    """Scales of either sign, shifts and statistics, as if BatchNorm had been trained."""
    with torch.no_grad():
        for name, values in network.state_dict().items():
            if "norm" in name and values.is_floating_point():
                values.uniform_(-1, 1) if name.endswith(("weight", "bias", "mean")) else values.uniform_(0.5, 2)


def plain_layers(network: Network, shape: Shape) -> nn.Sequential:
    """The network of torch's own layers, in the authors' order, with the weights of `build_network` after seed 0."""
    activation = {"relu": nn.ReLU, "tanh": nn.Tanh}[network.activation]
    layers: list[nn.Module] = []
    channels = shape[2]
    for layer in network.convolutions:
        conv = nn.Conv2d(channels, layer.filters, layer.kernel, stride=layer.stride, padding=layer.padding)
        layers += [conv, *([nn.BatchNorm2d(layer.filters)] if network.batch_norm else []), activation()]
        layers += [nn.MaxPool2d(layer.pool)] if layer.pool > 1 else []
        channels = layer.filters
    layers += [nn.Flatten(), nn.Linear(network.n_features(shape), 10)]
    return nn.Sequential(*layers)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str = "") -> None:
    scale = max(1, expected.abs().max().item())
    assert torch.allclose(found.double(), expected.double(), atol=tolerance * scale), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", ["pixel", "channel", "none"])
@pytest.mark.parametrize("changes", [{}, {"batch_norm": False}, {"activation": "tanh"}], ids=str)
@pytest.mark.parametrize(
    ("shape", "convolution", "is_windowed"),
    [pytest.param(*case.values, case in WINDOWED, id=case.id) for case in WINDOWED + OTHERS],
)
def test_a_block_is_convolution_norm_activation_and_pool_in_values_gradients_and_statistics(
    shape: Shape, convolution: dict[str, int], is_windowed: bool, changes: Any, mode: str, training: bool
) -> None:
    network = make_network(convolutions=[convolution], dropout=0.0, **changes)
    built = make_classifier(network, shape, mode=mode).train(training)
    plain = plain_layers(network, shape).train(training)
    unsettle_norms(built)
    plain.load_state_dict(dict(zip(plain.state_dict(), built.network.state_dict().values(), strict=True)))
    assert (first_layer(built.network).native_code(CPU) is not None) == is_windowed
    images = torch.from_numpy(make_images(40, shape) ^ 0xFF)
    # In float64: rounding would choose another of two maxima that are almost equal.
    expected, found = plain.double()(built.standardize(images).double()), built(images).double()
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())
    weighted = torch.randn(expected.shape)
    for logits in (expected, found):
        (logits * weighted).sum().backward()
    for (name, weights), same in zip(built.network.named_parameters(), plain.parameters(), strict=True):
        assert same.grad is not None
        # Before BatchNorm, a bias has no gradient but rounding.
        assert_close(torch.zeros_like(same) if weights.grad is None else weights.grad, same.grad, 1e-3, name)
    for (name, values), expected_values in zip(built.network.named_buffers(), plain.buffers(), strict=True):
        assert_close(values, expected_values, 1e-5, name)


@pytest.mark.parametrize(("shape", "convolution"), WINDOWED)
def test_bfloat16_is_near_float32(shape: Shape, convolution: dict[str, int]) -> None:
    classifier = make_classifier(make_network(convolutions=[convolution], fully_connected=[8]), shape)
    unsettle_norms(classifier)
    images = torch.from_numpy(make_images(40, shape) ^ 0xFF)
    expected, found = (Predictor(classifier, CPU, name)(images) for name in ("float32", "bfloat16"))
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def predict_in_batches(models: dict[Any, Predictor], images: torch.Tensor, n: int) -> dict[Any, np.ndarray]:
    parts = [_predict(models, part) for part in torch.split(images, n)]
    return {name: np.concatenate([part[name] for part in parts]) for name in models}


def window_block(classifier: Classifier) -> windows.WindowBlock:
    block = classifier.network[0]
    assert isinstance(block, windows.WindowBlock)
    return block


def values_of_block(classifier: Classifier, images: np.ndarray) -> torch.Tensor:
    return window_block(classifier).of_raw(torch.from_numpy(images), classifier.standardize)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize(("shape", "convolution"), WINDOWED)
def test_dropout_in_a_window_block_is_a_mask_after_it(
    shape: Shape, convolution: dict[str, int], activation: str
) -> None:
    found = []
    kept = torch.ones(())
    for p in (0.3, 0.0):
        network = make_network(convolutions=[convolution], activation=activation, dropout=p)
        classifier = make_classifier(network, shape).train()
        unsettle_norms(classifier)
        torch.manual_seed(1)
        values = values_of_block(classifier, make_images(30, shape))
        if p:
            kept = values.detach() != 0
        else:
            values = values * kept / 0.7
        torch.autograd.backward((values * torch.arange(values.numel()).view_as(values)).sum())
        weights = window_block(classifier).parameters()
        found.append([values, *(weight.grad for weight in weights if weight.grad is not None)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_a_window_block_drops_each_value_with_the_same_probability_and_on_its_own(p: float) -> None:
    convolution = WINDOWED[1].values[1]
    classifier = make_classifier(make_network(convolutions=[convolution], batch_norm=False, dropout=p), (28, 28, 1))
    classifier.train()
    conv = window_block(classifier).conv
    assert conv.bias is not None
    nn.init.zeros_(conv.weight)
    nn.init.ones_(conv.bias)  # so that no value is 0 unless it was dropped
    n, images = 4000, make_images(2000, (28, 28, 1))
    torch.manual_seed(3)
    dropped = torch.cat([values_of_block(classifier, images) == 0 for _ in range(2)]).view(n, -1).double().numpy()
    torch.manual_seed(3)
    again = values_of_block(classifier, images) == 0
    assert np.array_equal(dropped[: n // 2], again.view(n // 2, -1).numpy())
    errors = (dropped.mean(axis=0) - p) / np.sqrt(p * (1 - p) / n)  # of every place, over all images
    assert np.abs(errors).max() < 5
    assert 0.5 < errors.var() < 1.5
    stream = (dropped.reshape(-1) - p) / np.sqrt(p * (1 - p))
    assert abs(stream.mean()) < 5 / np.sqrt(stream.size)
    for lag in (1, 2, 3, 4, 8, 160, 1600, stream.size // 2):
        assert abs((stream[lag:] * stream[:-lag]).mean()) < 5 / np.sqrt(stream.size - lag), lag


def test_without_a_compiler_torchs_layers_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, images = (28, 28, 1), torch.from_numpy(make_images(30, (28, 28, 1)))
    classifier = make_classifier(make_network(convolutions=[WINDOWED[1].values[1]]), shape)
    expected = classifier(images)
    monkeypatch.setattr(windows, "_library", lambda geometry: None)
    assert window_block(classifier).native_code(CPU) is None
    found = classifier(images)
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.equal(found, expected)


def test_a_window_block_takes_uint8_images_of_its_shape_and_float32_weights_only() -> None:
    shape, images = (28, 28, 1), torch.from_numpy(make_images(30, (28, 28, 1)))
    classifier = make_classifier(make_network(convolutions=[WINDOWED[1].values[1]]), shape)
    for wrong in (images.float(), images[:, :14], images.squeeze(3)):
        with pytest.raises(ValueError, match=r"^images: torch\..*, expected torch.uint8 \(N, 28, 28, 1\)"):
            window_block(classifier).of_raw(wrong, classifier.standardize)
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(RuntimeError, match=r"type"):  # torch's, as for any other layer
            make_classifier(make_network(convolutions=[WINDOWED[1].values[1]]), shape).to(dtype)(images)


def test_a_window_block_is_not_used_where_its_output_would_not_fit_on_the_stack() -> None:
    convolution = Convolution(filters=64, kernel=3, stride=1, padding=1, pool=2)
    assert windows.WindowBlock.fits(convolution, (64, 64, 1))
    assert not windows.WindowBlock.fits(convolution, (512, 512, 1))


def test_models_are_shown_the_same_images_a_few_at_a_time() -> None:
    shape, images = (12, 12, 1), torch.from_numpy(make_images(40, (12, 12, 1)))
    network = make_network(convolutions=[{"filters": 4, "kernel": 5, "stride": 1, "padding": 0, "pool": 2}])
    one, other, bright = (make_classifier(network, shape) for _ in range(3))
    bright.standardize = Standardize(np.full((1, 1, 1), 9), np.ones((1, 1, 1)))
    models = {
        "one": Predictor(one, CPU, "float32"),
        "other-arithmetic": Predictor(other, CPU, "bfloat16"),
        "other-standardization": Predictor(bright, CPU, "float32"),
    }
    classes = predict_in_batches(models, images, 7)
    for name, model in models.items():
        assert (classes[name] == model(images).argmax(1).numpy()).all(), name
    assert (classes["one"] != classes["other-standardization"]).any()


def test_large_images_are_classified_a_few_at_a_time() -> None:
    shape = (224, 224, 3)
    network = make_network(convolutions=[{"filters": 2, "kernel": 9, "stride": 9, "padding": 0, "pool": 4}])
    models = {"one": Predictor(make_classifier(network, shape), CPU, "float32")}
    with mock.patch.object(Predictor, "__call__", autospec=True, side_effect=Predictor.__call__) as seen:
        predict_in_batches(models, torch.from_numpy(make_images(25, shape)), images_per_pass(500, 224 * 224 * 3))
    assert sorted(len(call.args[1]) for call in seen.call_args_list) == [5, 10, 10]


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_network_has_layers_of_dropout_if_there_is_any(p: float) -> None:
    layers = build_network(make_network(dropout=p), (12, 12, 3), 10).modules()
    assert any(isinstance(layer, nn.Dropout) for layer in layers) == (p > 0)


def test_a_network_without_convolutions_takes_raw_images_too() -> None:
    classifier = make_classifier(make_network(convolutions=[], fully_connected=[8]))
    assert classifier(torch.from_numpy(make_images(5))).shape == (5, 10)
    assert first_layer(classifier.network).native_code(CPU) is None


def test_hidden_layers_come_before_the_output() -> None:
    network = build_network(make_network(fully_connected=[32, 16]), (12, 12, 3), 10)
    widths = [(layer.in_features, layer.out_features) for layer in network if isinstance(layer, nn.Linear)]
    assert widths == [(6 * 5 * 5, 32), (32, 16), (16, 10)]


@pytest.mark.parametrize(
    ("dataset", "kernel", "channels", "n_features"),
    [("mnist", 7, [1, 10], 160), ("cifar10", 3, [3, 64, 64, 128, 128, 256, 256, 512, 512], 2048)],
)
def test_the_papers_networks(dataset: str, kernel: int, channels: list[int], n_features: int) -> None:
    network, shape = params.load(ROOT / "profiles/paper.yaml").train.recipes[dataset].network, DATASETS[dataset].shape
    assert isinstance(network, Network)
    assert network.n_features(shape) == n_features
    # Every convolution with its norm, and the output layer.
    n_weights = sum((kernel**2 * n + 3) * after for n, after in itertools.pairwise(channels)) + n_features * 10 + 10
    assert sum(weights.numel() for weights in build_network(network, shape, 10).parameters()) == n_weights


def test_standardization_of_large_images_takes_little_memory() -> None:
    seen = make_images(40, (512, 512, 3))
    tracemalloc.start()
    fit_standardization(seen, "pixel")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 250 * 2**20  # as int64, all of them and their squares would take 480 MiB


@pytest.mark.parametrize("mode", ["pixel", "channel", "none"])
def test_standardization_is_numpys_mean_and_standard_deviation_and_zero_where_nothing_varied(mode: str) -> None:
    seen, images = make_images(2345), make_images(20) ^ 0xFF
    seen[:, 3, 4, 1] = 77
    axes = {"pixel": (0,), "channel": (0, 1, 2)}.get(mode)
    mean, std = (seen.mean(axes), seen.std(axes)) if axes else (0.0, np.array(255.0))
    expected = np.divide(images - mean, std, out=np.zeros(images.shape), where=std > 0)
    found = Standardize(*fit_standardization(seen, mode))(torch.from_numpy(images))
    assert found.shape == (20, 3, 12, 12)
    assert np.allclose(found.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
    assert (found[:, 1, 3, 4] == 0).all() == (mode == "pixel")


@pytest.mark.parametrize(
    ("network", "n_classes", "mode"),
    [
        *((make_network(fully_connected=[8]), n_classes, "pixel") for n_classes in (2, 3, 10, 100, 1000)),
        (FastNetwork(widths=(4, 6), fully_connected=(), activation="tanh", whiten=True), 10, "channel"),
        (FastNetwork(widths=(4, 6), fully_connected=(), activation="tanh", whiten=False), 10, "none"),
    ],
)
def test_a_saved_network_comes_back_the_same(
    tmp_path: Path, network: Network | FastNetwork, n_classes: int, mode: str
) -> None:
    classifier = make_classifier(network, n_classes=n_classes, mode=mode)
    save(classifier, tmp_path / "a.safetensors", describe(network, n_classes=n_classes))
    models = (classifier, load(tmp_path / "a.safetensors", "make it"))
    expected, found = (Predictor(model, CPU, "float32")(torch.from_numpy(make_images(20))) for model in models)
    assert expected.shape == (20, n_classes)
    assert torch.equal(expected, found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.safetensors"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Weights of a model, with its description beside them."""
    save(make_classifier(make_network()), tmp_path / "a.safetensors", describe(make_network(), seed=1))
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("network", None, "damaged model"),
        ("shape", [16, 16, 3], "damaged model"),
        ("n_classes", 9, "damaged model .weights of another shape"),
        ("n_classes", None, "damaged model"),
        ("seed", 2, "seed is 2, params.yaml asks for 1"),
    ],
)
def test_a_description_that_disagrees_is_an_error(saved: Path, key: str, value: Any, message: str) -> None:
    write(saved, saved.read_bytes(), {**describe(make_network(), seed=1), key: value})
    with pytest.raises(PipelineError, match=message):
        load(saved, "make it", {"seed": 1})


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_every_changed_byte_of_a_model_is_noticed(saved: Path, suffix: str) -> None:
    file = saved.with_suffix(suffix)
    content = file.read_bytes()
    for place in range(0, len(content), 1 if suffix == ".json" else 97):
        for damaged in (content[:place], content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]):
            file.write_bytes(damaged)
            with pytest.raises(PipelineError, match=r"a\.(json|safetensors): "):
                load(saved, "make it")
    file.write_bytes(content)
    load(saved, "make it")


def test_a_model_of_an_earlier_version_is_named_as_such(saved: Path) -> None:
    described = saved.with_suffix(".json")
    described.write_text(json.dumps({**json.loads(described.read_text()), "schema_version": 2}))
    with pytest.raises(PipelineError, match=r"schema version 2, expected 4; make it again with `make it`"):
        load(saved, "make it")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["network.output.bias", "network.block1.norm.running_var", "standardize.mean"])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(saved: Path, name: str, value: float) -> None:
    classifier = load(saved, "")
    before = tree(saved.parent)
    tensors = classifier.state_dict()
    tensors[name].view(-1)[0] = value
    with pytest.raises(PipelineError, match="not finite"):
        save(classifier, saved, {})
    assert differing(before, tree(saved.parent)) == []
    write(saved, safetensors.torch.save(tensors), json.loads(saved.with_suffix(".json").read_text()))
    with pytest.raises(PipelineError, match=r"damaged model \(weights that are not finite"):
        load(saved, "make it")


def test_an_answer_that_is_not_finite_is_an_error_not_a_class() -> None:
    classifier = make_classifier(make_network())
    classifier.state_dict()["network.output.weight"][0] = 3e38  # finite, and too large to be summed
    with pytest.raises(PipelineError, match="not a finite number; train it again, with a lower learning rate"):
        Predictor(classifier, CPU, "float32")(torch.from_numpy(make_images(20)))


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(PipelineError, match="do not fit"):
        Predictor(make_classifier(make_network()), CPU, "float32")(torch.from_numpy(make_images(2, (16, 16, 3))))


def test_whitened_patches_are_uncorrelated_with_variance_one() -> None:
    rng = np.random.default_rng(1)
    smooth = rng.normal(size=(500, 3, 10, 10)).cumsum(2).cumsum(3)  # neighbours alike, as in pictures
    images = torch.from_numpy((smooth / smooth.std()).astype(np.float32))
    whitening = Whitening(3)
    whitening.fit(images)
    values = whitening(images).detach().permute(1, 0, 2, 3).reshape(24, -1).double()
    assert torch.allclose(values[:12], -values[12:])
    second_moments = values[:12] @ values[:12].T / values.shape[1]
    assert torch.allclose(second_moments, torch.diag(second_moments.diag()), atol=1e-3)
    # The last directions hardly vary: there the added epsilon counts.
    assert torch.allclose(second_moments.diag()[:3], torch.ones(3, dtype=torch.float64), atol=0.01)
    assert not whitening.weight.requires_grad


def test_a_group_starts_by_passing_its_input_on() -> None:
    group = Group(3, 5, "relu")
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(group.conv1(images)[:, :3], images)
    assert group(images).shape == (2, 5, 4, 4)


@pytest.mark.parametrize("side", [32, 24, 17])
def test_a_fast_network_takes_images_of_other_sides(side: int) -> None:
    fast = FastNetwork(widths=(4, 6, 8), fully_connected=(7,), activation="gelu", whiten=True)
    network = build_network(fast, (32, 32, 3), 10)
    assert network(torch.rand(2, 3, side, side)).shape == (2, 10)
