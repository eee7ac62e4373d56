"""Perturbed images and their stores: the determinism contract in code.

The bytes of a perturbed image depend on the clean image, its index in the full split, perturbation, level, split,
trial and seed, and on nothing else: every block of the full split, `block_size` images, has a generator of its own,
seeded by those names.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from pipeline.data import store
from pipeline.data.arrays import Images
from pipeline.data.datasets import Dataset
from pipeline.data.seeding import block_generator, block_size, level_name
from pipeline.perturbations.variants import Variant, variant_attributes
from pipeline.runtime.memory import keep_freed_memory


def perturb_images(split_images: Images, variant: Variant, trial: int, start: int, stop: int) -> Images:
    """The perturbed versions of images `start` to `stop` of a split.

    Args:
        split_images: uint8 (N, H, W, C), the full clean split from image 0 on, at least to the end of the
            block (`seeding.block_size`) that holds image `stop` - 1; not modified.
        variant: What to do to them.
        trial: 0-based repetition.
        start: First image, as an index into the full split.
        stop: One past the last image.

    Returns:
        uint8 (stop - start, H, W, C).

    Source: our choice. Whole blocks are drawn and cut, so that an image does not depend on how
    many others are wanted.
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


def write_perturbed(
    path: Path,
    dataset: Dataset,
    perturbation: str,
    variants: list[tuple[Variant, tuple[int, ...]]],
    clean: Mapping[str, Images],
    n_workers: int,
    progress: Callable[[int], object] = lambda n_images: None,
) -> None:
    """Write the store of one perturbation: a group per level with `train` and `test` as its variants ask.

    Args:
        path: The store.
        dataset: Which data set.
        perturbation: Its name.
        variants: From `planned_variants`.
        clean: Full clean images of every split that occurs, uint8 (N, H, W, C).
        n_workers: Threads; results do not depend on it.
        progress: Called with the number of images finished since the last call.
    """
    cv2.setNumThreads(1)  # the workers are the parallelism
    keep_freed_memory()
    root_attributes = {"dataset": dataset.name, "perturbation": perturbation}
    with store.replacing_store(path, root_attributes) as root, ThreadPoolExecutor(n_workers) as pool:
        arrays = []
        for variant, leading in variants:
            group = root.require_group(level_name(variant.level))
            shape = (*leading, *dataset.shape)
            arrays.append(store.create_images(group, variant.split, shape, variant_attributes(dataset, variant)))

        tasks = [
            (array, variant, region)
            for array, (variant, _) in zip(arrays, variants, strict=True)
            for region in store.shard_regions(array)
        ]
        hashes = {array.path: hashlib.sha256() for array in arrays}
        calls = (partial(_write_shard, *task, clean[task[1].split]) for task in tasks)
        for (array, _, _), images in zip(tasks, _in_order(pool, calls, n_workers + 2), strict=True):
            hashes[array.path].update(images.data)  # shards follow each other in C order
            progress(images.size // int(np.prod(dataset.shape)))
        for array in arrays:
            store.finish(array, hashes[array.path].hexdigest())


def _write_shard(array: store.Array, variant: Variant, region: tuple[slice, ...], clean: Images) -> Images:
    *trials, images = region[:-3]
    shard = [
        perturb_images(clean, variant, trial, images.start, images.stop)
        for trial in (range(trials[0].start, trials[0].stop) if trials else [0])
    ]
    values = np.stack(shard) if trials else shard[0]
    array[region] = values
    return values


def _in_order(pool: ThreadPoolExecutor, calls: Iterable[Callable[[], Images]], window: int) -> Iterator[Images]:
    """Results in the order of the calls, at most `window` of them under way or waiting, which bounds memory."""
    pending: deque[Future[Images]] = deque()
    for call in calls:
        pending.append(pool.submit(call))
        if len(pending) == window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
