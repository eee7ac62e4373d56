"""The model cache: finished models and checkpoints, keyed by a digest of everything that determines them.

It lies outside the stages' outputs.
"""

import ast
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pipeline.models import classifier, external, library, storage
from pipeline.models.devices import select_device, select_precision
from pipeline.runtime import layout
from pipeline.runtime.bucket import find_bucket
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import MAX_CHECKPOINT, read_file, replacing_file
from pipeline.training.job import ExternalModel, TrainingJob
from pipeline.training.loop import Epoch

# Modules whose code determines weights or learning curves. tests/test_cache.py checks that none is missing.
TRAINING_CODE = (
    "data.seeding",
    *(f"models.accelerated.{name}" for name in ("compiled", "windows", "winograd")),
    *(f"models.{name}" for name in ("classifier", "devices", "layers", "library")),
    *("recipes.plan", "recipes.recipe", "training.loop", "training.schedules"),
)
# Prefixes of the environment variables that configure the numerical libraries behind torch.
_ENVIRONMENT = (
    "ATEN_",
    "CUBLAS_",
    "DNNL_",
    "GOMP_",
    "KMP_",
    "MKL_",
    "NVIDIA_TF32_",
    "OMP_",
    "ONEDNN_",
    "TORCH_ALLOW_TF32_",
)
# Left out: the number of threads that they set is part of the key anyway.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

_CURVES = TypeAdapter(Annotated[list[Epoch], Field(min_length=1)], config=ConfigDict(extra="forbid", strict=True))


@dataclass(frozen=True)
class CacheEntry:
    """The place of a model in the cache, whether or not the model is there yet.

    Attributes:
        key: The digest that names its files; from `find_entry`.
        description: All params that determine the model, as JSON values.
        precision: Number format it is computed in, `float32` or `bfloat16`.
    """

    key: str
    description: Mapping[str, Any]
    precision: str

    @property
    def weights(self) -> Path:
        """The finished model; a `.json` file beside it, written last, has its description, key and learning curve."""
        return layout.cached_models() / f"{self.key}.safetensors"

    @property
    def checkpoint(self) -> Path:
        """The training state after the last complete epoch; removed when the model is finished."""
        return layout.cached_models() / f"{self.key}.checkpoint"

    @property
    def lock(self) -> Path:
        """The lock file, which exists while a process trains the model."""
        return layout.cached_models() / f"{self.key}.running"

    def is_finished(self) -> bool:
        """Whether the complete model is in the cache; if not, fetch it from object storage if PIPELINE_STORES is set.

        Removes the checkpoint and lock file left behind by a run that was killed while finishing.
        """
        if self._is_whole():
            bucket = find_bucket()
            if bucket is not None and not bucket.has(self._files[-1].as_posix()):
                self._send_finished()
        elif not (self._fetch(*self._files) and self._is_whole()):
            return False
        for leftover in (self.checkpoint, self.lock):
            leftover.unlink(missing_ok=True)
        return True

    def _is_whole(self) -> bool:
        try:
            read_entry(self.weights)
            storage.load(self.weights, "", self.description)
        except PipelineError:  # missing or damaged: train it
            return False
        return True

    @property
    def _files(self) -> tuple[Path, Path]:
        return self.weights, self.weights.with_suffix(".json")

    def _fetch(self, *paths: Path) -> bool:
        """Copy files from object storage; False if PIPELINE_STORES is not set or a file is missing there."""
        if (bucket := find_bucket()) is None:
            return False
        try:
            for path in paths:
                content = bucket.read(path.as_posix(), MAX_CHECKPOINT)
                with replacing_file(path) as partial:
                    partial.write_bytes(content)
        except FileNotFoundError:
            return False
        return True

    def _send(self, *paths: Path) -> None:
        """Copy files to object storage, if PIPELINE_STORES names any."""
        if (bucket := find_bucket()) is not None:
            for path in paths:
                bucket.write(path.as_posix(), read_file(path, MAX_CHECKPOINT))

    def _send_finished(self) -> None:
        """Replace what object storage has, a checkpoint or a damaged model, by the finished model."""
        self._send(*self._files)
        if (bucket := find_bucket()) is not None:
            bucket.remove([self.checkpoint.as_posix()])

    def fetch_checkpoint(self) -> None:
        """Fetch another machine's checkpoint from object storage, unless there is one on this machine."""
        if not self.checkpoint.exists():
            self._fetch(self.checkpoint)

    def send_checkpoint(self) -> None:
        """Copy the checkpoint to object storage, if PIPELINE_STORES is set, so that other machines can resume."""
        self._send(self.checkpoint)

    def finish(self, classifier: classifier.Classifier, curve: list[Epoch]) -> None:
        """Store a finished model and its learning curve, and remove its checkpoint."""
        rows = [asdict(epoch) for epoch in curve]
        description = {**self.description, "computed_in": self.precision, "learning_curve": rows, "key": self.key}
        storage.save(classifier, self.weights, description)
        self._send_finished()
        self.checkpoint.unlink(missing_ok=True)

    def copy_to(self, path: Path) -> list[dict[str, Any]]:
        """Copy a finished model to `path` (`.safetensors`, `.json` beside it) and return its curve, a row per epoch."""
        description = read_entry(self.weights)
        weights = storage.read_weights(self.weights, description, mend_entry(self.weights))
        del description["key"]  # depends on the machine: elsewhere the same model has another key
        storage.write(path, weights, description)
        rows: list[dict[str, Any]] = description["learning_curve"]
        return rows


def read_entry(weights: Path) -> dict[str, Any]:
    """Read the description of a model in the cache, with its learning curve but without its weights.

    Args:
        weights: `<key>.safetensors` in the cache.

    Raises:
        PipelineError: It is missing, damaged, or belongs to another key.
    """
    mend = mend_entry(weights)
    description = storage.read_description(weights, mend)
    if description.get("key") != weights.stem:
        raise PipelineError(f"{weights}: of another model; make it again with `{mend}`")
    try:
        curve = _CURVES.validate_json(json.dumps(description.get("learning_curve")))
    except ValidationError:
        raise PipelineError(f"{weights}: no learning curve; make it again with `{mend}`") from None
    numbers = [number for epoch in curve for number in astuple(epoch)]
    if [epoch.epoch for epoch in curve] != list(range(1, len(curve) + 1)) or not all(map(isfinite, numbers)):
        raise PipelineError(f"{weights}: no learning curve; make it again with `{mend}`")
    return description


def mend_entry(weights: Path) -> str:
    """Return the command that recreates a damaged model in the cache."""
    return f"rm {weights.with_suffix('.*')} && dvc repro"


def find_entry(job: TrainingJob) -> CacheEntry:
    """Return the cache entry of a job's model, whether or not the model is there yet.

    Raises:
        PipelineError: A store or a starting model that determines the model is missing, damaged, or made with other
            params.
    """
    recipe, device = job.plan.recipe, select_device(job.device)
    height, width, channels = job.dataset.shape
    computed_in = str(select_precision(recipe.precision, device)).removeprefix("torch.")
    names = {
        "description": dict(job.description),
        "seed_names": job.seed_names,
        "images": None if job.trained_on is None else job.trained_on.opened().sha256,
        "start": _digest_start(job.start),
        "code": _digest_own_code(),
        "native_code": classifier.native_code(recipe.network, (height, width, channels), device),
        "torch": torch.__version__,
        "library": library.version(recipe.network),
        "processor": _processor(device),
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT) and name not in _THREADS
        },
        "precision": computed_in,
        "threads": (job.n_threads or torch.get_num_threads()) if device.type == "cpu" else 0,
    }
    key = hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()
    return CacheEntry(key, job.description, computed_in)


def _digest_start(start: TrainingJob | ExternalModel | None) -> Any:
    """Digest of the weights that a model starts from, and of the code that makes a classifier of a user's model."""
    if start is None:
        return None
    if isinstance(start, ExternalModel):
        code = digest_code({external.__name__: Path(str(external.__file__))})
        return [external.read_description(start.path, start.made_by)["model_sha256"], code]
    return storage.read_checked(start.path, start.made_by, start.description)["weights_sha256"]


def cached_files() -> dict[str, list[Path]]:
    """Return all files of the cache, grouped by the key in their names; other files in its folder are left out."""
    files: dict[str, list[Path]] = {}
    for path in sorted(layout.cached_models().glob("*")):
        if named := re.match(r"\.?([0-9a-f]{64})\.", path.name):
            files.setdefault(named[1], []).append(path)
    return files


def name_entry(key: str) -> str:
    """Return a model's name in words, such as `mnist constant noise 0.05`."""
    try:
        described = storage.read_description(layout.cached_models() / f"{key}.safetensors", "")
    except PipelineError:
        return "not finished, damaged, or of an earlier version"
    trained_on = described.get("trained_on") or {}
    words = (
        described.get("dataset"),
        described.get("strategy"),
        trained_on.get("perturbation"),
        trained_on.get("level"),
    )
    return " ".join(str(word) for word in words if word is not None)


@cache
def _digest_own_code() -> str:
    return digest_code(training_code())


def training_code() -> dict[str, Path]:
    """Return name → file of the modules in `TRAINING_CODE`, all of which this module imports."""
    return {name: Path(str(sys.modules[f"pipeline.{name}"].__file__)) for name in TRAINING_CODE}


def digest_code(modules: Mapping[str, Path]) -> str:
    """Return the digest of the code of modules, without comments, docstrings and layout.

    Args:
        modules: Name → file.
    """
    digest = hashlib.sha256()
    for name, file in modules.items():
        tree = _Code().visit(ast.parse(file.read_text(encoding="utf-8")))
        digest.update(f"{name}\0{ast.unparse(tree)}\0".encode())
    return digest.hexdigest()


class _Code(ast.NodeTransformer):
    """Removes strings that have no effect: docstrings, and strings below attributes."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        """Remove a statement that is only a string."""
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Visit any other node; a block must not become empty."""
        super().generic_visit(node)
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.body:
            node.body = [ast.Pass()]
        return node


def _processor(device: torch.device) -> dict[str, Any]:
    """Return what libraries choose their algorithms by: other processors add the same sums in another order."""
    if device.type == "cuda":
        versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
        return {"device": "cuda", "name": torch.cuda.get_device_name(device), **versions}
    capabilities = {name: value for name, value in torch.cpu.get_capabilities().items() if not name.startswith("num_")}
    return {"device": device.type, "torch": torch.backends.cpu.get_cpu_capability(), **capabilities}
