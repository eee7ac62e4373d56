"""Code that is compiled when it is first needed: once, whole or not at all, and never without being told."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.models.accelerated import compiled
from pipeline.models.accelerated.compiled import compiler_version, load_library
from tests.conftest import ROOT, command_environment

MACROS = (("ANSWER", 42),)
SOURCE = "int answer(void) { return ANSWER; }\n"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Nothing is known of compilers and libraries, and nothing of this test's afterwards."""
    compiler_version.cache_clear()
    load_library.cache_clear()
    yield
    compiler_version.cache_clear()
    load_library.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the place of the package."""
    monkeypatch.setattr(compiled, "_FOLDER", tmp_path)
    (tmp_path / "code.c").write_text(SOURCE)
    return tmp_path


def answer() -> int:
    load_library.cache_clear()
    library = load_library("code", MACROS)
    assert isinstance(library, ctypes.CDLL)
    return int(library.answer())


def libraries(folder: Path) -> list[Path]:
    return sorted((folder / "__pycache__").iterdir())


def count_calls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a compiler in place that writes its arguments into this file, a line per call."""
    calls, script = folder / "calls", folder / "a compiler"
    script.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\nexec cc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", f"'{script}' -w")
    return calls


def test_a_library_is_compiled_once_and_anew_when_source_macros_or_compiler_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(folder, monkeypatch)
    for _ in range(2):
        assert answer() == 42
    assert [line.split()[:2] for line in calls.read_text().splitlines()] == [["-w", "--version"], ["-w", "-std=gnu11"]]
    assert len(libraries(folder)) == 1
    (folder / "code.c").write_text(SOURCE.replace("ANSWER", "ANSWER + 1"))
    assert answer() == 43
    assert len(libraries(folder)) == 2
    library = load_library("code", (("ANSWER", 7),))
    assert library is not None
    assert library.answer() == 8
    monkeypatch.setattr(compiled, "compiler_version", lambda: "another")
    assert answer() == 43
    assert len(libraries(folder)) == 4
    assert {path.suffix for path in libraries(folder)} == {".so"}


def test_the_compiler_is_named_by_its_version() -> None:
    version = compiler_version()
    assert version is not None
    assert any(character.isdigit() for character in version)
    assert "\n" not in version


def test_no_compiler_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match="no C compiler"):
        assert load_library("code", MACROS) is None
    assert not (folder / "__pycache__").exists()


def test_what_cannot_be_compiled_is_said_with_the_compilers_words_and_leaves_nothing(folder: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"(?s)code\.c: not compiled.*ANSWER"):
        assert load_library("code", ()) is None
    assert libraries(folder) == []


IN_ITS_PLACE: dict[str, Callable[[Path, bytes], object]] = {
    "cut": lambda path, content: path.write_bytes(content[:5000]),
    "bit": lambda path, content: path.write_bytes(content[:-1] + b"!"),
    "empty": lambda path, content: path.touch(),
    "link": lambda path, content: path.symlink_to("nowhere"),
    "pipe": lambda path, content: os.mkfifo(path),
}


@pytest.mark.parametrize("put", IN_ITS_PLACE.values(), ids=IN_ITS_PLACE)
def test_what_is_no_whole_library_in_a_librarys_place_is_compiled_anew(
    put: Callable[[Path, bytes], object], folder: Path
) -> None:
    assert answer() == 42
    (library,) = libraries(folder)
    content = library.read_bytes()
    library.unlink()  # this process has loaded it, and would not survive a change of it
    put(library, content)
    assert answer() == 42
    assert [path.read_bytes() for path in libraries(folder)] == [content]


STOPPED = """
import sys
from pathlib import Path
from pipeline.models.accelerated import compiled
from pipeline.runtime.stopping import stop_on_signals

stop_on_signals("stopped")
compiled._FOLDER = Path(sys.argv[1])
compiled.load_library("code", ())
"""


@pytest.mark.parametrize("slow", ["--version", "compilation"])
def test_a_stop_ends_the_compiler_too_and_leaves_no_library(slow: str, folder: Path) -> None:
    (folder / "__pycache__").mkdir()
    script = folder / "slow"
    script.write_text(f'''#!/bin/sh
if [ "$1" = --version ]; then
  if [ {slow} != --version ]; then echo 1; exit; fi
else
  for last; do :; done
  echo half > "$last"
fi
sleep 60 &
echo $! > "{folder}/number"
wait
''')
    script.chmod(0o755)
    environment = command_environment() | {"CC": str(script)}
    with subprocess.Popen([sys.executable, "-c", STOPPED, str(folder)], env=environment, stderr=subprocess.PIPE) as run:
        number = folder / "number"
        wait_until(lambda: number.exists() and number.read_text().endswith("\n"))
        assert len(libraries(folder)) == (slow == "compilation")
        began = time.monotonic()
        run.send_signal(signal.SIGTERM)
        assert run.wait(10) == -signal.SIGTERM
        assert time.monotonic() - began < 2
        assert run.stderr is not None
        assert run.stderr.read() == b"stopped\n"
    assert all(path.suffix == ".partial" for path in libraries(folder))  # the next `clean` removes it
    wait_until(lambda: not Path("/proc", number.read_text().strip(), "exe").exists())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_code_of_this_package_compiles_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(ROOT / "pipeline/models/accelerated/windows.c", tmp_path)
    monkeypatch.setattr(compiled, "_FOLDER", tmp_path)
    monkeypatch.setattr(compiled, "_FLAGS", (*compiled._FLAGS, "-Wall", "-Wextra", "-Werror"))
    sizes = {"FILTERS": 10, "HEIGHT": 28, "WIDTH": 28, "KERNEL": 7, "STRIDE": 3, "PADDING": 0, "POOL": 2}
    sizes |= {"OUT_HEIGHT": 8, "OUT_WIDTH": 8, "PHASE_HEIGHT": 10, "PHASE_WIDTH": 10}
    assert load_library("windows", tuple(sizes.items())) is not None
