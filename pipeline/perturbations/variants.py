"""What each array of a perturbed store must hold, as frozen values, and opening arrays checked against that."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pipeline.data import store
from pipeline.data.arrays import Images
from pipeline.data.datasets import Dataset
from pipeline.data.seeding import block_size, level_name
from pipeline.perturbations import PERTURBATIONS, Perturbation
from pipeline.runtime import layout
from pipeline.runtime.errors import PipelineError


@dataclass(frozen=True)
class Variant:
    """All that determines the bytes of a perturbed split, apart from its clean images."""

    perturbation: str
    level: float
    split: str
    seed: int
    options: Mapping[str, str | bool]

    @property
    def kernel(self) -> Perturbation:
        """Its entry in `PERTURBATIONS`."""
        return PERTURBATIONS[self.perturbation]

    @property
    def label(self) -> str:
        """Perturbation and level, such as `noise-0.05`; names the models trained on it."""
        return f"{self.perturbation}-{level_name(self.level)}"


def split_label(label: str) -> tuple[str, float]:
    """Split a label into perturbation and level."""
    perturbation, _, level = label.rpartition("-")
    return perturbation, float(level)


@dataclass(frozen=True)
class PlannedArray:
    """An array of a perturbed store, whether or not it exists yet.

    Attributes:
        dataset: Its data set.
        variant: The perturbed split that it holds.
        leading: Its leading shape, (N,) for training or (trials, N) for testing.
    """

    dataset: Dataset
    variant: Variant
    leading: tuple[int, ...]

    @property
    def path(self) -> Path:
        """Path of its store."""
        return layout.perturbed_store(self.dataset.name, self.variant.perturbation)

    @property
    def name(self) -> str:
        """Its path in the store, such as `0.05/test`."""
        return f"{level_name(self.variant.level)}/{self.variant.split}"

    @property
    def made_by(self) -> str:
        """The command that makes it."""
        return f"python -m pipeline perturb {self.dataset.name} {self.variant.perturbation}"

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C) or (trials, N, H, W, C)."""
        return (*self.leading, *self.dataset.shape)

    @property
    def n_images(self) -> int:
        """Number of images that it holds, all trials together."""
        return prod(self.leading)

    @property
    def attributes(self) -> dict[str, Any]:
        """All that is needed to regenerate it, and nothing that varies from run to run."""
        variant, is_random = self.variant, self.variant.kernel.is_random
        return {
            "dataset": self.dataset.name,
            "split": variant.split,
            "perturbation": variant.perturbation,
            "level": variant.level,
            "unit": variant.kernel.unit,
            "options": dict(variant.options),
            "seed": variant.seed if is_random else None,
            "block_size": block_size(self.dataset.shape) if is_random else None,
            "source_sha256": self.dataset.digests[variant.split, "images"],
        }

    def opened(self) -> "StoredArray":
        """Open the array for reading, with shape and attributes checked.

        Raises:
            PipelineError: The store or the array is missing, damaged, or made with other params.
        """
        array = store.get_array(store.open_store(self.path, self.made_by), self.name, self.made_by)
        expected = {**self.attributes, "shape": list(self.shape)}
        actual = {**dict(array.attrs), "shape": list(array.shape)}
        for key, value in expected.items():
            if actual.get(key) != value:
                raise PipelineError(
                    f"{self.path}/{self.name}: made with other params ({key} is {actual.get(key)!r}, params.yaml asks "
                    f"for {value!r}); make it again with `{self.made_by}`"
                )
        return StoredArray(array, self.made_by)


@dataclass(frozen=True)
class StoredArray:
    """An array opened for reading, checked against its plan.

    Attributes:
        array: From `store.get_array`.
        made_by: The command that makes it, for error messages.
    """

    array: store.Array
    made_by: str

    @property
    def sha256(self) -> str:
        """Digest of its decoded bytes, from its attributes; `read` and `trials` check it."""
        return str(self.array.attrs["sha256"])

    def read(self) -> Images:
        """Read all values and check their digest; errors as `store.read`."""
        return store.read(self.array, self.made_by)

    def trials(self) -> Iterator[Images]:
        """Yield one trial after the other and check the digest after the last; errors as `store.read_trials`."""
        return store.read_trials(self.array, self.made_by)

    def first(self, n: int) -> Images:
        """Read the first n images of trial 0 of an array with trials; errors as `store.read_part`."""
        return store.read_part(self.array, (0, slice(0, n)), self.made_by)
