"""What once went wrong with images of the user's own: lost, overlooked, misread, or ended in a traceback."""

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from PIL import Image
from ruamel.yaml import YAML
from torchvision import datasets
from torchvision.datasets.utils import verify_str_arg

from pipeline import verification
from pipeline.commands import main
from pipeline.data import own, pictures, preparing, seeding, store
from pipeline.data.datasets import Own
from pipeline.runtime import layout
from pipeline.runtime.engine import LocalProcesses
from pipeline.runtime.errors import PipelineError
from tests.conftest import ROOT, WriteParams, pasted, tree

SIZE = (6, 8)
Place = Callable[..., None]


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: None, tiny_values: dict[str, Any],
    write_params: WriteParams,
) -> Place:  # fmt: skip
    """Makes the current folder a study of one data set of ours, from the source given."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def write(path: Path | str, kind: str = "npz", name: str = "photos", **changes: Any) -> None:
        source = {"kind": kind, "path": str(path), "size": list(SIZE), "channels": 1, "test_share": None, **changes}
        tiny_values["datasets"] = {name: {"source": source, "n_train": 2, "n_test": 2}}
        for recipes in (tiny_values["train"]["recipes"], tiny_values["strategies"]["transfer"]["recipes"]):
            recipe = next(iter(recipes.values()))
            recipes.clear()
            recipes[name] = {**recipe, "batch_size": 2}
        tiny_values["train"]["recipes"][name]["network"]["convolutions"][0].update(stride=1, pool=1)
        for perturbation, levels in tiny_values["perturbations"].items():
            levels.update(train_levels=[1.0], test_levels=[1.0])
            tiny_values["evaluate"]["levels"][perturbation] = [1.0]
        write_params(tiny_values)

    return write


def npz(path: Path, n: int = 30, **changes: Any) -> Path:
    values, labels = np.random.default_rng(n).integers(0, 256, (n, *SIZE), dtype=np.uint8), np.arange(n) % 2
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **{"x_train": values, "y_train": labels, "x_test": values, "y_test": labels, **changes})
    return path


def foreign(path: Path, zarr_format: Any = 3, **attributes: Any) -> Path:
    root = zarr.create_group(path, attributes=attributes, zarr_format=zarr_format)
    for split in ("train", "test"):
        root.create_array(f"{split}/images", data=np.ones((6, *SIZE), np.uint8), chunks=(2, *SIZE))
        root.create_array(f"{split}/labels", data=np.arange(6) % 2)
    return path


def folder(path: Path, *files: str) -> Path:
    for number, name in enumerate(files):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(path / name)
    return path


TWO = [f"{name}/{i}.png" for name in "ab" for i in range(12)]
SPLIT = [f"{split}/{file}" for split in ("train", "test") for file in TWO]


def ran(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.output


def refused(*arguments: str | Path) -> str:
    return ran(*arguments, status=1).strip().splitlines()[-1]


def whole(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes | None]:
    """The clean stores of a source, in six shards of 20 images, as a run without an interruption leaves them."""
    for module, name in ((seeding, "BLOCK_BYTES"), (store, "CHUNK_BYTES"), (store, "SHARD_BYTES")):
        monkeypatch.setattr(module, name, 20 * SIZE[0] * SIZE[1])
    place(npz(tmp_path / "a.npz", 110))
    ran("prepare", "photos")
    return tree(Path("data/clean"))


@pytest.mark.parametrize(
    "file",
    [
        *("zarr.json", "train/zarr.json", "train/images/zarr.json", "train/images/c.1.0.0.0", "test/images/c.0.0.0.0"),
        *("train/images/c.5.0.0.0", "train/labels/c.0", "train/images/c.1.0.0.0123456789abcdef.partial"),
    ],
)
@pytest.mark.parametrize("part", [0, 2])
def test_whatever_is_left_of_a_store_it_is_finished_as_if_nothing_had_happened(
    file: str, part: int, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(place, tmp_path, monkeypatch)
    written, write = [], preparing._write

    def limited(*arguments: Any) -> int:
        written.append(arguments)
        if len(written) == 9:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(preparing, "_write", limited)
    with pytest.raises(click.Abort):
        CliRunner().invoke(main, ["prepare", "photos"], catch_exceptions=False, standalone_mode=False)
    path = Path("data/clean/.photos.zarr.partial", file)
    content = path.read_bytes() if path.exists() else b""
    path.write_bytes(content[: len(content) * part // 4])
    ran("prepare", "photos")
    assert tree(Path("data/clean")) == expected


def test_an_empty_shard_and_a_file_too_many_are_noticed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(place, tmp_path, monkeypatch)
    path = layout.clean_store("photos") / "train/images"
    (path / "c.1.0.0.0123456789abcdef.partial").touch()
    _, findings = verification.verify_clean(store.read_facts("photos"), lambda n: None)
    assert ["does not belong there" in finding.text for finding in findings] == [True]
    (path / "c.1.0.0.0").write_bytes(b"")
    with pytest.raises(PipelineError, match=r"train/images: 1 shard\(s\) are missing"):
        store.read_facts("photos")


OVERLAPS, OVERLOOKED = ", which stages write; move what is yours elsewhere", ": DVC would not see what changes there"
PATHS = {
    "data/clean/photos.zarr": OVERLAPS, "data/perturbed/mine": OVERLAPS, "data": OVERLAPS, ".": OVERLAPS,
    "data/../models/mine": OVERLAPS, "link": OVERLAPS, "docs/mine": OVERLOOKED, "data/downloads/link": OVERLOOKED,
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_stages_write_or_dvc_overlooks_are_refused(path: str, place: Place, tiny_values: Any) -> None:
    for made in ("docs/mine", "data/downloads", "metrics/mine", "../mine"):
        Path(made).mkdir(parents=True)
    for link in ("link", "data/downloads/link"):
        Path(link).symlink_to(Path("metrics/mine" if link == "link" else "../mine").resolve())
    Path(".dvcignore").write_text((ROOT / ".dvcignore").read_text())
    place(path, "folder")
    assert f"datasets.photos.source.path: '{path}' " in (line := refused("check"))
    assert PATHS[path] in line
    preprocessing = {"channels": "rgb", "size": None, "scale": 255.0, "mean": [0.0], "std": [1.0], "classes": None}
    mine = {"dataset": "photos", "kind": "onnx", "path": path, "architecture": None, **preprocessing}
    tiny_values["models"] = {"mine": mine}
    place("../photos")
    assert f"models.mine.path: '{path}' " in refused("check")


def spoiled(path: Path, name: bytes, make: Callable[[str], object]) -> Path:
    make(os.fsdecode(bytes(path) + b"/" + name))
    return path


def renamed(path: str) -> None:
    os.renames(f"{Path(path).parent}/a", path)


def linked(to: str) -> Callable[[str], None]:
    return lambda path: Path(path).symlink_to(to)


def touched(path: str) -> None:
    Path(path).touch()


EVEN = np.arange(30) % 2
EMPTY: dict[str, Any] = {"x_train": np.empty((0, *SIZE), np.uint8), "y_train": np.empty(0, int)}
REFUSED: list[tuple[Callable[[Path], Path], str]] = [
    (lambda p: spoiled(folder(p, *TWO), b"c", linked("a")), "c: a link to a folder; DVC would not see what changes"),
    (lambda p: spoiled(folder(p, *TWO), b"a/c", linked("../b")), "a/c: a link to a folder; DVC would not see"),
    (lambda p: spoiled(folder(p, *TWO), b"c", linked("nowhere")), "c: a link to nowhere"),
    (lambda p: spoiled(folder(p, *SPLIT), b"val", linked("nowhere")), "val: a link to nowhere"),
    (lambda p: spoiled(folder(p, *TWO), b"c\xff", renamed), "is not a valid class name; rename it"),
    (lambda p: spoiled(folder(p, *TWO), b"c.bak", renamed), ".dvcignore names *.bak: DVC would not see"),
    (lambda p: spoiled(folder(p, *TWO), b"a/x.heic", touched), "x.heic: not a PNG, JPEG or WebP; convert it"),
    (lambda p: folder(p, *SPLIT, "Train/a/1.png"), "has Train, test, train; join them, or, if these are classes, re"),
    (lambda p: folder(p, *SPLIT, "samples/1.png"), "has test, train; move samples elsewhere, or, if these are cl"),
    (lambda p: folder(p, *SPLIT[:24], "valid/a/1.png", "c/1.png"), "has train, valid; move c elsewhere"),
    (lambda p: npz(p.with_suffix(".npz"), **EMPTY), "y_train: no images"),
    (lambda p: npz(p.with_suffix(".npz"), 0), "y_train: no images"),
    (lambda p: foreign(p.with_suffix(".zarr"), classes=["a", "a"]), "'a' names 2 classes; rename it"),
    (lambda p: foreign(p.with_suffix(".zarr"), classes=["a", ""]), "'' is not a valid class name; rename it"),
    (lambda p: foreign(p.with_suffix(".zarr"), classes=["a", "\x1b[2J"]), r"'\x1b[2J' is not a valid class name"),
    (lambda p: foreign(p.with_suffix(".zarr"), classes=["a", "b" * 2**22]), "the names of 2 classes are too long"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_nothing_is_dropped_mixed_or_overlooked(make: Callable[[Path], Path], reason: str, place: Place) -> None:
    path = make(Path("data/mine"))
    Path(".dvcignore").write_text("*.bak\n")
    has_split = path.suffix or (path / "train").exists()
    place(path, path.suffix[1:] or "folder", test_share=None if has_split else 0.3)
    assert reason in refused("prepare", "photos")
    assert reason in refused("describe", path)


@pytest.mark.parametrize("value", [True, 3.0, "npz"])
def test_params_take_no_number_for_another_and_no_folder_for_a_file(value: Any, place: Place) -> None:
    place(folder(Path("mine"), *TWO), *(["npz"] if value == "npz" else ["folder", "photos"]))
    if value == "npz":
        assert "datasets.photos.source.path: 'mine' is a folder; name a file" in refused("check")
    else:
        place("mine", "folder", channels=value)
        assert f"source.channels: unknown {value!r}; choose from 1 or 3" in refused("check")


def lost(path: Path) -> Path:
    (path / "train/images/c/1/0/0").unlink()
    return path


LEFT_OUT: list[tuple[Callable[[Path], Path], str]] = [
    (lambda p: npz(p.with_suffix(".npz"), val_images=EVEN, notes=EVEN), "notes, val_images: not used"),
    (lambda p: lost(foreign(p.with_suffix(".zarr"))), "train/images: 1 chunk(s) not in the store are read as its fill"),
    (lambda p: spoiled(folder(p, *TWO), b"a/x.\x1b[2J", touched), r"are no pictures are left out (1 .\x1b[2j)"),
    (lambda p: spoiled(folder(p, *TWO), b"a/x.pdf", touched), "1 file(s) that are no pictures are left out (1 .pdf)"),
]


@pytest.mark.parametrize(("make", "remark"), LEFT_OUT, ids=[remark for _, remark in LEFT_OUT])
def test_what_is_left_out_is_said(make: Callable[[Path], Path], remark: str, place: Place) -> None:
    path = make(Path("mine"))
    place(path, path.suffix[1:] or "folder", test_share=None if path.suffix else 0.3)
    said = ran("describe", path) + ran("prepare", "photos")
    assert said.count(remark) == 2
    assert "\x1b" not in said


def test_labels_of_any_width_are_whole_numbers(place: Place) -> None:
    place(npz(Path("a.npz"), y_train=EVEN.astype(np.uint64) + 2**53, y_test=EVEN + 2**53))
    ran("prepare", "photos")
    assert store.read_facts("photos").classes == (str(2**53), str(2**53 + 1))


def test_as_many_classes_as_are_promised_are_prepared(place: Place) -> None:
    images, labels = np.zeros((65_535, 1, 1), np.uint8), np.arange(100_000, 165_535)
    place(npz(Path("a.npz"), x_train=images, y_train=labels, x_test=images, y_test=labels))
    ran("prepare", "photos")
    assert len(store.read_facts("photos").classes) == 65_535


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_every_class_has_an_image_to_train_on(kind: str, place: Place) -> None:
    n, share, path = 40, 0.6, Path(f"a.{kind}")
    keys = [[f"{i:02}/0.png", f"{i:02}/1.png"] if kind == "folder" else [str(i), str(i + n)] for i in range(n)]
    if kind == "npz":
        np.savez(path, images=np.zeros((2 * n, *SIZE), np.uint8), labels=np.arange(2 * n) % n)
    else:
        folder(path, *(key for of_class in keys for key in of_class))
    place(path, kind, test_share=share)
    ran("prepare", "photos")
    n_test = np.array([sum(own.belongs_to_test(key, share) for key in of_class) for of_class in keys])
    assert n_test.max() == 2
    labels = store.read_clean(store.read_facts("photos"), "test", "labels")
    assert np.bincount(labels, minlength=n).tolist() == np.minimum(n_test, 1).tolist()


class Pets(datasets.VisionDataset):  # type: ignore[misc]
    """Two images of one mean colour in the splits of OxfordIIITPet; a download would be an error."""

    def __init__(self, root: str, split: str = "trainval", download: bool = True) -> None:
        super().__init__(root)
        verify_str_arg(split, "split", ("trainval", "test"))
        assert not download

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return Image.fromarray(np.array([[100, 120]] if i else [[120, 100]], np.uint8).repeat(3, 0)), i


class Damaged(Pets):
    """Nine images a split, of which some cannot be read."""

    targets = tuple(i % 2 for i in range(9))

    def __len__(self) -> int:
        return 9

    def __getitem__(self, i: int) -> tuple[Any, int]:
        if i in (2, 3, 8):
            raise OSError(f"truncated {i}")
        return super().__getitem__(i % 2)[0], i % 2


class Whole(Damaged):
    """The same without a split."""

    def __init__(self, root: str) -> None:
        super().__init__(root, download=False)


class Unlabelled(Damaged):
    """The same; the label of an image comes with it alone."""

    targets = ()


@pytest.mark.parametrize("kind", [Damaged, Whole, Unlabelled])
def test_every_image_that_torchvision_cannot_read_is_listed(
    kind: type, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, kind.__name__, kind, raising=False)
    Path("pets").mkdir()
    said = ran("describe", "pets", "--torchvision", kind.__name__, status=1)
    n_times = 2 if kind is Damaged else 1  # in training and in test images, or not known in which
    for i in (2, 3, 8):
        assert said.count(f"image {i} of {kind.__name__} cannot be read: truncated {i}") == n_times
    assert said.count("cannot be used: ") == (0 if kind is Unlabelled else 3 * n_times)
    share = 0.2 if kind is Whole else None
    place("pets", "torchvision", dataset=kind.__name__, test_share=share)
    assert f"of {kind.__name__} cannot be read: truncated " in refused("prepare", "photos")


TORCHVISION: dict[str, tuple[type, str]] = {
    "Pets": (Pets, "sizes, height x width: 3x2 (4)\n"),
    "EMNIST": (datasets.EMNIST, "no training and test set among its splits (Unknown value"),
    "FakeData": (datasets.FakeData, "has no class 'FakeData'; name one such as SVHN"),
    "VisionDataset": (datasets.VisionDataset, "has no class 'VisionDataset'; name one such as SVHN"),
    "Ragged": (type("Ragged", (Pets,), {"targets": [[1], [1, 2]]}), "cannot read it as Ragged: setting an array"),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_is_asked_for_what_it_has(name: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, name, TORCHVISION[name][0], raising=False)
    Path("pets").mkdir()
    said = ran("describe", "pets", "--torchvision", name, status=int(name != "Pets"))
    assert TORCHVISION[name][1] in said
    assert "repeat" not in said  # as two images averaged to one pixel did


@pytest.mark.parametrize("name", ["My-Photos", "mnist", "a b", "x" * 61])
def test_describe_refuses_names_that_check_would(name: str, place: Place) -> None:
    assert f"datasets.{name}: " in refused("describe", folder(Path("mine"), *TWO), "--name", name)


@pytest.mark.parametrize(("name", "size"), [("null", (6, 8)), ("2024", (6, 8)), ("photos", (7, 4200))])
def test_describe_prints_a_block_that_check_accepts(
    name: str, size: tuple[int, int], place: Place, tiny_values: dict[str, Any], write_params: WriteParams
) -> None:
    path = folder(Path("~mine"), *TWO)
    for file in path.rglob("*.png"):
        Image.open(file).resize(size[::-1]).save(file)
    place("../photos", name=name)
    block = YAML(typ="safe", pure=True).load(ran("describe", path, "--name", name).split("For params.yaml:")[1])
    write_params(pasted(tiny_values, block))
    ran("check")


def fitted_whole(image: Any, size: tuple[int, int]) -> Any:
    height, width = image.shape[:2]
    scale = max(size[0] / height, size[1] / width)
    scaled = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    resized = cv2.resize(image, scaled[::-1], interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return resized[top : top + size[0], left : left + size[1]]


def test_a_strip_of_many_pixels_is_cut_before_it_is_resized_and_no_ordinary_picture() -> None:
    for shape in ((30, 40, 3), (5, 70, 3), (97, 7, 3), (3, 3, 3), (301, 200, 3)):
        image = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        for size in ((24, 24), (7, 50), (64, 48)):
            assert np.array_equal(pictures.fit(image, size), fitted_whole(image, size))
    strip = np.zeros((1, 16_000, 1), np.uint8)
    strip[:, 7_900:8_100] = 7
    tracemalloc.start()
    assert (pictures.fit(strip, (224, 224)) == 7).all()
    assert (pictures.fit(strip.transpose(1, 0, 2), (8, 224)) == 7).all()
    assert tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()


def test_what_pillow_can_make_up_for_it_does_in_silence(tmp_path: Path) -> None:
    Image.new("L", (8, 6)).save(tmp_path / "x.jfif", "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")
    assert pictures.read_picture(tmp_path / "x.jfif", 3).shape == (6, 8, 3)
    assert ".jfif" in pictures.FORMATS


def test_the_metadata_of_a_store_of_version_2_are_part_of_what_decides(tmp_path: Path) -> None:
    path = foreign(tmp_path / "a.zarr", 2)
    source = Own(kind="zarr", path=str(path), size=SIZE, channels=1, test_share=None)
    before = own.open_source(source, LocalProcesses(1)).fingerprint
    os.utime(path / "train/images/.zarray", (1, 1))
    assert own.open_source(source, LocalProcesses(1)).fingerprint != before
