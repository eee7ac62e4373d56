"""Files and folders appear whole or not at all, whatever happens while they are written."""

import ast
import errno
import itertools
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import (
    is_locked,
    locked,
    read_file,
    replacing_file,
    replacing_folder,
    write_text,
    write_texts,
)
from tests.conftest import restore, tree
from tests.test_graph import MODULES

Replacing = Callable[[Path], AbstractContextManager[Path]]

either = pytest.mark.parametrize("replacing", [replacing_file, replacing_folder])
new_or_not = pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])


def fill(path: Path, text: str) -> None:
    """Write into a folder, or else a file."""
    (path / "a.txt" if path.is_dir() else path).write_text(text)


def filled(replacing: Replacing, text: bytes) -> dict[str, bytes | None]:
    """What `tree` finds where `out` was filled."""
    return {"out": text} if replacing is replacing_file else {"out": None, "out/a.txt": text}


@either
@new_or_not
def test_a_file_or_folder_takes_its_place_as_a_whole_when_the_block_ends(
    existing: bool, replacing: Replacing, tmp_path: Path
) -> None:
    folder = tmp_path / "deep"
    before = filled(replacing, b"old") if existing else {}
    if existing:
        folder.mkdir()
        restore(folder, before | ({"out/gone.txt": b"not in the new one"} if "out/a.txt" in before else {}))
    with replacing(folder / "out") as partial:
        assert partial.parent == folder  # on the same file system: the rename cannot become a copy
        assert partial.name.endswith(".partial")
        fill(partial, "new")
        assert before.items() <= tree(folder).items()
        assert (folder / "out").exists() == existing
    assert tree(folder) == filled(replacing, b"new")


@either
@new_or_not
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt("x"), OSError("not a gzipped file")], ids=repr)
def test_an_error_in_the_block_leaves_everything_as_it_was_and_keeps_its_words(
    error: BaseException, existing: bool, replacing: Replacing, tmp_path: Path
) -> None:
    before, words = filled(replacing, b"old") if existing else {}, str(error)
    restore(tmp_path, before)

    def write_half() -> None:
        with replacing(tmp_path / "out") as partial:
            fill(partial, "half")
            raise error

    with pytest.raises(type(error)) as caught:
        write_half()
    assert str(caught.value) == words
    assert tree(tmp_path) == before


def test_a_file_that_was_never_written_leaves_the_previous_one(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(FileNotFoundError), replacing_file(tmp_path / "a.bin"):
        pass
    assert tree(tmp_path) == {"a.bin": b"old"}


@pytest.mark.parametrize("text", ["", "one\ntwo\n", "σ = 0.05\n"], ids=["empty", "lines", "not-ascii"])
def test_text_is_written_as_utf8_with_unix_line_ends(text: str, tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", text)
    assert tree(tmp_path) == {"new": None, "new/a.txt": text.encode("utf-8")}


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "a.txt").write_text("old")


def make_loop(path: Path) -> None:
    path.symlink_to(path)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


# What may lie where a file, a folder or a lock shall be.
IN_THE_WAY: dict[str, Callable[[Path], object]] = {
    **{"folder": lambda path: (path / "inner").mkdir(parents=True), "pipe": os.mkfifo, "loop": make_loop},
    **{"device": link_to("/dev/zero"), "link to mine": link_to("../mine/a.txt"), "link to folder": link_to("../mine")},
}


@pytest.fixture
def beside_mine(tmp_path: Path) -> Iterator[Path]:
    """A folder beside `mine`, which stays as it is."""
    make_folder(tmp_path / "mine")
    (tmp_path / "here").mkdir()
    yield tmp_path / "here"
    assert tree(tmp_path / "mine") == {"a.txt": b"old"}


@pytest.mark.parametrize("make", [*IN_THE_WAY.values(), lambda path: path.write_text("half, longer")])
@new_or_not
def test_what_lies_in_the_way_of_a_file_or_folder_is_removed_and_no_link_is_followed(
    existing: bool, make: Callable[[Path], object], beside_mine: Path
) -> None:
    for name in (".a.txt.partial", ".out.partial", ".out.previous.partial", *(["out"] if existing else [])):
        make(beside_mine / name)
    write_text(beside_mine / "a.txt", "new")
    with replacing_folder(beside_mine / "out") as partial:
        assert list(partial.iterdir()) == []
        (partial / "b.txt").write_text("new")
    assert tree(beside_mine) == {"a.txt": b"new", "out": None, "out/b.txt": b"new"}


@pytest.mark.parametrize("fails", [False, True], ids=["next-run-succeeds", "next-run-fails"])
def test_a_folder_killed_between_its_two_renames_is_recovered(fails: bool, tmp_path: Path) -> None:
    make_folder(tmp_path / ".out.previous.partial")
    make_folder(tmp_path / ".out.partial")  # complete, but not yet in place
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext(), replacing_folder(tmp_path / "out") as partial:
        fill(partial, "new")
        if fails:
            raise KeyboardInterrupt
    assert tree(tmp_path) == filled(replacing_folder, b"old" if fails else b"new")


@pytest.mark.parametrize("n_calls", range(1, 12))
def test_no_half_removed_folder_is_put_back_though_its_removal_was_killed(
    n_calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    make_folder(path)
    process = os.fork()
    if process == 0:  # killed as it renames or removes something for the nth time
        calls = itertools.count(1)
        for name in ("rename", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, dying_at(n_calls, calls, getattr(os, name)))
        with replacing_folder(path) as partial:
            (partial / "a.txt").write_text("new")
        os._exit(0)
    os.waitpid(process, 0)
    shutil.rmtree(path, ignore_errors=True)  # as DVC does before a stage runs
    with suppress(KeyboardInterrupt), replacing_folder(path):
        raise KeyboardInterrupt
    assert tree(tmp_path) in ({}, filled(replacing_folder, b"old"))


def dying_at(n_calls: int, calls: Iterator[int], function: Callable[..., None]) -> Callable[..., None]:
    def call(*arguments: Any, **options: Any) -> None:
        if next(calls) == n_calls:
            os._exit(1)
        function(*arguments, **options)

    return call


def test_a_folder_that_cannot_take_its_place_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    make_folder(path)
    for function in (os.rename, os.replace):

        def refuse_the_new_one(source: Path, target: Path, move: Callable[[Path, Path], None] = function) -> None:
            if source.name == ".out.partial":
                raise PermissionError(errno.EACCES, "refused", str(source), None, str(target))
            move(source, target)

        monkeypatch.setattr(os, function.__name__, refuse_the_new_one)
    with pytest.raises(PermissionError, match="refused"), replacing_folder(path) as partial:
        (partial / "a.txt").write_text("new")
    assert tree(tmp_path) == filled(replacing_folder, b"old")


@either
def test_a_place_that_cannot_be_written_is_an_os_error(replacing: Replacing, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(NotADirectoryError), replacing(tmp_path / "file" / "below" / "a"):
        pytest.fail("the block was entered")
    assert tree(tmp_path) == {"file": b"old"}


def test_files_that_belong_together_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    write_texts(dict.fromkeys(paths, "old"))
    with pytest.raises(UnicodeEncodeError):
        write_texts({paths[0]: "new", paths[1]: "half \udc80"})
    with pytest.raises(UnicodeEncodeError):
        write_text(paths[0], "half \udc80")
    assert tree(tmp_path) == {"a.txt": b"old", "b.txt": b"old"}
    write_texts(dict.fromkeys(paths, "new"))
    assert tree(tmp_path) == {"a.txt": b"new", "b.txt": b"new"}


def test_where_there_are_no_locks_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "no locks available")))
    with locked(tmp_path / "a.running", "this"), locked(tmp_path / "a.running", "this"):
        pass


def test_a_lock_is_there_for_as_long_as_its_block_runs(tmp_path: Path) -> None:
    (tmp_path / "a.running").write_text("process 1 that was killed long ago, and holds no lock")
    with locked(tmp_path / "a.running", "this"):
        assert is_locked(tmp_path / "a.running")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("make", IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_what_is_no_file_in_a_locks_place_is_refused_and_left_alone(
    make: Callable[[Path], object], beside_mine: Path
) -> None:
    make(beside_mine / "a.running")
    before = tree(beside_mine)
    said = r"a\.running: not a file, as a lock is; remove it"
    with pytest.raises(PipelineError, match=said), locked(beside_mine / "a.running", "x"):
        pytest.fail("the block was entered")
    assert tree(beside_mine) == before


NO_FILES: list[tuple[Callable[[Path], object], str]] = [
    *((os.mkfifo, "a pipe, socket or device"), (link_to("/dev/zero"), "a pipe, socket or device")),
    *((Path.mkdir, "a folder"), (make_loop, "cannot be read")),
    (lambda path: path.write_bytes(b"12345"), "5 bytes, more than the 4"),
]


@pytest.mark.parametrize(("make", "said"), NO_FILES)
def test_what_is_no_file_of_the_right_size_is_refused_before_it_is_read(
    make: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    make(tmp_path / "a")
    with pytest.raises(PipelineError, match=said) as caught:
        read_file(tmp_path / "a", 4)
    assert str(caught.value).startswith(f"{tmp_path / 'a'}: ")


def test_a_file_is_read_through_links_and_takes_the_memory_that_it_needs(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    tracemalloc.start()
    assert read_file(tmp_path / "b", 2**40) == b"1234"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "c", 4)


# Every way of this package, and of what it is built on, to open a file by its path.
OPENERS = {
    *("open", "read_text", "read_bytes", "read_csv", "read_json", "read_table", "read_parquet", "read_pickle"),
    *("fdopen", "load", "fromfile", "loadtxt", "genfromtxt", "memmap", "imread", "load_file", "safe_open"),
    *("open_group", "FileIO", "open_array", "open_consolidated", "GzipFile", "ZipFile", "TarFile", "file_digest"),
    *("copyfile", "copy2"),
}
# How calls begin that have one of those names and open nothing that somebody else may have put there.
HARMLESS = (
    "os.open(os.devnull",
    # The package's own files.
    *("resources.files(", "pd.read_csv(file)", "file.read_text(encoding='utf-8')", "source.read_text("),
    # What read_file has read.
    *("YAML(typ='safe').load(text)", "yaml.load(read_file(", "pd.read_csv(io.BytesIO(content)"),
    *("gzip.open(io.BytesIO(content)", "tarfile.open(fileobj=io.BytesIO(content)", "safetensors.torch.load(content"),
    *("Image.open(BytesIO(content)", "torch.load(io.BytesIO(content)", "archive.open(member)"),
    # A store that looks at files before it opens them.
    *("zarr.open_group(Folder(path", "zarr.open_group(backend", "zarr.open_group(Objects(staged"),
    "zarr.open_array(backend",
    # Functions of ours, which are looked at where they are defined.
    *("load(params_path)", "load(model)", "external.load(", "sources.load(spec", "storage.load("),
)


def opening_calls(path: Path) -> list[str]:
    """The calls in a module that may open a file, as text."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = {node: getattr(node.func, "attr", getattr(node.func, "id", None)) for node in nodes}
    return [ast.unparse(node) for node in nodes if names[node] in OPENERS]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_one_module_opens_files(module: str) -> None:
    found = [call for call in opening_calls(MODULES[module]) if not call.startswith(HARMLESS)]
    assert bool(found) == (module == "runtime.files"), found
