"""What one array of a perturbed store holds, as a frozen value."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.data.datasets import Dataset
from pipeline.data.seeding import block_size
from pipeline.perturbations import PERTURBATIONS, Perturbation


@dataclass(frozen=True)
class Variant:
    """All that decides the bytes of a perturbed split, its clean images aside."""

    perturbation: str
    level: float
    split: str
    seed: int
    options: Mapping[str, str | bool]

    @property
    def kernel(self) -> Perturbation:
        """Its line in the table."""
        return PERTURBATIONS[self.perturbation]


def variant_attributes(dataset: Dataset, variant: Variant) -> dict[str, Any]:
    """All that is needed to regenerate an array, and nothing that varies from run to run."""
    return {
        "dataset": dataset.name,
        "split": variant.split,
        "perturbation": variant.perturbation,
        "level": variant.level,
        "unit": variant.kernel.unit,
        "options": dict(variant.options),
        "seed": variant.seed if variant.kernel.is_random else None,
        "block_size": block_size(dataset.shape) if variant.kernel.is_random else None,
        "source_sha256": dataset.digests[variant.split, "images"],
    }
