"""Whatever the caller's environment is: commands do their work, or say in one line what is wrong, by its right name."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import click
import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pipeline import commands
from pipeline.perturbations import PERTURBATIONS
from pipeline.runtime import engine, layout
from pipeline.runtime.errors import PipelineError
from tests.conftest import FAULTS_SEED, ROOT, command_environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals, file descriptors, limits")
PIPELINE = [sys.executable, "-m", "pipeline"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the params of profile quick."""
    shutil.copy(ROOT / "profiles/quick.yaml", tmp_path / layout.PARAMS)
    return tmp_path


def shell(script: str, folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-c", script.replace("PIPELINE", " ".join(PIPELINE))],
        cwd=folder,
        env={**command_environment(), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


# What is said of errors.


def run_out(number: int) -> None:
    """Of memory, as torch, numpy, OpenCV and CUDA do."""
    if number == 0:
        torch.empty(2**50)
    if number == 1:
        np.empty(2**47)
    if number == 2:
        raise cv2.error("OpenCV(5.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 9 bytes")
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee documentation")


def say(fail: Callable[[], object]) -> str:
    """What a command says that fails like this."""
    group = commands._Group("main", commands={"fail": click.Command("fail", callback=fail)})
    result = CliRunner().invoke(group, ["fail"])
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert result.output.startswith("Error: ")
    return result.output.removeprefix("Error: ")


@pytest.mark.parametrize("number", range(4), ids=["torch", "numpy", "opencv", "cuda"])
@pytest.mark.parametrize("in_worker", [False, True])
def test_running_out_of_memory_is_one_line_with_advice(number: int, in_worker: bool) -> None:
    worker = engine.LocalProcesses(1)
    said = say(lambda: list(worker.run(run_out, [number])) if in_worker else run_out(number))
    assert re.fullmatch(r"not enough memory \(.+\); ask for less in params\.yaml.*\n", said)


def test_other_errors_of_libraries_are_no_lack_of_memory() -> None:
    assert commands._explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert commands._explain(ValueError("out of memory of mine")) is None
    assert commands._explain(KeyError("a")) is None


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_an_error_without_a_file_name_never_sends_anybody_to_a_path(number: int) -> None:
    said = say(Mock(side_effect=OSError(number, os.strerror(number))))
    assert os.strerror(number) in said
    assert "check that path" not in said
    assert not said.startswith("output")
    assert "None" not in said


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files; raise the limit on open files (ulimit "),
        (OSError(errno.ENOTCONN, "Not connected", "a"), "a: Not connected; the file system is no longer conn"),
        (BlockingIOError(errno.EAGAIN, "Try again"), "Try again; no process or thread can be added: end others, or"),
        (RuntimeError("can't start new thread"), "can't start new thread; no process or thread can be added"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory ([Errno 12] Cannot allocate memory); ask"),
        (ImportError("libtorch.so: failed to map segment from shared object"), "not enough memory (libtorch.so"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), "a/b: No such file; check that path"),
        (OSError(errno.EIO, "I/O error", "a\x1b[2Jb"), "a\\x1b[2Jb: I/O error; the disk, or the way to it, fails"),
        (OSError("not a gzipped file"), "not a gzipped file; the system refuses it (OSError)"),
        (UnicodeEncodeError("ascii", "\xe9", 0, 1, "no"), "'\\xe9': cannot be written as ascii; set LC_ALL=C.UTF-8"),
        (PipelineError("params.yaml: wrong"), "params.yaml: wrong"),
        (RuntimeWarning("no C compiler"), "no C compiler (PYTHONWARNINGS or -W makes an error of this warning)\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_is_said_by_its_right_name(error: BaseException, expected: str) -> None:
    assert say(Mock(side_effect=error)).startswith(expected)


# Signals.


@pytest.mark.parametrize("n", [pytest.param(4, id="quick"), pytest.param(400, id="long", marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", ["check", "verify --data", "prepare mnist", "report"])
def test_ctrl_c_at_any_moment_from_the_start_shows_no_code_of_ours(command: str, n: int, folder: Path) -> None:
    rng = random.Random(f"{FAULTS_SEED} {command} early")
    ends = {"line": 0, "silent": 0, "Python's": 0, "done": 0}
    for _ in range(n):
        with subprocess.Popen(
            [*PIPELINE, *command.split()],
            cwd=folder,
            env=command_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as process:
            time.sleep(rng.uniform(0.02, 0.5) if rng.random() < 0.5 else rng.uniform(0.02, 0.1))
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=10)
        if process.returncode in (0, 1) and "Traceback" not in said:
            ends["done"] += 1
        elif said == "Stopped by SIGINT: no output is half written; run again to go on.\n":
            ends["line"] += 1
        elif said == "":  # before the line could be said, or as Python ends
            ends["silent"] += 1
        else:  # Python's own start, in which nothing of ours runs
            ends["Python's"] += 1
            assert f"{os.sep}pipeline{os.sep}" not in said, said
        assert process.returncode != -signal.SIGINT or "Error: " not in said.partition("Traceback")[0]
    sys.stdout.write(f"{command}: {ends}\n")
    assert ends["line"]


# Pipes that close early, streams that are closed, full or cannot say it.


@pytest.mark.parametrize("reader", ["true", "head -1", "head -c 5"])
def test_a_profile_is_put_in_place_though_nobody_reads_what_changes(reader: str, folder: Path) -> None:
    shutil.copytree(ROOT / "profiles", folder / layout.PROFILES)
    result = shell(f"PIPELINE profile paper | {reader}; echo ${{PIPESTATUS[0]}} >&2", folder)
    assert result.stderr == "0\n"
    assert (folder / layout.PARAMS).read_bytes() == (ROOT / "profiles/paper.yaml").read_bytes()


@pytest.mark.parametrize(
    ("redirection", "expected"),
    [
        ("| true", ""),
        ("2>&1 | true", ""),
        (">&-", ""),
        ("<&- >&- 2>&-", ""),
        ("2>&-", f"params.yaml: valid; mnist, cifar10; {', '.join(PERTURBATIONS)}; constant, incremental, transfer\n"),
        (">/dev/full", "standard output: No space left on device; further output is lost\n"),
        (">/dev/full 2>&1", ""),
    ],
)
def test_work_is_done_whoever_listens(redirection: str, expected: str, folder: Path) -> None:
    result = shell(f"PIPELINE check {redirection}; exit ${{PIPESTATUS[0]}}", folder)
    assert result.returncode == 0
    assert result.stdout + result.stderr == expected
    (folder / layout.PARAMS).write_text("device: cpu\n")
    assert shell(f"PIPELINE check {redirection}; exit ${{PIPESTATUS[0]}}", folder).returncode == 1


def test_with_closed_streams_nothing_said_ends_up_in_a_file_that_is_opened(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pipeline.runtime.streams import outlive_readers; outlive_readers(); "
        "file = open('x', 'w'); assert file.fileno() > 2; print('said'); sys.stderr.write('said'); os.write(1, b'said')"
    )
    result = shell(f'{sys.executable} -c "{code}" <&- >&- 2>&-', tmp_path)
    assert result.returncode == 0
    assert (tmp_path / "x").read_bytes() == b""


def test_a_stream_that_does_not_wait_is_written_in_full(tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline.runtime.streams import outlive_readers; outlive_readers(); "
        "[sys.stdout.write('x' * 99 + chr(10)) for _ in range(5000)]"
    )
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with subprocess.Popen([sys.executable, "-c", code], env=command_environment(), stdout=writing) as process:
        os.close(writing)
        time.sleep(1)
        with os.fdopen(reading, "rb") as file:
            assert len(file.read()) == 500_000
    assert process.returncode == 0


# Variables.

# What has nothing to do with each other is together, so that one process shows it all.
ENVIRONMENTS = [
    {"PYTHONIOENCODING": "ascii", "COLUMNS": "0", "TERM": "dumb", "HOME": "", "TMPDIR": "/none", "NO_COLOR": "1"},
    {
        **{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "-5", "TERM": "", "HOME": "/none"},
        **{"TMPDIR": "/dev/null", "FORCE_COLOR": "1"},
    },
    {"COLUMNS": "x", "TERM": "x", "OMP_NUM_THREADS": "x", "CUDA_VISIBLE_DEVICES": "x"},
    {"COLUMNS": "", "PYTHONWARNINGS": "error"},
]


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=str)
@pytest.mark.parametrize(
    ("command", "status", "expected"),
    [
        ("--help", 0, "Usage: python -m pipeline"),
        ("check", 0, "params.yaml: valid; "),
        ("verify --data", 1, "PROBLEM data/"),
    ],
)
def test_commands_work_in_any_environment(
    command: str, status: int, expected: str, environment: dict[str, str], folder: Path
) -> None:
    result = shell(f"PIPELINE {command}", folder, **environment)
    assert (result.returncode, result.stderr) == (status, "")
    assert result.stdout.startswith(expected)


@pytest.mark.parametrize("level", ["1", "2"])
def test_without_assert_statements_it_is_said_that_zarr_needs_them(level: str, tmp_path: Path) -> None:
    result = shell("PIPELINE check", tmp_path, PYTHONOPTIMIZE=level)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: PYTHONOPTIMIZE: zarr does not work without its assert statements; unset it")
    assert shell("PIPELINE --help", tmp_path, PYTHONOPTIMIZE=level).returncode == 0


def test_too_few_open_files_are_said_before_workers_need_them(tmp_path: Path) -> None:
    result = shell("ulimit -n 20; PIPELINE report", tmp_path)
    assert (result.returncode, result.stderr) == (1, "Error: ulimit -n: 20 open files are too few; allow 64 or more\n")


def test_settings_of_zarr_that_are_no_yaml_are_named(folder: Path) -> None:
    (folder / "zarr.yaml").write_text("async: [")
    result = shell("PIPELINE perturb mnist noise", folder, ZARR_CONFIG=str(folder))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert f"{folder}/zarr.yaml" in line
    assert "fix or remove that file" in line


@pytest.mark.parametrize("command", ["check", "prepare mnist", "perturb mnist hot", "report", "verify"])
def test_in_a_folder_that_is_gone_a_command_ends_in_one_line(command: str, tmp_path: Path) -> None:
    result = shell(f"mkdir gone; cd gone; rmdir ../gone; PIPELINE {command}", tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: params.yaml: no such file; run in the repository root")
    assert result.stderr.count("\n") == 1


LONG = "x" * 90


@pytest.mark.parametrize("folder", [LONG, "none", "file", "closed"])
def test_workers_begin_whatever_the_folder_for_temporary_files_is(folder: str, tmp_path: Path) -> None:
    (tmp_path / LONG).mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "work.py").write_text(
        "from pipeline.runtime.engine import LocalProcesses\n"
        "if __name__ == '__main__':\n"
        "    print(sorted(LocalProcesses(2).run(abs, [0, -1, -2])))\n"
    )
    result = shell(f"{sys.executable} work.py", tmp_path, TMPDIR=str(tmp_path / folder))
    assert (result.returncode, result.stdout, result.stderr) == (0, "[(-2, 2), (-1, 1), (0, 0)]\n", "")


def test_too_few_files_that_may_be_open_are_no_damage(tmp_path: Path) -> None:
    code = (
        "import os, resource, zarr; from pathlib import Path; from pipeline.data import store; "
        "zarr.create_group('a.zarr', attributes={'schema_version': store.SCHEMA_VERSION}); "
        "store.open_store(Path('a.zarr'), 'make'); "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) - 1, 4096)); "
        "store.open_store(Path('a.zarr'), 'make')"
    )
    result = shell(f'{sys.executable} -c "{code}"', tmp_path)
    assert result.stderr.splitlines()[-1].startswith("OSError: [Errno 24] Too many open files"), result.stderr
