"""What the stores must hold according to params, and opening them checked against it."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from pipeline.data import store
from pipeline.data.datasets import Dataset
from pipeline.data.seeding import level_name
from pipeline.perturbations.variants import Variant, variant_attributes
from pipeline.runtime import layout
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import PARTIAL_SUFFIX
from pipeline.study.params import Params
from pipeline.study.planning import planned_variants

# Of stores that are being removed; they end like half-made ones, which DVC and git do not look at.
_STALE_SUFFIX = f".stale{PARTIAL_SUFFIX}"


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
