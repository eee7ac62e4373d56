"""Images of the user's own: what is read of them, what is refused, and what a run that was stopped leaves."""

import hashlib
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import zarr
from PIL import Image
from ruamel.yaml import YAML

from pipeline.data import own, pictures, preparing, seeding, store
from pipeline.data.arrays import Images
from pipeline.perturbations import PERTURBATIONS
from pipeline.runtime import layout
from pipeline.study.suggesting import suggest_levels
from tests.conftest import ROOT, MakeOwnStudy, WriteParams, pasted, tree
from tests.test_stages import fail, succeed

SIZE = (12, 16)
CLASSES = ("Zebra", "ant", "öl")


def picture(seed: int, height: int = 12, width: int = 16) -> Any:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of twenty pictures each, of two sizes."""
    folder = tmp_path / "photos"
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            picture(100 * number + i, *((12, 16) if i % 2 else (30, 26))).save(folder / name / f"{i}.png")
    return folder


Place = Callable[..., dict[str, Any]]


@pytest.fixture
def place(own_study: MakeOwnStudy) -> Place:
    """Makes the current folder a study of the data set `photos`, from the source given."""

    def make(path: Path, kind: str = "folder", **options: Any) -> dict[str, Any]:
        return own_study("photos", path=str(path), kind=kind, **{"size": SIZE, **options})

    return make


def prepare() -> str:
    return succeed("prepare", "photos", "--workers", "2")


def refused() -> str:
    *_, line = fail("prepare", "photos").strip().splitlines()
    assert not layout.clean_store("photos").exists()
    assert line.startswith("Error: ")
    return line


def stored(split: str, kind: str) -> Any:
    return store.read_clean(store.read_facts("photos"), split, kind)


def fitted(pixels: Any) -> Any:
    """Resized until the shorter side fits, and cropped: written anew, with another library's arithmetic aside."""
    height, width = pixels.shape[:2]
    scale = max(SIZE[0] / height, SIZE[1] / width)
    scaled = max(SIZE[1], round(width * scale)), max(SIZE[0], round(height * scale))
    if (height, width) != SIZE:
        pixels = cv2.resize(pixels, scaled, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    top, left = (pixels.shape[0] - SIZE[0]) // 2, (pixels.shape[1] - SIZE[1]) // 2
    return pixels[top : top + SIZE[0], left : left + SIZE[1]]


def place_of(key: str) -> bytes:
    return hashlib.sha256(unicodedata.normalize("NFC", key).encode()).digest()


def goes_to_test(key: str, share: float) -> bool:
    return int.from_bytes(place_of(key)[-4:], "big") < share * 2**32


def all_images() -> dict[str, set[bytes]]:
    return {split: {image.tobytes() for image in stored(split, "images")} for split in ("train", "test")}


def test_a_folder_is_split_by_the_digests_of_its_paths_and_a_file_more_moves_no_other(
    photos: Path, place: Place
) -> None:
    place(photos, test_share=0.3)
    prepare()
    expected: dict[str, list[tuple[bytes, int, Any]]] = {"train": [], "test": []}
    for number, name in enumerate(CLASSES):
        for path in (photos / name).iterdir():
            key = f"{name}/{path.name}"
            split = "test" if goes_to_test(key, 0.3) else "train"
            expected[split].append((place_of(key), number, fitted(np.asarray(Image.open(path)))))
    for split, rows in expected.items():
        rows.sort(key=lambda row: row[0])
        assert stored(split, "labels").tolist() == [label for _, label, _ in rows]
        assert np.array_equal(stored(split, "images"), np.stack([image for *_, image in rows]))
    facts = store.read_facts("photos")
    assert facts.classes == CLASSES
    assert facts.attributes["source"] == {"kind": "folder", "size": list(SIZE), "channels": 3, "test_share": 0.3}
    before = all_images()
    picture(1000).save(photos / "ant" / "new.png")
    prepare()
    after = all_images()
    assert all(before[split] <= after[split] for split in before)
    assert sum(map(len, after.values())) == 61


def as_npz(folder: Path, arrays: dict[str, Any], names: tuple[str, ...]) -> None:
    np.savez_compressed(folder / "a.npz", **dict(zip(names, arrays.values(), strict=True)))


def as_zarr(folder: Path, arrays: dict[str, Any], zarr_format: Any) -> None:
    root = zarr.create_group(folder / "a.zarr", zarr_format=zarr_format)
    for name, values in arrays.items():
        root.create_array(name, data=values, chunks=(7, *values.shape[1:]))


def as_torchvision(folder: Path, arrays: dict[str, Any]) -> None:
    raw = folder / "root/KMNIST/raw"
    raw.mkdir(parents=True)
    for name, values in arrays.items():
        split, kind = name.split("/")
        header = b"\0\0\x08" + bytes([values.ndim]) + np.array(values.shape, ">i4").tobytes()
        stem = {"train": "train", "test": "t10k"}[split]
        (raw / f"{stem}-{kind}-idx{values.ndim}-ubyte").write_bytes(header + values.astype(np.uint8).tobytes())


MEDMNIST = ("train_images", "train_labels", "test_images", "test_labels")
KERAS = ("x_train", "y_train", "x_test", "y_test")
FILES: dict[str, tuple[str, str, Callable[[Path, dict[str, Any]], None]]] = {
    "medmnist": ("npz", "a.npz", lambda folder, arrays: as_npz(folder, arrays, MEDMNIST)),
    "keras": ("npz", "a.npz", lambda folder, arrays: as_npz(folder, arrays, KERAS)),
    "zarr-2": ("zarr", "a.zarr", lambda folder, arrays: as_zarr(folder, arrays, 2)),
    "zarr-3": ("zarr", "a.zarr", lambda folder, arrays: as_zarr(folder, arrays, 3)),
    "torchvision": ("torchvision", "root", as_torchvision),
}
CLASSES_OF_KMNIST = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FILES)
def test_arrays_in_a_file_keep_their_order(name: str, channels: int, tmp_path: Path, place: Place) -> None:
    kind, file, write = FILES[name]
    n_images, given = {"train": 40, "test": 18}, dict[str, Any]()
    images = {split: np.random.default_rng(n).integers(0, 256, (n, *SIZE), np.uint8) for split, n in n_images.items()}
    labels = {split: np.arange(n) % 4 + 3 for split, n in n_images.items()}
    for split in n_images:
        given[f"{split}/images"] = images[split]
        given[f"{split}/labels"] = labels[split][:, None] if name == "medmnist" else labels[split]
    write(tmp_path, given)
    place(tmp_path / file, kind, channels=channels, **({"dataset": "KMNIST"} if kind == "torchvision" else {}))
    prepare()
    for split in images:
        found = stored(split, "images")
        assert found.shape[3] == channels
        assert all(np.array_equal(found[..., i], images[split]) for i in range(channels))
        assert stored(split, "labels").tolist() == [label - 3 for label in labels[split].tolist()]
    # Names are the labels themselves, where nobody gives others.
    assert store.read_facts("photos").classes == (tuple("3456") if kind != "torchvision" else CLASSES_OF_KMNIST[3:7])


@pytest.mark.parametrize("names", [["x", "y"], ["x", "y", 3], {"x": 0}, "xyz"], ids=str)
def test_names_of_classes_that_do_not_fit_are_said_not_to_be_used(
    names: Any, tmp_path: Path, place: Place, in_process: None
) -> None:
    of_split = {"images": np.zeros((30, *SIZE), np.uint8), "labels": np.arange(30) % 3}
    as_zarr(tmp_path, {f"{split}/{kind}": of_split[kind] for split in ("train", "test") for kind in of_split}, 3)
    for given, said in ((names, True), (["x", "y", "z"], False)):
        zarr.open_group(tmp_path / "a.zarr", mode="r+").attrs["classes"] = given
        printed = succeed("describe", str(tmp_path / "a.zarr"))
        assert ("odd: the attribute classes is not used" in printed) == said
        assert ("  0 x: 10 train" in printed) == (not said)


def test_arrays_without_a_test_set_are_split_by_their_numbers(tmp_path: Path, place: Place) -> None:
    images, labels = np.arange(90, dtype=np.uint8)[:, None, None] + np.zeros((90, *SIZE), np.uint8), np.arange(90) % 3
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    place(tmp_path / "a.npz", "npz", channels=1, test_share=0.25)
    prepare()
    numbers = {split: stored(split, "images")[:, 0, 0, 0].tolist() for split in ("train", "test")}
    assert sorted(numbers["train"] + numbers["test"]) == list(range(90))
    assert numbers["test"] == [i for i in range(90) if goes_to_test(str(i), 0.25)]
    for split in numbers:
        assert stored(split, "labels").tolist() == [i % 3 for i in numbers[split]]


def test_pictures_are_shown_as_a_viewer_shows_them(tmp_path: Path) -> None:
    plain = picture(1, 10, 20)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn clockwise
    plain.save(tmp_path / "turned.png", exif=turned)
    assert np.array_equal(pictures.read_picture(tmp_path / "turned.png", 3), np.rot90(np.asarray(plain), -1))
    for name, made in {
        "grey.png": plain.convert("L"),
        "palette.png": plain.quantize(256),
        "opaque.webp": plain.convert("RGBA"),
        "bits.png": plain.convert("1"),
    }.items():
        made.save(tmp_path / name, lossless=True) if name.endswith("webp") else made.save(tmp_path / name)
        assert np.array_equal(pictures.read_picture(tmp_path / name, 3), np.asarray(made.convert("RGB"))), name
    grey = pictures.read_picture(tmp_path / "turned.png", 1)
    assert np.array_equal(grey[..., 0], np.rot90(np.asarray(plain.convert("L")), -1))


def truncated(path: Path) -> None:
    picture(1, 300, 300).save(path)
    path.write_bytes(path.read_bytes()[:4000])


def animated(path: Path) -> None:
    picture(1).save(path, save_all=True, append_images=[picture(2)])


DEEP = np.full((12, 16, 3), 999, np.uint16)
BAD_PICTURES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "text": ("x.png", lambda path: path.write_text("no picture"), "no PNG, JPEG or WebP"),
    "truncated-png": ("x.png", truncated, "cannot be decoded"),
    "truncated-jpeg": ("x.jpg", truncated, "cannot be decoded"),
    "empty": ("x.png", lambda path: path.touch(), "no PNG, JPEG or WebP"),
    "deep-grey": ("x.png", lambda path: Image.fromarray(DEEP[..., 0]).save(path), "16 bits"),
    "deep-colour": ("x.png", lambda path: cv2.imwrite(str(path), DEEP), "16 bits"),
    "cmyk": ("x.jpg", lambda path: picture(1).convert("CMYK").save(path), "CMYK"),
    "transparent": ("x.png", lambda path: Image.new("RGBA", (16, 12), (9, 9, 9, 99)).save(path), "transparent"),
    "animated-webp": ("x.webp", animated, "animated"),
    "animated-png": ("x.png", animated, "animated"),
    "bomb": ("x.png", lambda path: Image.new("1", (10_000, 9_000)).save(path), "cannot be decoded"),
    "gif": ("x.gif", lambda path: picture(1).save(path), "not a PNG, JPEG or WebP"),
    "broken-link": ("x.png", lambda path: path.symlink_to("nowhere.png"), "a link to nowhere"),
    "looping-link": ("x", lambda path: path.symlink_to(path.parent), "a link to a folder; DVC would not see"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_a_bad_picture_is_one_line_with_its_path(case: str, photos: Path, place: Place) -> None:
    name, make, reason = BAD_PICTURES[case]
    make(photos / "ant" / name)
    place(photos, test_share=0.3)
    line = refused()
    assert f"{photos / 'ant' / name}: " in line
    assert reason in line


def test_describe_lists_every_bad_picture_and_leaves_with_an_error(photos: Path, in_process: None) -> None:
    bad = {"text", "truncated-jpeg", "deep-colour", "animated-webp"}
    for case in bad:
        name, make, _ = BAD_PICTURES[case]
        make(photos / "ant" / f"{case}{Path(name).suffix}")
    (photos / "ant/again.png").write_bytes((photos / "Zebra/3.png").read_bytes())
    (photos / "ant/notes.txt").touch()
    Image.new("L", (9, 9)).save(photos / "ant/grey.png")
    said = fail("describe", str(photos), "--name", "mine", "--test-share", "0.3")
    for case in bad:
        assert f"{photos / 'ant' / case}." in said
    assert "colours: RGB (61), grey (1, stored as RGB)" in said
    assert "repeat" in said or "training images too" in said
    assert "1 file(s) that are no pictures are left out (1 .txt)" in said


def move_into(photos: Path, train: str, test: str) -> None:
    """Put the last pictures of every class into one folder, the others into another."""
    for name in CLASSES:
        for number, file in enumerate(sorted((photos / name).iterdir())):
            folder = photos / (train if number < 15 else test) / name
            folder.mkdir(parents=True, exist_ok=True)
            file.rename(folder / file.name)
        (photos / name).rmdir()


def add_class(photos: Path, name: str) -> None:
    (photos / name).mkdir()
    picture(1).save(photos / name / "1.png")


def add_class_to_test(photos: Path) -> None:
    move_into(photos, "train", "test")
    add_class(photos / "test", "bee")


def keep_one_class(photos: Path) -> None:
    for name in CLASSES[1:]:
        shutil.rmtree(photos / name)


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], float | None, str]] = {
    "missing": (lambda photos: photos.rename(photos.with_name("elsewhere")), 0.3, "photos: no such file or folder"),
    "no-split": (lambda photos: None, None, "photos: has no train/ and test/; give a test_share"),
    "two-splits": (lambda photos: move_into(photos, "train", "test"), 0.3, "set test_share to null"),
    "validation": (lambda photos: move_into(photos, "train", "val"), None, "has train/ but no test/; rename val/"),
    "empty-class": (lambda photos: (photos / "bee").mkdir(), 0.3, "bee: a class without images"),
    "no-classes": (lambda photos: picture(1).save(photos / "1.png"), 0.3, "in the folder of no class"),
    "one-class": (keep_one_class, 0.3, "one class only (Zebra)"),
    "case": (lambda photos: add_class(photos, "zebra"), 0.3, "the folders Zebra and zebra differ in case only"),
    "accents": (lambda photos: add_class(photos, "o\u0308l"), 0.3, "two folders with the same name"),
    "no-test-images": (lambda photos: None, 1e-9, "the test set is empty"),
    "class-in-test-only": (add_class_to_test, None, "no training images of bee"),
    "unprintable": (lambda photos: (photos / "ant").rename(photos / "a\tb"), 0.3, "is not a valid class name"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_one_line_with_its_path(case: str, photos: Path, place: Place) -> None:
    spoil, share, reason = BAD_FOLDERS[case]
    spoil(photos)
    place(photos, test_share=share)
    line = refused()
    assert str(photos) in line
    assert reason in line


def test_a_split_with_a_class_missing_from_the_test_set_is_said(photos: Path, place: Place) -> None:
    move_into(photos, "train", "test")
    shutil.rmtree(photos / "test/ant")
    place(photos)
    assert "photos: no test images of ant" in prepare()
    assert sorted(set(stored("test", "labels").tolist())) == [0, 2]


def test_links_to_pictures_and_to_the_whole_are_followed(photos: Path, tmp_path: Path, place: Place) -> None:
    picture(7).save(tmp_path / "far.png")
    (photos / "ant/link.png").symlink_to(tmp_path / "far.png")
    (tmp_path / "there").symlink_to(photos)
    place(tmp_path / "there", test_share=0.3)
    prepare()
    assert sum(len(stored(split, "labels")) for split in ("train", "test")) == 61


ARRAYS = {
    "train_images": np.zeros((6, *SIZE, 3), np.uint8),
    "train_labels": np.arange(6) % 2,
    "test_images": np.zeros((4, *SIZE, 3), np.uint8),
    "test_labels": np.arange(4) % 2,
}
BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "floats": ({"train_images": np.zeros((6, *SIZE, 3))}, "train_images: of type float64; give images of uint8"),
    "channels-first": ({"train_images": np.zeros((6, 3, *SIZE), np.uint8)}, "`.transpose(0, 2, 3, 1)`"),
    "four-channels": ({"train_images": np.zeros((6, *SIZE, 4), np.uint8)}, "C = 1 or 3"),
    "flat": ({"train_images": np.zeros((6, 99), np.uint8)}, "of shape (6, 99)"),
    "objects": ({"train_images": np.array([None] * 6, object)}, "train_images.npy: of type object"),
    "one-hot": ({"train_labels": np.eye(6)}, "`labels.argmax(1)`"),
    "float-labels": ({"train_labels": np.zeros(6)}, "train_labels: labels of type float64"),
    "fewer-labels": ({"train_labels": np.zeros(5, int)}, "6 images, but 5 labels"),
    "fortran": ({"train_images": np.asfortranarray(ARRAYS["train_images"])}, "in Fortran order"),
    "no-test": ({"test_images": None}, "has train_images, train_labels, test_labels; needed are"),
    "label-in-test-only": ({"test_labels": np.array([0, 1, 0, 9])}, "no training images of 9"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_one_line_with_their_path(case: str, tmp_path: Path, place: Place) -> None:
    changes, reason = BAD_ARRAYS[case]
    np.savez(tmp_path / "a.npz", **{name: value for name, value in {**ARRAYS, **changes}.items() if value is not None})
    place(tmp_path / "a.npz", "npz")
    line = refused()
    assert str(tmp_path / "a.npz") in line
    assert reason in line


@pytest.mark.parametrize("keep", [10, 500, -400])
def test_a_truncated_npz_is_one_line_with_its_path(keep: int, tmp_path: Path, place: Place) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **ARRAYS)  # type: ignore[arg-type]
    path.write_bytes(path.read_bytes()[:keep])
    place(path, "npz")
    assert f"{path}: no zip archive, or damaged" in refused()


def test_a_run_that_was_stopped_goes_on_and_one_whose_files_changed_begins_anew(
    photos: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((seeding, "BLOCK_BYTES"), (store, "CHUNK_BYTES"), (store, "SHARD_BYTES")):
        monkeypatch.setattr(module, name, 5 * 12 * 16 * 3)  # shards of five images
    place(photos, test_share=0.3)
    prepare()
    whole = tree(Path("data/clean"))
    decoded: list[str] = []
    read = pictures.read_picture

    def count(path: str, channels: int) -> Any:
        decoded.append(path)
        return read(path, channels)

    def count_to_32(path: str, channels: int) -> Any:
        if len(decoded) == 32:
            raise KeyboardInterrupt
        return count(path, channels)

    def stop_half_way() -> None:
        decoded.clear()
        monkeypatch.setattr(pictures, "read_picture", count_to_32)
        assert "Aborted!" in fail("prepare", "photos")
        monkeypatch.setattr(pictures, "read_picture", count)
        decoded.clear()

    monkeypatch.setattr(own, "_BATCH_BYTES", 1)
    stop_half_way()
    assert {name: part for name, part in tree(Path("data/clean")).items() if name[0] != "."} == whole
    prepare()
    assert len(decoded) <= 60 - 30  # six shards of five images were there
    assert tree(Path("data/clean")) == whole
    stop_half_way()
    picture(5).save(photos / "ant/5.png")
    prepare()
    assert len(decoded) == 60


def test_what_the_store_does_not_hold_of_params_is_said(photos: Path, place: Place) -> None:
    place(photos, test_share=0.3)
    assert "data/clean/photos.zarr: no such store; make it with `python -m pipeline prepare photos`" in fail("plan")
    prepare()
    place(photos, test_share=0.2)
    assert "data/clean/photos.zarr: made with other params" in fail("plan")
    place(photos, test_share=0.3, n_train=61)
    assert "datasets.photos.n_train: 61 is more than the" in fail("plan")


@pytest.mark.parametrize(
    ("size", "n_classes", "n"), [((224, 200), 3, 8), ((8, 8), 1000, 1200)], ids=["large-images", "thousand-classes"]
)
def test_a_study_of_own_images_runs_through_every_stage(
    size: tuple[int, int], n_classes: int, n: int, tmp_path: Path, place: Place, write_params: WriteParams
) -> None:
    images = np.random.default_rng(3).integers(0, 256, (n, *size, 3), dtype=np.uint8)
    labels = np.arange(n) % n_classes
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images[::-1], y_test=labels[::-1])
    values = place(tmp_path / "a.npz", "npz", n_train=n, n_test=n, batch_size=n // 4, size=size)
    del values["ablations"]["components"]
    values["perturb"]["trials"] = 1
    values["strategies"] = {"constant": {}}
    write_params(values)
    prepare()
    succeed("perturb", "photos", "noise")
    for stage in ("train", "impact", "strategies", "evaluate", "ablations"):
        succeed(stage, "photos")
    assert stored("test", "labels").dtype == (np.uint16 if n_classes > 256 else np.uint8)
    succeed("report")
    assert len(Path("metrics/report/index.html").read_text()) < 3_000_000
    succeed("verify")
    assert Path("metrics/confusion/photos.csv").stat().st_size < 40 * 12 * (n + 1)


def test_the_block_that_describe_prints_is_one_that_check_accepts(
    photos: Path, place: Place, write_params: WriteParams
) -> None:
    values = place(photos, test_share=0.3)
    printed = succeed("describe", str(photos)).split("For params.yaml:")[1]
    assert not re.search(r"[&*\[{]", printed)  # parts of it can be pasted, and are in the form that DVC writes
    block = YAML(typ="safe", pure=True).load(printed)
    write_params(pasted(values, block))
    succeed("check")
    prepare()
    assert block["datasets"]["photos"]["n_train"] == len(stored("train", "labels"))


@pytest.mark.parametrize(
    ("size", "levels", "sigmas"),
    [
        ((64, 64), [102, 205, 410], [1.0, 2.0, 3.0]),
        ((224, 300), [1680, 3360, 6720], [3.5, 7.0, 10.5]),
        ((28, 28), [20, 39, 78], [0.44, 0.88, 1.31]),
        ((8, 5), [1, 2, 4], [0.1, 0.16, 0.23]),
        ((1, 2), [1], [0.1]),
    ],
)
def test_damaged_pixels_and_blur_are_suggested_by_the_size_of_the_image(
    size: tuple[int, int], levels: list[int], sigmas: list[float]
) -> None:
    suggested = suggest_levels(size)
    block = {"train_levels": levels[-1:], "test_levels": levels, "scope": "image"}
    blur = {"train_levels": sigmas[-1:], "test_levels": sigmas, "mix_channels": False}
    assert suggested["perturbations"] == dict.fromkeys(("stuck", "hot", "dead"), block) | {"blur": blur}
    assert suggested["evaluate"]["levels"] == dict.fromkeys(("stuck", "hot", "dead"), levels[-1:]) | {
        "blur": sigmas[-2:]
    }
    assert max(sigmas) <= PERTURBATIONS["blur"].max_level(*size)


def test_for_images_of_64x64_the_levels_of_profile_own_are_suggested() -> None:
    profile = YAML(typ="safe").load(ROOT / "profiles/own.yaml")
    suggested = suggest_levels((64, 64))
    assert {name: profile["perturbations"][name] for name in suggested["perturbations"]} == suggested["perturbations"]
    levels = suggested["evaluate"]["levels"]
    assert {name: profile["evaluate"]["levels"][name] for name in levels} == levels


@pytest.mark.parametrize("sizes", [[1] * 23, [23], [5, 9, 9], [4, 6, 7, 6]], ids=str)
def test_batches_are_cut_to_shards_in_the_same_memory_over_and_over(sizes: list[int]) -> None:
    """Fresh memory for every shard took longer than filling it."""
    images = np.random.default_rng(1).integers(0, 256, (23, 2, 3, 1), dtype=np.uint8)
    ended: list[int] = []

    def batches() -> Iterator[Images]:
        yield from np.split(images, np.cumsum(sizes)[:-1])
        ended.append(1)

    regions = [(slice(first, min(first + 5, 23)), slice(0, 2)) for first in range(0, 23, 5)]
    shards: list[Images] = []
    for region, shard in zip(regions, preparing._cut(batches(), regions, images.shape[1:]), strict=True):
        assert np.array_equal(shard, images[region[0]])
        assert np.shares_memory(shard, shards[-2]) if len(shards) > 1 else True
        assert not (shards and np.shares_memory(shard, shards[-1]))  # which is being written
        shards.append(shard)
    assert ended
