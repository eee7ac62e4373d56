"""Networks of libraries, models that others have trained, and training these on."""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torchvision import models as library_models

from pipeline.evaluation.measuring import Predictor
from pipeline.models import classifier, external, library, storage
from pipeline.models.devices import select_device
from pipeline.models.layers import Standardize
from pipeline.recipes.external import External
from pipeline.recipes.plan import plan_natural
from pipeline.recipes.recipe import RECIPES, LibraryNetwork, Weights
from pipeline.runtime.errors import PipelineError
from pipeline.study.params import load
from pipeline.study.planning import plan_study
from pipeline.training.loop import Examples, TrainingData, train_model
from tests.conftest import MakeOwnStudy, WriteParams
from tests.test_params import changed
from tests.test_stages import fail, succeed

SHAPE, N_CLASSES = (16, 16, 3), 4
COLOURS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.75, 0.75, 0.75]], np.float32)


def network(architecture: str = "shufflenet_v2_x0_5", **changes: Any) -> LibraryNetwork:
    values = {"kind": "torchvision", "weights": None, "stem": "small", "fully_connected": (), **changes}
    return LibraryNetwork(architecture=architecture, **values)


def examples(n: int = 60, seed: int = 0) -> Examples:
    """Images of one colour each, by class, so that a network learns them in a moment."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % N_CLASSES).astype(np.uint8)
    noise = rng.integers(0, 20, (n, *SHAPE), dtype=np.uint8)
    return Examples((230 * COLOURS[labels]).astype(np.uint8)[:, None, None] + noise, labels, N_CLASSES)


# Networks of a library.


@pytest.mark.parametrize(
    ("architecture", "channels"),
    [  # grey images ask for another first layer
        *(("resnet18", 1), ("mobilenet_v3_small", 3), ("squeezenet1_1", 1), ("vit_b_32", 1), ("regnet_x_400mf", 3)),
        *(("convnext_tiny", 1), ("densenet121", 1), ("googlenet", 3), ("inception_v3", 1), ("swin_t", 1)),
    ],
)
def test_networks_of_torchvision_give_an_output_for_every_class(architecture: str, channels: int) -> None:
    side = 96 if architecture == "inception_v3" else 32
    shape = (side, side, channels)
    assert library.try_step(network(architecture), shape, 7, batch_size=2) > 0
    with torch.device("meta"):
        built = classifier.build_network(network(architecture, fully_connected=(9,)), shape, 7)
        assert built(torch.empty(2, channels, side, side)).shape == (2, 7)
    assert built.get_submodule("output").in_features == 9


def test_a_network_of_timm_does_too() -> None:
    pytest.importorskip("timm")
    assert library.try_step(network("resnet10t", kind="timm"), (32, 32, 3), 7, batch_size=2) > 0
    with pytest.raises(PipelineError, match="timm has no 'resnet18x'"):
        library.try_step(network("resnet18x", kind="timm"), (32, 32, 3), 7, batch_size=2)


def test_the_memory_of_a_step_is_about_what_it_takes() -> None:
    """Against the sizes of what autograd keeps, counted on real tensors."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    body = library.Body(network("resnet18"), (32, 32, 3))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        body(torch.zeros(8, 3, 32, 32))
    n_weights = sum(weight.numel() for weight in body.parameters())
    estimated = library.try_step(network("resnet18"), (32, 32, 3), 4, batch_size=8)
    assert estimated == pytest.approx(sum(kept.values()) + 16 * n_weights, rel=0.1)


def test_more_than_the_free_memory_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "free_memory", lambda device: 2**20)
    with pytest.raises(PipelineError, match=r"batch_size: a step of .* takes about .* GiB, and 0.0 GiB are free"):
        classifier.check_step(network(), SHAPE, N_CLASSES, 10, torch.device("cpu"))
    monkeypatch.undo()
    vit = network("vit_b_16", stem="full"), (32, 32, 3), N_CLASSES, 10, torch.device("cpu")
    classifier.check_step(*vit)
    with pytest.raises(PipelineError, match="vit_b_16 does not take images of 16x16"):
        classifier.check_step(*vit, small=16)  # to which they are scaled in the first epochs


@pytest.mark.parametrize(
    ("changes", "shape", "reason"),
    [
        ({"architecture": "resnet19"}, SHAPE, "torchvision has no 'resnet19'"),
        ({"architecture": "raft_large"}, SHAPE, "torchvision has no 'raft_large'"),
        ({"architecture": "alexnet", "stem": "full"}, SHAPE, "alexnet does not take images of 16x16"),
        ({"architecture": "vit_b_16"}, (20, 20, 3), "vit_b_16 does not take images of 20x20"),
    ],
)
def test_what_a_library_cannot_do_is_one_line(
    changes: dict[str, Any], shape: tuple[int, int, int], reason: str
) -> None:
    with pytest.raises(PipelineError, match=reason):
        library.try_step(network(**changes), shape, N_CLASSES, 2)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model of torchvision that knows the colours, as `torch.save` writes it."""
    torch.manual_seed(1)
    model = library_models.shufflenet_v2_x0_5(num_classes=N_CLASSES)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    data = examples()
    images = torch.from_numpy(data.images).permute(0, 3, 1, 2) / 255
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(model(images), torch.from_numpy(data.labels).long())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the means of all that it is shown from here on, which is once
    model(images)
    path = tmp_path_factory.mktemp("taught") / "mine.pt"
    torch.save(model.state_dict(), path)
    assert (outputs_of(path, data.images).argmax(1).numpy() == data.labels).all()
    return path


def outputs_of(path: Path, images: Any) -> torch.Tensor:
    """What the model in that file says, by torchvision alone."""
    model = library_models.shufflenet_v2_x0_5(num_classes=N_CLASSES)
    model.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        outputs: torch.Tensor = model.eval()(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    return outputs


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_training_starts_from_the_weights_that_params_name(taught: Path, tiny_values: dict[str, Any]) -> None:
    weights = Weights(path=str(taught), sha256=digest(taught))
    built = classifier.build_network(network(stem="full", weights=weights), SHAPE, N_CLASSES)
    standardize = Standardize(np.zeros((1, 1, 1)), np.full((1, 1, 1), 255.0))
    started = classifier.Classifier(SHAPE, standardize, built)
    started.load_start()
    images = examples(seed=9).images
    assert torch.allclose(started.eval()(torch.from_numpy(images)), outputs_of(taught, images), atol=1e-4)
    # With a hidden layer behind it, or another number of classes, the rest is taken all the same.
    other = classifier.Classifier(SHAPE, standardize, classifier.build_network(network(weights=weights), SHAPE, 9))
    other.load_start()
    state, given = dict(other.network.named_children())["body"].state_dict(), torch.load(taught, weights_only=True)
    assert all(torch.equal(state[f"model.{name}"], value) for name, value in given.items() if name[:3] != "fc.")


def with_nan(path: Path) -> None:
    tensors = torch.load(path, weights_only=True)
    tensors["fc.bias"][0] = float("nan")
    torch.save(tensors, path)


def save_quantized(path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # torch calls them deprecated
        torch.save({"a": torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)}, path)


BAD_WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda path: path.write_text("no weights"), "neither safetensors nor"),
    "module": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "more than weights; save them by torch.save"),
    "architecture": (lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path), "of another architecture"),
    "not-finite": (with_nan, "not finite numbers"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "neither safetensors nor"),
    "missing": (Path.unlink, "no such file of weights"),
    "sparse": (lambda path: torch.save({"a": torch.eye(3).to_sparse()}, path), "some of its weights are sparse"),
    "quantized": (save_quantized, "quantized"),
    "complex": (lambda path: torch.save({"a": torch.eye(3) * 1j}, path), "complex"),
    "without values": (lambda path: torch.save({"a": torch.eye(3, device="meta")}, path), "some of its weights are"),
}


@pytest.mark.parametrize(("spoil", "reason"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_bad_weights_are_one_line(spoil: Callable[[Path], object], reason: str, taught: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(taught, tmp_path))
    spoil(path)
    weights = Weights(path=str(path), sha256=digest(path) if path.exists() else "0" * 64)
    with pytest.raises(PipelineError, match=f"^{path}: .*{reason}"):
        library.Body(network(stem="full", weights=weights), SHAPE).load_start(torch.nn.Linear(1024, N_CLASSES))


def test_a_header_of_any_length_is_one_of_safetensors() -> None:
    """The length begins with the byte of a pickle, 0x80, in one of 256 files."""
    for n in range(300):
        content = safetensors.torch.save({"x" * n or "y": torch.ones(2)})
        assert len(library.parse_tensors(content, "mine")) == 1


def test_other_weights_than_params_name_are_refused(taught: Path) -> None:
    body = library.Body(network(stem="full", weights=Weights(path=str(taught), sha256="0" * 64)), SHAPE)
    with pytest.raises(PipelineError, match=f"has SHA-256 {digest(taught)}, params.yaml names 0000"):
        body.load_start(torch.nn.Identity())


# Models of others.


SAME = helper.make_node("Identity", ["raw"], ["logits"])


def colour_graph(
    channels_last: bool = False,
    is_probability: bool = False,
    n: int | str = "n",
    swaps: bool = False,
    channels: int = 3,
    order: Sequence[int] = range(N_CLASSES),
    is_apart: bool = False,
    says_class: bool = False,
    last: Sequence[onnx.NodeProto] = (SAME,),
    outputs: Sequence[onnx.ValueInfoProto] = (),
) -> bytes:
    """A graph that knows the colours by their means, in [0, 1] and RGB, or BGR where it `swaps`.

    Its outputs are in `order`; it `says_class` before them; its weights may lie in a file of their own. Of what it
    knows, `raw`, the `last` nodes make `logits` and other `outputs`, which come before it.
    """
    colours = COLOURS[list(order)]
    weights = (colours[:, ::-1] if swaps else colours).T[:channels].copy()
    bias = -(colours**2).sum(1) / 2
    shape = [n, *SHAPE] if channels_last else [n, channels, *SHAPE[:2]]
    axes = numpy_helper.from_array(np.array([1, 2] if channels_last else [2, 3]), "axes")
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["raw"]),
        *last,
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["logits"], ["class"], axis=1, keepdims=0),
    ]
    first = [helper.make_tensor_value_info("class", TensorProto.INT64, [n])] if says_class else []
    output = "probabilities" if is_probability else "logits"
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [*outputs, *first, helper.make_tensor_value_info(output, TensorProto.FLOAT, [n, N_CLASSES])],
        [axes, numpy_helper.from_array(weights, "w"), numpy_helper.from_array(bias.astype(np.float32), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    if is_apart:
        onnx.save_model(model, "apart.onnx", save_as_external_data=True, size_threshold=0, location="weights")
        return Path("apart.onnx").read_bytes()
    content: bytes = model.SerializeToString()
    return content


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the graph that knows the colours, in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.onnx"
    path.write_bytes(colour_graph())
    return path


def spec(path: Path, **changes: Any) -> External:
    values = {
        "dataset": "colours", "kind": "onnx", "path": str(path), "architecture": None, "channels": "rgb", "size": None,
        "scale": 255.0, "mean": (0.0,), "std": (1.0,), "classes": None, **changes,
    }  # fmt: skip
    return External(**values)


IMPORTED = Path("external")


def import_model(given: External, n_classes: int = N_CLASSES, side: int = 16) -> external.Imported:
    """Into the current folder, tried on images of that side."""
    data, times = examples(100, seed=3), side // 16
    images = data.images.repeat(times, axis=1).repeat(times, axis=2)
    return external.import_model("mine", given, images, data.labels, [f"c{i}" for i in range(n_classes)], IMPORTED)


def load_imported(given: External) -> external.ExternalClassifier:
    return external.load(IMPORTED, given, SHAPE, N_CLASSES, "import-model mine")


FORMS: list[dict[str, Any]] = [
    *({}, {"channels_last": True}, {"is_probability": True}, {"n": 1}, {"n": 7}, {"says_class": True})
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_graph_is_imported_and_gives_what_onnxruntime_gives(form: dict[str, Any], graph: Path) -> None:
    graph.write_bytes(colour_graph(**form))
    found = import_model(spec(graph))
    assert (found.accuracy, found.n_tried, found.remarks) == (1.0, 100, ())
    assert found.is_probability == form.get("is_probability", False)
    graph.unlink()  # the copy is what is measured
    data = examples(23, seed=4)
    logits = load_imported(spec(graph))(torch.from_numpy(data.images))
    assert logits.argmax(1).tolist() == data.labels.tolist()
    means = data.images.astype(np.float32).mean((1, 2)) / 255
    expected = means @ COLOURS.T - (COLOURS**2).sum(1) / 2
    if form.get("is_probability"):
        expected -= np.log(np.exp(expected).sum(1, keepdims=True))
    assert logits.numpy() == pytest.approx(expected, abs=1e-5)


def test_weights_of_a_library_are_imported(taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    safetensors.torch.save_file(torch.load(taught, weights_only=True), "mine.safetensors")
    for path in (taught, Path("mine.safetensors")):
        given = spec(path, kind="torchvision", architecture="shufflenet_v2_x0_5")
        assert import_model(given).accuracy >= 0.5
        model, images = load_imported(given), examples(seed=5).images
        for same in (model, model.to_train().eval()):
            assert torch.allclose(same(torch.from_numpy(images)), outputs_of(taught, images), atol=5e-4)


def test_weights_for_other_classes_are_said(taught: Path, graph: Path) -> None:
    given = spec(taught, kind="torchvision", architecture="shufflenet_v2_x0_5")
    with pytest.raises(PipelineError, match=f"weights for {N_CLASSES} classes, and there are 6; .* a new last layer"):
        import_model(given, 6)


def test_one_mean_and_three_deviations_are_standardized_by_channel(taught: Path, graph: Path) -> None:
    given = spec(taught, kind="torchvision", architecture="shufflenet_v2_x0_5", std=(1.0, 1.01, 0.99))
    import_model(given)
    model, images = load_imported(given), torch.from_numpy(examples(seed=5).images)
    trained = model.to_train().eval()
    assert trained.standardize.mean.shape == trained.standardize.inverse_std.shape
    assert torch.allclose(trained(images), model(images), atol=5e-4)


def test_the_size_that_a_model_takes_is_given_to_it(graph: Path) -> None:
    with pytest.raises(PipelineError, match=r"takes images of shape \(3, 16, 16\), is given \(3, 32, 32\); set size"):
        import_model(spec(graph), side=32)
    assert import_model(spec(graph, size=(16, 16)), side=32).accuracy == 1


# Outputs that are no logits.
LISTED = helper.make_node("SequenceConstruct", ["raw"], ["no logits"])
LIST = helper.make_tensor_sequence_value_info("no logits", TensorProto.FLOAT, None)
AVERAGED = helper.make_node("ReduceMean", ["raw"], ["no logits"], keepdims=0)
NUMBER = helper.make_tensor_value_info("no logits", TensorProto.FLOAT, [])


@pytest.mark.parametrize(
    ("node", "output", "reason"),
    [
        (LISTED, LIST, r"gives no logits: seq\(tensor\(float\)\); a classifier gives an array of logits"),
        (AVERAGED, NUMBER, "its output 'no logits' is one number, not a row per image"),
    ],
    ids=["list", "number"],
)
def test_an_output_that_is_no_logits_is_passed_over_or_named(
    node: onnx.NodeProto, output: onnx.ValueInfoProto, reason: str, graph: Path
) -> None:
    content = colour_graph(last=[node, SAME], outputs=[output])
    graph.write_bytes(content)
    assert import_model(spec(graph)).accuracy == 1
    model = onnx.load_model_from_string(content)
    del model.graph.output[1:]
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(PipelineError, match=f"a.onnx: {reason}"):
        import_model(spec(graph))


# Dropout that is still there, and normalization by the batch: graphs that were exported while they were being trained.
IN_TRAINING = {
    "chance": [
        helper.make_node("RandomNormalLike", ["raw"], ["noise"], scale=0.03),
        helper.make_node("Add", ["raw", "noise"], ["logits"]),
    ],
    "batch": [
        helper.make_node("Constant", [], ["first"], value_ints=[0]),
        helper.make_node("ReduceMean", ["raw", "first"], ["mean_of_batch"], keepdims=1),
        helper.make_node("Sub", ["raw", "mean_of_batch"], ["logits"]),
    ],
    "no number in small batches": [
        helper.make_node("Shape", ["raw"], ["n"], start=0, end=1),
        helper.make_node("Cast", ["n"], ["n_images"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["few"], value_floats=[7.5]),
        helper.make_node("Sub", ["n_images", "few"], ["more"]),
        helper.make_node("Sqrt", ["more"], ["root"]),
        helper.make_node("Sub", ["root", "root"], ["zero"]),
        helper.make_node("Add", ["raw", "zero"], ["logits"]),
    ],
}


@pytest.mark.parametrize("kind", IN_TRAINING)
def test_a_graph_that_gives_other_outputs_when_run_again_is_refused(kind: str, graph: Path) -> None:
    graph.write_bytes(colour_graph(last=IN_TRAINING[kind]))
    with pytest.raises(PipelineError, match=r"gives other outputs for the same images .*in evaluation mode"):
        import_model(spec(graph))
    assert not IMPORTED.exists()


def test_a_model_that_only_guesses_is_refused_with_what_is_probably_wrong(graph: Path) -> None:
    with pytest.raises(PipelineError, match=r"no better than guessing; .*: with scale: 255.0 it has 100 %$"):
        import_model(spec(graph, scale=1e12))
    assert not IMPORTED.exists()


def test_swapped_channels_are_said(graph: Path) -> None:
    graph.write_bytes(colour_graph(swaps=True))
    found = import_model(spec(graph))
    assert found.accuracy < 0.8
    (remark,) = found.remarks
    assert "but with channels: bgr it has 100 %" in remark
    assert import_model(spec(graph, channels="bgr")).remarks == ()


def test_classes_in_another_order_are_said(graph: Path) -> None:
    graph.write_bytes(colour_graph(order=[0, 2, 1, 3]))
    (remark,) = import_model(spec(graph)).remarks
    assert remark.endswith("with its classes in another order it has 100 %: classes: [c0, c2, c1, c3]")
    graph.write_bytes(colour_graph(order=[1, 2, 3, 0]))
    with pytest.raises(PipelineError, match=r"no better than guessing; .*: classes: \[c1, c2, c3, c0\]$"):
        import_model(spec(graph))
    # Where a wrong order is given, the right one is still that of the model's outputs.
    with pytest.raises(PipelineError, match=r": classes: \[c1, c2, c3, c0\]$"):
        import_model(spec(graph, classes=("c3", "c1", "c0", "c2")))


@pytest.mark.parametrize("is_probability", [False, True])
def test_a_model_with_another_order_of_classes_gives_outputs_in_that_of_the_data_set(
    is_probability: bool, graph: Path
) -> None:
    graph.write_bytes(colour_graph(order=[1, 2, 3, 0], is_probability=is_probability))
    given = spec(graph, classes=("c1", "c2", "c3", "c0"))
    found = import_model(given)
    assert (found.accuracy, found.remarks) == (1.0, ())
    data = examples(23, seed=4)
    assert load_imported(given)(torch.from_numpy(data.images)).argmax(1).tolist() == data.labels.tolist()
    with pytest.raises(PipelineError, match=r"imported with other params \(spec\)"):
        load_imported(spec(graph, classes=("c1", "c2", "c0", "c3")))


def test_a_model_with_another_order_of_classes_is_trained_on_in_that_of_the_data_set(taught: Path, graph: Path) -> None:
    tensors = torch.load(taught, weights_only=True)
    order = [2, 0, 3, 1]
    safetensors.torch.save_file(tensors | {name: tensors[name][order] for name in ("fc.weight", "fc.bias")}, "mine")
    given = spec(Path("mine"), kind="torchvision", architecture="shufflenet_v2_x0_5", classes=[f"c{i}" for i in order])
    import_model(given)
    images = examples(seed=5).images
    model = load_imported(given)
    for same in (model, model.to_train().eval()):
        assert torch.allclose(same(torch.from_numpy(images)), outputs_of(taught, images), atol=5e-4)


def test_other_classes_than_those_of_the_data_set_are_named(graph: Path) -> None:
    reason = "models.mine.classes: unknown 'cat', without 'c1', 'c3'; give the names of colours, 'c0', 'c1', 'c2', 'c3'"
    with pytest.raises(PipelineError, match=f"^{reason}, in the order of the model's outputs, or leave it empty"):
        import_model(spec(graph, classes=("c2", "cat", "c0")))


def test_weights_in_a_file_of_their_own_are_refused_wherever_it_lies(graph: Path) -> None:
    graph.write_bytes(colour_graph(is_apart=True))
    assert Path("weights").exists()
    with pytest.raises(PipelineError, match="its weights lie in a file of their own; export it again as one file"):
        import_model(spec(graph))


@pytest.mark.parametrize(
    ("predicted", "labels", "is_guessing"),
    [
        ([0] * 40, [0, 1] * 20, True),
        ([0] * 80, [0] * 76 + [1] * 4, True),
        ([0] * 76 + [1] * 4, [0] * 76 + [1] * 4, False),
        ([1, 2, 3, 0] * 10, [0, 1, 2, 3] * 10, True),
        ([0, 1, 2, 0] * 10, [0, 1, 2, 3] * 10, False),
    ],
)
def test_guessing_is_no_more_agreement_than_by_chance(
    predicted: list[int], labels: list[int], is_guessing: bool
) -> None:
    assert external._is_guessing(np.array(predicted), np.array(labels, np.uint8)) == is_guessing


def test_a_model_is_tried_on_images_of_all_parts_of_the_test_set() -> None:
    """Which may be sorted by class."""
    assert external.tried(3).tolist() == [0, 1, 2]
    assert len(external.tried(1800)) == external.N_TRIED
    assert set(np.repeat(range(10), 180)[external.tried(1800)]) == set(range(10))


BAD_MODELS: dict[str, tuple[bytes, int, str]] = {
    # id: content, classes of the data set, what is said of it
    "text": (b"no model", N_CLASSES, "not an ONNX file"),
    "empty": (b"", N_CLASSES, "not an ONNX file"),
    "truncated": (colour_graph()[:-20], N_CLASSES, "not an ONNX file"),
    "grey": (colour_graph(channels=1), N_CLASSES, r"takes images of shape \(1, 16, 16\)"),
    "other-classes": (colour_graph(), 5, r"gives outputs of shape \(100, 4\) .*, and colours has 5 classes"),
}


@pytest.mark.parametrize(("content", "n_classes", "reason"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_bad_model_is_one_line_with_its_path(content: bytes, n_classes: int, reason: str, graph: Path) -> None:
    graph.write_bytes(content)
    with pytest.raises(PipelineError, match=f"^{graph}: .*{reason}"):
        import_model(spec(graph), n_classes)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def describe_as(**entries: Any) -> None:
    path = IMPORTED / "description.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


DAMAGE: dict[str, tuple[Callable[[], object], dict[str, Any], str]] = {
    # id: what is done to the copy, what params say now, and what is said
    "model": (lambda: shorten(IMPORTED / "model"), {}, f"^{IMPORTED}.*`import-model mine`"),
    "description": (lambda: shorten(IMPORTED / "description.json"), {}, f"^{IMPORTED}.*`import-model mine`"),
    "no-model": (lambda: (IMPORTED / "model").unlink(), {}, f"^{IMPORTED}.*not whole.*`import-model mine`"),
    "no-description": (lambda: (IMPORTED / "description.json").unlink(), {}, f"^{IMPORTED}.*`import-model mine`"),
    "order": (
        lambda: describe_as(output_of_class=[0, 1, 2, 2]),
        {},
        f"^{IMPORTED}.*output_of_class.*`import-model mine`",
    ),
    "version": (lambda: describe_as(schema_version=1), {}, f"^{IMPORTED}.*another version.*`import-model mine`"),
    "params": (lambda: None, {"scale": 254.0}, f"^{IMPORTED}.*imported with other params"),
}


@pytest.mark.parametrize(("damage", "changes", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_copy_that_is_not_what_params_ask_for_is_one_line(
    damage: Callable[[], object], changes: dict[str, Any], reason: str, graph: Path
) -> None:
    import_model(spec(graph))
    damage()
    with pytest.raises(PipelineError, match=reason):
        load_imported(spec(graph, **changes))


# In a study.


@pytest.fixture
def colours(own_study: MakeOwnStudy, write_params: WriteParams, taught: Path) -> dict[str, Any]:
    """The params of a study of the colours with two models of others, one of which is repaired, in its folder."""
    train, test = examples(40, 1), examples(80, 2)
    np.savez("a.npz", x_train=train.images, y_train=train.labels, x_test=test.images, y_test=test.labels)
    Path("graph.onnx").write_bytes(colour_graph(order=[1, 2, 3, 0]))
    values = own_study("colours", n_train=40, n_test=80, batch_size=20, path="a.npz", size=SHAPE[:2])
    values["train"]["recipes"]["colours"].update(
        standardize="channel", network=network(architecture="mobilenet_v3_small").model_dump(mode="json")
    )
    values["models"] = {
        "mine": spec(taught, kind="torchvision", architecture="shufflenet_v2_x0_5").model_dump(mode="json"),
        "graph": spec(Path("graph.onnx"), classes=("1", "2", "3", "0")).model_dump(mode="json"),
    }
    repairing = {"model": "mine", "learning_rate": 0.001, "batch_size": 20, "epochs": 2}
    values["strategies"] = {"constant": {}, "repair": {"share": 0.5, "recipes": {"colours": repairing}}}
    values["ablations"] = {}
    write_params(values)
    return values


@pytest.mark.slow
def test_a_study_measures_models_of_others_and_repairs_one(colours: dict[str, Any], write_params: WriteParams) -> None:
    for command in (
        "prepare colours",
        "perturb colours noise",
        "train colours",
        "import-model mine",
        "import-model graph",
    ):
        succeed(*command.split())
    for stage in ("impact", "strategies", "evaluate", "ablations"):
        assert "{" not in succeed(stage, "colours")
    summary = json.loads(Path("metrics/impact/summary/colours.json").read_text())
    assert summary["graph"]["clean_accuracy"] == 1
    assert {"clean_accuracy", "robust_accuracy", "noise_accuracy"} <= summary["mine"].keys()
    repaired = json.loads(Path("metrics/evaluate/summary/colours/repair.json").read_text())
    assert repaired["baseline"] == "mine"
    # What it is compared with is the model itself, on the images on which the natural model is measured.
    study = plan_study(load(), "colours")
    cells = [line.split(",") for line in Path("metrics/evaluate/cells/colours.csv").read_text().splitlines()]
    mine = [row for row in cells if row[1] == "mine" and row[6] == "noise"]
    assert len(mine) == colours["perturb"]["trials"]
    share = sum(int(row[10]) for row in mine) / sum(int(row[9]) for row in mine)
    assert repaired["baseline_robust_accuracy"] == pytest.approx(share, abs=1e-6)
    assert study.baselines == {"constant": "natural", "repair": "mine"}
    # As docs/own-data.md says, a repaired model is the library's network again.
    (job,) = study.strategies["repair"]
    model = storage.load(job.path, "")
    body, output = model.network.body, model.network.output
    assert isinstance(body, library.Body)
    assert isinstance(output, nn.Linear)
    weights = body.model.state_dict() | {f"{body.head}.{name}": value for name, value in output.state_dict().items()}
    plain = library_models.shufflenet_v2_x0_5(num_classes=4)
    plain.load_state_dict(weights)
    images = torch.from_numpy(examples(80, 2).images)
    with torch.inference_mode():
        assert torch.equal(plain.eval()(model.standardize(images)), model(images))
    succeed("report")
    page = Path("metrics/report/index.html").read_text()
    assert "colours: your models" in page
    found = [page.index(f"<h3>{name}</h3>") for name in ("Your model mine", "Your model graph")]
    assert max(found) < page.index("<h3>The network trained here (natural)</h3>")
    assert page[found[1] :].partition("<dd>")[2].startswith("100.0\N{NO-BREAK SPACE}% right on clean images")
    # One colour for a model on the whole page, and beside a repaired model stands the one that it was before.
    legend = re.findall(r'<li class="s(\d+)">(natural|constant|repair|mine|graph)</li>', page)
    assert len(set(legend)) == len({color for color, _ in legend}) == len({name for _, name in legend}) == 5
    assert [row.split("<")[0] for row in page.split("<td>no damage (")[1:]] == ["natural)", "mine)"]
    assert re.findall(r"<small>\((natural|mine)\)", page) == ["natural", "mine"]
    # How it was repaired, what it loses, and nothing of a paper that has no such images.
    trained = ("repair", "mine", "0.5", "2", "20", "0.001", "as mine", "torchvision shufflenet_v2_x0_5")
    assert "".join(trained) in re.sub("<[^>]*>", "", page)
    assert [page.count(f"Your model {name}: ") for name in ("mine", "graph")] == [1, 1]
    assert not re.search("paper's|the paper|authors", page)
    assert "\n0 problem(s)" in succeed("verify")
    # Where only a model of the user's is trained on damage, the natural model is not said to be repaired.
    write_params({**colours, "strategies": {"repair": colours["strategies"]["repair"]}})
    succeed("evaluate", "colours")
    succeed("report")
    page = Path("metrics/report/index.html").read_text()
    assert page.count("Not tried: it was not trained on damage and tested on it.") == 2  # graph and natural
    assert re.findall(r"<tr><td>(\w+)</td><td>[\d.]+</td><td>[\d.]+</td><td>[–+−]", page) == ["mine", "repair"]
    # Another file is another model: what was made of the old one is not taken for it.
    Path("graph.onnx").write_bytes(colour_graph(order=[1, 2, 3, 0], is_probability=True))
    succeed("import-model", "graph")
    succeed("impact", "colours")


@pytest.mark.parametrize(("key", "value"), [("scale", 1.0), ("mean", [0.5]), ("std", [0.5]), ("classes", [*"1023"])])
def test_a_model_repaired_with_another_preprocessing_is_another_model(
    key: str, value: Any, colours: dict[str, Any], write_params: WriteParams
) -> None:
    """What the model cache and the readers of model files know a repaired model by."""
    succeed("prepare", "colours")
    before = [job.description for job in plan_study(load(), "colours").jobs("strategies")]
    colours["models"]["mine"][key] = value
    write_params(colours)
    after = [job.description for job in plan_study(load(), "colours").jobs("strategies")]
    is_changed = [old != new for old, new in zip(before, after, strict=True)]
    assert is_changed == [old["repairs"] is not None for old in before] == [False, True]


def test_a_model_of_which_training_would_make_another_is_refused() -> None:
    def given(architecture: str, side: int) -> external.ExternalClassifier:
        torch.manual_seed(0)
        model = library_models.get_model(architecture, num_classes=N_CLASSES).eval()
        kept = spec(Path("a.pt"), kind="torchvision", architecture=architecture)
        return external.ExternalClassifier(kept, model, (side, side, 3), N_CLASSES, False, None).eval()

    mine = given("shufflenet_v2_x0_5", 32)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))
    assert torch.allclose(mine(images), mine.to_train()(images), atol=1e-4)
    with pytest.raises(PipelineError, match=r"a\.pt: squeezenet1_1 cannot be trained further: its last layer is not"):
        given("squeezenet1_1", 64).to_train()  # its last layer is a convolution, with ReLU after it
    forward = mine.model.forward
    mine.model.forward = lambda images: 2 * forward(images)
    with pytest.raises(PipelineError, match="it computes something after its last layer, which would be lost"):
        mine.to_train()


def test_lack_of_memory_is_not_said_to_be_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    with pytest.raises(RuntimeError, match="allocate memory"), library.explained("vit_h_14", (518, 518)):
        raise full
    path, description = tmp_path / "a.safetensors", {"network": {}, "shape": list(SHAPE), "n_classes": N_CLASSES}
    path.write_bytes(b"")
    monkeypatch.setattr(storage, "read_description", lambda *_: description)
    monkeypatch.setattr(storage, "read_weights", lambda *_: b"")
    for error in (full, MemoryError()):
        monkeypatch.setattr(safetensors.torch, "load", Mock(side_effect=error))
        with pytest.raises(type(error)):
            storage.load(path, "make it")
    missing = PipelineError("timm is not installed: `pip install`")
    monkeypatch.setattr(safetensors.torch, "load", Mock(side_effect=missing))
    with pytest.raises(PipelineError, match=r"a\.safetensors: timm is not installed: `pip install`$"):
        storage.load(path, "make it")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: classifier.Classifier(SHAPE, Standardize(np.zeros(1), np.ones(1)), nn.Sequential()), "train it again"),
        (lambda: external.ExternalClassifier(spec(Path("a")), nn.Identity(), SHAPE, 3, False, None), "check its scale"),
    ],
    ids=["trained here", "of the user"],
)
def test_an_output_that_is_not_finite_is_an_error_with_a_remedy_that_fits(make: Any, said: str) -> None:
    model = make()
    model.forward = lambda images: torch.full((len(images), N_CLASSES), torch.nan)
    with pytest.raises(PipelineError, match=f"its output is not a finite number; {said}"):
        Predictor(model, select_device("cpu"), "float32")(torch.from_numpy(examples(4).images))


BAD_PARAMS: list[tuple[dict[str, Any], str]] = [
    ({"models.graph.dataset": "photos"}, "models.graph.dataset: unknown 'photos'; choose from colours"),
    ({"models.graph.architecture": "resnet18"}, "models.graph.architecture: name the one of torchvision or timm"),
    ({"models.graph.mean": [0.1, 0.2]}, "models.graph.mean: 2 values for rgb; give 1 or 3"),
    ({"models.graph.classes": [*"0121"]}, "models.graph.classes: '1' more than once; name every class once"),
    ({"models.graph.classes": [0, 1, 2, 3]}, "models.graph.classes.0: 0: "),
    ({"models.mine.mean": 0.5}, "params.yaml: 1 problem(s)\n  models.mine.mean: 0.5: give a list\n"),
    ({"models.graph.path": "~/a.onnx"}, "models.graph.path: '~/a.onnx' is no path; write it out"),
    ({"models.constant": {}}, "models.constant"),
    ({"models.noise_accuracy": {}}, "models.noise_accuracy"),
    ({"strategies.repair.recipes.colours.model": "theirs"}, "unknown 'theirs'; models has graph, mine for colours"),
    ({"strategies.repair.recipes.colours.model": "graph"}, "an ONNX graph cannot be trained"),
    (
        {"train.recipes.colours.drop_last": False, "strategies.repair.recipes.colours.batch_size": 13},
        "strategies.repair.recipes.colours.batch_size: leaves a last batch of one image, too few for BatchNorm",
    ),
    ({"models.mine.channels": "grey"}, "models.mine.channels: networks of torchvision and timm take three; give rgb"),
    ({"strategies.repair.recipes.colors": {}}, "strategies.repair.recipes.colors"),
    (
        {"strategies.repair.recipes": {"other": {"model": "mine", "learning_rate": 0.1, "batch_size": 9, "epochs": 1}}},
        "strategies.repair.recipes: unknown data set 'other'",
    ),
    ({"models.mine.channels": "bgr"}, "only a model that takes images as they are can be trained"),
    ({"train.recipes.colours.network.kind": "keras"}, "train.recipes.colours.network.kind: unknown 'keras'"),
    ({"train.recipes.colours.network.widths": [3]}, "train.recipes.colours.network.widths: unknown key"),
]


@pytest.mark.parametrize(("changes", "reason"), BAD_PARAMS, ids=[reason for _, reason in BAD_PARAMS])
def test_bad_params_of_models_are_named(
    changes: dict[str, Any], reason: str, colours: dict[str, Any], write_params: WriteParams
) -> None:
    write_params(changed(colours, changes))
    assert reason in fail("check")


@pytest.mark.parametrize("n_threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_library_network_trains_to_the_same_weights_each_time(n_threads: int, tiny_values: dict[str, Any]) -> None:
    data = TrainingData(examples(20), examples(10, 7))
    recipe = {**tiny_values["train"]["recipes"]["mnist"], "batch_size": 10, "epochs": 1}
    recipe["network"] = network().model_dump(mode="json")
    plan = plan_natural(RECIPES.validate_python(recipe))
    torch.set_num_threads(n_threads)
    first, again = (train_model(plan, data, (1,), select_device("cpu"))[0].state_dict() for _ in range(2))
    torch.set_num_threads(1)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("kind", "architecture"), [("torchvision", "regnet_y_400mf"), ("timm", "mobilenetv3_small_050")]
)
def test_a_library_network_is_trained_for_a_step_stored_and_measured(
    kind: str, architecture: str, tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip(kind)
    test = examples(8, 7)
    recipe = {**tiny_values["train"]["recipes"]["mnist"], "batch_size": 12, "epochs": 1}
    recipe["network"] = network(architecture, kind=kind).model_dump(mode="json")
    plan, device = plan_natural(RECIPES.validate_python(recipe)), select_device("cpu")
    trained, curve = train_model(plan, TrainingData(examples(12), test), (1,), device)
    assert [epoch.epoch for epoch in curve] == [1]
    description = {"network": recipe["network"], "shape": list(SHAPE), "n_classes": N_CLASSES}
    storage.save(trained, tmp_path / "a.safetensors", description)
    images = torch.from_numpy(test.images)
    first, stored = (
        Predictor(model, device, "float32")(images)
        for model in (trained, storage.load(tmp_path / "a.safetensors", "make it", description))
    )
    assert first.shape == (8, N_CLASSES)
    assert torch.equal(first, stored)
