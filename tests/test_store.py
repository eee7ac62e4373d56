"""Stores open with plain zarr, are a few dozen files, and tell when they are damaged."""

import asyncio
import copy
import errno
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.abc.buffer import Buffer
from zarr.abc.store import RangeByteRequest
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import _local

from pipeline.data import seeding, store
from pipeline.runtime.errors import PipelineError
from tests.conftest import command_environment, tree
from tests.test_properties import examples


def write(path: Path, values: np.ndarray) -> None:
    with store.replacing_store(path, {"dataset": "mnist"}) as root:
        array = store.create_images(root, "images", values.shape, {"level": 3})
        for region in store.shard_regions(array):
            array[region] = values[region]
        store.finish(array, store.sha256(values))


def make_values(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    "shape",
    [(1230, 28, 28, 1), (3, 620, 28, 28, 1), (2, 7, 4, 4, 3), (1, 32, 32, 3), (30, 1000, 4, 4, 1)],
    ids=str,
)
def test_what_is_written_is_read_by_plain_zarr(shape: tuple[int, ...], tmp_path: Path) -> None:
    values = make_values(shape)
    write(tmp_path / "a.zarr", values)
    array = zarr.open_group(tmp_path / "a.zarr", mode="r")["images"]
    assert isinstance(array, zarr.Array)
    assert np.array_equal(np.asarray(array[...]), values)
    assert array.attrs["sha256"] == store.sha256(values)
    assert array.metadata.zarr_format == 3
    assert array.shards is not None


def test_shards_tile_the_array_in_c_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "images_per_chunk", lambda image_bytes: 500)
    monkeypatch.setattr(store, "SHARD_BYTES", 1000 * 16)
    for shape in ((3, 2300, 4, 4, 1), (5, 400, 4, 4, 1), (2600, 4, 4, 1)):
        with store.replacing_store(tmp_path / "b.zarr", {}) as root:
            array = store.create_images(root, "images", shape, {})
            regions = list(store.shard_regions(array))
        assert len(regions) > 1
        values = make_values(shape)
        pieces = [values[region].ravel() for region in regions]
        assert np.array_equal(np.concatenate(pieces), values.ravel())


def test_a_failed_write_leaves_nothing_though_others_are_still_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = _local._put

    def fail_or_be_slow(path: Path, value: Buffer, exclusive: bool = False) -> int:
        if path.parent.name == "images":
            raise OSError(errno.ENOSPC, "No space left on device")
        time.sleep(0.2)
        return put(path, value, exclusive)

    monkeypatch.setattr(_local, "_put", fail_or_be_slow)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "f.zarr", make_values((10, 4, 4, 1)))
    time.sleep(0.5)  # for what was not waited for
    assert list(tmp_path.iterdir()) == []


def test_a_full_size_store_is_dozens_of_files_not_thousands(tmp_path: Path) -> None:
    with store.replacing_store(tmp_path / "c.zarr", {}) as root:
        for shape in ((50_000, 32, 32, 3), (25, 10_000, 32, 32, 3), (25, 10_000, 28, 28, 1)):
            array = store.create_images(root, str(shape), shape, {})
            assert 1 <= sum(1 for _ in store.shard_regions(array)) <= 25


def read(path: Path) -> np.ndarray:
    return store.read(store.get_array(store.open_store(path, "x"), "images", "x"), "x")


def flip(file: Path, content: bytes, bit: int) -> None:
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    file.write_bytes(flipped)


def test_every_flipped_bit_in_a_shard_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "images_per_chunk", lambda image_bytes: 500)
    path = tmp_path / "a.zarr"
    values = make_values((700, 8, 8, 1))
    write(path, values)
    file = next(path.rglob("c.*"))
    content = file.read_bytes()
    n_bits, n_index_bits = 8 * len(content), 8 * (2 * 16 + 4)  # offset and size of two chunks, and a checksum
    drawn = np.random.default_rng(1).choice(n_bits - n_index_bits, 500, replace=False)
    for bit in [*drawn.tolist(), *range(n_bits - n_index_bits, n_bits)]:
        flip(file, content, bit)
        with pytest.raises(PipelineError, match="damaged data"):
            read(path)
    file.write_bytes(content)
    assert np.array_equal(read(path), values)


@pytest.mark.parametrize("digest", [None, 3])
def test_an_array_without_a_digest_is_damaged(digest: int | None, tmp_path: Path) -> None:
    write(tmp_path / "a.zarr", make_values((5, 8, 8, 1)))
    array = zarr.open_group(tmp_path / "a.zarr", mode="r+")["images"]
    array.attrs["sha256"] = digest
    with pytest.raises(PipelineError, match="images: damaged metadata"):
        read(tmp_path / "a.zarr")


def write_half(path: Path) -> None:
    with store.replacing_store(path, {}) as root:
        store.create_labels(root, "labels", np.zeros(3, np.uint8))
        raise RuntimeError


def test_an_error_while_writing_leaves_the_previous_store(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    write(path, make_values((40, 8, 8, 1)))
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(RuntimeError):
        write_half(path)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.zarr"]


# Images of every size.

# The layouts of the first release: shape to images (and trials) per chunk and per shard.
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
    image = shape[-3:]
    assert (array.chunks, array.shards) == ((*layout[0], *image), (*layout[1], *image))


sides, counts = (
    st.one_of(st.integers(1, 40), st.integers(1, 9000)),
    st.one_of(st.integers(1, 3000), st.integers(1, 10**6)),
)


@examples(200)
@given(st.tuples(sides, sides, st.sampled_from([1, 2, 3, 4])), counts, st.one_of(st.none(), st.integers(1, 30)))
def test_a_layout_of_any_shape_is_bounded_and_accepted(image: tuple[int, ...], n: int, trials: int | None) -> None:
    shape = (n, *image) if trials is None else (trials, n, *image)
    array = store.create_images(zarr.create_group({}), "test", shape, {"sha256": "0"})
    assert array.shards is not None
    *_, shard_images, _, _, _ = array.shards
    *_, chunk_images, _, _, _ = array.chunks
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
        ours, _ = store._as_we_write(array, Path())
        assert (ours.shape, ours.chunks, ours.shards) == (shape, array.chunks, array.shards)


SIZES = [
    *((1230, 1, 1, 1), (2, 620, 1, 1, 1), (120, 211, 211, 3), (120, 212, 212, 3), (2, 130, 224, 224, 3)),
    *((90, 600, 400, 3), (11, 1500, 1500, 3), (2, 3, 1500, 1500, 3), (2, 5000, 5000, 3), (3, 300, 105, 105, 3)),
]


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_images_of_every_size_are_read_back(shape: tuple[int, ...], tmp_path: Path) -> None:
    values = make_values(shape)
    write(tmp_path / "a.zarr", values)
    array = store.get_array(store.open_store(tmp_path / "a.zarr", "x"), "images", "x")
    assert np.array_equal(store.read(array, "x"), values)
    if len(shape) == 5:
        for found, wanted in zip(store.read_trials(array, "x"), values, strict=True):
            assert np.array_equal(found, wanted)
    last = (..., slice(-1, None), slice(None), slice(None), slice(None))
    assert np.array_equal(store.read_part(array, last, "x"), values[last])
    assert np.array_equal(zarr.open_array(tmp_path / "a.zarr", path="images", mode="r")[...], values)


# What is not a file, and what is too large for one.


def test_the_store_that_zarr_reads_from_looks_before_it_opens_in_every_way(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"0123456789")
    folder, prototype = store.BoundedStore(tmp_path, max_bytes=10), zarr.core.buffer.default_buffer_prototype()
    middle = RangeByteRequest(2, 4)

    async def read_partially(key: str, part: RangeByteRequest | None) -> Buffer | None:
        return (await folder.get_partial_values(prototype, [(key, part)]))[0]

    ways: list[Callable[[str, RangeByteRequest | None], Buffer | None]] = [
        lambda key, part: folder.get_sync(key, prototype=prototype, byte_range=part),
        lambda key, part: asyncio.run(folder.get(key, prototype, part)),
        lambda key, part: asyncio.run(read_partially(key, part)),
    ]
    (tmp_path / "huge").write_bytes(bytes(11))
    for read in ways:
        assert [read("file", part).to_bytes() for part in (None, middle)] == [b"0123456789", b"23"]  # type: ignore[union-attr]
        assert [read("none", part) for part in (None, middle)] == [None, None]
        for key, said in (
            ("pipe", "a pipe, socket or device"),
            ("huge", "11 bytes, more than the 10"),
            (".", "a folder"),
        ):
            for part in (None, middle):
                with pytest.raises(PipelineError, match=said):
                    read(key, part)


def test_a_shard_as_large_as_can_be_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    """Values that do not compress: what zstd, checksums and the index add is within the bound."""
    for shape in ((1, 1, 1, 1), (7, 3, 3, 1), (2100, 28, 28, 1), (900, 32, 32, 3)):
        write(tmp_path / "a.zarr", make_values(shape))
        array = store.get_array(store.open_store(tmp_path / "a.zarr", "x"), "images", "x")
        assert isinstance(array.store, store.BoundedStore)
        shard = tmp_path / "a.zarr/images/c.0.0.0.0"
        assert shard.stat().st_size <= array.store.max_bytes < 1.05 * math.prod(array.shards or ()) + 200
        with shard.open("ab") as file:
            file.truncate(array.store.max_bytes + 1)
        with pytest.raises(PipelineError, match="bytes, more than the"):
            store.read(array, "x")


# xarray wants one length per name and group.


def test_dimensions_have_names_and_one_length_within_a_group(tmp_path: Path) -> None:
    with store.replacing_store(tmp_path / "a.zarr", {}) as root:
        level = root.create_group("0.05")
        store.create_images(level, "train", (9, 4, 4, 1), {})
        store.create_images(level, "test", (2, 7, 4, 4, 1), {})
        clean = root.create_group("train")
        store.create_images(clean, "images", (9, 4, 4, 1), {})
        store.create_labels(clean, "labels", np.zeros(9, np.uint8))
    named = {}
    for name in ("0.05", "train"):
        group = zarr.open_group(tmp_path / "a.zarr", path=name, mode="r")
        sizes: set[tuple[Any, int]] = set()
        for key, array in group.arrays():
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


# Whatever zarr is set to.

CODECS = ("zstd", "bytes", "crc32c", "sharding_indexed")
USERS_SETTINGS: dict[str, Any] = {
    "codec_pipeline.path": "none.Such",
    "codec_pipeline.batch_size": 7,
    "codec_pipeline": "x",
    **{f"codecs.{name}": "none.Such" for name in CODECS},
    "codecs": "x",
    "array.write_empty_chunks": True,
    "array.order": "F",
    "array.target_shard_size_bytes": 1000,
    "array": "x",
    "default_zarr_format": 2,
    "json_indent": None,
    "buffer": "none.Such",
    "ndbuffer": "none.Such",
    "async.concurrency": 1,
    "async.timeout": 1e-9,
    "async": "x",
    "threading.max_workers": "x",
    "threading": "x",
}


def write_and_read(path: Path) -> dict[str, bytes | None]:
    """The files of a store with black images, which is read too."""
    values = make_values((2, 1100, 28, 28, 1))
    values[:, 500:] = 0
    with store.replacing_store(path, {"dataset": "mnist"}) as root:
        group = root.require_group("0.05")
        array = store.create_images(group, "test", values.shape, {"level": 3})
        for region in store.shard_regions(array):
            array[region] = values[region]
        store.finish(array, store.sha256(values))
        store.create_labels(root.create_group("train"), "labels", np.arange(9, dtype=np.uint8))
    for name, expected in (("0.05/test", values), ("train/labels", np.arange(9))):
        array = store.get_array(store.open_store(path, "x"), name, "x")
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
        if "." in key or key not in ("codec_pipeline", "codecs", "array", "async", "threading")
    }
    code = "import sys; from pathlib import Path; from tests.test_store import *; write_and_read(Path(sys.argv[1]))"
    for name, environment in (("a", {}), ("b", variables)):
        command = [sys.executable, "-c", code, str(tmp_path / f"{name}.zarr")]
        subprocess.run(command, env=command_environment() | environment, check=True)
    assert tree(tmp_path / "a.zarr") == tree(tmp_path / "b.zarr")


def test_threads_that_overlap_leave_the_settings_as_they_were(tmp_path: Path) -> None:
    write(tmp_path / "a.zarr", make_values((5, 8, 8, 1)))
    with zarr.config.set({"async.concurrency": 7, "array.order": "F"}):
        before = copy.deepcopy(zarr.config.config)
        entered = [threading.Event(), threading.Event()]

        def hold(number: int) -> None:
            """The first begins first and ends first, which a stack of settings cannot undo in order."""
            with store._default_settings():
                entered[number].set()
                entered[1].wait(5)
                if number == 1:
                    first.join(5)
                seen.append(zarr.config.get("async.concurrency"))

        seen: list[int] = []
        first, second = (threading.Thread(target=hold, args=(number,)) for number in range(2))
        first.start()
        entered[0].wait(5)
        second.start()
        for thread in (first, second):
            thread.join(5)
        assert seen == [10, 10]
        assert zarr.config.config == before
        threads = [threading.Thread(target=lambda: [read(tmp_path / "a.zarr") for _ in range(20)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert zarr.config.config == before
    with pytest.raises(PipelineError):
        read(tmp_path / "none.zarr")
    assert zarr.config.get("async.concurrency") == 10


def test_a_setting_made_meanwhile_stays() -> None:
    with zarr.config.set({"array.order": "F"}):
        with store._default_settings():
            assert zarr.config.get("array.order") == "C"
            zarr.config.set({"async.concurrency": 5})
        assert zarr.config.get("array.order") == "F"
        assert zarr.config.get("async.concurrency") == 5
        with store._default_settings():
            assert zarr.config.get("async.concurrency") == 10
        zarr.config.set({"async.concurrency": 10})


def test_settings_are_not_touched_where_they_are_zarrs_defaults() -> None:
    class Untouched(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            raise AssertionError(key)

    before = zarr.config.config
    zarr.config.config = Untouched(before)
    try:
        with store._default_settings():
            pass
    finally:
        zarr.config.config = before


@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8", "float64", "bool", "complex64"])
def test_arrays_of_the_user_are_written_and_read_by_zarrs_own_codecs(dtype: str, tmp_path: Path) -> None:
    values = (make_values((40, 8)) / 7).astype(dtype)
    for shards in (None, (20, 8)):
        path = tmp_path / f"{shards}.zarr"
        codecs = [ZstdCodec(level=3)]
        zarr.create_array(path, data=values, chunks=(10, 8), shards=shards, compressors=codecs)
        array = zarr.open_array(path, mode="r")
        assert np.array_equal(array[...], values)
        assert {type(codec) for codec in array.compressors} == {ZstdCodec}
    assert zarr.registry.get_codec_class("zstd") is ZstdCodec


@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8", "complex128", "bool"])
def test_the_bounded_codec_has_room_for_values_of_any_size(dtype: str, tmp_path: Path) -> None:
    values = (make_values((40, 8)) / 7).astype(dtype)
    array = zarr.create_array(
        tmp_path / "a.zarr",
        data=values,
        chunks=(10, 8),
        shards=(20, 8),
        serializer=BytesCodec(),
        compressors=[store.BoundedZstd(level=1), Crc32cCodec()],
    )
    assert np.array_equal(array[...], values)
    assert np.array_equal(zarr.open_array(tmp_path / "a.zarr", mode="r")[...], values)
