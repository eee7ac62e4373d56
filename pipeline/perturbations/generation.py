"""Generates perturbed images and their stores: the determinism contract in code.

The bytes of a perturbed image depend on the clean image, its index in the full split, perturbation, level, split,
trial and seed, and on nothing else. To that end, every block of `block_size` images of the full split has its own
generator, seeded by those names.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import cv2
import numpy as np

from pipeline.data import store
from pipeline.data.arrays import Images
from pipeline.data.datasets import Dataset
from pipeline.data.seeding import block_generator, block_size, level_name
from pipeline.perturbations.variants import PlannedArray, Variant
from pipeline.runtime.engine import Engine, Held, check_wanted, shown_here


def perturb_images(split_images: Images, variant: Variant, trial: int, start: int, stop: int) -> Images:
    """Return the perturbed versions of images `start` to `stop` of a split.

    Args:
        split_images: uint8 (N, H, W, C), the full clean split from image 0 on, at least to the end of the
            block (`seeding.block_size`) that holds image `stop` - 1; not modified.
        variant: The perturbation to apply.
        trial: 0-based repetition.
        start: First image, as an index into the full split.
        stop: One past the last image.

    Returns:
        uint8 (stop - start, H, W, C).

    Source: our choice. Whole blocks are perturbed and then cut, so that an image does not depend on how many others
    are wanted.
    """
    perturbed = np.empty((stop - start, *split_images.shape[1:]), np.uint8)
    shares_draws = variant.options.get("scope") == "sensor"
    size = block_size(split_images.shape[1:])
    for block in range(start // size, -(-stop // size)):
        first = block * size
        rng = block_generator(
            variant.seed, variant.perturbation, variant.level, variant.split, trial, None if shares_draws else block
        )
        images = variant.kernel.kernel(split_images[first : first + size], variant.level, rng, **variant.options)
        low, high = max(start, first), min(stop, first + size)
        perturbed[low - start : high - start] = images[low - first : high - first]
    return perturbed


@dataclass(frozen=True)
class _Job:
    """An array to fill, in the store that is written at `location`; `clean` are the full clean images of its split."""

    location: str
    planned: PlannedArray
    clean: Held[Images]
    progress: Held[Callable[[int], object]]


def write_perturbed(
    path: Path,
    dataset: Dataset,
    perturbation: str,
    arrays: Sequence[PlannedArray],
    clean: Mapping[str, Images],
    engine: Engine,
    progress: Callable[[int], object] = lambda n_images: None,
) -> None:
    """Write the store of one perturbation: a group per level with `train` and `test` as planned.

    Args:
        path: The store.
        dataset: The data set that is perturbed.
        perturbation: Name of the perturbation.
        arrays: All arrays of the store; there may be none.
        clean: Full clean images of every split that occurs, uint8 (N, H, W, C).
        engine: Fills arrays in parallel; results do not depend on the number of workers.
        progress: Called with the number of images finished since the last call.
    """
    held = {split: Held(images, partial(store.read_clean, dataset, split, "images")) for split, images in clean.items()}
    with store.replacing_store(path, {"dataset": dataset.name, "perturbation": perturbation}) as root:
        made, jobs = {}, []
        for planned in arrays:
            group, split = root.require_group(level_name(planned.variant.level)), planned.variant.split
            made[planned.name] = store.create_images(group, split, planned.shape, planned.attributes)
            jobs.append(_Job(store.location_of(root), planned, held[split], shown_here(progress)))
        # The largest first: started last, one of them would keep the other cores waiting.
        for job, digest in engine.run(_fill, sorted(jobs, key=lambda job: job.planned.n_images, reverse=True)):
            store.finish(made[job.planned.name], digest)
            if not engine.is_in_process:
                progress(job.planned.n_images)


def _fill(job: _Job) -> str:
    """Write an array shard by shard and return the digest of its bytes."""
    cv2.setNumThreads(1)  # the engine provides the parallelism
    array, variant, clean = store.open_partial(job.location, job.planned.name), job.planned.variant, job.clean.get()
    digest = hashlib.sha256()
    for region in store.shard_regions(array):
        *trials, images = region[:-3]
        shard = []
        for trial in range(trials[0].start, trials[0].stop) if trials else [0]:
            check_wanted()
            shard.append(perturb_images(clean, variant, trial, images.start, images.stop))
        values = np.stack(shard) if trials else shard[0]
        array[region] = values
        digest.update(values.data)  # shards follow each other in C order
        job.progress.get()(values.size // prod(values.shape[-3:]))
    return digest.hexdigest()
