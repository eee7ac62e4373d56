"""Zarr stores of images and labels; the only module that imports zarr.

Arrays are uint8, sharded so that a store is a few dozen files, and every chunk carries a CRC-32C checksum. A store
appears whole or not at all. Readers raise one error of our own for anything missing, damaged or unexpected.
"""

import asyncio
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.core import sync as zarr_sync
from zarr.core.array_spec import ArraySpec
from zarr.registry import register_codec

from pipeline import layout
from pipeline.datasets import Dataset
from pipeline.errors import PipelineError, is_exhausted
from pipeline.files import replacing_folder

# Bytes per chunk, before compression: what a reader of a single image has to decode. zarr spends about a millisecond on
# every chunk, whatever its size. Results do not depend on it.
CHUNK_BYTES = 1_600_000
# Bytes per shard, before compression: what one task makes, holds and writes.
SHARD_BYTES = 64 * 2**20
# Fifty times the shards of the largest array of profile paper.
_MAX_SHARDS = 1000
SCHEMA_VERSION = 1

Array = zarr.Array[Any]
Group = zarr.Group

# Two cores' worth: zarr's defaults are made for object stores, and workers here bring threads of their own.
zarr.config.set({"async.concurrency": 2, "threading.max_workers": 2})


class BoundedZstd(ZstdCodec):
    """zstd that decodes no more than a chunk has room for; a few bytes of it can stand for gigabytes."""

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        room = np.zeros(math.prod(chunk_spec.shape), np.uint8)
        self._zstd_codec.decode(chunk_bytes.as_numpy_array(), room)
        return chunk_spec.prototype.buffer.from_array_like(room)


register_codec("zstd", BoundedZstd, qualname="pipeline.store.BoundedZstd")
zarr.config.set({"codecs.zstd": "pipeline.store.BoundedZstd"})


@contextmanager
def replacing_store(path: Path, attributes: Mapping[str, Any]) -> Iterator[Group]:
    """A new group that takes the place of the store at `path` when the block ends without an error.

    Args:
        path: The store to write.
        attributes: Attributes of its root group, JSON values that do not vary from run to run.
    """
    with replacing_folder(path) as partial:
        try:
            yield zarr.create_group(
                partial, attributes={"schema_version": SCHEMA_VERSION, **attributes}, overwrite=True
            )
        finally:
            # Of several writes of one call zarr reports the first that fails, while the others go on.
            zarr_sync.sync(_all_written())


async def _all_written() -> None:
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)


def create_images(group: Group, name: str, shape: tuple[int, ...], attributes: Mapping[str, Any]) -> Array:
    """An empty array for images in `group`, sharded and checksummed.

    Args:
        group: Where it goes.
        name: `images`, `train` or `test`.
        shape: (N, H, W, C) or (trials, N, H, W, C).
        attributes: JSON values that do not vary from run to run.
    """
    *trials, n, height, width, channels = shape
    image_bytes = height * width * channels
    chunk_images = min(n, images_per_chunk(image_bytes))
    chunks_per_trial = -(-n // chunk_images)
    chunks_per_shard = max(1, SHARD_BYTES // (chunk_images * image_bytes))
    shard_images = chunk_images * min(chunks_per_trial, chunks_per_shard)
    # Whole trials share a shard where several fit; otherwise a trial is cut into shards.
    shard_trials = [min(count, max(1, chunks_per_shard // chunks_per_trial)) for count in trials]
    image = (height, width, channels)
    return _create(
        group,
        name,
        shape,
        chunks=(*(1 for _ in trials), chunk_images, *image),
        shards=(*shard_trials, shard_images, *image),
        attributes=attributes,
    )


def images_per_chunk(image_bytes: int) -> int:
    """How many images of that size fit into a chunk: 2,000 of MNIST, 500 of CIFAR-10, which divide 10,000."""
    return 500 * max(1, CHUNK_BYTES // (500 * image_bytes))


def create_labels(group: Group, name: str, labels: NDArray[np.uint8]) -> None:
    """Write labels, uint8 (N,), as one shard."""
    array = _create_labels(group, name, labels.shape)
    array[...] = labels
    finish(array, sha256(labels))


def _create_labels(group: Group, name: str, shape: tuple[int, ...]) -> Array:
    return _create(group, name, shape, chunks=shape, shards=shape, attributes={})


def _create(
    group: Group,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    shards: tuple[int, ...],
    attributes: Mapping[str, Any],
) -> Array:
    return group.create_array(
        name,
        shape=shape,
        dtype="uint8",
        chunks=chunks,
        shards=shards,
        serializer=BytesCodec(),
        # Level 1: noise does not compress at any level, and digits do almost as well as at the default.
        compressors=[BoundedZstd(level=1), Crc32cCodec()],
        fill_value=0,
        attributes=dict(attributes),
        # A black image must be told from a lost one.
        config={"write_empty_chunks": True},
    )


def shard_regions(array: Array) -> Iterator[tuple[slice, ...]]:
    """The region of every shard in C order; one writer per region, or data are lost."""
    shards = array.shards or array.chunks
    for index in np.ndindex(_shard_grid(array)):
        yield tuple(
            slice(i * shard, min((i + 1) * shard, length))
            for i, shard, length in zip(index, shards, array.shape, strict=True)
        )


def _shard_grid(array: Array) -> tuple[int, ...]:
    return tuple(-(-length // shard) for length, shard in zip(array.shape, array.shards or array.chunks, strict=True))


def _n_missing_shards(array: Array) -> int:
    # zarr counts the chunks of an initialised shard, those beyond the array's edge too.
    chunks_per_shard = math.prod(array.shards or array.chunks) // math.prod(array.chunks)
    return math.prod(_shard_grid(array)) - array.nchunks_initialized // chunks_per_shard


def files_of(arrays: Iterable[Array]) -> set[Path]:
    """The files of a store that holds these arrays and nothing else, relative to its folder."""
    files = {Path("zarr.json")}
    for array in arrays:
        folder = Path(array.path)
        files |= {parent / "zarr.json" for parent in (folder, *folder.parents)}
        files |= {folder / array.metadata.encode_chunk_key(index) for index in np.ndindex(_shard_grid(array))}
    return files


def planned_files(
    attributes: Mapping[str, Any], arrays: Iterable[tuple[str, tuple[int, ...], Mapping[str, Any]]]
) -> dict[Path, bytes | None]:
    """All files of a store, relative to its folder: the content of every zarr.json, None for a shard.

    Args:
        attributes: Those given to `replacing_store`.
        arrays: Path, shape and attributes, the digest last, of every array.
    """
    metadata: dict[str, Any] = {}
    root = zarr.create_group(metadata, attributes={"schema_version": SCHEMA_VERSION, **attributes})
    made = []
    for name, shape, expected in arrays:
        *groups, last = name.split("/")
        group = root.require_group("/".join(groups))
        array = _create_labels(group, last, shape) if len(shape) == 1 else create_images(group, last, shape, {})
        made.append(array.update_attributes(dict(expected)))
    contents = {Path(name): content.to_bytes() for name, content in metadata.items()}
    return dict.fromkeys(files_of(made)) | contents


def _layout_problem(array: Array) -> str | None:
    """What its metadata claim that no array of this module has; a reader would allocate what they say."""
    if not isinstance(array.attrs.get("sha256"), str):
        return "no digest"
    shape = array.shape
    if len(shape) not in (1, 4, 5) or min(shape) < 1:
        return f"shape {shape}"
    nowhere = zarr.create_group({})
    expected = _create_labels(nowhere, "x", shape) if len(shape) == 1 else create_images(nowhere, "x", shape, {})
    if math.prod(expected.shards or ()) > SHARD_BYTES or math.prod(_shard_grid(expected)) > _MAX_SHARDS:
        return f"shape {shape}"
    found = array.metadata.to_dict()
    different = [key for key, value in expected.metadata.to_dict().items() if found.get(key) != value]
    return next((f"unexpected {key}" for key in different if key != "attributes"), None)


def finish(array: Array, digest: str) -> None:
    """Record the SHA-256 of the array's decoded bytes in C order."""
    array.attrs["sha256"] = digest


def sha256(array: NDArray[np.uint8]) -> str:
    """SHA-256 of the array's bytes in C order, as hex digits."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def open_store(path: Path, made_by: str) -> Group:
    """A store for reading.

    Args:
        path: Where it lies.
        made_by: Command that makes it, for the error message.

    Raises:
        PipelineError: No such store, metadata that cannot be read, or another schema version.
    """
    if not path.is_dir():
        raise PipelineError(f"{path}: no such store; make it with `{made_by}`")
    try:
        group = zarr.open_group(path, mode="r")
    except Exception as error:  # zarr passes on what its JSON and codec parsers raise
        if is_exhausted(error):
            raise
        raise PipelineError(f"{path}: damaged metadata ({error}); make it again with `{made_by}`") from None
    attributes = group.metadata.attributes
    version = attributes.get("schema_version") if isinstance(attributes, dict) else None
    if version != SCHEMA_VERSION:
        raise PipelineError(f"{path}: schema version {version!r}, expected {SCHEMA_VERSION}; run `{made_by}`")
    return group


def get_array(group: Group, name: str, made_by: str) -> Array:
    """An array of an open store, with all of its shards present.

    Args:
        group: From `open_store`.
        name: Path of the array in it, such as `0.05/test`.
        made_by: As `open_store`.

    Raises:
        PipelineError: No such array, damaged metadata, or shards missing.
    """
    where = f"{group.store_path.store}/{name}".removeprefix("file://")
    try:
        array = group[name]
        if not isinstance(array, zarr.Array) or array.dtype != np.uint8:
            raise PipelineError(f"{where}: not an array of uint8; make it again with `{made_by}`")
        problem = _layout_problem(array)
        missing = 0 if problem else _n_missing_shards(array)
    except PipelineError:
        raise
    except KeyError:
        raise PipelineError(f"{where}: not in the store; make it again with `{made_by}`") from None
    except Exception as error:  # as in open_store
        if is_exhausted(error):
            raise
        raise PipelineError(f"{where}: damaged metadata ({error}); make it again with `{made_by}`") from None
    if problem:
        raise PipelineError(f"{where}: damaged metadata ({problem}); make it again with `{made_by}`")
    if missing:
        raise PipelineError(f"{where}: {missing} shard(s) are missing; make it again with `{made_by}`")
    return array


def read(array: Array, made_by: str) -> NDArray[np.uint8]:
    """All values of an array, its digest checked.

    Args:
        array: From `get_array`.
        made_by: As `open_store`.

    Raises:
        PipelineError: A chunk fails its checksum or cannot be decoded, or the values are not those first written.
    """
    values = read_part(array, ..., made_by)
    _check_digest(array, sha256(values), made_by)
    return values


def read_trials(array: Array, made_by: str) -> Iterator[NDArray[np.uint8]]:
    """One trial after the other of an array (trials, N, H, W, C), the digest checked after the last.

    Args:
        array: From `get_array`.
        made_by: As `open_store`.

    Raises:
        PipelineError: As `read`.
    """
    digest = hashlib.sha256()
    for trial in range(array.shape[0]):
        values = read_part(array, trial, made_by)
        digest.update(values.data)
        yield values
    _check_digest(array, digest.hexdigest(), made_by)


def read_part(array: Array, selection: Any, made_by: str) -> NDArray[np.uint8]:
    """A part of an array; chunks are checked by their checksums, the whole is not.

    Args:
        array: From `get_array`.
        selection: Basic index, such as a trial's number or a slice of images.
        made_by: As `open_store`.

    Raises:
        PipelineError: A chunk fails its checksum or cannot be decoded.
    """
    try:
        return np.ascontiguousarray(array[selection], dtype=np.uint8)
    except Exception as error:  # codecs raise what they like
        if is_exhausted(error):
            raise
        raise PipelineError(f"{_where(array)}: damaged data ({error}); make it again with `{made_by}`") from None


def _check_digest(array: Array, digest: str, made_by: str) -> None:
    # zarr reads an empty shard as zeros: only the digest tells.
    if digest != array.attrs.get("sha256"):
        raise PipelineError(
            f"{_where(array)}: damaged data (SHA-256 is not that in its attributes); make it again with `{made_by}`"
        )


def _where(array: Array) -> str:
    return str(array.store_path).removeprefix("file://")


def read_clean(dataset: Dataset, split: str, kind: str) -> NDArray[np.uint8]:
    """A full array of the clean store, its digest checked.

    Args:
        dataset: Which data set.
        split: `train` or `test`.
        kind: `images` (uint8 (N, H, W, C)) or `labels` (uint8 (N,)).

    Raises:
        PipelineError: The store is missing or damaged, or holds other data.
    """
    made_by = f"python -m pipeline prepare {dataset.name}"
    path = layout.clean_store(dataset.name)
    values = read(get_array(open_store(path, made_by), f"{split}/{kind}", made_by), made_by)
    if sha256(values) != dataset.digests[split, kind]:
        raise PipelineError(f"{path}/{split}/{kind}: not the {dataset.name} data; make it again with `{made_by}`")
    return values
