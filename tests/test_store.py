"""Stores open with plain zarr, are a few dozen files, and tell when they are damaged."""

import asyncio
import copy
import errno
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.abc.buffer import Buffer
from zarr.abc.store import RangeByteRequest
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import _local

from pipeline.data import seeding, store
from pipeline.data.backends import Folder
from pipeline.runtime.errors import PipelineError
from tests.conftest import command_environment, tree
from tests.test_properties import examples


def make_values(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def fill(array: store.Array, values: np.ndarray) -> None:
    for region in store.shard_regions(array):
        array[region] = values[region]
    store.finish(array, store.sha256(values))


def write(path: Path, values: np.ndarray) -> None:
    with store.replacing_store(path, {"dataset": "mnist"}) as root:
        fill(store.create_images(root, "images", values.shape, {"level": 3}), values)


def get(path: Path, name: str = "images") -> store.Array:
    return store.get_array(store.open_store(path, "x"), name, "x")


def read(path: Path) -> np.ndarray:
    return store.read(get(path), "x")


SHAPES = [
    *((1230, 28, 28, 1), (3, 620, 28, 28, 1), (2, 7, 4, 4, 3), (1, 32, 32, 3), (30, 1000, 4, 4, 1)),
    *((1230, 1, 1, 1), (2, 620, 1, 1, 1), (120, 211, 211, 3), (120, 212, 212, 3), (2, 130, 224, 224, 3)),
    *((90, 600, 400, 3), (11, 1500, 1500, 3), (2, 3, 1500, 1500, 3), (2, 5000, 5000, 3), (3, 300, 105, 105, 3)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_of_every_size_are_read_back_and_by_plain_zarr_too(shape: tuple[int, ...], tmp_path: Path) -> None:
    values = make_values(shape)
    write(tmp_path / "a.zarr", values)
    array = get(tmp_path / "a.zarr")
    assert np.array_equal(store.read(array, "x"), values)
    if len(shape) == 5:  # with trials
        for found, wanted in zip(store.read_trials(array, "x"), values, strict=True):
            assert np.array_equal(found, wanted)
    last = (..., slice(-1, None), slice(None), slice(None), slice(None))
    assert np.array_equal(store.read_part(array, last, "x"), values[last])
    plain = zarr.open_array(tmp_path / "a.zarr", path="images", mode="r")
    assert np.array_equal(plain[...], values)
    assert plain.attrs["sha256"] == store.sha256(values)
    assert plain.metadata.zarr_format == 3
    assert plain.shards is not None


def test_shards_tile_the_array_in_c_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "images_per_chunk", lambda image_bytes: 500)
    monkeypatch.setattr(store, "SHARD_BYTES", 1000 * 16)
    for shape in ((3, 2300, 4, 4, 1), (5, 400, 4, 4, 1), (2600, 4, 4, 1)):
        regions = list(store.shard_regions(store.create_images(zarr.create_group({}), "images", shape, {})))
        assert len(regions) > 1
        values = make_values(shape)
        pieces = [values[region].ravel() for region in regions]
        assert np.array_equal(np.concatenate(pieces), values.ravel())


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_failed_write_leaves_what_was_there_though_others_are_still_under_way(
    existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = _local._put

    def fail_or_be_slow(path: Path, value: Buffer, exclusive: bool = False) -> int:
        if path.parent.name == "images":
            raise OSError(errno.ENOSPC, "No space left on device")
        time.sleep(0.2)
        return put(path, value, exclusive)

    if existing:
        write(tmp_path / "a.zarr", make_values((40, 8, 8, 1)))
    before = tree(tmp_path)
    monkeypatch.setattr(_local, "_put", fail_or_be_slow)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a.zarr", make_values((10, 4, 4, 1)))
    time.sleep(0.5)  # for what was not waited for
    assert tree(tmp_path) == before


def test_every_flipped_bit_in_a_shard_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "images_per_chunk", lambda image_bytes: 500)
    values = make_values((700, 8, 8, 1))
    write(tmp_path / "a.zarr", values)
    file = next((tmp_path / "a.zarr").rglob("c.*"))
    content = file.read_bytes()
    n_bits, n_index_bits = 8 * len(content), 8 * (2 * 16 + 4)  # offset and size of two chunks, and a checksum
    drawn = np.random.default_rng(1).choice(n_bits - n_index_bits, 100, replace=False)
    for bit in [*drawn.tolist(), *range(n_bits - n_index_bits, n_bits)]:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        with pytest.raises(PipelineError, match="damaged data"):
            read(tmp_path / "a.zarr")
    file.write_bytes(content)
    assert np.array_equal(read(tmp_path / "a.zarr"), values)


@pytest.mark.parametrize("digest", [None, 3])
def test_an_array_without_a_digest_is_damaged(digest: int | None, tmp_path: Path) -> None:
    write(tmp_path / "a.zarr", make_values((5, 8, 8, 1)))
    zarr.open_array(tmp_path / "a.zarr", path="images", mode="r+").attrs["sha256"] = digest
    with pytest.raises(PipelineError, match="images: damaged metadata"):
        read(tmp_path / "a.zarr")


# Layouts.

# Those of the first release: shape to images (and trials) per chunk and per shard.
FIRST_LAYOUTS = {
    (10_000, 28, 28, 1): ((2000,), (10_000,)),
    (60_000, 28, 28, 1): ((2000,), (60_000,)),
    (1230, 28, 28, 1): ((1230,), (1230,)),
    (25, 10_000, 28, 28, 1): ((1, 2000), (8, 10_000)),
    (3, 620, 28, 28, 1): ((1, 620), (3, 620)),
    (10_000, 32, 32, 3): ((500,), (10_000,)),
    (50_000, 32, 32, 3): ((500,), (21_500,)),
    (25, 10_000, 32, 32, 3): ((1, 500), (2, 10_000)),
    (2, 1100, 32, 32, 3): ((1, 500), (2, 1500)),
}


@pytest.mark.parametrize(("shape", "layout"), FIRST_LAYOUTS.items(), ids=str)
def test_the_layout_of_mnist_and_cifar10_is_that_of_the_first_release(shape: tuple[int, ...], layout: Any) -> None:
    array = store.create_images(zarr.create_group({}), "test", shape, {})
    assert (array.chunks, array.shards) == ((*layout[0], *shape[-3:]), (*layout[1], *shape[-3:]))
    assert len(list(store.shard_regions(array))) <= 25  # files


sides = st.one_of(st.integers(1, 40), st.integers(1, 9000))
counts = st.one_of(st.integers(1, 3000), st.integers(1, 10**6))


@examples(200)
@given(st.tuples(sides, sides, st.sampled_from([1, 2, 3, 4])), counts, st.one_of(st.none(), st.integers(1, 30)))
def test_a_layout_of_any_shape_is_bounded_and_accepted(image: tuple[int, ...], n: int, trials: int | None) -> None:
    shape = (n, *image) if trials is None else (trials, n, *image)
    array = store.create_images(zarr.create_group({}), "test", shape, {"sha256": "0"})
    assert array.shards is not None
    shard_images, chunk_images = array.shards[-4], array.chunks[-4]
    n_bytes, block = math.prod(image), seeding.block_size(image)
    larger = [divisor for divisor in range(block + 1, 501) if 500 % divisor == 0]
    assert 500 % block == 0
    assert block * n_bytes <= seeding.BLOCK_BYTES or block == 1
    assert not larger or larger[0] * n_bytes > seeding.BLOCK_BYTES
    assert array.chunks[-3:] == array.shards[-3:] == image
    assert math.prod(array.chunks) <= max(store.CHUNK_BYTES, n_bytes)
    assert math.prod(array.shards) <= max(store.SHARD_BYTES, n_bytes)
    assert chunk_images <= n
    assert shard_images % chunk_images == 0
    assert shard_images >= n or shard_images % block == 0
    assert chunk_images == n or chunk_images % block == 0 or block % chunk_images == 0
    if math.prod(store._shard_grid(array)) <= store._MAX_SHARDS:
        ours = store._as_we_write(array, Folder(Path()))
        assert (ours.shape, ours.chunks, ours.shards) == (shape, array.chunks, array.shards)


def test_dimensions_have_names_and_one_length_within_a_group(tmp_path: Path) -> None:
    """xarray wants that."""
    with store.replacing_store(tmp_path / "a.zarr", {}) as root:
        level, clean = root.create_group("0.05"), root.create_group("train")
        store.create_images(level, "train", (9, 4, 4, 1), {})
        store.create_images(level, "test", (2, 7, 4, 4, 1), {})
        store.create_images(clean, "images", (9, 4, 4, 1), {})
        store.create_labels(clean, "labels", np.zeros(9, np.uint8))
    named = {}
    for name in ("0.05", "train"):
        sizes: set[tuple[Any, int]] = set()
        for key, array in zarr.open_group(tmp_path / "a.zarr", path=name, mode="r").arrays():
            assert array.metadata.zarr_format == 3
            named[f"{name}/{key}"] = array.metadata.dimension_names
            sizes |= set(zip(array.metadata.dimension_names or (), array.shape, strict=True))
        assert len(dict(sizes)) == len(sizes)
    assert named == {
        "0.05/train": ("train_image", "y", "x", "channel"),
        "0.05/test": ("trial", "image", "y", "x", "channel"),
        "train/images": ("image", "y", "x", "channel"),
        "train/labels": ("image",),
    }


# What is not a file, and what is too large for one.


def test_the_store_that_zarr_reads_from_looks_before_it_opens_in_every_way(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"0123456789")
    (tmp_path / "huge").write_bytes(bytes(11))
    folder, prototype = Folder(tmp_path, max_bytes=10), default_buffer_prototype()
    middle = RangeByteRequest(2, 4)
    ways: list[Callable[[str, RangeByteRequest | None], Buffer | None]] = [
        lambda key, part: folder.get_sync(key, prototype=prototype, byte_range=part),
        lambda key, part: asyncio.run(folder.get(key, prototype, part)),
        lambda key, part: asyncio.run(folder.get_partial_values(prototype, [(key, part)]))[0],
    ]
    refused = {"pipe": "a pipe, socket or device", "huge": "11 bytes, more than the 10", ".": "a folder"}
    for read in ways:
        assert [read("file", part).to_bytes() for part in (None, middle)] == [b"0123456789", b"23"]  # type: ignore[union-attr]
        for part in (None, middle):
            assert read("none", part) is None
            for key, said in refused.items():
                with pytest.raises(PipelineError, match=said):
                    read(key, part)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 3, 3, 1), (2100, 28, 28, 1), (900, 32, 32, 3)], ids=str)
def test_a_shard_as_large_as_can_be_is_read_and_one_byte_more_is_not(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Values that do not compress: what zstd, checksums and the index add is within the bound."""
    write(tmp_path / "a.zarr", make_values(shape))
    array = get(tmp_path / "a.zarr")
    assert isinstance(array.store, Folder)
    shard = tmp_path / "a.zarr/images/c.0.0.0.0"
    assert shard.stat().st_size <= array.store.max_bytes < 1.05 * math.prod(array.shards or ()) + 200
    os.truncate(shard, array.store.max_bytes + 1)
    with pytest.raises(PipelineError, match="bytes, more than the"):
        store.read(array, "x")


# Whatever zarr is set to.

BLOCKS = ("codec_pipeline", "codecs", "array", "async", "threading")
CLASSES = ("codec_pipeline.path", *(f"codecs.{name}" for name in ("zstd", "bytes", "crc32c", "sharding_indexed")))
USERS_SETTINGS: dict[str, Any] = {
    **dict.fromkeys((*BLOCKS, "threading.max_workers"), "x"),
    **dict.fromkeys((*CLASSES, "buffer", "ndbuffer"), "none.Such"),
    **{"array.write_empty_chunks": True, "array.order": "F", "array.target_shard_size_bytes": 1000},
    **{"async.concurrency": 1, "async.timeout": 1e-9, "codec_pipeline.batch_size": 7},
    **{"default_zarr_format": 2, "json_indent": None},
}


def write_and_read(path: Path) -> dict[str, bytes | None]:
    """The files of a store with black images, which is read too."""
    values = make_values((2, 1100, 28, 28, 1))
    values[:, 500:] = 0
    with store.replacing_store(path, {"dataset": "mnist"}) as root:
        fill(store.create_images(root.require_group("0.05"), "test", values.shape, {"level": 3}), values)
        store.create_labels(root.create_group("train"), "labels", np.arange(9, dtype=np.uint8))
    for name, expected in (("0.05/test", values), ("train/labels", np.arange(9))):
        array = get(path, name)
        assert np.array_equal(store.read(array, "x"), expected)
        assert np.array_equal(store.read_part(array, slice(1), "x"), expected[:1])
    return tree(path)


@pytest.mark.parametrize(("key", "value"), USERS_SETTINGS.items())
def test_a_store_is_the_same_whatever_the_user_sets_and_the_setting_stays(key: str, value: Any, tmp_path: Path) -> None:
    expected = write_and_read(tmp_path / "a.zarr")
    with zarr.config.set({key: value}):
        before = copy.deepcopy(zarr.config.config)
        assert write_and_read(tmp_path / "b.zarr") == expected
        assert zarr.config.config == before


def test_a_store_is_the_same_whatever_the_environment_says(tmp_path: Path) -> None:
    variables = {
        f"ZARR_{key.upper().replace('.', '__')}": str(value)
        for key, value in USERS_SETTINGS.items()
        if key not in BLOCKS
    }
    code = "import sys; from pathlib import Path; from tests.test_store import *; write_and_read(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "b.zarr")]
    subprocess.run(command, env=command_environment() | variables, check=True)
    assert tree(tmp_path / "b.zarr") == write_and_read(tmp_path / "a.zarr")


def test_threads_that_overlap_leave_the_settings_as_they_were(tmp_path: Path) -> None:
    write(tmp_path / "a.zarr", make_values((5, 8, 8, 1)))
    with zarr.config.set({"async.concurrency": 7, "array.order": "F"}):
        before = copy.deepcopy(zarr.config.config)
        # The first begins first and ends first, which a stack of settings cannot undo in order.
        with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
            blocks = [(thread, store._default_settings()) for thread in (first, second)]
            for thread, block in blocks:
                thread.submit(block.__enter__).result(5)
            for thread, block in blocks:
                assert thread.submit(zarr.config.get, "async.concurrency").result(5) == 10
                thread.submit(block.__exit__, None, None, None).result(5)
        assert zarr.config.config == before
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(read, [tmp_path / "a.zarr"] * 80))
        assert zarr.config.config == before
    with pytest.raises(PipelineError):
        read(tmp_path / "none.zarr")
    assert zarr.config.get("async.concurrency") == 10


def test_a_setting_made_meanwhile_stays() -> None:
    with zarr.config.set({"array.order": "F", "async.timeout": 9, "async.concurrency": 10}):
        with store._default_settings():
            assert zarr.config.get("array.order") == "C"
            zarr.config.set({"async.concurrency": 5, "async.timeout": 8})
        assert [zarr.config.get(key) for key in ("array.order", "async.concurrency", "async.timeout")] == ["F", 5, 8]
        with store._default_settings():
            assert zarr.config.get("async.concurrency") == 10


class Untouched(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise AssertionError(key)


def test_settings_are_not_touched_where_they_are_zarrs_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr.config, "config", Untouched(zarr.config.config))
    with store._default_settings():
        pass


@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8", "float64", "bool", "complex64", "complex128"])
def test_arrays_of_the_user_pass_through_zarrs_own_codecs_and_the_bounded_one(dtype: str, tmp_path: Path) -> None:
    values = (make_values((40, 8)) / 7).astype(dtype)
    ours, zarrs = [store.BoundedZstd(level=-1), Crc32cCodec()], [ZstdCodec(level=3)]
    for name, shards, codecs in (("a", None, zarrs), ("b", (20, 8), zarrs), ("c", (20, 8), ours)):
        path = tmp_path / f"{name}.zarr"
        written = zarr.create_array(path, data=values, chunks=(10, 8), shards=shards, compressors=codecs)
        opened = zarr.open_array(path, mode="r")
        assert np.array_equal(written[...], values)
        assert np.array_equal(opened[...], values)
        assert type(opened.compressors[0]) is ZstdCodec
    assert zarr.registry.get_codec_class("zstd") is ZstdCodec
