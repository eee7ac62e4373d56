"""Convolutional networks from their description, with input standardization inside, and their files.

A network takes raw uint8 images (N, H, W, C) and gives logits (N, n_classes), so whoever loads one needs to know
nothing about how it was trained.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipeline.arrays import Images
from pipeline.errors import PipelineError
from pipeline.files import read_file, replacing_file, write_text
from pipeline.networks.layers import ACTIVATIONS, Block, Group, Scale, Whitening
from pipeline.networks.windows import Geometry, WindowBlock
from pipeline.recipes import NETWORKS, FastNetwork, Network

SCHEMA_VERSION = 3
# Far more than any model or description has; a damaged or hostile file cannot take more memory.
_MAX_WEIGHTS, _MAX_DESCRIPTION = 4 * 2**30, 64 * 2**20


class Standardize(nn.Module):
    """uint8 (N, H, W, C), 0-255 → float32 (N, C, H, W): minus the mean, over the standard deviation.

    Attributes:
        mean: float32, broadcastable to (H, W, C), on the scale 0-255.
        inverse_std: Likewise; 0 where the training set never varies, so that those positions become 0.
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, mean: NDArray[np.float64], std: NDArray[np.float64]) -> None:
        super().__init__()
        inverse = np.divide(1, std, out=np.zeros_like(std), where=std > 0)
        self.register_buffer("mean", torch.from_numpy(mean.astype(np.float32)))
        self.register_buffer("inverse_std", torch.from_numpy(inverse.astype(np.float32)))

    def forward(self, images: Tensor) -> Tensor:
        """Standardized images; the channels-last memory order of the input is kept."""
        return images.float().sub_(self.mean).mul_(self.inverse_std).permute(0, 3, 1, 2)


def fit_standardization(images: Images, mode: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of the training images.

    Args:
        images: uint8 (N, H, W, C), the training set actually used.
        mode: `pixel`: of every position and channel, shapes (H, W, C), as the authors. `channel`: of every
            channel, (1, 1, C). `none`: 0 and 255, (1, 1, 1), so that inputs are in [0, 1].

    Returns:
        mean, std: float64, std with divisor N. Sums are exact integers, so that a position that never
        varies has a standard deviation of exactly 0.
    """
    if mode == "none":
        return np.zeros((1, 1, 1)), np.full((1, 1, 1), 255.0)
    height, width, channels = images.shape[1:]
    total = np.zeros((height, width, channels), np.int64)
    total_squares = np.zeros_like(total)
    for start in range(0, len(images), 1000):
        block = images[start : start + 1000].astype(np.int64)
        total += block.sum(axis=0)
        total_squares += (block * block).sum(axis=0)
    count = len(images)
    if mode == "channel":
        total = total.sum(axis=(0, 1), keepdims=True)
        total_squares = total_squares.sum(axis=(0, 1), keepdims=True)
        count *= height * width
    # Python integers: the products below exceed 64 bits.
    numerator = total_squares.astype(object) * count - total.astype(object) ** 2
    variance = numerator.astype(np.float64) / float(count) ** 2
    return total / count, np.sqrt(variance)


def build_network(network: Network | FastNetwork, shape: tuple[int, int, int], n_classes: int) -> nn.Sequential:
    """Untrained layers from float32 (N, C, H, W) to logits (N, n_classes).

    Args:
        network: Its description; `Params` has checked that it fits the images.
        shape: (H, W, C) of the images.
        n_classes: How many classes there are.

    Source: paper section IV and Table I; for `FastNetwork` see `layers`.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = shape[2]
    if isinstance(network, FastNetwork):
        patches = Whitening(channels) if network.whiten else nn.Conv2d(channels, 8 * channels, kernel_size=2)
        layers["patches"], layers["activation"] = patches, ACTIVATIONS[network.activation]()
        channels = patches.out_channels
        for number, group_width in enumerate(network.widths, start=1):
            layers[f"group{number}"] = Group(channels, group_width, network.activation)
            channels = group_width
        layers["pool"] = nn.AdaptiveMaxPool2d(1)
    else:
        for number, convolution in enumerate(network.convolutions, start=1):
            if number == 1 and WindowBlock.fits(convolution, shape):
                layers[f"block{number}"] = WindowBlock(network, convolution, shape)
            else:
                layers[f"block{number}"] = Block(network, convolution, channels)
            channels = convolution.filters
    layers["flatten"] = nn.Flatten()
    n_features = network.n_features(shape)
    for number, hidden in enumerate(network.fully_connected, start=1):
        layers[f"hidden{number}"] = nn.Linear(n_features, hidden)
        layers[f"hidden{number}_activation"] = ACTIVATIONS[network.activation]()
        n_features = hidden
    layers["output"] = nn.Linear(n_features, n_classes)
    if isinstance(network, FastNetwork):
        layers["scale"] = Scale(1 / 9)  # large steps need small logits; the factor is airbench's
    return nn.Sequential(layers)


def native_code(network: Network | FastNetwork, shape: tuple[int, int, int], device: torch.device) -> str | None:
    """Digest of the compiled code of ours that computes a network on a device; None where torch's alone does.

    Args:
        network: Its description.
        shape: (H, W, C) of the images.
        device: Where it runs.
    """
    with torch.device("meta"):
        first = next(build_network(network, shape, n_classes=1).children())
    return first.library_digest if isinstance(first, WindowBlock) and first.takes_packed(device) else None


class Classifier(nn.Module):
    """Standardization and network in one: uint8 (N, H, W, C) → float32 logits (N, n_classes).

    Attributes:
        shape: (H, W, C) of the images it takes.
        path: Where it was loaded from; None for one that was not.
    """

    path: Path | None = None

    def __init__(self, shape: tuple[int, int, int], standardize: Standardize, network: nn.Sequential) -> None:
        super().__init__()
        self.shape = shape
        self.standardize = standardize
        self.network = network

    def packing(self, device: torch.device) -> Geometry | None:
        """How `prepare` packs images on a device; None if it standardizes them instead."""
        first = next(self.network.children())
        return first.geometry if isinstance(first, WindowBlock) and first.takes_packed(device) else None

    def prepare(self, images: Tensor) -> Tensor:
        """What `classify` takes of raw images: standardized (N, C, H, W), or still uint8 but packed.

        No weight enters into it, so that it need not be done anew in every epoch, and packing is the same for all
        models that pack alike.
        """
        geometry = self.packing(images.device)
        standardized: Tensor = self.standardize(images) if geometry is None else geometry.pack(images)
        return standardized

    def forward(self, images: Tensor, side: int | None = None) -> Tensor:
        """Logits of raw images; scaled to `side` pixels after standardization, if that is given."""
        prepared = self.prepare(images)
        if side is not None:
            prepared = interpolate(prepared, size=(side, side), mode="bilinear")
        return self.classify(prepared)

    def classify(self, prepared: Tensor) -> Tensor:
        """Logits of images that went through `prepare`."""
        first, *others = self.network.children()
        if prepared.dtype == torch.uint8:
            assert isinstance(first, WindowBlock)
            values = first.of_packed(prepared, self.standardize.mean, self.standardize.inverse_std)
        else:
            values = first(prepared)
        for layer in others:
            values = layer(values)
        return values.float()


def save(classifier: Classifier, path: Path, description: Mapping[str, Any]) -> None:
    """Write weights as safetensors to `path` and the description beside it as JSON.

    Args:
        classifier: What to save.
        path: Of the weights; ends in `.safetensors`.
        description: JSON values that say how it came about: at least `network`, `shape`, `n_classes` and `recipe`.

    Raises:
        PipelineError: A weight is not finite.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise PipelineError(f"{path}: not written: some of its weights are not finite numbers")
    write(path, safetensors.torch.save(tensors), description)


def write(path: Path, weights: bytes, description: Mapping[str, Any]) -> None:
    """Write the two files of a model, the description last.

    Args:
        path: Of the weights; ends in `.safetensors`.
        weights: Content of that file.
        description: As `save`; the digests and the version of an earlier file are replaced.
    """
    with replacing_file(path) as partial:
        partial.write_bytes(weights)
    digest = hashlib.sha256(weights).hexdigest()
    described = {"schema_version": 0, **description} | {"schema_version": SCHEMA_VERSION, "weights_sha256": digest}
    write_text(path.with_suffix(".json"), to_json(described))


def to_json(description: Mapping[str, Any]) -> str:
    """The text of a description's file, which ends with a digest of the rest.

    Args:
        description: As `save`, with schema version and digest of the weights.
    """
    rest = {name: value for name, value in description.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(rest).encode()).hexdigest()
    return json.dumps({**rest, "sha256": digest}, indent=2) + "\n"


def read_description(path: Path, made_by: str) -> dict[str, Any]:
    """What the file beside a model's weights says, checked against the digest in it.

    Args:
        path: Of the weights.
        made_by: Command that makes the model, for the error message.

    Raises:
        PipelineError: The file is missing or damaged, or of another schema version.
    """
    described = path.with_suffix(".json")
    try:
        text = read_file(described, _MAX_DESCRIPTION).decode()
        description = json.loads(text)
        version = description["schema_version"]
    except FileNotFoundError:
        raise PipelineError(f"{described}: no such model; make it with `{made_by}`") from None
    except PipelineError:
        raise
    except Exception as error:  # a parser can raise anything; the file is what the user can act on
        problem = shorten(str(error), 200) or type(error).__name__
        raise PipelineError(f"{described}: damaged model ({problem}); make it again with `{made_by}`") from None
    if version != SCHEMA_VERSION:
        raise PipelineError(
            f"{described}: schema version {_short(version)}, expected {SCHEMA_VERSION}; make it again with `{made_by}`"
        )
    if text != to_json(description):
        raise PipelineError(f"{described}: damaged model (its digest is another); make it again with `{made_by}`")
    checked: dict[str, Any] = description
    return checked


def read_weights(path: Path, description: Mapping[str, Any], made_by: str = "") -> bytes:
    """The content of a model's weights file, checked against the digest in its description.

    Args:
        path: Of the weights.
        description: From `read_description`.
        made_by: As `read_description`.

    Raises:
        PipelineError: The file is missing, or not the one described.
    """
    try:
        content = read_file(path, _MAX_WEIGHTS)
    except FileNotFoundError:
        raise PipelineError(f"{path}: no such model; make it with `{made_by}`") from None
    if hashlib.sha256(content).hexdigest() != description.get("weights_sha256"):
        raise PipelineError(
            f"{path}: damaged model (not the weights that {path.stem}.json describes); make it again with `{made_by}`"
        )
    return content


def load(path: Path, made_by: str, expected: Mapping[str, Any] | None = None) -> Classifier:
    """A saved classifier in evaluation mode.

    Args:
        path: Of the weights; the description lies beside it as `.json`.
        made_by: Command that makes it, for the error message.
        expected: Entries that the description must have.

    Raises:
        PipelineError: A file is missing or damaged, weights and description do not belong together, a weight is not
            finite, or the description is not what was expected.
    """
    description = read_description(path, made_by)
    content = read_weights(path, description, made_by)
    try:
        tensors = safetensors.torch.load(content)
        network, n_classes = NETWORKS.validate_python(description["network"]), description["n_classes"]
        height, width, channels = description["shape"]
        shape = (height, width, channels)
        mean = tensors["standardize.mean"].numpy().astype(np.float64)
        if mean.shape not in (shape, (1, 1, channels), (1, 1, 1)):
            raise PipelineError(f"no standardization of {shape} images")
        with torch.device("meta"):  # no memory for what the description claims until the weights are known to fit
            claimed = build_network(network, shape, n_classes).state_dict()
        if any(tensors[f"network.{name}"].shape != tensor.shape for name, tensor in claimed.items()):
            raise PipelineError("weights of another shape than the network")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise PipelineError("weights that are not finite numbers")
        classifier = Classifier(shape, Standardize(mean, np.ones_like(mean)), build_network(network, shape, n_classes))
        classifier.load_state_dict(tensors)
    except Exception as error:  # damaged files can raise anything; the file is what the user can act on
        problem = shorten(str(error), 200) or type(error).__name__
        raise PipelineError(f"{path}: damaged model ({problem}); make it again with `{made_by}`") from None
    for key, value in (expected or {}).items():
        if description.get(key) != value:
            raise PipelineError(
                f"{path}: made with other params ({key} is {_short(description.get(key))}, params.yaml asks for "
                f"{_short(value)}); make it again with `{made_by}`"
            )
    classifier.path = path
    return classifier.eval()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
