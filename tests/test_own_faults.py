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
from torchvision.datasets import VisionDataset
from torchvision.datasets.utils import verify_str_arg

from pipeline import verification
from pipeline.commands import main
from pipeline.data import own, pictures, preparing, seeding, store
from pipeline.data.datasets import Own
from pipeline.runtime import layout
from pipeline.runtime.engine import LocalProcesses
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import read_file
from tests.conftest import ROOT, WriteParams, tree

SIZE = (6, 8)
PARTIAL = Path("data/clean/.photos.zarr.partial")
Place = Callable[..., None]


@pytest.fixture
def place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_process: None,
    tiny_values: dict[str, Any],
    write_params: WriteParams,
) -> Place:
    """Makes the current folder a study of one data set of ours, `photos`, from the source given."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def write(path: Path | str, kind: str = "npz", **changes: Any) -> None:
        source = {"kind": kind, "path": str(path), "size": list(SIZE), "channels": 1, "test_share": None, **changes}
        tiny_values["datasets"] = {"photos": {"source": source, "n_train": 2, "n_test": 2}}
        for recipes in (tiny_values["train"]["recipes"], tiny_values["strategies"]["transfer"]["recipes"]):
            recipe = next(iter(recipes.values()))
            recipes.clear()
            recipes["photos"] = {**recipe, "batch_size": 2}
        convolution = tiny_values["train"]["recipes"]["photos"]["network"]["convolutions"][0]
        convolution.update(stride=1, pool=1)
        for name, levels in tiny_values["perturbations"].items():
            levels.update(train_levels=[1.0], test_levels=[1.0])
            tiny_values["evaluate"]["levels"][name] = [1.0]
        write_params(tiny_values)

    return write


def npz(path: Path, n: int = 30, **changes: Any) -> Path:
    values = np.random.default_rng(n).integers(0, 256, (n, *SIZE), dtype=np.uint8)
    arrays = {"x_train": values, "y_train": np.arange(n) % 2, "x_test": values, "y_test": np.arange(n) % 2}
    np.savez(path, **{**arrays, **changes})
    return path


def folder(path: Path, *files: str) -> Path:
    """Pictures, all different, at these paths in a folder."""
    for number, name in enumerate(files):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(values).save(path / name)
    return path


def classes(*names: str, n: int = 12) -> list[str]:
    return [f"{name}/{i}.png" for name in names for i in range(n)]


def ran(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.output


def refused(*arguments: str | Path) -> str:
    *_, line = ran(*arguments, status=1).strip().splitlines()
    return line


def whole(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes | None]:
    """The clean stores of a source, in shards of five images, as a run without an interruption leaves them."""
    for module, name in ((seeding, "BLOCK_BYTES"), (store, "CHUNK_BYTES"), (store, "SHARD_BYTES")):
        monkeypatch.setattr(module, name, 5 * SIZE[0] * SIZE[1])
    place(npz(tmp_path / "a.npz", 28))
    ran("prepare", "photos")
    return tree(Path("data/clean"))


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# What a killed run or a power cut leaves of the store that is being written.
LEFT: dict[str, tuple[str, Callable[[Path], object]]] = {
    "empty-shard": ("train/images/c.1.0.0.0", lambda path: path.write_bytes(b"")),
    "half-shard": ("test/images/c.0.0.0.0", halved),
    "half-last-shard": ("train/images/c.5.0.0.0", halved),
    "of-zarr": ("train/images/c.1.0.0.0123456789abcdef.partial", lambda path: path.write_bytes(b"half")),
    "root": ("zarr.json", lambda path: path.write_bytes(b"")),
    "group": ("train/zarr.json", lambda path: path.write_bytes(b"")),
    "array": ("train/images/zarr.json", lambda path: path.write_bytes(b"")),
    "labels": ("train/labels/c.0", halved),
}


@pytest.mark.parametrize("case", LEFT)
def test_whatever_is_left_of_a_store_it_is_finished_as_if_nothing_had_happened(
    case: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    name, spoil = LEFT[case]
    spoil(PARTIAL / name)
    ran("prepare", "photos")
    assert tree(Path("data/clean")) == expected


def test_an_empty_shard_and_a_file_too_many_are_noticed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(place, tmp_path, monkeypatch)
    path = layout.clean_store("photos") / "train/images"
    (path / "c.1.0.0.0123456789abcdef.partial").touch()
    _, findings = verification.verify_clean(store.read_facts("photos"), lambda n: None)
    assert [finding.text.split(": ")[1].partition(";")[0] for finding in findings] == ["does not belong there"]
    (path / "c.1.0.0.0").write_bytes(b"")
    with pytest.raises(PipelineError, match=r"train/images: 1 shard\(s\) are missing"):
        store.read_facts("photos")


def linked(name: str, to: str) -> str:
    Path(to).mkdir(parents=True, exist_ok=True)
    Path(name).symlink_to(Path(to).absolute())
    return name


OVERLAPPING = "which stages write; move what is yours elsewhere"
PATHS: dict[str, tuple[Callable[[], str], str]] = {
    "result": (lambda: "data/clean/photos.zarr", OVERLAPPING),
    "within": (lambda: "data/perturbed/mine", OVERLAPPING),
    "above": (lambda: "data", OVERLAPPING),
    "here": (lambda: ".", OVERLAPPING),
    "link": (lambda: linked("mine", "metrics"), OVERLAPPING),
    "roundabout": (lambda: "data/../models/mine", OVERLAPPING),
    "docs": (lambda: str(folder(Path("docs"), "mine/x/1.png") / "mine"), ".dvcignore names /docs: DVC would not see"),
    "downloads": (lambda: linked("data/downloads/x", "../x"), ".dvcignore names /data/downloads: DVC would not"),
}


@pytest.mark.parametrize("case", PATHS)
def test_paths_that_stages_write_or_dvc_overlooks_are_refused(
    case: str, place: Place, tiny_values: dict[str, Any], write_params: WriteParams
) -> None:
    Path("data/downloads").mkdir(parents=True)
    Path(".dvcignore").write_text((ROOT / ".dvcignore").read_text())
    path, reason = PATHS[case][0](), PATHS[case][1]
    place(path)
    line = refused("check")
    assert line.strip().startswith(f"datasets.photos.source.path: '{path}' ")
    assert reason in line
    place("../photos")
    tiny_values["models"] = {"mine": {
        "dataset": "photos", "kind": "onnx", "path": path, "architecture": None, "channels": "rgb", "size": None,
        "scale": 255.0, "mean": [0.0], "std": [1.0],
    }}  # fmt: skip
    write_params(tiny_values)
    assert f"models.mine.path: '{path}' " in refused("check")


TWO = classes("a", "b")
SPLIT = [f"{split}/{file}" for split in ("train", "test") for file in TWO]
BAD_FOLDERS: dict[str, tuple[list[str], bytes, Callable[[str], object] | None, str]] = {
    "link-to-class": (TWO, b"c", lambda path: Path(path).symlink_to("a"), "c: a link to a folder; DVC would not see"),
    "link-within": (TWO, b"a/c", lambda path: Path(path).symlink_to("../b"), "a/c: a link to a folder; DVC would not"),
    "dangling-class": (TWO, b"c", lambda path: Path(path).symlink_to("nowhere"), "c: a link to nowhere"),
    "dangling-split": (SPLIT, b"val", lambda path: Path(path).symlink_to("nowhere"), "val: a link to nowhere"),
    "no-utf-8": (TWO, b"c\xff", lambda path: os.renames(f"{Path(path).parent}/a", path), "no name of a class; rename"),
    "overlooked": (TWO, b"c.bak", lambda path: os.renames(f"{Path(path).parent}/a", path), ".dvcignore names *.bak"),
    "two-trains": (SPLIT + [f"Train/{file}" for file in TWO], b"", None, "has Train, test, train; join them"),
    "third": ([*SPLIT, "samples/1.png"], b"", None, "has test, train; move samples elsewhere, or, if these are cl"),
    "third-beside-half": ([*SPLIT[:24], *classes("valid/a", "c")], b"", None, "has train, valid; move c elsewhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_no_folder_is_dropped_mixed_or_overlooked(case: str, place: Place) -> None:
    files, name, make, reason = BAD_FOLDERS[case]
    path = folder(Path("data/mine"), *files)
    if make is not None:
        make(os.fsdecode(bytes(path) + b"/" + name))
    Path(".dvcignore").write_text("*.bak\n")
    place(path, "folder", test_share=None if "rai" in files[0] else 0.3)
    assert reason in refused("prepare", "photos")
    assert reason in refused("describe", path)


def test_one_of_several_classes_may_be_called_train(place: Place) -> None:
    place(folder(Path("mine"), *classes("bus", "train")), "folder", test_share=0.3)
    ran("prepare", "photos")
    assert store.read_facts("photos").classes == ("bus", "train")


class Pets(VisionDataset):  # type: ignore[misc]
    """Two images of one mean colour, over and over, in the splits of OxfordIIITPet."""

    def __init__(self, root: str, split: str = "trainval", download: bool = True) -> None:
        super().__init__(root)
        verify_str_arg(split, "split", ("trainval", "test"))
        assert not download

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return Image.fromarray(np.array([[100, 120]] if i else [[120, 100]], np.uint8).repeat(3, 0)), i


@pytest.fixture
def pets(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets, "Pets", Pets, raising=False)
    path = Path("pets")
    path.mkdir()
    return path


def test_describe_looks_at_images_of_torchvision_as_they_are(place: Place, pets: Path) -> None:
    said = ran("describe", pets, "--torchvision", "Pets")
    assert "sizes, height x width: 3x2 (4)" in said
    assert "size: [3, 2]" in said
    assert "2 test image(s) are training images too" in said
    assert "repeat" not in said


def foreign(path: Path, **attributes: Any) -> Path:
    root = zarr.create_group(path, attributes=attributes)
    for split in ("train", "test"):
        root.create_array(f"{split}/images", data=np.ones((6, *SIZE), np.uint8), chunks=(2, *SIZE))
        root.create_array(f"{split}/labels", data=np.arange(6) % 2)
    return path


def many(path: Path, n: int) -> Path:
    """An image and a class of six digits, so many times."""
    images, labels = np.zeros((n, 1, 1), np.uint8), np.arange(100_000, 100_000 + n)
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return path


EVEN, BIG = np.arange(30) % 2, 2**64 - 1 - np.arange(30, dtype=np.uint64) % 2
LABELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unsigned": ({"y_train": EVEN.astype(np.uint64)}, ("0", "1")),
    "large": ({"y_train": EVEN.astype(np.uint64) + 2**53, "y_test": EVEN + 2**53}, (str(2**53), str(2**53 + 1))),
    "largest": ({"y_train": BIG, "y_test": BIG}, (str(2**64 - 2), str(2**64 - 1))),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_of_any_width_are_whole_numbers(case: str, place: Place, tmp_path: Path) -> None:
    changes, expected = LABELS[case]
    place(npz(tmp_path / "a.npz", **changes))
    ran("prepare", "photos")
    assert store.read_facts("photos").classes == expected


EMPTY: dict[str, Any] = {"x_train": np.empty((0, *SIZE), np.uint8), "y_train": np.empty(0, int)}
BAD_ARRAYS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty-split": (lambda path: npz(path / "a.npz", **EMPTY), "y_train: no images"),
    "empty": (lambda path: npz(path / "a.npz", 0), "y_train: no images"),
    "twice": (lambda path: foreign(path / "a.zarr", classes=["a", "a"]), "'a' names 2 classes; rename it"),
    "nameless": (lambda path: foreign(path / "a.zarr", classes=["a", ""]), "'' is no name of a class; rename it"),
    "command": (lambda path: foreign(path / "a.zarr", classes=["a", "\x1b[2J"]), "'\\x1b[2J' is no name of a class"),
    "long": (lambda path: foreign(path / "a.zarr", classes=["a", "b" * 2**22]), "the names of 2 classes are too long"),
    "many": (lambda path: many(path / "a.npz", 65_536), "65,536 classes, more than the 65,535 allowed"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_without_images_or_names_are_one_line(case: str, place: Place, tmp_path: Path) -> None:
    make, reason = BAD_ARRAYS[case]
    path = make(tmp_path)
    place(path, path.suffix[1:])
    assert reason in refused("prepare", "photos")
    assert reason in refused("describe", path)


def test_as_many_classes_as_are_promised_are_prepared(place: Place, tmp_path: Path) -> None:
    place(many(tmp_path / "a.npz", 65_535))
    ran("prepare", "photos")
    assert len(store.read_facts("photos").classes) == 65_535


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_every_class_has_an_image_to_train_on(kind: str, place: Place, tmp_path: Path) -> None:
    n, share = 40, 0.6
    path = tmp_path / f"a.{kind}"
    if kind == "npz":
        keys = [[str(i), str(i + n)] for i in range(n)]
        np.savez(path, images=np.zeros((2 * n, *SIZE), np.uint8), labels=np.arange(2 * n) % n)
    else:
        keys = [[f"{i:02}/0.png", f"{i:02}/1.png"] for i in range(n)]
        folder(path, *(key for of_class in keys for key in of_class))
    place(path, kind, test_share=share)
    ran("prepare", "photos")
    n_test = np.array([sum(own.belongs_to_test(key, share) for key in of_class) for of_class in keys])
    assert n_test.max() == 2
    facts = store.read_facts("photos")
    for split, expected in (("test", np.minimum(n_test, 1)), ("train", 2 - np.minimum(n_test, 1))):
        assert np.bincount(store.read_clean(facts, split, "labels"), minlength=n).tolist() == expected.tolist()


def fitted_before(image: Any, size: tuple[int, int]) -> Any:
    """As `pictures.fit` once was: the whole image is resized, however long it is."""
    height, width = image.shape[:2]
    scale = max(size[0] / height, size[1] / width)
    scaled = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    resized = cv2.resize(image, scaled[::-1], interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return resized[top : top + size[0], left : left + size[1]]


def test_a_strip_of_many_pixels_is_cut_before_it_is_resized_and_no_ordinary_picture() -> None:
    rng = np.random.default_rng(1)
    for shape in ((30, 40), (5, 70), (97, 7), (3, 3), (301, 200)):
        image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        for size in ((24, 24), (7, 50), (64, 48)):
            assert np.array_equal(pictures.fit(image, size), fitted_before(image, size))
    strip = np.zeros((1, 16_000, 1), np.uint8)
    strip[:, 7_900:8_100] = 7
    tracemalloc.start()
    assert (pictures.fit(strip, (224, 224)) == 7).all()
    assert (pictures.fit(strip.transpose(1, 0, 2), (8, 224)) == 7).all()
    assert tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()


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
    place(path.absolute(), "folder", test_share=0.3)
    block = YAML(typ="safe", pure=True).load(ran("describe", path, "--name", name).split("For params.yaml:")[1])
    tiny_values["datasets"] = block["datasets"]
    for recipes in (tiny_values["train"]["recipes"], tiny_values["strategies"]["transfer"]["recipes"]):
        recipes[name] = recipes.pop("photos")
    write_params(tiny_values)
    ran("check")


TORCHVISION: dict[str, tuple[Any, str]] = {
    "EMNIST": (datasets.EMNIST, "no training and test set among its splits (Unknown value"),
    "FakeData": (datasets.FakeData, "has no class 'FakeData'; name one such as SVHN"),
    "VisionDataset": (VisionDataset, "has no class 'VisionDataset'; name one such as SVHN"),
    "Ragged": (type("Ragged", (Pets,), {"targets": [[1], [1, 2]]}), "torchvision cannot read it as Ragged: "),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_what_torchvision_cannot_read_is_one_line(
    name: str, place: Place, pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, name, TORCHVISION[name][0], raising=False)
    assert TORCHVISION[name][1] in refused("describe", pets, "--torchvision", name)


def test_a_folder_in_the_place_of_a_file_is_not_to_be_removed(place: Place) -> None:
    place(folder(Path("mine"), *TWO))
    assert "datasets.photos.source.path: 'mine' is a folder; name a file" in refused("prepare", "photos")
    with pytest.raises(PipelineError, match="a folder, not a file; move it elsewhere"):
        read_file(Path("mine"), 9)


@pytest.mark.parametrize("value", [True, 3.0, 2])
def test_channels_are_a_whole_number(value: object, place: Place) -> None:
    place(folder(Path("mine"), *TWO), "folder", channels=value)
    assert f"datasets.photos.source.channels: unknown {value!r}; choose from 1 or 3" in refused("check")


def arrays_left_out(path: Path) -> tuple[Path, str]:
    return npz(path / "a.npz", val_images=EVEN, notes=EVEN), "notes, val_images: not used"


def chunk_lost(path: Path) -> tuple[Path, str]:
    store_path = foreign(path / "a.zarr")
    (store_path / "train/images/c/1/0/0").unlink()
    return store_path, "train/images: 1 chunk(s) not in the store are read as its fill value"


def commands_in_names(path: Path) -> tuple[Path, str]:
    (folder(path / "mine", *TWO) / "a/x.\x1b[2J").touch()
    return path / "mine", "1 file(s) that are no pictures are left out (1 .\\x1b[2j)"


def documents(path: Path) -> tuple[Path, str]:
    folder(path / "mine", *TWO)
    (path / "mine/a/0.png").rename(path / "mine/a/notes.pdf")
    Image.new("L", (8, 6)).save(path / "mine/b/x.jfif", "JPEG")
    return path / "mine", "1 file(s) that are no pictures are left out (1 .pdf)"


@pytest.mark.parametrize("make", [arrays_left_out, chunk_lost, commands_in_names, documents])
def test_what_is_left_out_is_said(make: Callable[[Path], tuple[Path, str]], place: Place, tmp_path: Path) -> None:
    path, remark = make(tmp_path)
    split = {"kind": "folder", "test_share": 0.3} if path.is_dir() and path.suffix != ".zarr" else {}
    place(path, **{"kind": path.suffix[1:], **split})
    said = ran("describe", path) + ran("prepare", "photos")
    assert said.count(remark) == 2
    assert "\x1b" not in said


@pytest.mark.parametrize("name", ["x.heic", "x.BMP", "x.tiff"])
def test_pictures_that_are_not_read_are_to_be_converted(name: str, place: Place) -> None:
    (folder(Path("mine"), *TWO) / "a" / name).touch()
    assert "not a PNG, JPEG or WebP; convert it" in refused("describe", "mine")


def test_what_pillow_can_make_up_for_it_does_in_silence(tmp_path: Path) -> None:
    Image.new("L", (8, 6)).save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")
    assert pictures.read_picture(tmp_path / "x.jpg", 3).shape == (6, 8, 3)


def test_the_metadata_of_a_store_of_version_2_are_part_of_what_decides(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    for split in ("train", "test"):
        zarr.create_array(path, name=f"{split}/images", data=np.ones((6, *SIZE), np.uint8), zarr_format=2)
        zarr.create_array(path, name=f"{split}/labels", data=np.arange(6) % 2, zarr_format=2)
    source = Own(kind="zarr", path=str(path), size=SIZE, channels=1, test_share=None)
    before = own.open_source(source, LocalProcesses(1)).fingerprint
    os.utime(path / "train/images/.zarray", (1, 1))
    assert own.open_source(source, LocalProcesses(1)).fingerprint != before
