"""Opens the stores that a study has planned, checked against the plan, and removes those that it has not."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from pipeline.data.arrays import Images, Labels
from pipeline.data.store import read_clean
from pipeline.perturbations.variants import StoredArray
from pipeline.runtime import layout
from pipeline.runtime.files import PARTIAL_SUFFIX, remove
from pipeline.study.planning import Study

# Suffix of stores that are being removed; it ends like that of half-made ones, which DVC and git ignore.
_STALE_SUFFIX = f".stale{PARTIAL_SUFFIX}"


def read_examples(study: Study, split: str) -> tuple[Images, Labels]:
    """Read the clean images of a split that the study uses, uint8 (N, H, W, C), and their labels, (N,).

    Raises:
        PipelineError: The clean store is missing or damaged, or holds other data.
    """
    n = study.n_examples[split]
    images, labels = (read_clean(study.dataset, split, kind)[:n] for kind in ("images", "labels"))
    return images, labels


@dataclass(frozen=True)
class StudyData:
    """The images that a stage measures models on.

    Attributes:
        clean: Split → uint8 (N, H, W, C).
        labels: Split → class numbers (N,).
        perturbed: (perturbation, level) → the perturbed test images, (trials, N, H, W, C).
        n_images: Number of all these images, trials included.
    """

    clean: Mapping[str, Images]
    labels: Mapping[str, Labels]
    perturbed: Mapping[tuple[str, float], StoredArray]
    n_images: int


def open_study(study: Study, stage: str) -> StudyData:
    """Open the images that stage `impact`, `evaluate` or `ablations` measures on; perturbed ones are not read yet.

    Raises:
        PipelineError: A store is missing, damaged, or made with other params.
    """
    tested = study.tested(stage)
    perturbed = {(array.variant.perturbation, array.variant.level): array.opened() for array in tested}
    examples = {split: read_examples(study, split) for split in study.splits(stage)}
    clean = {split: images for split, (images, _) in examples.items()}
    labels = {split: of_split for split, (_, of_split) in examples.items()}
    n_images = sum(len(images) for images in clean.values()) + sum(array.n_images for array in tested)
    return StudyData(clean, labels, perturbed, n_images)


def remove_stale_stores(study: Study) -> list[Path]:
    """Remove a data set's perturbed stores that params.yaml no longer names, and return where they were.

    The stages that read all stores depend on the folder of stores: a stale one in it would make its hash depend on
    history. Several stages may call this at the same time: only one of them moves a store away, in one step, and if it
    is killed before it has removed the store, the next one does.
    """
    folder = layout.perturbed_store(study.dataset.name, "any").parent
    named = {layout.perturbed_store(study.dataset.name, name) for name in study.arrays}
    stale = []
    for path in sorted(folder.glob("*.zarr")):
        if path not in named:
            with suppress(FileNotFoundError):  # another stage was faster
                path.rename(path.with_name(f".{path.name}.{uuid4().hex}{_STALE_SUFFIX}"))
                stale.append(path)
    for path in folder.glob(f".*{_STALE_SUFFIX}"):
        remove(path)
    return stale
