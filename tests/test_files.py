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
from tests.conftest import tree
from tests.test_graph import MODULES


def make_folder(path: Path, text: str) -> None:
    path.mkdir(parents=True)
    (path / "a.txt").write_text(text)


@pytest.mark.parametrize("previous", [None, b"old"], ids=["new", "replaced"])
def test_a_file_takes_its_place_when_the_block_ends(previous: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.bin"
    if previous is not None:
        path.parent.mkdir()
        path.write_bytes(previous)
    with replacing_file(path) as partial:
        partial.write_bytes(b"new")
        assert partial.parent == path.parent  # on the same file system: the rename cannot become a copy
        assert partial.name.endswith(".partial")
        assert (path.read_bytes() if path.exists() else None) == previous
    assert tree(tmp_path) == {"deep": None, "deep/a.bin": b"new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("previous", [None, b"old"], ids=["new", "existing"])
def test_an_error_while_a_file_is_written_leaves_everything_as_it_was(
    previous: bytes | None, error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "a.bin"
    if previous is not None:
        path.write_bytes(previous)

    def write_half() -> None:
        with replacing_file(path) as partial:
            partial.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert tree(tmp_path) == ({} if previous is None else {"a.bin": previous})


@pytest.mark.parametrize("replacing", [replacing_file, replacing_folder])
def test_the_words_of_an_error_are_kept(
    replacing: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="not a gzipped file"), replacing(tmp_path / "a"):
        raise OSError("not a gzipped file")


def test_a_file_that_was_never_written_leaves_the_previous_one(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(FileNotFoundError), replacing_file(path):
        pass
    assert tree(tmp_path) == {"a.bin": b"old"}


def test_the_half_made_file_of_a_killed_run_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with replacing_file(path) as partial:
        name = partial.name
        partial.write_bytes(b"first")
    (tmp_path / name).write_bytes(b"a longer leftover of a killed run")
    with replacing_file(path) as partial:
        partial.write_bytes(b"second")
    assert tree(tmp_path) == {"a.bin": b"second"}


@pytest.mark.parametrize("text", ["", "one\ntwo\n", "σ = 0.05\n"], ids=["empty", "lines", "not-ascii"])
def test_text_is_written_as_utf8_with_unix_line_ends(text: str, tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", text)
    assert tree(tmp_path) == {"new": None, "new/a.txt": text.encode("utf-8")}


def test_text_that_cannot_be_encoded_leaves_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \udc80")
    assert tree(tmp_path) == {"a.txt": b"old"}


@pytest.mark.parametrize("existing", [False, True], ids=["new", "replaced"])
def test_a_folder_takes_its_place_as_a_whole(existing: bool, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    if existing:
        make_folder(path, "old")
        (path / "gone.txt").write_text("not in the new one")
    with replacing_folder(path) as partial:
        assert list(partial.iterdir()) == []
        assert partial.parent == path.parent
        assert partial.name.endswith(".partial")
        (partial / "a.txt").write_text("new")
        assert path.exists() == existing
    assert tree(tmp_path) == {"deep": None, "deep/out": None, "deep/out/a.txt": b"new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_an_error_while_a_folder_is_written_leaves_everything_as_it_was(
    existing: bool, error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "out"
    if existing:
        make_folder(path, "old")
    before = tree(tmp_path)

    def write_half() -> None:
        with replacing_folder(path) as partial:
            make_folder(partial / "inner", "half")
            raise error

    with pytest.raises(error):
        write_half()
    assert tree(tmp_path) == before


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "out"
    make_folder(path, "old")
    make_folder(tmp_path / ".out.partial" / "inner", "half")
    make_folder(tmp_path / ".out.previous.partial", "older")
    with replacing_folder(path) as partial:
        assert list(partial.iterdir()) == []
        (partial / "a.txt").write_text("new")
    assert tree(tmp_path) == {"out": None, "out/a.txt": b"new"}


@pytest.mark.parametrize("fails", [False, True], ids=["next-run-succeeds", "next-run-fails"])
def test_a_folder_killed_between_its_two_renames_is_recovered(fails: bool, tmp_path: Path) -> None:
    path = tmp_path / "out"
    make_folder(tmp_path / ".out.previous.partial", "old")
    make_folder(tmp_path / ".out.partial", "complete, but not yet in place")

    with pytest.raises(KeyboardInterrupt) if fails else nullcontext(), replacing_folder(path) as partial:
        (partial / "a.txt").write_text("new")
        if fails:
            raise KeyboardInterrupt
    assert tree(tmp_path) == {"out": None, "out/a.txt": b"old" if fails else b"new"}


@pytest.mark.parametrize("n_calls", range(1, 12))
def test_no_half_removed_folder_is_put_back_though_its_removal_was_killed(
    n_calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    make_folder(path, "old")
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
    assert tree(tmp_path) in ({}, {"out": None, "out/a.txt": b"old"})


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
    make_folder(path, "old")
    for function in (os.rename, os.replace):

        def refuse_the_new_one(source: Path, target: Path, move: Callable[[Path, Path], None] = function) -> None:
            if source.name == ".out.partial":
                raise PermissionError(errno.EACCES, "refused", str(source), None, str(target))
            move(source, target)

        monkeypatch.setattr(os, function.__name__, refuse_the_new_one)
    with pytest.raises(PermissionError, match="refused"), replacing_folder(path) as partial:
        (partial / "a.txt").write_text("new")
    assert tree(tmp_path) == {"out": None, "out/a.txt": b"old"}


@pytest.mark.parametrize("replacing", [replacing_file, replacing_folder])
def test_a_place_that_cannot_be_written_is_an_os_error(
    replacing: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("old")
    entered = False
    with pytest.raises(NotADirectoryError), replacing(tmp_path / "file" / "below" / "a"):
        entered = True
    assert not entered
    assert tree(tmp_path) == {"file": b"old"}


def test_files_that_belong_together_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    paths = [tmp_path / "a.txt", tmp_path / "deep" / "b.txt"]
    for path in paths:
        write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_texts({paths[0]: "new", paths[1]: "half \udc80"})
    assert tree(tmp_path) == {"a.txt": b"old", "deep": None, "deep/b.txt": b"old"}
    write_texts(dict.fromkeys(paths, "new"))
    assert tree(tmp_path) == {"a.txt": b"new", "deep": None, "deep/b.txt": b"new"}


def with_a_file_system_without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)


def test_where_there_are_no_locks_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_a_file_system_without_locks(monkeypatch)
    with locked(tmp_path / "a.running", "this"), locked(tmp_path / "a.running", "this"):
        pass


def test_a_lock_is_there_for_as_long_as_its_block_runs(tmp_path: Path) -> None:
    path = tmp_path / "a.running"
    path.write_text("process 1 that was killed long ago, and holds no lock")
    with locked(path, "this"):
        assert is_locked(path)
    assert tree(tmp_path) == {}


def make_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "a pipe, socket or device"),
        (lambda path: path.symlink_to("/dev/zero"), "a pipe, socket or device"),
        (Path.mkdir, "a folder"),
        (make_loop, "cannot be read"),
        (lambda path: path.write_bytes(b"12345"), "5 bytes, more than the 4"),
    ],
    ids=["pipe", "device", "folder", "looping link", "too large"],
)
def test_what_is_no_file_of_the_right_size_is_refused_before_it_is_read(
    make: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    make(tmp_path / "a")
    with pytest.raises(PipelineError, match=said) as caught:
        read_file(tmp_path / "a", 4)
    assert str(caught.value).startswith(f"{tmp_path / 'a'}: ")


def test_a_small_file_takes_little_memory_however_large_it_may_be(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    tracemalloc.start()
    assert read_file(tmp_path / "a", 2**40) == b"1234"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_a_file_is_read_through_links(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert read_file(tmp_path / "b", 4) == b"1234"
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "c", 4)


# Every way of this package, and of what it is built on, to open a file by its path.
OPENERS = {
    *(
        "open",
        "read_text",
        "read_bytes",
        "read_csv",
        "read_json",
        "read_table",
        "read_parquet",
        "read_pickle",
        "fdopen",
    ),
    *(
        "load",
        "fromfile",
        "loadtxt",
        "genfromtxt",
        "memmap",
        "imread",
        "load_file",
        "safe_open",
        "open_group",
        "FileIO",
    ),
    *("open_array", "open_consolidated", "GzipFile", "ZipFile", "TarFile", "file_digest", "copyfile", "copy2"),
}
# How calls begin that have one of those names and open nothing that somebody else may have put there.
HARMLESS = (
    "os.open(os.devnull",
    # The package's own files.
    *("resources.files(", "pd.read_csv(file)", "file.read_text(encoding='utf-8')", "source.read_text("),
    # What read_file has read.
    *(
        "YAML(typ='safe').load(text)",
        "yaml.load(read_file(",
        "pd.read_csv(io.BytesIO(content)",
    ),
    *(
        "gzip.open(io.BytesIO(content)",
        "tarfile.open(fileobj=io.BytesIO(content)",
        "safetensors.torch.load(content",
    ),
    "Image.open(BytesIO(content)",
    *("torch.load(io.BytesIO(content)", "archive.open(member)"),
    # A store that looks at files before it opens them.
    "zarr.open_group(BoundedStore(path",
    "zarr.open_group(files",
    # Functions of ours, which are looked at where they are defined.
    *("load(params_path)", "load(model)", "brought.load(", "sources.load(spec", "storage.load("),
)


def opening_calls(path: Path) -> list[str]:
    """The calls in a module that may open a file, as text."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = {node: getattr(node.func, "attr", getattr(node.func, "id", None)) for node in nodes}
    return [ast.unparse(node) for node in nodes if names[node] in OPENERS]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"runtime.files"}))
def test_only_one_module_opens_files(module: str) -> None:
    assert [call for call in opening_calls(MODULES[module]) if not call.startswith(HARMLESS)] == []


def test_the_search_for_calls_finds_them(tmp_path: Path) -> None:
    code = "open(p)\np.open()\nPath('x').read_text()\npd.read_csv(p)\nnp.load(p)\nz = [gzip.open(p) for p in q]\n"
    (tmp_path / "x.py").write_text(code)
    assert len(opening_calls(tmp_path / "x.py")) == 6


# Links and pipes that somebody has put in the place of what is written.


def test_nothing_is_written_through_a_link_that_lies_in_a_temporary_files_place(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / ".a.txt.partial").symlink_to(mine)
    write_text(tmp_path / "a.txt", "new")
    make_folder(tmp_path / "others", "mine")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "others")
    (tmp_path / ".out.previous.partial").symlink_to(tmp_path / "others")
    with replacing_folder(tmp_path / "out") as partial:
        (partial / "b.txt").write_text("new")
    assert tree(tmp_path) == {
        **{"a.txt": b"new", "mine": b"mine", "others": None, "others/a.txt": b"mine", "out": None, "out/b.txt": b"new"}
    }


@pytest.mark.parametrize("make", [os.mkfifo, make_loop, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_does_not_stop_a_file_or_folder_from_taking_its_place(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    for name in (".a.txt.partial", ".out.partial", "out"):
        make(tmp_path / name)
    write_text(tmp_path / "a.txt", "new")
    with replacing_folder(tmp_path / "out") as partial:
        (partial / "b.txt").write_text("new")
    assert tree(tmp_path) == {"a.txt": b"new", "out": None, "out/b.txt": b"new"}


def link_to_mine(path: Path) -> None:
    path.with_name("mine").write_text("mine")
    path.symlink_to(path.with_name("mine"))


@pytest.mark.parametrize(
    "make", [os.mkfifo, make_loop, Path.mkdir, link_to_mine, lambda path: path.symlink_to("/dev/zero")]
)
def test_what_is_no_file_in_a_locks_place_is_refused_and_left_alone(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "a.running"
    make(path)
    before = {file: (file.lstat(), file.read_bytes() if file.name == "mine" else b"") for file in tmp_path.iterdir()}
    entered = False
    with (
        pytest.raises(PipelineError, match=r"a\.running: not a file, as a lock is; remove it"),
        locked(path, "x"),
    ):
        entered = True
    assert not entered
    assert before.keys() == set(tmp_path.iterdir())
    assert all(not content or file.read_bytes() == content for file, (_, content) in before.items())
