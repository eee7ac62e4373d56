"""Files of trained classifiers: weights as safetensors, and beside them a JSON description of how they were made."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import safetensors.torch
import torch

from pipeline.models.classifier import Classifier, build_network
from pipeline.models.layers import Standardize
from pipeline.recipes.recipe import NETWORKS
from pipeline.runtime.errors import PipelineError, lacks_memory
from pipeline.runtime.files import MAX_WEIGHTS, read_file, replacing_file, write_text

SCHEMA_VERSION = 4
# Far above any description: a damaged or hostile file cannot take more memory.
_MAX_DESCRIPTION = 64 * 2**20


def save(classifier: Classifier, path: Path, description: Mapping[str, Any]) -> None:
    """Write weights as safetensors to `path` and the description beside it as JSON.

    Args:
        classifier: What to save.
        path: File of the weights; ends in `.safetensors`.
        description: JSON values that say how it was made: at least `network`, `shape`, `n_classes` and `recipe`.

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
        path: File of the weights; ends in `.safetensors`.
        weights: Content of that file.
        description: As `save`; the digests and the version of an earlier file are replaced.
    """
    with replacing_file(path) as partial:
        partial.write_bytes(weights)
    digest = hashlib.sha256(weights).hexdigest()
    described = {"schema_version": 0, **description} | {"schema_version": SCHEMA_VERSION, "weights_sha256": digest}
    write_text(path.with_suffix(".json"), to_json(described))


def to_json(description: Mapping[str, Any]) -> str:
    """Return the text of a description file, which ends with a digest of the rest.

    Args:
        description: As `save`, with schema version and digest of the weights.
    """
    rest = {name: value for name, value in description.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(rest).encode()).hexdigest()
    return json.dumps({**rest, "sha256": digest}, indent=2) + "\n"


def read_description(path: Path, made_by: str) -> dict[str, Any]:
    """Read the description beside a model's weights, checked against the digest in it.

    Args:
        path: File of the weights.
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


def read_checked(path: Path, made_by: str, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Read a description as `read_description` does, and check it against the expected entries.

    Raises:
        PipelineError: As `read_description`; an entry differs from `expected`.
    """
    description = read_description(path, made_by)
    _check_expected(path, description, expected, made_by)
    return description


def _check_expected(path: Path, description: Mapping[str, Any], expected: Mapping[str, Any], made_by: str) -> None:
    for key, value in expected.items():
        if description.get(key) != value:
            raise PipelineError(
                f"{path}: made with other params ({key} is {_short(description.get(key))}, params.yaml asks for "
                f"{_short(value)}); make it again with `{made_by}`"
            )


def read_weights(path: Path, description: Mapping[str, Any], made_by: str = "") -> bytes:
    """Read the content of a model's weights file, checked against the digest in its description.

    Args:
        path: File of the weights.
        description: From `read_description`.
        made_by: As `read_description`.

    Raises:
        PipelineError: The file is missing, or not the one described.
    """
    try:
        content = read_file(path, MAX_WEIGHTS)
    except FileNotFoundError:
        raise PipelineError(f"{path}: no such model; make it with `{made_by}`") from None
    if hashlib.sha256(content).hexdigest() != description.get("weights_sha256"):
        raise PipelineError(
            f"{path}: damaged model (not the weights that {path.stem}.json describes); make it again with `{made_by}`"
        )
    return content


def load(path: Path, made_by: str, expected: Mapping[str, Any] | None = None) -> Classifier:
    """Load a saved classifier, in evaluation mode.

    Args:
        path: File of the weights; the description lies beside it as `.json`.
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
            raise ValueError(f"no standardization of {shape} images")
        with torch.device("meta"):  # no memory for what the description claims until the weights are known to fit
            claimed = build_network(network, shape, n_classes).state_dict()
        if any(tensors[f"network.{name}"].shape != tensor.shape for name, tensor in claimed.items()):
            raise ValueError("weights of another shape than the network")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("weights that are not finite numbers")
        classifier = Classifier(shape, Standardize(mean, np.ones_like(mean)), build_network(network, shape, n_classes))
        classifier.load_state_dict(tensors)
    except PipelineError as error:  # a library is missing
        raise PipelineError(f"{path}: {error}") from None
    except Exception as error:  # damaged files can raise anything; the file is what the user can act on
        if lacks_memory(error):
            raise
        problem = shorten(str(error), 200) or type(error).__name__
        raise PipelineError(f"{path}: damaged model ({problem}); make it again with `{made_by}`") from None
    _check_expected(path, description, expected or {}, made_by)
    classifier.path = path
    return classifier.eval()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
