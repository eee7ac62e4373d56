"""Writes the clean store of the user's own images, in bounded memory, and resumes where a run was stopped."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import own, store
from pipeline.data.arrays import Images
from pipeline.data.datasets import SPLITS, Own

Region = tuple[slice, ...]


def write_own(path: Path, name: str, source: Own, opened: own.Opened, progress: Callable[[int], object]) -> None:
    """Write the clean store of a data set: groups `train` and `test`, each with `images` and `labels`.

    Images are decoded and written shard by shard. A run that is stopped, for whatever reason, leaves its finished
    shards, and the next one continues after them, unless a file of the source has changed meanwhile.

    Args:
        path: The store.
        name: Name of the data set.
        source: Where the images come from.
        opened: From `own.open_source`.
        progress: Called with the number of images written since the last call.

    Raises:
        PipelineError: A file cannot be read or decoded; the message names it.
    """
    attributes = {"dataset": name, "classes": list(opened.classes), "source": source.attributes}
    decides = json.dumps([attributes, opened.fingerprint])
    with store.replacing_store(path, attributes, hashlib.sha256(decides.encode()).hexdigest()) as root:
        for split in SPLITS:
            found, group = opened.splits[split], root.require_group(split)
            array, kept = store.resume_images(group, "images", (len(found.labels), *source.shape))
            store.finish(array, _write_images(array, kept, found, progress))
            store.create_labels(group, "labels", found.labels)


def _write_images(
    array: store.Array, kept: Iterable[Images], found: own.Split, progress: Callable[[int], object]
) -> str:
    """Write the shards that are missing, and return the digest of all of them."""
    digest, n_done, rest = hashlib.sha256(), 0, list(store.shard_regions(array))
    for images in kept:
        digest.update(images.data)
        n_done += len(images)
        del rest[0]
    progress(n_done)
    # Written in a thread of its own, so that the next images are fetched from the workers meanwhile.
    with ThreadPoolExecutor(1) as writer:
        written: Future[int] | None = None
        for region, images in zip(rest, _cut(found.images(n_done), rest, array.shape[1:]), strict=True):
            if written is not None:
                progress(written.result())
            written = writer.submit(_write, array, region, images, digest)
        if written is not None:
            progress(written.result())
    return digest.hexdigest()


def _write(array: store.Array, region: Region, images: Images, digest: Any) -> int:
    array[region] = images
    digest.update(images.data)
    return len(images)


def _cut(batches: Iterator[Images], regions: Sequence[Region], shape: tuple[int, ...]) -> Iterator[Images]:
    """Regroup batches of any size into one array per region of whole images, overwritten by the next but one."""
    lengths = [region[0].stop - region[0].start for region in regions]
    # Allocated once: the system takes longer to provide memory than the images take to copy.
    rooms = [np.empty((max(lengths, default=0), *shape), np.uint8) for _ in range(2)]
    batch = np.empty((0, *shape), np.uint8)
    for length, room in zip(lengths, cycle(rooms), strict=False):
        n_held = 0
        while n_held < length:
            if not len(batch):
                batch = next(batches)
            part, batch = batch[: length - n_held], batch[length - n_held :]
            room[n_held : n_held + len(part)] = part
            n_held += len(part)
        yield room[:length]
    next(batches, None)  # nothing is left; lets the workers end
