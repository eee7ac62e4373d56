"""What the stores must hold according to params, and opening them checked against it."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline import layout, store
from pipeline.datasets import Dataset
from pipeline.errors import PipelineError
from pipeline.files import PARTIAL_SUFFIX
from pipeline.params import Params
from pipeline.perturbations import PERTURBATIONS, Perturbation
from pipeline.seeding import block_size, level_name

# Of stores that are being removed; they end like half-made ones, which DVC and git do not look at.
_STALE_SUFFIX = f".stale{PARTIAL_SUFFIX}"


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


def planned_variants(params: Params, dataset: str, perturbation: str) -> list[tuple[Variant, tuple[int, ...]]]:
    """The arrays of one perturbed store: what each holds, and its leading shape, (N,) or (trials, N).

    Raises:
        PipelineError: params.yaml has no such perturbation.
    """
    if perturbation not in params.perturbations:
        raise PipelineError(
            f"perturbation: unknown '{perturbation}'; params.yaml has {', '.join(params.perturbations)}"
        )
    levels = params.perturbations[perturbation]
    subset = params.datasets[dataset]
    trials = params.perturb.trials if PERTURBATIONS[perturbation].is_random else 1
    number = int if PERTURBATIONS[perturbation].unit == "n_pixels" else float  # YAML may say 1 for 1.0
    new = partial(Variant, perturbation, seed=params.perturb.seed, options=levels.options)
    planned: list[tuple[Variant, tuple[int, ...]]] = []
    for level in sorted(levels.train_levels):
        planned.append((new(level=number(level), split="train"), (subset.n_train,)))
    for level in sorted({*levels.test_levels, *params.evaluate.levels[perturbation]}):
        planned.append((new(level=number(level), split="test"), (trials, subset.n_test)))
    return planned


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


def open_perturbed(
    params: Params,
    dataset: Dataset,
    perturbation: str,
    is_wanted: Callable[[Variant], bool] = lambda variant: True,
) -> list[tuple[Variant, store.Array, str]]:
    """The arrays of a perturbed store, checked against params.

    Args:
        params: What the store should hold.
        dataset: Which data set.
        perturbation: Which perturbation.
        is_wanted: Of which variants; opening one costs a hundredth of a second.

    Returns:
        Every variant with its array and the command that makes it.

    Raises:
        PipelineError: The store is missing, damaged, or made with other params.
    """
    made_by = f"python -m pipeline perturb {dataset.name} {perturbation}"
    group = store.open_store(layout.perturbed_store(dataset.name, perturbation), made_by)
    return [
        (variant, open_variant(group, dataset, variant, leading, made_by), made_by)
        for variant, leading in planned_variants(params, dataset.name, perturbation)
        if is_wanted(variant)
    ]


def open_variant(
    group: store.Group, dataset: Dataset, variant: Variant, leading: tuple[int, ...], made_by: str
) -> store.Array:
    """One array of an open perturbed store, checked against params.

    Args:
        group: The store.
        dataset: Which data set.
        variant: With `leading`, from `planned_variants`.
        leading: The array's leading shape.
        made_by: Command that makes the store, for the error message.

    Raises:
        PipelineError: It is missing, damaged, or made with other params.
    """
    name = f"{level_name(variant.level)}/{variant.split}"
    array = store.get_array(group, name, made_by)
    expected = {**variant_attributes(dataset, variant), "shape": [*leading, *dataset.shape]}
    actual = {**dict(array.attrs), "shape": list(array.shape)}
    differing = [key for key, value in expected.items() if actual.get(key) != value]
    if differing:
        key = differing[0]
        raise PipelineError(
            f"{layout.perturbed_store(dataset.name, variant.perturbation)}/{name}: made with other params ({key} is "
            f"{actual.get(key)!r}, params.yaml asks for {expected[key]!r}); make it again with `{made_by}`"
        )
    return array


def open_tested(
    params: Params, dataset: Dataset, levels: Mapping[str, Sequence[float]]
) -> dict[tuple[str, float], tuple[store.Array, str]]:
    """The perturbed test images at some levels, checked against params.

    Args:
        params: What the stores should hold.
        dataset: Which data set.
        levels: Perturbation → its levels.

    Returns:
        (perturbation, level) → array (trials, N, H, W, C), and the command that makes it.

    Raises:
        PipelineError: As `open_perturbed`.
    """

    def is_tested(variant: Variant) -> bool:
        return variant.split == "test" and variant.level in levels.get(variant.perturbation, ())

    return {
        (perturbation, variant.level): (array, made_by)
        for perturbation in params.perturbations
        for variant, array, made_by in open_perturbed(params, dataset, perturbation, is_tested)
    }


def remove_stale_stores(params: Params, dataset: Dataset) -> list[Path]:
    """Remove the perturbed stores of a data set that params no longer name, and return where they were.

    The stages that read all stores depend on their folder: with a stale one in it, its hash would depend on history.
    Several stages may do so at the same time: a store is moved out of the way in one step, by one of them, and what a
    killed one left of it is removed by the next.
    """
    folder = layout.perturbed_store(dataset.name, "any").parent
    named = {layout.perturbed_store(dataset.name, name) for name in params.perturbations}
    stale = []
    for path in sorted(folder.glob("*.zarr")):
        if path not in named:
            with suppress(FileNotFoundError):  # another one was faster
                path.rename(path.with_name(f".{path.name}.{uuid4().hex}{_STALE_SUFFIX}"))
                stale.append(path)
    for path in folder.glob(f".*{_STALE_SUFFIX}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return stale
