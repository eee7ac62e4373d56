"""Describes a folder or file of images: its content, its oddities, and the block that names it in params.yaml."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import own
from pipeline.data.datasets import MAX_SIDE, SPLITS, Own
from pipeline.runtime.engine import Engine
from pipeline.runtime.errors import PipelineError

# Suggested for images of many sizes: larger ones take long to train on with a laptop.
_MAX_SIDE = 224
_MAX_SHOWN = 10


@dataclass(frozen=True)
class Described:
    """The description of a source.

    Attributes:
        lines: The description for people.
        datasets: The source's block under `datasets` of params.yaml.
        size: Height and width of images in that block.
        is_usable: Whether `prepare` accepts the source as it is.
    """

    lines: list[str]
    datasets: dict[str, Any]
    size: tuple[int, int]
    is_usable: bool


def detect(path: Path, dataset: str | None) -> dict[str, Any]:
    """Return the `source` block of params.yaml; size and channels, not known yet, are set to 1 pixel in colour.

    Args:
        path: A folder or file.
        dataset: Name of a class of torchvision.datasets that reads it, or None.
    """
    if dataset is not None:
        kind = "torchvision"
    elif path.is_dir():
        marks = ("zarr.json", ".zgroup", ".zattrs", ".zmetadata")
        kind = "zarr" if any((path / mark).exists() for mark in marks) else "folder"
    else:
        kind = "npz"
    where = str(path.absolute() if str(path).startswith("~") else path)
    named = {} if dataset is None else {"dataset": dataset}
    return {"kind": kind, "path": where, "size": (1, 1), "channels": 3, "test_share": None, **named}


def open_detected(source: Own, test_share: float, engine: Engine) -> tuple[Own, own.Opened]:
    """Open a detected source; return it, with `test_share` if it has no test set, and what was opened.

    Raises:
        PipelineError: As `own.open_source`.
    """
    try:
        return source, own.open_source(source, engine)
    except own.NoTestSetError:
        split = source.model_copy(update={"test_share": test_share})
        return split, own.open_source(split, engine)


def describe(name: str, source: Own, opened: own.Opened, progress: Callable[[int], object]) -> Described:
    """Describe a source; every image is decoded.

    Args:
        name: Name of the data set in params.yaml.
        source: From `open_detected`.
        opened: Likewise.
        progress: Called with the number of images inspected since the last call.
    """
    inspected = {split: list(_counted(opened.splits[split].inspections(), progress)) for split in SPLITS}
    readable = [found for of_split in inspected.values() for found in of_split if found.problem is None]
    broken = [found for of_split in inspected.values() for found in of_split if found.problem is not None]
    lines = [f"{source.path}: kind {source.kind}, {len(opened.classes)} classes", *_counts(opened)]
    if not readable:
        raise PipelineError(f"{source.path}: no image can be read; the first: {broken[0].problem}")
    sizes = Counter(found.size for found in readable)
    shown = ", ".join(f"{height}x{width} ({n:,})" for (height, width), n in sizes.most_common(5))
    more = f" and {len(sizes) - 5} more" if len(sizes) > 5 else ""
    lines.append(f"sizes, height x width: {shown}{more}")
    n_grey = sum(found.is_grey for found in readable)
    is_grey = n_grey == len(readable)
    if 0 < n_grey < len(readable):
        lines.append(f"colours: RGB ({len(readable) - n_grey:,}), grey ({n_grey:,}, stored as RGB)")
    else:
        lines.append("colours: grey" if is_grey else "colours: RGB")
    oddities = [*opened.remarks, *_duplicates(inspected)]
    oddities += [
        f"cannot be used: {found.problem}" for found in sorted(broken, key=lambda found: found.where)[:_MAX_SHOWN]
    ]
    if len(broken) > _MAX_SHOWN:
        oddities.append(f"cannot be used: {len(broken) - _MAX_SHOWN:,} more")
    lines += [f"odd: {line}" for line in oddities] or ["nothing odd"]
    n_readable = {split: sum(found.problem is None for found in inspected[split]) for split in SPLITS}
    size = _common_size(sizes)
    given = source.model_copy(update={"size": size, "channels": 1 if is_grey else 3}).model_dump(mode="json")
    block = {"source": given, **{f"n_{split}": n for split, n in n_readable.items()}}
    return Described(lines, {name: block}, size, is_usable=not broken)


def _counted(inspected: Iterator[own.Inspection], progress: Callable[[int], object]) -> Iterator[own.Inspection]:
    for found in inspected:
        progress(1)
        yield found


def _counts(opened: own.Opened) -> list[str]:
    """List classes with their numbers and image counts; of many classes, those with the fewest and the most images."""
    counts = [np.bincount(opened.splits[split].labels, minlength=len(opened.classes)) for split in SPLITS]
    rows = list(zip(range(len(counts[0])), opened.classes, *(of_split.tolist() for of_split in counts), strict=True))
    shown = rows
    if len(rows) > 2 * _MAX_SHOWN:
        rows.sort(key=lambda row: row[2])
        shown = rows[:_MAX_SHOWN] + rows[-_MAX_SHOWN:]
    lines = [f"  {number} {name}: {train:,} train, {test:,} test" for number, name, train, test in shown]
    if len(shown) < len(rows):
        lines.insert(_MAX_SHOWN, f"  ... {len(rows) - len(shown):,} classes between")
    return [*lines, f"  all: {counts[0].sum():,} train, {counts[1].sum():,} test"]


def _duplicates(inspected: dict[str, list[own.Inspection]]) -> Iterator[str]:
    of_train = {found.digest: found.where for found in inspected["train"] if found.problem is None}
    in_both = [(found.where, of_train[found.digest]) for found in inspected["test"] if found.digest in of_train]
    if in_both:
        yield (
            f"{len(in_both):,} test image(s) are training images too, pixel for pixel, such as {in_both[0][0]} and "
            f"{in_both[0][1]}: test accuracy will be too high; remove one of each pair"
        )
    for split in SPLITS:
        digests = [found.digest for found in inspected[split] if found.problem is None]
        n = len(digests) - len(set(digests))
        if n:
            yield f"{n:,} of the {len(digests):,} {split} images repeat another one of them, pixel for pixel"


def _common_size(sizes: Counter[tuple[int, int]]) -> tuple[int, int]:
    size = next(iter(sizes))
    if len(sizes) > 1 or max(size) > MAX_SIDE:
        sides = np.repeat([min(size) for size in sizes], list(sizes.values()))
        side = min(_MAX_SIDE, int(np.median(sides)))
        size = side, side
    return size
