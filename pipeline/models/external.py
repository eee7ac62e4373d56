"""Models that the user supplies: imported once, checked on clean images, then used like our own."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipeline.data.arrays import Images, Labels
from pipeline.models import library
from pipeline.models.classifier import HEAD, Classifier, build_network
from pipeline.models.layers import Standardize
from pipeline.recipes.external import External
from pipeline.runtime.errors import PipelineError, is_outage
from pipeline.runtime.files import MAX_WEIGHTS, read_file, replacing_folder
from pipeline.runtime.values import to_yaml

SCHEMA_VERSION = 2
_MAX_DESCRIPTION = 2**22
# Number of clean test images that a model is checked on when it is imported.
N_TRIED = 500
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MODEL, _DESCRIPTION = "model", "description.json"
# How far two outputs for the same images may lie apart, as a share of the standard deviation of all outputs: rounding
# stays far below, dropout and normalization by the batch lie above. Our choice.
_SAME = 0.03
# ONNX types that a graph may take and give.
_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Preprocess(nn.Module):
    """uint8 (N, H, W, C), 0-255 → float32 (N, C, H, W), as the user's model expects them."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: External) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Convert images to the size, channel order and range that the description names."""
        values = images.permute(0, 3, 1, 2).float()
        if self.spec.channels == "grey":
            if values.shape[1] == 3:  # ITU-R 601, as Pillow and OpenCV compute it
                values = (values * values.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        else:
            values = values.expand(-1, 3, -1, -1)
            values = values.flip(1) if self.spec.channels == "bgr" else values
        if self.spec.size is not None and tuple(values.shape[2:]) != self.spec.size:
            values = interpolate(values, size=self.spec.size, mode="bilinear", antialias=True)
        return (values / self.spec.scale - self.mean) / self.std


class OnnxModel(nn.Module):
    """An ONNX graph, run on one CPU thread whatever the device: float32 (N, C, H, W) → (N, n_classes)."""

    def __init__(self, content: bytes, where: str) -> None:
        """Load the graph, which can only run onnxruntime's built-in operators.

        Args:
            content: Content of an ONNX file, weights included.
            where: Its path, for messages.

        Raises:
            PipelineError: onnxruntime is not installed, or cannot read the graph; the graph does not have exactly one
                input, an array of floats of four axes, or has no array of floats among its outputs.
        """
        super().__init__()
        try:
            import onnxruntime  # an extra
        except ImportError:
            raise PipelineError(f"{where}: needs onnxruntime: `pip install -c constraints.txt -e '.[onnx]'`") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # the caller provides the parallelism
        options.log_severity_level = 4
        # Weights in a separate file would not be part of the copy. This path cannot contain one, so they are an error.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
        try:
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has no base class for its errors
            if is_outage(error):
                raise
            said = " ".join(str(error).split())[:200]
            if "external data" in said.lower() or "external tensors" in said.lower():
                raise PipelineError(
                    f"{where}: its weights lie in a file of their own; export it again as one file: "
                    "`torch.onnx.export(..., external_data=False)`"
                ) from None
            raise PipelineError(f"{where}: not an ONNX file, or damaged ({said})") from None
        self.where = where
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or inputs[0].type not in _FLOATS or len(inputs[0].shape) != 4:
            takes = "; ".join(f"{given.name}: {given.type} {given.shape}" for given in inputs)
            raise PipelineError(f"{where}: takes {takes}; a classifier takes one float32 array of images, of four axes")
        self.name, self.shape = inputs[0].name, inputs[0].shape
        # Exporters of other libraries output class numbers first, and then the scores that decided them.
        outputs = self.session.get_outputs()
        arrays = [output for output in outputs if output.type in _FLOATS]
        if not arrays:
            gives = "; ".join(f"{output.name}: {output.type}" for output in outputs)
            raise PipelineError(
                f"{where}: gives {gives}; a classifier gives an array of logits or probabilities: export it with one"
            )
        # The first of two axes; where no shape is known, the first.
        self.output = min(arrays, key=lambda output: len(output.shape) != 2).name
        self.kind = _FLOATS[inputs[0].type]
        self.is_channels_last = self.shape[3] in (1, 3) and self.shape[1] not in (1, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Return the graph's first output of floats with two axes or, without any, the first of floats."""
        values = images.permute(0, 2, 3, 1) if self.is_channels_last else images
        _, *given = values.shape
        wanted = [own if isinstance(own, int) else other for own, other in zip(self.shape[1:], given, strict=True)]
        if wanted != given:
            raise PipelineError(
                f"{self.where}: takes images of shape {tuple(self.shape[1:])}, is given {tuple(given)}; set size and "
                "channels to what it takes"
            )
        array = values.contiguous().cpu().numpy().astype(self.kind)
        # A graph that was exported for one batch size takes no other.
        n = self.shape[0] if isinstance(self.shape[0], int) and self.shape[0] > 0 else len(array)
        outputs = []
        for start in range(0, len(array), n):
            part = array[start : start + n]
            padded = np.concatenate([part, np.repeat(part[:1], n - len(part), axis=0)])
            try:
                output = self.session.run([self.output], {self.name: padded})[0]
            except Exception as error:
                said = " ".join(str(error).split())[:200]
                raise PipelineError(
                    f"{self.where}: fails on images of shape {tuple(given)} ({said}); set size and channels to what it "
                    "takes, or export it with height, width and channels fixed"
                ) from None
            if np.ndim(output) == 0:
                raise PipelineError(f"{self.where}: its output {self.output!r} is one number, not a row per image")
            outputs.append(np.asarray(output)[: len(part)])
        return torch.from_numpy(np.concatenate(outputs)).to(images.device)


class ExternalClassifier(nn.Module):
    """uint8 (N, H, W, C) → logits (N, n_classes), as `Classifier`.

    Attributes:
        shape: (H, W, C) of the images it takes.
        path: The user's file.
        is_probability: Whether the model outputs probabilities, whose logarithms are the logits.
        output_of_class: Index of the model's output for each class; None: outputs are in the order of the classes.
        if_not_finite: As that of `Classifier`.
    """

    if_not_finite = "check its scale, mean and std, or export it in float32"

    def __init__(
        self,
        spec: External,
        model: nn.Module,
        shape: tuple[int, int, int],
        n_classes: int,
        is_probability: bool,
        output_of_class: list[int] | None,
    ) -> None:
        super().__init__()
        self.preprocess, self.model = Preprocess(spec), model
        self.spec, self.path, self.shape, self.n_classes = spec, Path(spec.path), shape, n_classes
        self.is_probability, self.output_of_class = is_probability, output_of_class

    def to_train(self) -> Classifier:
        """Return the same model as a `Classifier`, which can be trained.

        Raises:
            PipelineError: It would be another model: its last layer is not a fully connected one with a bias, or
                something follows that layer; or its mean and std are of colour images, and these are grey.
        """
        spec, network = self.spec, self.spec.network
        if max(len(spec.mean), len(spec.std)) > self.shape[2]:
            raise PipelineError(f"{self.path}: mean and std of three channels for grey images; give one number each")
        mean, std = np.broadcast_arrays(*(np.array(v).reshape(1, 1, -1) * spec.scale for v in (spec.mean, spec.std)))
        weights = self.model.state_dict()
        built = build_network(network, self.shape, self.n_classes)
        body, output = built[0], built.get_submodule(HEAD)
        assert isinstance(body, library.Body)
        cannot = f"{self.path}: {network.architecture} cannot be trained further"
        if not body.take(weights, output, str(self.path)):
            raise PipelineError(f"{cannot}: its last layer is not a fully connected layer with a bias")
        if (order := self.output_of_class) is not None:
            output.load_state_dict({name: tensor[order] for name, tensor in output.state_dict().items()})
        classifier = Classifier(self.shape, Standardize(mean, std), built).eval()
        images = torch.randint(256, (4, *self.shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            own, copied = (model(images).log_softmax(1).clamp(min=-30) for model in (self, classifier))
        if not (own - copied).abs().max() <= _SAME * own.std(correction=0):  # NaN differs too
            raise PipelineError(f"{cannot}: it computes something after its last layer, which would be lost")
        return classifier

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of raw images."""
        outputs = _in_order(self.model(self.preprocess(images)).float(), self.output_of_class)
        return outputs.clamp(min=1e-30).log() if self.is_probability else outputs


@dataclass(frozen=True)
class Imported:
    """What checking a model on clean images has found.

    Attributes:
        accuracy: Share of the images classified correctly, in [0, 1].
        n_tried: Number of images.
        is_probability: Whether its outputs are probabilities.
        remarks: What the user should look at.
    """

    accuracy: float
    n_tried: int
    is_probability: bool
    remarks: tuple[str, ...]


def import_model(
    name: str, spec: External, images: Images, labels: Labels, classes: Sequence[str], folder: Path
) -> Imported:
    """Check a model on clean test images and copy it to where the stages find it.

    Args:
        name: Its name in params.yaml.
        spec: Where its file is and what input it expects.
        images: uint8 (N, H, W, C), from `tried`.
        labels: Class numbers (N,).
        classes: Names of the data set's classes, in order.
        folder: Folder of the copy; written whole or not at all.

    Raises:
        PipelineError: The file is missing or damaged, or not a model for these images and classes; params name other
            classes; it gives other outputs when run again; it does no better than guessing, which points to a
            mistake in its preprocessing or in the order of classes.
    """
    try:
        output_of_class = spec.find_outputs(classes)
    except ValueError as error:
        raise PipelineError(f"models.{name}.{error}") from None
    content = _read(Path(spec.path))
    height, width, channels = images.shape[1:]
    n_classes = len(classes)
    model = _open(spec, content, (height, width), n_classes)
    outputs = _ask(spec, model, images)
    if outputs.shape != (len(images), n_classes):
        gives = f"outputs of shape {tuple(outputs.shape)} for {len(images)} images"
        raise PipelineError(
            f"{spec.path}: gives {gives}, and {spec.dataset} has {n_classes} classes; a model for other classes needs "
            "a new last layer"
        )
    if not outputs.isfinite().all():
        raise PipelineError(f"{spec.path}: some of its outputs are not finite; check scale, mean and std")
    again = _ask(spec, model, images[::-1].copy(), batch_size=7).flip(0)  # every image among others
    if not (outputs - again).abs().max() <= _SAME * outputs.std(correction=0):  # NaN differs too
        raise PipelineError(
            f"{spec.path}: gives other outputs for the same images when run again in other batches, so its "
            "accuracy would depend on chance; export it in evaluation mode (torch: model.eval())"
        )
    outputs = _in_order(outputs, output_of_class)
    is_probability = bool((outputs >= 0).all() and ((outputs.sum(1) - 1).abs() < 1e-3).all())
    remarks = _check_predictions(spec, model, images, labels, outputs.argmax(1).numpy(), classes, output_of_class)
    if spec.kind != "onnx" and spec.channels == "rgb" and spec.size is None:
        shape = height, width, channels
        try:
            ExternalClassifier(spec, model, shape, n_classes, is_probability, output_of_class).eval().to_train()
        except PipelineError as error:
            remarks += (f"strategy repair cannot train it: {str(error).removeprefix(f'{spec.path}: ')}",)
    description = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "spec": spec.decides,
        "model_sha256": hashlib.sha256(content).hexdigest(),
        "shape": [height, width, channels],
        "n_classes": n_classes,
        "is_probability": is_probability,
        "output_of_class": output_of_class,
    }
    with replacing_folder(folder) as staged:
        (staged / _MODEL).write_bytes(content)
        (staged / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return Imported(_accuracy(outputs, labels), len(images), is_probability, remarks)


def tried(n_images: int) -> NDArray[np.int64]:
    """Return indices of the clean test images that a model is checked on: at most `N_TRIED`, spread over all images."""
    return np.unique(np.linspace(0, n_images - 1, N_TRIED, dtype=np.int64))


def load(folder: Path, spec: External, shape: tuple[int, int, int], n_classes: int, made_by: str) -> ExternalClassifier:
    """Load an imported model, in evaluation mode.

    Args:
        folder: Folder of its copy.
        spec: Its description in params.
        shape: (H, W, C) of the images.
        n_classes: Number of classes in the data set.
        made_by: Command that imports it, for messages.

    Raises:
        PipelineError: It is missing, is damaged, or was imported with other params.
    """
    description = read_description(folder, made_by)
    expected = {"spec": spec.decides, "shape": list(shape), "n_classes": n_classes}
    for key, value in expected.items():
        if description.get(key) != value:
            raise PipelineError(f"{folder}: imported with other params ({key}); do it again with `{made_by}`")
    content = read_file(folder / _MODEL, MAX_WEIGHTS)
    if hashlib.sha256(content).hexdigest() != description.get("model_sha256"):
        raise PipelineError(f"{folder / _MODEL}: damaged; import it again with `{made_by}`")
    output_of_class = description.get("output_of_class")
    if output_of_class is not None and not _is_order(output_of_class, n_classes):
        raise PipelineError(
            f"{folder / _DESCRIPTION}: damaged (output_of_class); import the model again with `{made_by}`"
        )
    model = _open(spec, content, shape[:2], n_classes)
    is_probability = bool(description["is_probability"])
    return ExternalClassifier(spec, model, shape, n_classes, is_probability, output_of_class).eval()


def _is_order(order: Any, n_classes: int) -> bool:
    are_numbers = isinstance(order, list) and all(type(index) is int for index in order)
    return are_numbers and sorted(order) == list(range(n_classes))


def read_description(folder: Path, made_by: str) -> dict[str, Any]:
    """Read the description beside the copy of a model.

    Raises:
        PipelineError: It is missing or damaged.
    """
    path = folder / _DESCRIPTION
    try:
        described = json.loads(read_file(path, _MAX_DESCRIPTION))
        version = described["schema_version"]
        if not (folder / _MODEL).exists():
            raise ValueError("not whole")
    except FileNotFoundError:
        raise PipelineError(f"{folder}: not imported yet; do it with `{made_by}`") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise PipelineError(f"{path}: damaged ({error}); import the model again with `{made_by}`") from None
    if version != SCHEMA_VERSION:
        raise PipelineError(f"{path}: of another version; import the model again with `{made_by}`")
    checked: dict[str, Any] = described
    return checked


def _read(path: Path) -> bytes:
    try:
        return read_file(path, MAX_WEIGHTS)
    except FileNotFoundError:
        raise PipelineError(f"{path}: no such model; check its path in params.yaml") from None


def _open(spec: External, content: bytes, size: tuple[int, int], n_classes: int) -> nn.Module:
    if spec.kind == "onnx":
        return OnnxModel(content, spec.path)
    assert spec.architecture is not None
    network = spec.model_copy(update={"channels": "rgb", "size": None}).network
    tensors = library.parse_tensors(content, spec.path)
    own = library.build_model(network, spec.size or size, n_classes)
    library.load_tensors(own, tensors, spec.path)
    return own.eval()


@torch.inference_mode()
def _ask(spec: External, model: nn.Module, images: Images, batch_size: int = 50) -> Tensor:
    preprocess = Preprocess(spec)
    with library.explained(spec.architecture or spec.kind, images.shape[1:3]):
        parts = [model(preprocess(part)) for part in torch.split(torch.from_numpy(images), batch_size)]
    return torch.cat(parts).float()


def _in_order(outputs: Tensor, output_of_class: list[int] | None) -> Tensor:
    return outputs if output_of_class is None else outputs[:, output_of_class]


def _accuracy(outputs: Tensor, labels: Labels) -> float:
    return float((outputs.argmax(1).numpy() == labels).mean())


def _check_predictions(
    spec: External,
    model: nn.Module,
    images: Images,
    labels: Labels,
    predicted: NDArray[np.int64],
    classes: Sequence[str],
    output_of_class: list[int] | None,
) -> tuple[str, ...]:
    """Return remarks on preprocessing and the order of classes; raise an error if the model only guesses."""
    n, accuracy = len(labels), float((predicted == labels).mean())
    better, found = "", accuracy + 3 * (0.5 / n) ** 0.5  # three standard deviations of the difference of two shares
    for changes in _other_ways(spec):
        right = _accuracy(_in_order(_ask(spec.model_copy(update=changes), model, images), output_of_class), labels)
        if right > found:
            said = ", ".join(
                f"{key}: {list(value) if isinstance(value, tuple) else value}" for key, value in changes.items()
            )
            better, found = f"with {said} it has {100 * right:.0f} %", right
    # The class that each output stands for most often: if these are the same classes in another order, that explains
    # more than preprocessing does.
    order = np.array(
        [np.bincount(labels[predicted == i], minlength=len(classes)).argmax() for i in range(len(classes))]
    )
    if len(np.unique(order)) == len(order) and (right := float((order[predicted] == labels).mean())) > found:
        meant = dict(zip(range(len(classes)) if output_of_class is None else output_of_class, order, strict=True))
        names = to_yaml([classes[meant[i]] for i in range(len(classes))])
        better = f"with its classes in another order it has {100 * right:.0f} %: classes: {names}"
    if _is_guessing(predicted, labels):
        raise PipelineError(
            f"{spec.path}: {100 * accuracy:.0f} % accuracy on {n} clean test images, no better than guessing; probably "
            f"its preprocessing or the order of its classes{f': {better}' if better else ''}"
        )
    return (f"{100 * accuracy:.0f} % accuracy on {n} clean test images, but {better}",) if better else ()


def _is_guessing(predicted: NDArray[np.int64], labels: Labels) -> bool:
    """Whether predicted classes and labels agree no more than by chance: Cohen's kappa is below three standard errors.

    This holds for unbalanced classes too: a model that always gives the most frequent one is guessing.

    Source: Fleiss, Cohen and Everitt, Psychological Bulletin 72 (1969), 323: the error of kappa where it is zero.
    """
    n = len(labels)
    given, wanted = (
        np.bincount(values, minlength=int(max(predicted.max(), labels.max())) + 1) / n for values in (predicted, labels)
    )
    by_chance = float(given @ wanted)
    if wanted.max() == 1:  # one class only: nothing to tell apart
        return False
    variance = by_chance + by_chance**2 - float(given @ wanted**2 + given**2 @ wanted)
    return bool((predicted == labels).mean() - by_chance <= 3 * (max(variance, 0.0) / n) ** 0.5)


def _other_ways(spec: External) -> Iterator[Mapping[str, Any]]:
    """Yield changes that lead to other common kinds of preprocessing, in case the user's is mistaken."""
    orders = ["rgb", "bgr"] if spec.channels != "grey" else ["grey"]
    ranges = [(spec.mean, spec.std), ((0.0,), (1.0,)), ((0.5,), (0.5,))]
    ranges += [_IMAGENET] if spec.channels != "grey" else []
    for channels, scale, (mean, std) in itertools.product(orders, (255.0, 1.0), ranges):
        ways = {"channels": channels, "scale": scale, "mean": mean, "std": std}
        changes = {key: value for key, value in ways.items() if value != getattr(spec, key)}
        if changes:
            yield changes
