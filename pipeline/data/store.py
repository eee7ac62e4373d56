"""Reads and writes Zarr stores of images and labels; only this module and `data.backends` below it import zarr.

Arrays are uint8, sharded so that a store is a few dozen files, and every chunk carries a CRC-32C checksum. A store
appears whole or not at all, in a folder or in object storage. Readers raise `PipelineError` for anything missing,
damaged or unexpected.
"""

import asyncio
import hashlib
import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer
from zarr.buffer.cpu import NDBuffer
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.core import sync as zarr_sync
from zarr.core.array_spec import ArraySpec
from zarr.storage import StorePath

from pipeline.data import manifest
from pipeline.data.arrays import Labels
from pipeline.data.backends import Backend, Folder, Objects
from pipeline.data.datasets import SPLITS, Dataset
from pipeline.data.seeding import BLOCK_SIZE, block_size, largest_divisor
from pipeline.runtime import layout
from pipeline.runtime.bucket import Bucket, find_bucket
from pipeline.runtime.errors import PipelineError, UnreachableError, is_outage
from pipeline.runtime.files import PARTIAL_SUFFIX, read_file, replacing_folder, resuming_folder, write_text

# Bytes per chunk, before compression: what a reader of a single image has to decode. zarr spends about a millisecond on
# every chunk, whatever its size. Results do not depend on it.
CHUNK_BYTES = 1_600_000
# Bytes per shard, before compression: what one task makes, holds and writes.
SHARD_BYTES = 64 * 2**20
# A thousand times the shards of the largest array of profile paper; all are looked up before an array is read.
_MAX_SHARDS = 1_000_000
SCHEMA_VERSION = 4
_SHARD = re.compile(r"c(\.\d+)+")
# The largest shard or chunk that is read from a store that was not made by this module.
MAX_FOREIGN_BYTES = 2**28
# Labels have at most two bytes.
MAX_CLASSES = 2**16 - 1

# A black image must be told from a lost one. The metadata do not record this setting: every writer has to give it.
_CONFIG: Any = {"write_empty_chunks": True}

Array = zarr.Array[Any]
Group = zarr.Group

_settings_lock, _n_settings_users = threading.Lock(), 0
_users_settings: dict[str, Any] = {}


@contextmanager
def _default_settings() -> Iterator[None]:
    """Have zarr use its default settings while any thread is in such a block, and then the user's again.

    zarr's settings belong to the whole process. Only those that the user has set otherwise are changed, so mostly none,
    and those that are set meanwhile stay.
    """
    global _n_settings_users, _users_settings
    with _settings_lock:
        if _n_settings_users == 0:
            _users_settings = _swap(zarr.config.config, zarr.config.defaults[0])
        _n_settings_users += 1
    try:
        yield
    finally:
        with _settings_lock:
            _n_settings_users -= 1
            if _n_settings_users == 0:
                _swap(zarr.config.config, _users_settings, instead_of=zarr.config.defaults[0])


def _swap(
    config: dict[str, Any], wanted: Mapping[str, Any], instead_of: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Set what differs from `wanted`, if it still is as in `instead_of`, and return the old values."""
    before: dict[str, Any] = {}
    for key, value in wanted.items():
        old = config.get(key)
        if isinstance(value, Mapping) and isinstance(old, dict):
            inner = _swap(old, value, None if instead_of is None else instead_of.get(key, {}))
            before |= {key: inner} if inner else {}
        elif old != value and (instead_of is None or old == instead_of.get(key)):
            before[key], config[key] = old, deepcopy(value)
    return before


class BoundedZstd(ZstdCodec):
    """zstd that decodes no more than a chunk has room for: a few compressed bytes can stand for gigabytes."""

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        n_bytes = math.prod(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize
        room = np.zeros(n_bytes, np.uint8)
        self._zstd_codec.decode(chunk_bytes.as_numpy_array(), room)
        return chunk_spec.prototype.buffer.from_array_like(room)


@contextmanager
def replacing_store(path: Path, attributes: Mapping[str, Any], resumes: str | None = None) -> Iterator[Group]:
    """Yield a new group that takes the place of the store at `path` when the block ends without an error.

    Args:
        path: The store to write.
        attributes: Attributes of its root group, JSON values that do not vary from run to run.
        resumes: Digest of all that decides the store. If given, a block that fails leaves what it has written, and the
            next one with the same digest finds its shards (`resume_images`). All other files are made again: a power
            cut leaves empty ones, and a kill those that zarr was writing.
    """
    bucket = find_bucket()
    staging = _replacing_folder(path, resumes) if bucket is None else _replacing_objects(path, bucket, resumes)
    with _default_settings(), staging as partial:
        try:
            for name in partial.names():
                if not _SHARD.fullmatch(PurePosixPath(name).name):
                    partial.remove(name)
            yield zarr.create_group(partial, attributes={"schema_version": SCHEMA_VERSION, **attributes})
        finally:
            # If one of several writes in a call fails, zarr reports it while the others go on.
            zarr_sync.sync(_all_written())


@contextmanager
def _replacing_folder(path: Path, resumes: str | None) -> Iterator[Folder]:
    staging = replacing_folder(path) if resumes is None else resuming_folder(path, resumes)
    with staging as partial:
        yield Folder(partial, read_only=False, max_bytes=2 * SHARD_BYTES)


@contextmanager
def _replacing_objects(path: Path, bucket: Bucket, resumes: str | None) -> Iterator[Objects]:
    """Like `_replacing_folder`; only the working folder records the name of the staging folder to resume."""
    noted, name = path.with_name(f".{path.name}.key{PARTIAL_SUFFIX}"), uuid4().hex
    if resumes is not None:
        with suppress(FileNotFoundError):
            key, _, former = read_file(noted, 1000).decode(errors="replace").partition(" ")
            name = former if key == resumes and re.fullmatch("[0-9a-f]{32}", former) else name
        write_text(noted, f"{resumes} {name}")
    staged = bucket / PARTIAL_SUFFIX / name
    partial = Objects(staged, read_only=False, max_bytes=2 * SHARD_BYTES)
    try:
        yield partial
        with _default_settings():
            members = zarr.open_group(Objects(staged), mode="r").members(max_depth=None)
            files = files_of([node for _, node in members if isinstance(node, zarr.Array)])
        manifest.publish(path, partial, [file.as_posix() for file in files], bucket / path)
    except UnreachableError:  # nor can object storage be asked to clean up
        raise
    except BaseException:
        if resumes is None:
            with suppress(UnreachableError):  # the first error is the one to report
                staged.remove(partial.names())
        raise
    staged.remove(partial.names())
    noted.unlink(missing_ok=True)


def location_of(group: Group) -> str:
    """Return the folder, or the URL in object storage, that a group of `replacing_store` is written to."""
    return backend_of(group).location


def open_partial(location: str, name: str) -> Array:
    """Open an array for writing, in a store that another process makes (`replacing_store`).

    Args:
        location: From `location_of`.
        name: Path of the array in it.
    """
    is_url = "://" in location
    backend = Objects(Bucket(location), read_only=False) if is_url else Folder(location, read_only=False)
    with _default_settings():
        return zarr.open_array(backend, path=name, mode="r+", zarr_format=3, config=_CONFIG)


async def _all_written() -> None:
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)


def create_images(group: Group, name: str, shape: tuple[int, ...], attributes: Mapping[str, Any]) -> Array:
    """Create an empty array for images in `group`, sharded and checksummed.

    A shard holds whole blocks of images (`seeding.block_size`), as many as fit into `SHARD_BYTES`, at least one.
    Dimensions are named trial, image, y, x and channel. In an array `train`, image is named train_image: xarray wants
    one length per name, and the array `test` beside it has another length.

    Args:
        group: The group to create it in.
        name: `images`, `train` or `test`.
        shape: (N, H, W, C) or (trials, N, H, W, C).
        attributes: JSON values that do not vary from run to run.
    """
    *trials, n, height, width, channels = shape
    image = (height, width, channels)
    image_bytes = math.prod(image)
    whole_chunk = images_per_chunk(image_bytes)
    chunk_images = min(n, whole_chunk)
    chunks_per_trial = -(-n // chunk_images)
    chunks_per_block = max(1, block_size(image) // whole_chunk)
    blocks_per_shard = max(1, SHARD_BYTES // (chunk_images * image_bytes * chunks_per_block))
    chunks_per_shard = chunks_per_block * blocks_per_shard
    shard_images = chunk_images * min(chunks_per_trial, chunks_per_shard)
    # Whole trials share a shard where several fit; otherwise a trial is cut into shards.
    shard_trials = [min(count, max(1, chunks_per_shard // chunks_per_trial)) for count in trials]
    return _create(
        group,
        name,
        shape,
        chunks=(*(1 for _ in trials), chunk_images, *image),
        shards=(*shard_trials, shard_images, *image),
        dimensions=(*("trial" for _ in trials), "train_image" if name == "train" else "image", "y", "x", "channel"),
        attributes=attributes,
    )


def resume_images(group: Group, name: str, shape: tuple[int, ...]) -> tuple[Array, Iterator[NDArray[np.uint8]]]:
    """Create an array for images that keeps what a stopped run has written of it.

    Args:
        group: A group of a store that `replacing_store` resumes.
        name: As `create_images`.
        shape: Likewise.

    Returns:
        The array, and an iterator over the images of its existing shards, from the first on. When that ends, all files
        of later shards are removed.
    """
    array = create_images(group, name, shape, {})
    return array, _whole_shards(array)


def _whole_shards(array: Array) -> Iterator[NDArray[np.uint8]]:
    backend, keys = backend_of(array), list(_shard_keys(array))
    kept = {f"{array.path}/zarr.json"}
    with suppress(PipelineError):  # from a shard that a power cut has damaged
        missing = set(backend.missing(keys))
        for region, key in zip(shard_regions(array), keys, strict=True):
            if key in missing:
                break
            yield read_part(array, region, "")
            kept.add(key)
    for name in backend.names():
        if name.startswith(f"{array.path}/") and name not in kept:
            backend.remove(name)


def backend_of(node: Array | Group) -> Backend:
    """Return the backend through which a store of this module is read and written."""
    assert isinstance(node.store, Folder | Objects)
    return node.store


def images_per_chunk(image_bytes: int) -> int:
    """Return how many images of a size go into a chunk: 2,000 of MNIST, 500 of CIFAR-10, which divide 10,000.

    Whole blocks of 500 if at least one fits; otherwise the largest divisor of a block that fits, at least one image.
    """
    n_blocks = CHUNK_BYTES // (BLOCK_SIZE * image_bytes)
    return BLOCK_SIZE * n_blocks or largest_divisor(block_size((image_bytes,)), CHUNK_BYTES // image_bytes)


def label_type(n_classes: int) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds the labels of `n_classes` classes."""
    return np.dtype(np.uint8 if n_classes <= 256 else np.uint16)


def create_labels(group: Group, name: str, labels: Labels) -> None:
    """Write labels, `label_type` (N,), as one shard; labels left by a stopped run are replaced."""
    backend_of(group).remove(f"{group.path}/{name}")
    array = _create_labels(group, name, labels.shape, labels.dtype)
    array[...] = labels
    finish(array, sha256(labels))


def _create_labels(group: Group, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    return _create(group, name, shape, chunks=shape, shards=shape, dimensions=("image",), attributes={}, dtype=dtype)


def _create(
    group: Group,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    shards: tuple[int, ...],
    dimensions: tuple[str, ...],
    attributes: Mapping[str, Any],
    dtype: Any = "uint8",
) -> Array:
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        shards=shards,
        serializer=BytesCodec(),
        # Photographs and noise hardly compress at any level, and zstd is twice as fast on them at -1 as at 1. Digits
        # take a tenth more space, digits with noise four tenths (docs/performance.md).
        compressors=[BoundedZstd(level=-1), Crc32cCodec()],
        fill_value=0,
        attributes=dict(attributes),
        dimension_names=dimensions,
        # All shards in one folder, not each in folders of its own: DVC walks all folders for every stage.
        chunk_key_encoding={"name": "default", "separator": "."},
        config=_CONFIG,
    )


def shard_regions(array: Array) -> Iterator[tuple[slice, ...]]:
    """Yield the region of every shard in C order; a region must have one writer only, or data are lost."""
    shards = array.shards or array.chunks
    for index in np.ndindex(_shard_grid(array)):
        yield tuple(
            slice(i * shard, min((i + 1) * shard, length))
            for i, shard, length in zip(index, shards, array.shape, strict=True)
        )


def _shard_grid(array: Array) -> tuple[int, ...]:
    return tuple(-(-length // shard) for length, shard in zip(array.shape, array.shards or array.chunks, strict=True))


def _shard_keys(array: Array) -> Iterator[str]:
    for index in np.ndindex(_shard_grid(array)):
        yield f"{array.path}/{array.metadata.encode_chunk_key(index)}"


def files_of(arrays: Iterable[Array]) -> set[Path]:
    """Return the files of a store that holds these arrays and nothing else, relative to its folder."""
    files = {Path("zarr.json")}
    for array in arrays:
        folder = Path(array.path)
        files |= {parent / "zarr.json" for parent in (folder, *folder.parents)}
        files |= set(map(Path, _shard_keys(array)))
    return files


def planned_files(
    attributes: Mapping[str, Any], arrays: Iterable[tuple[str, tuple[int, ...], Mapping[str, Any]]]
) -> dict[Path, bytes | None]:
    """Plan all files of a store: path relative to its folder → content of a zarr.json, or None for a shard.

    Args:
        attributes: As given to `replacing_store`.
        arrays: Path, shape and attributes (the digest last) of every array.
    """
    metadata: dict[str, Any] = {}
    made, labels = [], label_type(len(attributes.get("classes", ())))
    with _default_settings():
        root = zarr.create_group(metadata, attributes={"schema_version": SCHEMA_VERSION, **attributes})
        for name, shape, expected in arrays:
            *groups, last = name.split("/")
            group = root.require_group("/".join(groups))
            is_labels = len(shape) == 1
            array = _create_labels(group, last, shape, labels) if is_labels else create_images(group, last, shape, {})
            made.append(array.update_attributes(dict(expected)))
    contents = {Path(name): content.to_bytes() for name, content in metadata.items()}
    return dict.fromkeys(files_of(made)) | contents


def _as_we_write(array: Array, backend: Backend) -> Array:
    """Return the array as this module would have made it, with its own codecs and with bounds on what is read.

    Otherwise the layout that the metadata claim would decide how much a reader allocates.

    Raises:
        ValueError: No array of this module has such metadata.
    """
    shape = array.shape
    if not isinstance(array.attrs.get("sha256"), str):
        raise ValueError("no digest")
    if len(shape) not in (1, 4, 5) or min(shape) < 1:
        raise ValueError(f"shape {shape}")
    nowhere, is_labels = zarr.create_group({}), len(shape) == 1
    if is_labels:
        ours = _create_labels(nowhere, array.basename, shape, array.dtype)
    else:
        ours = create_images(nowhere, array.basename, shape, {})
    if math.prod(_shard_grid(ours)) > _MAX_SHARDS or (is_labels and shape[0] > SHARD_BYTES):
        raise ValueError(f"shape {shape}")
    found = array.metadata.to_dict()
    different = [key for key, value in ours.metadata.to_dict().items() if found.get(key) != value]
    for key in different:
        if key != "attributes":
            raise ValueError(f"unexpected {key}")
    shard, chunk = (ours.dtype.itemsize * math.prod(shape) for shape in (ours.shards or ours.chunks, ours.chunks))
    # Plus what zstd adds to an incompressible chunk, the chunk's checksum and index entry, and the index's checksum.
    files = backend.bounded(shard + shard // chunk * (chunk // 256 + 64 + 4 + 16) + 4)
    metadata = replace(ours.metadata, attributes=array.metadata.attributes)
    return zarr.Array(zarr.AsyncArray(metadata, StorePath(files, array.path), ours.config))


def finish(array: Array, digest: str) -> None:
    """Record the SHA-256 of the array's decoded bytes in C order."""
    array.attrs["sha256"] = digest


def sha256(array: Labels) -> str:
    """SHA-256 of the array's bytes in C order, as hex digits."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def open_store(path: Path, made_by: str) -> Group:
    """Open a store for reading.

    Args:
        path: The store, or the manifest that says where it is.
        made_by: Command that makes it, for the error message.

    Raises:
        PipelineError: No such store, metadata that cannot be read, or another schema version.
    """
    if path.is_file():
        backend: Backend = manifest.open_objects(path, made_by)
    elif path.is_dir():
        backend = Folder(path)
    else:
        raise PipelineError(f"{path}: no such store; make it with `{made_by}`")
    try:
        with _default_settings():
            group = zarr.open_group(backend, mode="r", zarr_format=3, use_consolidated=False)
    except FileNotFoundError:
        raise PipelineError(f"{backend.location}: no such store; make it again with `{made_by}`") from None
    except Exception as error:  # zarr passes on what its JSON and codec parsers raise
        if is_outage(error):
            raise
        raise PipelineError(f"{backend.location}: damaged metadata ({error}); make it again with `{made_by}`") from None
    attributes = group.metadata.attributes
    version = attributes.get("schema_version") if isinstance(attributes, dict) else None
    if version != SCHEMA_VERSION:
        raise PipelineError(
            f"{backend.location}: schema version {version!r}, expected {SCHEMA_VERSION}; run `{made_by}`"
        )
    return group


def get_array(group: Group, name: str, made_by: str) -> Array:
    """Return an array of an open store, all of whose shards are present.

    Its layout is that of this module, but its shape is whatever the metadata claim: check the shape before you read.

    Args:
        group: From `open_store`.
        name: Path of the array in it, such as `0.05/test`.
        made_by: As `open_store`.

    Raises:
        PipelineError: No such array, damaged metadata, or shards missing.
    """
    where = f"{backend_of(group).location}/{name}"
    try:
        with _default_settings():
            found = group[name]
            if not isinstance(found, zarr.Array) or found.dtype not in (np.uint8, np.uint16):
                raise ValueError("not an array of uint8 or uint16")
            array = _as_we_write(found, backend_of(group))
    except KeyError:
        raise PipelineError(f"{where}: not in the store; make it again with `{made_by}`") from None
    except Exception as error:  # as in open_store
        if is_outage(error):
            raise
        raise PipelineError(f"{where}: damaged metadata ({error}); make it again with `{made_by}`") from None
    backend = backend_of(array)
    try:
        missing = backend.missing(_shard_keys(array))
    except UnreachableError:
        raise
    except PipelineError as error:
        raise PipelineError(f"{where}: damaged data ({error}); make it again with `{made_by}`") from None
    if missing:
        raise PipelineError(f"{where}: {len(missing)} shard(s) are missing; make it again with `{made_by}`")
    return array


def read(array: Array, made_by: str) -> NDArray[np.uint8]:
    """Read all values of an array, and check its digest.

    Args:
        array: From `get_array`.
        made_by: As `open_store`.

    Raises:
        PipelineError: A chunk fails its checksum or cannot be decoded, or the values are not those first written.
    """
    digest, rows = hashlib.sha256(), (array.shards or array.chunks)[0]
    with _explained(array, made_by):
        values = np.empty(array.shape, array.dtype)

    def read_rows(first: int) -> NDArray[np.uint8]:
        part = values[first : first + rows]
        with _explained(array, made_by), _default_settings():
            array.get_basic_selection(slice(first, first + rows), out=NDBuffer.from_numpy_array(part))
        return part

    with ThreadPoolExecutor(4) as pool:  # what has been read is hashed while more is read
        for part in pool.map(read_rows, range(0, len(values), rows)):
            digest.update(part.data)
    _check_digest(array, digest.hexdigest(), made_by)
    return values


def read_trials(array: Array, made_by: str) -> Iterator[NDArray[np.uint8]]:
    """Yield an array (trials, N, H, W, C) trial by trial; its digest is checked after the last one.

    Args:
        array: From `get_array`.
        made_by: As `open_store`.

    Raises:
        PipelineError: As `read`.
    """
    digest, per_shard = hashlib.sha256(), (array.shards or array.chunks)[0]
    for first in range(0, array.shape[0], per_shard):  # a shard is read once, whole
        for values in read_part(array, slice(first, first + per_shard), made_by):
            digest.update(values.data)
            yield values
    _check_digest(array, digest.hexdigest(), made_by)


def read_part(array: Array, selection: Any, made_by: str) -> NDArray[np.uint8]:
    """Read a part of an array; the checksums of its chunks are checked, the digest of the whole is not.

    Args:
        array: From `get_array`.
        selection: Basic index, such as a trial's number or a slice of images.
        made_by: As `open_store`.

    Raises:
        PipelineError: A chunk fails its checksum or cannot be decoded; the part does not fit into memory.
    """
    with _explained(array, made_by), _default_settings():
        return np.ascontiguousarray(array[selection], dtype=array.dtype)


@contextmanager
def _explained(array: Array, made_by: str) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise PipelineError(f"{_where(array)}: does not fit into memory ({error})") from None
    except Exception as error:  # codecs raise what they like
        if is_outage(error):
            raise
        raise PipelineError(f"{_where(array)}: damaged data ({error}); make it again with `{made_by}`") from None


def _check_digest(array: Array, digest: str, made_by: str) -> None:
    if digest != array.attrs.get("sha256"):
        raise PipelineError(
            f"{_where(array)}: damaged data (SHA-256 is not that in its attributes); make it again with `{made_by}`"
        )


def _where(array: Array) -> str:
    return f"{backend_of(array).location}/{array.path}"


def read_clean(dataset: Dataset, split: str, kind: str) -> Any:
    """Read a full array of the clean store, and check its digest.

    Args:
        dataset: The data set.
        split: `train` or `test`.
        kind: `images` (uint8 (N, H, W, C)) or `labels` (`label_type` (N,)).

    Raises:
        PipelineError: The store is missing or damaged, or holds other data.
    """
    made_by = f"python -m pipeline prepare {dataset.name}"
    path = layout.clean_store(dataset.name)
    array = get_array(open_store(path, made_by), f"{split}/{kind}", made_by)
    shape = (dataset.n_examples[split], *(dataset.shape if kind == "images" else ()))
    dtype = np.uint8 if kind == "images" else label_type(len(dataset.classes))
    if (array.shape, array.dtype, array.attrs["sha256"]) != (shape, dtype, dataset.digests[split, kind]):
        raise PipelineError(f"{path}/{split}/{kind}: not the {dataset.name} data; make it again with `{made_by}`")
    return read(array, made_by)


def read_facts(name: str) -> Dataset:
    """Read the facts of a data set from its clean store.

    Raises:
        PipelineError: The store is missing or damaged.
    """
    made_by = f"python -m pipeline prepare {name}"
    path = layout.clean_store(name)
    group = open_store(path, made_by)
    classes: Any = group.attrs.get("classes")
    source: Any = group.attrs.get("source")
    arrays = {
        (split, kind): get_array(group, f"{split}/{kind}", made_by) for split in SPLITS for kind in ("images", "labels")
    }
    shapes = {array.shape[1:] for (_, kind), array in arrays.items() if kind == "images"}
    are_strings = isinstance(classes, list) and all(isinstance(label, str) for label in classes)
    if not (are_strings and isinstance(source, dict) and len(shapes) == 1 and len(shape := shapes.pop()) == 3):
        raise PipelineError(f"{path}: damaged metadata; make it again with `{made_by}`")
    return Dataset(
        name,
        (shape[0], shape[1], shape[2]),
        n_examples={split: arrays[split, "labels"].shape[0] for split in SPLITS},
        classes=tuple(classes),
        digests={key: str(array.attrs["sha256"]) for key, array in arrays.items()},
        source=source,
    )


def open_foreign(path: Path, name: str) -> Array | None:
    """Open an array of a store that others made, for reading in parts; None if it has none of that name.

    Args:
        path: A Zarr store of version 2 or 3, a folder.
        name: Path of the array in it.

    Raises:
        PipelineError: It cannot be read, or its chunks are too large to be held.
    """
    try:
        with _default_settings():
            found = zarr.open_group(Folder(path, max_bytes=MAX_FOREIGN_BYTES), mode="r").get(name)
    except Exception as error:  # as in open_store
        if is_outage(error):
            raise
        raise PipelineError(f"{path}: no Zarr store, or damaged metadata ({error})") from None
    if not isinstance(found, zarr.Array):
        return None
    n_bytes = found.dtype.itemsize * math.prod(found.shards or found.chunks)
    if n_bytes > MAX_FOREIGN_BYTES:
        raise PipelineError(f"{path}/{name}: chunks of {n_bytes:,} bytes, more than the {MAX_FOREIGN_BYTES:,} allowed")
    return found


def count_missing(array: Array) -> int:
    """Count the shards or chunks of an array from `open_foreign` that have no file; zarr reads them as fill value."""
    return len(backend_of(array).missing(_shard_keys(array)))


def foreign_classes(path: Path) -> Any:
    """Return the attribute `classes` of a store's root group, or None."""
    with _default_settings():
        return zarr.open_group(Folder(path), mode="r").attrs.get("classes")


def read_foreign(array: Array, selection: Any) -> NDArray[Any]:
    """Read a part of an array from `open_foreign`.

    Raises:
        PipelineError: A chunk cannot be decoded.
    """
    try:
        with _default_settings():
            return np.ascontiguousarray(array[selection])
    except Exception as error:  # codecs raise what they like
        if is_outage(error) or isinstance(error, MemoryError):
            raise
        raise PipelineError(f"{_where(array)}: damaged data ({error})") from None
