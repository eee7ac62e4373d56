"""Finished models and checkpoints, kept outside every stage's outputs by a digest of all that decides them."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pipeline import layout, networks
from pipeline.devices import select_precision
from pipeline.errors import PipelineError
from pipeline.files import replacing_file, write_text
from pipeline.networks.compiled import compiler_version
from pipeline.training import Epoch

# Code that decides the weights; a change to it makes every kept model stale.
_TRAINING_CODE = ("devices.py", "networks/*.*", "recipes.py", "regimens.py", "seeding.py", "training.py")


_CURVES = TypeAdapter(Annotated[list[Epoch], Field(min_length=1)], config=ConfigDict(extra="forbid", strict=True))


@dataclass(frozen=True)
class Kept:
    """Where one model is kept.

    Attributes:
        key: The digest; from `keep`.
        description: All that decides the model, as JSON values.
        precision: What it is computed in, `float32` or `bfloat16`.
    """

    key: str
    description: Mapping[str, Any]
    precision: str

    @property
    def weights(self) -> Path:
        """The finished model; its description lies beside it as `.json`."""
        return layout.finished_models() / f"{self.key}.safetensors"

    @property
    def checkpoint(self) -> Path:
        """The state after the last whole epoch, until the model is finished."""
        return layout.finished_models() / f"{self.key}.checkpoint"

    @property
    def curve(self) -> Path:
        """The learning curve; written last, so it marks a finished model."""
        return layout.finished_models() / f"{self.key}.curve.json"

    @property
    def lock(self) -> Path:
        """There as long as a process trains the model."""
        return layout.finished_models() / f"{self.key}.running"

    def is_finished(self) -> bool:
        """Whether the model is there, whole; removes what a run that was killed as it finished has left beside it."""
        if not self.curve.is_file():
            return False
        try:
            _read_curve(self.curve)
            networks.load(self.weights, "", self.description)
            json.loads(self.curve.read_text(encoding="utf-8"))
        except (PipelineError, ValueError):  # damaged since: train it again
            return False
        for leftover in (self.checkpoint, self.lock):
            leftover.unlink(missing_ok=True)
        return True

    def finish(self, classifier: networks.Classifier, curve: list[Epoch]) -> None:
        """Keep a finished model and its learning curve."""
        networks.save(classifier, self.weights, {**self.description, "computed_in": self.precision})
        write_text(self.curve, json.dumps([asdict(epoch) for epoch in curve]) + "\n")
        self.checkpoint.unlink(missing_ok=True)

    def copy_to(self, path: Path) -> list[dict[str, Any]]:
        """Copy a finished model to `path` (`.safetensors`, `.json` beside it) and return its curve, a row per epoch."""
        with ExitStack() as both:
            for suffix in (".safetensors", ".json"):
                partial = both.enter_context(replacing_file(path.with_suffix(suffix)))
                shutil.copyfile(self.weights.with_suffix(suffix), partial)
        return [asdict(epoch) for epoch in _read_curve(self.curve)]


def _read_curve(path: Path) -> list[Epoch]:
    try:
        curve = _CURVES.validate_json(path.read_bytes())
    except ValidationError:
        raise PipelineError(f"{path}: damaged; delete it, and the model is trained again") from None
    numbers = [number for epoch in curve for number in astuple(epoch)]
    if [epoch.epoch for epoch in curve] != list(range(1, len(curve) + 1)) or not all(map(isfinite, numbers)):
        raise PipelineError(f"{path}: damaged; delete it, and the model is trained again")
    return curve


def keep(
    description: Mapping[str, Any],
    precision: str,
    device: torch.device,
    n_threads: int,
    images_sha256: str | None = None,
    natural_sha256: str | None = None,
) -> Kept:
    """Where the model is kept that all this decides.

    Args:
        description: All of params that decides it, as JSON values.
        precision: Of its recipe.
        device: Where it is computed.
        n_threads: Threads that compute it.
        images_sha256: Digest of the perturbed training images, if it sees any.
        natural_sha256: Digest of the natural model's weights, if it starts from them.
    """
    folder = Path(__file__).parent
    computed_in = str(select_precision(precision, device)).removeprefix("torch.")
    names = {
        "description": dict(description),
        "images": images_sha256,
        "natural": natural_sha256,
        "code": {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for pattern in _TRAINING_CODE
            for file in folder.glob(pattern)
        },
        "torch": torch.__version__,
        "compiler": compiler_version(),
        "device": device.type,
        "precision": computed_in,
        "threads": n_threads,
    }
    key = hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()
    return Kept(key, description, computed_in)
