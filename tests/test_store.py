"""Stores open with plain zarr, are a few dozen files, and tell when they are damaged."""

import errno
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.abc.buffer import Buffer
from zarr.storage import _local

from pipeline import store
from pipeline.errors import PipelineError


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


def delete_shard(path: Path) -> None:
    next(file for file in path.rglob("c/**/*") if file.is_file()).unlink()


def truncate_shard(path: Path) -> None:
    file = next(file for file in path.rglob("c/**/*") if file.is_file())
    file.write_bytes(file.read_bytes()[:-100])


def empty_shard(path: Path) -> None:
    next(file for file in path.rglob("c/**/*") if file.is_file()).write_bytes(b"")


def break_metadata(path: Path) -> None:
    (path / "images" / "zarr.json").write_text("{")


def break_root(path: Path) -> None:
    (path / "zarr.json").write_text("[]")


def delete_array(path: Path) -> None:
    (path / "images" / "zarr.json").unlink()


def change_version(path: Path) -> None:
    file = path / "zarr.json"
    file.write_text(file.read_text().replace('"schema_version": 2', '"schema_version": 0'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (delete_shard, "1 shard"),
        (truncate_shard, "damaged data"),
        (empty_shard, "damaged data"),
        (break_metadata, "images"),
        (break_root, "damaged metadata"),
        (delete_array, "not in the store"),
        (change_version, "schema version 0"),
    ],
)
def test_damage_is_one_clear_error(damage: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    write(path, make_values((700, 8, 8, 1)))
    assert callable(damage)
    damage(path)
    with pytest.raises(PipelineError, match=message) as caught:
        store.read(store.get_array(store.open_store(path, "make it"), "images", "make it"), "make it")
    assert str(path) in str(caught.value)
    assert "make it" in str(caught.value)


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
    file = next(file for file in path.rglob("c/**/*") if file.is_file())
    content = file.read_bytes()
    n_bits, n_index_bits = 8 * len(content), 8 * (2 * 16 + 4)  # offset and size of two chunks, and a checksum
    drawn = np.random.default_rng(1).choice(n_bits - n_index_bits, 500, replace=False)
    for bit in [*drawn.tolist(), *range(n_bits - n_index_bits, n_bits)]:
        flip(file, content, bit)
        with pytest.raises(PipelineError, match="damaged data"):
            read(path)
    file.write_bytes(content)
    assert np.array_equal(read(path), values)


@pytest.mark.filterwarnings("ignore")  # zarr warns of some, which only says so the sooner
@pytest.mark.parametrize("name", ["zarr.json", "images/zarr.json"])
def test_a_flipped_bit_in_the_metadata_never_gives_other_images(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    values = make_values((700, 8, 8, 1))
    write(path, values)
    content = (path / name).read_bytes()
    n_detected = 0
    bits = np.random.default_rng(1).permutation(8 * len(content))[:500].tolist()
    for bit in bits:
        flip(path / name, content, bit)
        try:
            assert np.array_equal(read(path), values), bit
        except PipelineError:
            n_detected += 1
    assert n_detected > len(bits) / 2  # the others are spaces, and attributes that nothing here looks at


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
