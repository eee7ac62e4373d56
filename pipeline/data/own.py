"""Reads the user's own images from folders or files: classes, and each split's images in order, a few at a time."""

import hashlib
import inspect
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path, PurePath
from typing import IO, Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data import pictures, store
from pipeline.data.arrays import Images, Labels
from pipeline.data.backends import MAX_METADATA_BYTES
from pipeline.data.datasets import SPLITS, Own, OwnTorchvision
from pipeline.data.watching import find_overlooked
from pipeline.runtime.engine import Engine
from pipeline.runtime.errors import PipelineError, is_outage
from pipeline.runtime.files import opened_zip

# Bytes of decoded images that are passed on together.
_BATCH_BYTES = 4 * 2**20
_MAX_LISTED = 5
_NPZ_NAMES = (
    {split: (f"{split}_images", f"{split}_labels") for split in SPLITS},
    {split: (f"x_{split}", f"y_{split}") for split in SPLITS},
)
_NPZ_UNSPLIT = (("images", "labels"), ("x", "y"))
# How classes of torchvision.datasets name their splits.
_TORCHVISION_SPLITS = (("train", "test"), ("trainval", "test"), ("train", "val"), ("train-standard", "val"))
# Names of folders that are a validation split, not a class.
_VALIDATION = ("val", "valid", "validation", "dev")


@dataclass(frozen=True)
class Split:
    """The images of a split, in the order of the store.

    Attributes:
        labels: Class number of each image, uint8 or uint16 (N,).
        images: Given the index of the first wanted image, yields uint8 (n, H, W, C), a few at a time.
        inspections: Yields an inspection of each image, in any order.
    """

    labels: Labels
    images: Callable[[int], Iterator[Images]]
    inspections: Callable[[], Iterator["Inspection"]]


@dataclass(frozen=True)
class Inspection:
    """What `describe` reports of one image, before it is resized.

    Attributes:
        where: Its file, or its number in an array.
        size: Height and width, pixels.
        is_grey: Whether its colours are all grey.
        digest: Digest of its pixels; equal for two images of which only the files differ.
        problem: Why it cannot be read; then all but `where` are meaningless. None if it can.
    """

    where: str
    size: tuple[int, int]
    is_grey: bool
    digest: bytes
    problem: str | None = None


def _inspect(where: str, pixels: Images) -> Inspection:
    rgb = pixels if pixels.ndim == 3 else pixels[..., None]
    is_grey = bool((rgb == rgb[..., :1]).all())
    height, width = rgb.shape[:2]
    content = np.ascontiguousarray(rgb[..., :1] if is_grey else rgb)
    return Inspection(
        where, (height, width), is_grey, hashlib.sha256(str(content.shape).encode() + content.data).digest()
    )


@dataclass(frozen=True)
class Opened:
    """A user's source that was found to hold a data set; its images are not decoded yet.

    Attributes:
        classes: Names of the labels.
        splits: `train` and `test`.
        remarks: Lines about what a user may not expect, such as files that are left out.
        fingerprint: Digest of the names, sizes and modification times of all files of the source.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    remarks: list[str]
    fingerprint: str = ""


class NoTestSetError(PipelineError):
    """A source has no test set, and no `test_share` says how much of it becomes the test set."""


def open_source(source: Own, engine: Engine) -> Opened:
    """Open a source and check it as far as possible without decoding.

    Args:
        source: Path and kind of the source.
        engine: Decodes the pictures in folders.

    Raises:
        PipelineError: The source does not exist, is not of its kind, or has a label without training images, only one
            class or an empty split; the message names the path.
    """
    path = Path(source.path)
    if not path.exists():
        raise PipelineError(f"{path}: no such file or folder; check the path")
    opened = replace(_KINDS[source.kind](path, source, engine), fingerprint=_fingerprint(path))
    _check_classes(path, opened)
    return opened


def _fingerprint(path: Path) -> str:
    digest = hashlib.sha256()
    for file in _walk(str(path)) if path.is_dir() else [str(path)]:
        status = Path(file).stat()
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _check_classes(path: Path, opened: Opened) -> None:
    names = opened.classes
    if len(names) < 2:
        raise PipelineError(f"{path}: one class only ({names[0]}); a classifier needs two")
    for split in SPLITS:
        labels = opened.splits[split].labels
        if not len(labels):
            raise PipelineError(f"{path}: the {split} set is empty; add images, or change test_share if it is set")
        counts = np.bincount(labels, minlength=len(names))
        if np.count_nonzero(counts) < 2:
            raise PipelineError(f"{path}: the {split} set has one class only ({names[int(counts.argmax())]})")
        missing = [names[i] for i in np.flatnonzero(counts == 0)]
        if missing and split == "train":
            raise PipelineError(f"{path}: no training images of {_some(missing)}; add some, or remove the classes")
        if missing:
            opened.remarks.append(f"no test images of {_some(missing)}")


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Refuse class names that cannot be told apart, shown or stored; called before labels are numbered."""
    if len(names) > store.MAX_CLASSES:
        raise PipelineError(f"{path}: {len(names):,} classes, more than the {store.MAX_CLASSES:,} allowed")
    for name, n in Counter(names).items():
        if n > 1 or not name.strip() or not name.isprintable():
            way = f"names {n} classes" if n > 1 else "is not a valid class name"
            raise PipelineError(f"{path}: {name!r} {way}; rename it")
    if len(json.dumps(names, indent=4)) > MAX_METADATA_BYTES // 2:
        raise PipelineError(f"{path}: the names of {len(names):,} classes are too long; shorten them")


def _some(names: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return between.join(names[:_MAX_LISTED]) + more


def belongs_to_test(key: str, share: float) -> bool:
    """Whether an image belongs to the test set, if the source has none and its class has others for training.

    Args:
        key: Path of its file in the folder, or its number.
        share: The test set's share of all images.

    Source: our choice: a digest of the key decides, so that adding a file never moves another to the other split.
    """
    return int.from_bytes(_digest(key)[-4:], "big") < share * 2**32


def _split(keys: Sequence[str], labels: NDArray[Any], share: float) -> NDArray[np.bool_]:
    """Return which images belong to the test set; if all of a class would, the last of them by digest does not."""
    is_test = np.array([belongs_to_test(key, share) for key in keys], bool)
    lacking = np.flatnonzero(~np.isin(labels, labels[~is_test])).tolist()
    kept = {labels[i]: i for i in sorted(lacking, key=lambda i: _digest(keys[i])[-4:])}
    is_test[list(kept.values())] = False
    return is_test


def _digest(key: str) -> bytes:
    # Normalized, so that a file has the same name on systems that compose accents and on those that do not.
    return hashlib.sha256(unicodedata.normalize("NFC", key).encode(errors="surrogateescape")).digest()


# Folders of pictures.


@dataclass(frozen=True)
class _Job:
    """Pictures to decode; `number` counts the jobs of a split."""

    number: int
    paths: tuple[str, ...]
    size: tuple[int, int]
    channels: int


def _decode(job: _Job) -> Images:
    cv2.setNumThreads(1)  # the engine already runs jobs in parallel
    images = np.empty((len(job.paths), *job.size, job.channels), np.uint8)
    for image, path in zip(images, job.paths, strict=True):
        image[...] = pictures.fit(pictures.read_picture(path, job.channels), job.size)
    return images


def _inspect_files(job: _Job) -> list[Inspection]:
    inspections = []
    for path in job.paths:
        try:
            inspections.append(_inspect(path, pictures.read_picture(path, 3)))
        except PipelineError as error:
            inspections.append(Inspection(path, (0, 0), False, b"", str(error)))
    return inspections


def _open_folder(path: Path, source: Own, engine: Engine) -> Opened:
    remarks: list[str] = []
    folders = find_splits(path, source.test_share, remarks)
    listed = {split: find_pictures(folder, remarks) for split, folder in folders.items()}
    names = sorted({name for by_class in listed.values() for name in by_class}, key=os.fsencode)
    _check_names(path, names)
    folded: dict[str, str] = {}
    for name in names:
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise PipelineError(f"{path}: the folders {other} and {name} differ in case only; rename or join them")
    number = {name: i for i, name in enumerate(names)}
    examples: dict[str, list[tuple[bytes, str, int]]] = {split: [] for split in SPLITS}
    for split, by_class in listed.items():
        n_above = len(str(folders[split])) + 1
        for name, files in by_class.items():
            keys = [file[n_above:].replace(os.sep, "/") for file in files]
            rows = [(_digest(key), file, number[name]) for key, file in zip(keys, files, strict=True)]
            if split:
                examples[split] += rows
                continue
            assert source.test_share is not None
            for row, is_test in zip(rows, _split(keys, np.zeros(len(keys)), source.test_share), strict=True):
                examples["test" if is_test else "train"].append(row)
    splits = {}
    for split, found in examples.items():
        found.sort()  # by digest, so that the first n of a split are a sample of all classes
        files = [file for _, file, _ in found]
        labels = np.array([label for *_, label in found], store.label_type(len(names)))
        splits[split] = Split(
            labels, partial(_decoded, files, source, engine), partial(_inspected, files, source, engine)
        )
    return Opened(tuple(names), splits, remarks)


def _jobs(files: Sequence[str], source: Own) -> list[_Job]:
    n = max(1, min(256, _BATCH_BYTES // prod(source.shape)))
    parts = [tuple(files[first : first + n]) for first in range(0, len(files), n)]
    return [_Job(number, paths, source.size, source.channels) for number, paths in enumerate(parts)]


def _decoded(files: Sequence[str], source: Own, engine: Engine, start: int) -> Iterator[Images]:
    waiting: dict[int, Images] = {}
    turn = 0
    for job, images in engine.run(_decode, _jobs(files[start:], source)):
        waiting[job.number] = images
        while turn in waiting:
            yield waiting.pop(turn)
            turn += 1


def _inspected(files: Sequence[str], source: Own, engine: Engine) -> Iterator[Inspection]:
    for _, inspections in engine.run(_inspect_files, _jobs(files, source)):
        yield from inspections


def find_splits(path: Path, test_share: float | None, remarks: list[str]) -> dict[str, Path]:
    """Find the folders that hold a folder per class: `train` and `test`, or one under an empty name, to be split.

    Raises:
        PipelineError: There are both a split and `test_share`, or neither; half of a split is missing; or there are
            other folders beside a split.
    """
    if not path.is_dir():
        raise PipelineError(f"{path}: not a folder; for a file use kind npz")
    names = [entry.name for entry in _entries(str(path)) if entry.is_dir()]
    found = [name for name in names if name.lower() in (*SPLITS, *_VALIDATION)]
    others = [name for name in names if name not in found]
    if len(found) < 2 and (others or not found):  # one of several classes may be called train
        if test_share is None:
            raise NoTestSetError(f"{path}: has no train/ and test/; give a test_share, such as 0.2, to have it split")
        return {"": path}
    folders = {name.lower(): name for name in found}
    if others or len(folders) < len(found):
        more = f"; move {_some(others)} elsewhere" if others else "; join them"
        raise PipelineError(f"{path}: has {_some(found)}{more}, or, if these are classes, rename them")
    for split in SPLITS:
        if split not in folders:
            instead = [folders[name] for name in _VALIDATION if name in folders]
            way = f"rename {instead[0]}/" if instead else "make one"
            raise PipelineError(f"{path}: has {found[0]}/ but no {split}/; {way}")
    if test_share is not None:
        raise PipelineError(f"{path}: has train/ and test/ already; set test_share to null")
    remarks += [f"{path / folders[name]} is not used" for name in _VALIDATION if name in folders]
    return {split: path / folders[split] for split in SPLITS}


def find_pictures(folder: Path, remarks: list[str]) -> dict[str, list[str]]:
    """Find the pictures of each class: name of the class → paths below its folder.

    Raises:
        PipelineError: A picture lies outside all class folders or has an unsupported format; a class has no pictures.
    """
    found: dict[str, list[str]] = {}
    others: Counter[str] = Counter()
    formats = {*pictures.FORMATS, *pictures.OTHER_FORMATS}
    for entry in _entries(str(folder)):
        if not entry.is_dir():
            suffix = PurePath(entry.name).suffix.lower()
            if suffix in formats:
                raise PipelineError(f"{entry.path}: in the folder of no class; move it into one")
            others[suffix or entry.name] += 1
            continue
        files = found.setdefault(unicodedata.normalize("NFC", entry.name), [])
        if files:
            raise PipelineError(f"{entry.path}: two folders with the same name, written in two ways; join them")
        for file in _walk(entry.path):
            suffix = PurePath(file).suffix.lower()
            if suffix in pictures.FORMATS:
                files.append(file)
            elif suffix in formats:
                raise PipelineError(f"{file}: not a PNG, JPEG or WebP; convert it")
            else:
                others[suffix or PurePath(file).name] += 1
        if not files:
            raise PipelineError(f"{entry.path}: a class without images; put some there, or remove the folder")
    if not found:
        raise PipelineError(f"{folder}: has no folders; put the images of each class into a folder of its own")
    if others:
        kinds = _some([f"{n} {kind}" for kind, n in others.most_common()])
        remarks.append(f"{folder}: {others.total():,} file(s) that are no pictures are left out ({kinds})")
    return found


def _walk(folder: str) -> Iterator[str]:
    """Yield all files below a folder in the order of their names; raises as `_entries`."""
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _walk(entry.path)
        else:
            yield entry.path


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """List the files and folders in a folder in the order of their names, without hidden ones.

    Raises:
        PipelineError: An entry is neither a file nor a folder, or DVC would not see what changes in it.
    """
    if (problem := find_overlooked(Path(folder))) is not None:
        raise PipelineError(f"{folder}: {problem}")
    with os.scandir(folder) as entries:
        listed = sorted((entry for entry in entries if not _is_hidden(entry.name)), key=lambda entry: entry.name)
    for entry in listed:
        if entry.is_symlink() and entry.is_dir():
            way = "DVC would not see what changes behind it; put the folder itself there"
            raise PipelineError(f"{entry.path}: a link to a folder; {way}")
        if not (entry.is_dir() or entry.is_file()):
            kind = "a link to nowhere" if entry.is_symlink() else "a pipe, socket or device"
            raise PipelineError(f"{entry.path}: {kind}; move it elsewhere")
    return listed


def _is_hidden(name: str) -> bool:
    is_of_zarr = name in (".zarray", ".zattrs", ".zgroup", ".zmetadata")
    return (name.startswith(".") and not is_of_zarr) or name in ("Thumbs.db", "desktop.ini", "__MACOSX")


# Arrays in files.


@dataclass(frozen=True)
class _Arrays:
    """Images and labels as stored in a file: `images(start)` yields uint8 (n, H, W) or (n, H, W, C), in order.

    Images that are yielded together have the same size. If sizes differ, `shape` gives the number of images only.
    For a single image that cannot be read, the error is yielded instead.
    """

    where: str
    shape: tuple[int, ...]
    labels: NDArray[Any]
    images: Callable[[int], Iterator[NDArray[Any] | PipelineError]]


def _flat(parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([part.reshape(-1) for part in parts] or [np.empty(0, np.int64)])


def _open_arrays(
    path: Path, source: Own, found: Mapping[str, _Arrays], names: Any = None, remarks: Sequence[str] = ()
) -> Opened:
    """Open a data set of arrays: `train` and `test`, or one under an empty name, to be split."""
    values = sorted({value for arrays in found.values() for value in np.unique(arrays.labels).tolist()})
    are_names = isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(n, str) for n in names)
    if are_names and values[0] >= 0 and values[-1] < len(names):
        classes = tuple(names[value] for value in values)
    else:
        classes = tuple(map(str, values))
        if names is not None:
            remarks = [*remarks, "the attribute classes is not used: it is not a list with a name for every label"]
    _check_names(path, classes)
    dtype, splits = store.label_type(len(classes)), {}
    number = {value: i for i, value in enumerate(values)}
    for split, arrays in found.items():
        of_split, places = np.unique(arrays.labels, return_inverse=True)
        numbers = np.array([number[value] for value in of_split.tolist()], dtype)[places]
        if split:
            splits[split] = Split(
                numbers, partial(_fitted, arrays, source, None), partial(_inspected_arrays, arrays, None)
            )
            continue
        assert source.test_share is not None
        is_test = _split([str(i) for i in range(len(numbers))], numbers, source.test_share)
        for name, chosen in (("train", ~is_test), ("test", is_test)):
            places = np.flatnonzero(chosen)
            splits[name] = Split(
                numbers[chosen], partial(_fitted, arrays, source, places), partial(_inspected_arrays, arrays, places)
            )
    return Opened(classes, splits, list(remarks))


def _chosen(
    arrays: _Arrays, places: NDArray[Any] | None, start: int
) -> Iterator[tuple[NDArray[Any], Images | PipelineError]]:
    """Yield numbers and images, (n, H, W, C), of all rows or of those at `places`, from the `start`-th of them on."""
    if places is not None:
        start = int(places[start]) if start < len(places) else arrays.shape[0]
    for block in arrays.images(start):
        numbers = np.arange(start, start + (1 if isinstance(block, PipelineError) else len(block)))
        start += len(numbers)
        chosen = slice(None) if places is None else np.flatnonzero(np.isin(numbers, places))
        if not isinstance(block, PipelineError):
            yield numbers[chosen], (block if block.ndim == 4 else block[..., None])[chosen]
        elif len(numbers[chosen]):
            yield numbers, block


def _fitted(arrays: _Arrays, source: Own, places: NDArray[Any] | None, start: int) -> Iterator[Images]:
    cv2.setNumThreads(1)
    for _, images in _chosen(arrays, places, start):
        if isinstance(images, PipelineError):
            raise images
        if images.shape[3] < source.channels:
            images = np.repeat(images, source.channels, axis=3)
        fitted = np.empty((len(images), *source.shape), np.uint8)
        for image, target in zip(images, fitted, strict=True):
            if image.shape[2] > source.channels:
                image = np.asarray(Image.fromarray(image).convert("L"))[..., None]
            target[...] = pictures.fit(image, source.size)
        yield fitted


def _inspected_arrays(arrays: _Arrays, places: NDArray[Any] | None) -> Iterator[Inspection]:
    for numbers, images in _chosen(arrays, places, 0):
        if isinstance(images, PipelineError):
            yield Inspection(f"{arrays.where} {numbers[0]}", (0, 0), False, b"", str(images))
            continue
        for number, image in zip(numbers, images, strict=True):
            yield _inspect(f"{arrays.where} {number}", image)


def _check_images(where: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if dtype != np.uint8:
        way = "; for values in [0, 1]: `(255 * images).round().astype(np.uint8)`" if dtype.kind == "f" else ""
        raise PipelineError(f"{where}: of type {dtype}; give images of uint8, 0-255{way}")
    if len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
        raise PipelineError(f"{where}: of shape {shape}, (N, C, H, W); give (N, H, W, C): `.transpose(0, 2, 3, 1)`")
    if not (len(shape) in (3, 4) and min(shape[1:]) >= 1 and (len(shape) == 3 or shape[3] in (1, 3))):
        raise PipelineError(f"{where}: of shape {shape}; give images (N, H, W) or (N, H, W, C), C = 1 or 3")
    if shape[0] > store.SHARD_BYTES // 2:
        raise PipelineError(f"{where}: {shape[0]:,} images, more than the {store.SHARD_BYTES // 2:,} allowed")


def _check_labels(where: str, shape: tuple[int, ...], dtype: np.dtype[Any], n_images: int) -> None:
    if not n_images:
        raise PipelineError(f"{where}: no images; give some, or remove it")
    if len(shape) == 2 and shape[1] > 1:
        raise PipelineError(f"{where}: labels of shape {shape}; for one-hot ones: `labels.argmax(1)`")
    if dtype.kind not in "iu":
        raise PipelineError(f"{where}: labels of type {dtype}; give whole numbers")
    if prod(shape) != n_images:
        raise PipelineError(f"{where}: {n_images:,} images, but {prod(shape):,} labels")


def _open_npz(path: Path, source: Own, engine: Engine) -> Opened:
    with opened_zip(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
    has = ", ".join(members) or "nothing"
    pairs = next((names for names in _NPZ_NAMES if all({*pair} <= members.keys() for pair in names.values())), None)
    if pairs is None:
        unsplit = next((pair for pair in _NPZ_UNSPLIT if {*pair} <= members.keys()), None)
        if unsplit is None:
            raise PipelineError(
                f"{path}: has {has}; needed are train_images, train_labels, test_images and test_labels, or x_train, "
                "y_train, x_test and y_test, or images and labels with a test_share"
            )
        pairs = {"": unsplit}
    _check_share(path, source, is_split="" not in pairs)
    found = {}
    for split, (images, labels) in pairs.items():
        where, (shape, dtype) = f"{path}: {images}", _read_header(path, members[images])
        _check_images(where, shape, dtype)
        _check_labels(f"{path}: {labels}", *_read_header(path, members[labels]), shape[0])
        values = _flat(_stream(path, members[labels], 0))
        found[split] = _Arrays(where, shape, values, partial(_stream, path, members[images]))
    unused = sorted(members.keys() - {name for pair in pairs.values() for name in pair})
    return _open_arrays(path, source, found, remarks=[f"{path}: {_some(unused)}: not used"] if unused else [])


def _check_share(path: Path, source: Own, is_split: bool) -> None:
    if is_split and source.test_share is not None:
        raise PipelineError(f"{path}: has a test set already; set test_share to null")
    if not is_split and source.test_share is None:
        raise NoTestSetError(f"{path}: has no test set; give a test_share, such as 0.2, to have it split")


def _read_header(path: Path, member: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    with opened_zip(path) as archive, archive.open(member) as file:
        return _parse_header(path, member, file)


def _parse_header(path: Path, member: str, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, is_fortran, dtype = read(file)
    except (ValueError, KeyError, EOFError) as error:
        raise PipelineError(f"{path}: {member}: damaged, or no array: {error}") from None
    if dtype.hasobject or dtype.itemsize == 0:
        raise PipelineError(f"{path}: {member}: of type {dtype}; give an array of numbers")
    if is_fortran and len(shape) > 1:
        raise PipelineError(f"{path}: {member}: in Fortran order; save `np.ascontiguousarray` of it")
    return shape, dtype


def _stream(path: Path, member: str, start: int) -> Iterator[NDArray[Any]]:
    """Yield an array of an npz file from row `start` on, a few MiB at a time; nothing is unpickled."""
    with opened_zip(path) as archive, archive.open(member) as file:
        shape, dtype = _parse_header(path, member, file)
        row = dtype.itemsize * prod(shape[1:])
        n = max(1, _BATCH_BYTES // max(1, row))
        file.seek(start * row, os.SEEK_CUR)
        for first in range(start, shape[0] if shape else 0, n):
            n_bytes = row * min(n, shape[0] - first)
            content = file.read(n_bytes)
            if len(content) < n_bytes:
                raise PipelineError(f"{path}: {member}: truncated, has fewer than its {shape[0]:,} rows")
            yield np.frombuffer(content, dtype).reshape(-1, *shape[1:])


def _open_zarr(path: Path, source: Own, engine: Engine) -> Opened:
    groups = [split for split in SPLITS if store.open_foreign(path, f"{split}/images") is not None]
    if groups and len(groups) < 2:
        raise PipelineError(f"{path}: has {groups[0]}/images only; needed are train and test")
    _check_share(path, source, is_split=bool(groups))
    found, remarks = {}, []
    for split in groups or [""]:
        prefix = f"{split}/" if split else ""
        images, labels = (store.open_foreign(path, f"{prefix}{kind}") for kind in ("images", "labels"))
        if images is None or labels is None:
            raise PipelineError(f"{path}: has no {prefix}images and {prefix}labels")
        where = f"{path}/{prefix}images"
        _check_images(where, images.shape, images.dtype)
        _check_labels(f"{path}/{prefix}labels", labels.shape, labels.dtype, images.shape[0])
        found[split] = _Arrays(where, images.shape, _flat(_slabs(labels, 0)), partial(_slabs, images))
        if n_missing := store.count_missing(images):
            remarks.append(f"{where}: {n_missing:,} chunk(s) not in the store are read as its fill value")
    others = [name for name in _VALIDATION if store.open_foreign(path, f"{name}/images") is not None]
    remarks += [f"{path}: {_some(others)}: not used"] if others else []
    return _open_arrays(path, source, found, store.foreign_classes(path), remarks)


def _slabs(array: store.Array, start: int) -> Iterator[NDArray[Any]]:
    """Yield a zarr array from row `start` on, whole chunks at a time."""
    row = max(1, array.dtype.itemsize * prod(array.shape[1:]))
    step = array.chunks[0] * max(1, _BATCH_BYTES // (row * array.chunks[0]))
    first = start
    while first < array.shape[0]:
        stop = min((first // step + 1) * step, array.shape[0])
        yield store.read_foreign(array, slice(first, stop))
        first = stop


def _open_torchvision(path: Path, source: Own, engine: Engine) -> Opened:
    assert isinstance(source, OwnTorchvision)
    from torchvision import datasets  # imports torch: seconds, and only this kind needs it

    make: Any = getattr(datasets, source.dataset, None)
    is_dataset = (
        inspect.isclass(make) and issubclass(make, datasets.VisionDataset) and make is not datasets.VisionDataset
    )
    takes = inspect.signature(make).parameters if is_dataset else {}
    if "root" not in takes:
        raise PipelineError(f"{path}: torchvision.datasets has no class {source.dataset!r}; name one such as SVHN")
    read = partial(make, str(path), **({"download": False} if "download" in takes else {}))
    ways: list[dict[str, dict[str, Any]]] = [{"": {}}]
    if "train" in takes:
        ways = [{split: {"train": split == "train"} for split in SPLITS}]
    elif "split" in takes:
        ways = [{"train": {"split": train}, "test": {"split": test}} for train, test in _TORCHVISION_SPLITS]
    _check_share(path, source, is_split="" not in ways[0])
    with _in_words(f"{path}: torchvision cannot read it as {source.dataset}"):
        found = _read_splits(read, ways)
        arrays = {split: _as_arrays(path, source, examples) for split, examples in found.items()}
    names = getattr(next(iter(found.values())), "classes", None)
    return _open_arrays(path, source, arrays, names)


def _read_splits(read: Callable[..., Any], ways: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
    """Read the splits, named in the first of the given ways that the class knows."""
    for keywords in ways:
        try:
            return {split: read(**named) for split, named in keywords.items()}
        except ValueError as error:
            if "Unknown value" not in str(error):
                raise
            unknown = " ".join(str(error).split())
    raise ValueError(f"no training and test set among its splits ({unknown})")


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Turn any error that torchvision or its decoder lets through into one of a single line."""
    try:
        yield
    except (PipelineError, MemoryError):
        raise
    except Exception as error:
        if is_outage(error):
            raise
        raise PipelineError(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from None


def _as_arrays(path: Path, source: OwnTorchvision, examples: Any) -> _Arrays:
    n = len(examples)
    where = f"{path}: {source.dataset}"

    def read(take: Callable[[Any], Any], i: int) -> Any:
        try:
            with _in_words(f"{path}: image {i} of {source.dataset} cannot be read"):
                return take(examples[i])
        except PipelineError as error:
            return error

    def images(start: int) -> Iterator[NDArray[Any] | PipelineError]:
        yield from (read(lambda item: _to_picture(item[0], source.channels)[None], i) for i in range(start, n))

    labels = next((v for name in ("targets", "labels", "_labels") if len(v := getattr(examples, name, ())) == n), None)
    if labels is None:  # then torchvision can give labels only by decoding every image
        labels = [read(lambda item: item[1], i) for i in range(n)]
        if unreadable := [str(label) for label in labels if isinstance(label, PipelineError)]:
            raise PipelineError(_some(unreadable, "; "))
    values = np.asarray(labels)
    _check_labels(where, values.shape, values.dtype, n)
    return _Arrays(where, (n,), values.reshape(-1), images)


def _to_picture(item: Any, channels: int) -> Images:
    """Convert an item to uint8 (H, W, C)."""
    pixels = pictures.to_pixels(item if isinstance(item, Image.Image) else Image.fromarray(np.asarray(item)), channels)
    if pixels is None:
        raise ValueError("has transparent pixels")
    return pixels


_KINDS: Mapping[str, Callable[[Path, Any, Engine], Opened]] = {
    "folder": _open_folder,
    "npz": _open_npz,
    "zarr": _open_zarr,
    "torchvision": _open_torchvision,
}
