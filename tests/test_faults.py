"""Stages that are killed, stopped, run twice at once or find no room or damaged data: nothing is lost, nothing half."""

import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.sources import Arrays
from pipeline.runtime import layout
from pipeline.runtime.files import is_locked, locked
from tests.children import Child
from tests.conftest import FAULTS_SEED, MakeOnce, WriteParams, differing, restore, tree, write_originals

COMMANDS = {
    "prepare": "prepare mnist",
    "perturb": "perturb mnist noise",
    "train": "train mnist",
    "impact": "impact mnist",
    "strategies": "strategies mnist --workers 2",
    "evaluate": "evaluate mnist",
    "report": "report",
}
OUTPUTS = {
    "prepare": [layout.clean_store("mnist")],
    "perturb": [layout.perturbed_store("mnist", "noise")],
    "train": [layout.natural_models("mnist"), layout.natural_curves("mnist")],
    "impact": [layout.cells("impact", "mnist"), layout.examples("mnist"), layout.summary("impact", "mnist")],
    "strategies": [layout.strategy_models("mnist"), layout.strategy_curves("mnist")],
    "evaluate": [layout.cells("evaluate", "mnist"), layout.summary("evaluate", "mnist"), layout.confusion("mnist")],
    "report": [layout.report()],
}
KILLED = ["prepare", "perturb", "train", "strategies", "evaluate"]
State = dict[str, bytes | None] | bytes | None


@pytest.fixture
def finished(made_once: MakeOnce, tiny_datasets: dict[str, Arrays], write_params: WriteParams) -> Path:
    """The current folder, with a study of two perturbations of the tiny MNIST, done by real processes."""

    def fill(values: dict[str, Any]) -> None:
        shutil.rmtree("data")
        write_originals(Path("originals"), tiny_datasets["mnist"])
        values["prepare"].update(sources=["local"], local_folder="originals")
        values["datasets"] = {"mnist": {**values["datasets"]["mnist"], "n_train": 300, "n_test": 200}}
        for name in ("stuck", "dead", "blur"):
            del values["perturbations"][name], values["evaluate"]["levels"][name]
        values["strategies"] = {"constant": {}}
        values["ablations"] = {"inputs": {"channel": {"standardize": "channel"}}}
        write_params(values)
        *before, report = COMMANDS.values()
        for command in (*before[:2], "perturb mnist hot", *before[2:], "ablations mnist", report):
            run(command)
        assert leftovers() == []

    return made_once(fill)


def run(command: str, status: int = 0) -> str:
    """What a command says that nobody disturbs."""
    with Child(*command.split()) as child:
        assert child.end() == status, child.said()
        return child.said()


def state(path: Path) -> State:
    return tree(path) if path.is_dir() else path.read_bytes() if path.exists() else None


def put(path: Path, content: State) -> None:
    """Give an output this content."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if isinstance(content, dict):
        path.mkdir(parents=True)
        restore(path, content)
    elif content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def outputs(stage: str) -> dict[Path, State]:
    return {path: state(path) for path in OUTPUTS[stage]}


def check_whole(stage: str, new: dict[Path, State]) -> None:
    """That a stage has made these outputs, and left nothing else."""
    assert outputs(stage) == new
    assert leftovers() == []


def leftovers() -> list[str]:
    """What only a run under way may have; a lock that nobody holds is none."""
    found = [path for suffix in ("partial", "running", "checkpoint") for path in Path().rglob(f"*.{suffix}")]
    return [str(path) for path in found if path.suffix != ".running" or is_locked(path)]


def is_gone(child: Child) -> bool:
    """Whether no process of it is left."""
    try:
        os.killpg(child.pid, 0)
    except ProcessLookupError:
        return True
    return False


@cache
def measure(stage: str) -> float:
    """Seconds that an undisturbed run takes which has everything to do."""
    seconds = []
    for _ in range(3):
        shutil.rmtree(layout.cached_models(), ignore_errors=True)
        began = time.monotonic()
        run(COMMANDS[stage])
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds)


def number_of(path: Path) -> int | None:
    """Of the file or folder, another one if it was replaced; None if it is not there."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def wait_for(child: Child, kind: str, paths: list[Path], before: list[int | None]) -> None:
    """Until a run has begun to write its outputs, or has replaced them all, or has ended."""
    hidden = [path.with_name(f".{path.name}.partial") for path in paths]
    while child.process.is_alive():
        replaced = [number_of(path) != number for path, number in zip(paths, before, strict=True)]
        if all(replaced) or (kind == "begun" and (any(replaced) or any(path.exists() for path in hidden))):
            break
        time.sleep(0.0002)


# Killed.


@pytest.mark.parametrize("n_kills", [pytest.param(6, id="quick"), pytest.param(400, id="long", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", KILLED)
def test_a_stage_killed_at_any_moment_leaves_whole_outputs_and_ends_with_the_same_bytes(
    stage: str, n_kills: int, finished: Path
) -> None:
    new = outputs(stage)
    old: dict[Path, State] = {
        path: {"old": b"old"} if isinstance(content, dict) else b"old" for path, content in new.items()
    }
    duration, rng = measure(stage), random.Random(f"{FAULTS_SEED} {stage}")
    # At moments that lie evenly over its time; and as it has begun to write its outputs or has replaced them, which
    # some stages do in a hundredth of their time.
    kinds, n_timed, moments = ["any", "begun", "any", "replaced", "any", "begun"], 0, Counter({"before": 0})
    while moments.total() < n_kills:
        if rng.random() < 0.5:  # otherwise it goes on from where it was killed
            shutil.rmtree(layout.cached_models(), ignore_errors=True)
        begin = rng.choice([old, dict.fromkeys(new)])
        for path, content in begin.items():
            put(path, content)
        hidden, numbers = set(leftovers()), [number_of(path) for path in begin]
        with Child(*COMMANDS[stage].split()) as child:
            kind = kinds[moments.total() % len(kinds)]
            if kind == "any":
                time.sleep((n_timed + rng.random()) / 4 % 1 * duration)
                n_timed += 1
            else:
                wait_for(child, kind, list(begin), numbers)
                time.sleep(rng.choice([0, 0.001]) * rng.random())
            # The workers too, or only the process that was started, as `kill -9` does.
            (child.signal_all if rng.random() < 0.5 else child.signal)(signal.SIGKILL)
            status = child.end()
            now = outputs(stage)
        if status == 0:
            assert now == new
            continue
        assert status == -signal.SIGKILL, child.said()
        for path, content in now.items():
            allowed = [None, begin[path], new[path]]
            if any(".previous." in name for name in hidden):  # put back: killed before as its output was replaced
                allowed.append(old[path])
            assert content in allowed, path
        begun = [name for name in leftovers() if name not in hidden and not name.endswith(".running")]
        moments["after" if now == new else "during" if begun or now != begin else "before"] += 1
        if rng.random() < 0.1:
            run(COMMANDS[stage])
            check_whole(stage, new)
    sys.stdout.write(f"{stage}: killed {dict(moments)} its output appears, {duration:.2f} s undisturbed\n")
    assert moments["before"]
    assert moments["during"] + moments["after"]
    run(COMMANDS[stage])
    check_whole(stage, new)


# Stopped.

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("stage", COMMANDS)
@pytest.mark.parametrize("n_stops", [pytest.param(3, id="quick"), pytest.param(100, id="long", marks=pytest.mark.slow)])
def test_a_stage_that_is_stopped_ends_at_once_with_one_line_and_no_output_half(
    stage: str, n_stops: int, finished: Path
) -> None:
    new = outputs(stage)
    duration, rng = measure(stage), random.Random(f"{FAULTS_SEED} {stage} stop")
    stopped = tried = 0
    while stopped < (n_stops // 2 if stage == "report" else n_stops):
        tried += 1
        assert tried < 20 * n_stops, "it ends before it is stopped"
        shutil.rmtree(layout.cached_models(), ignore_errors=True)
        number = SIGNALS[stopped % len(SIGNALS)]
        with Child(*COMMANDS[stage].split()) as child:
            child.wait_until_begun()
            time.sleep(rng.uniform(0, duration))
            # As a terminal, or as `kill`.
            (child.signal_all if rng.random() < 0.5 else child.signal)(number)
            began = time.monotonic()
            status = child.end()
            took = time.monotonic() - began
            said, gone = child.said(), is_gone(child)
        if status == 0:
            continue
        stopped += 1
        assert status == -number, said
        assert took < 2
        assert gone
        *before, last = said.splitlines()
        assert last == f"Stopped by {number.name}: no output is half written; run again to go on."
        assert not [line for line in before if not re.match("mnist |data/|models/|metrics/", line)]
        for path, content in new.items():
            assert state(path) == content, path
    if stage in ("train", "strategies", "impact", "evaluate"):
        run("train mnist")  # made models anew
    run(COMMANDS[stage])
    check_whole(stage, new)


# No room.

ERROR = r"(?s)(.*\n)?Error: [^\n]*{}[^\n]*\n"


@pytest.fixture
def disk(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of its own with the finished study, the current folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here: not root, or in a container")
    try:
        shutil.copytree(finished, folder / "study")
        monkeypatch.chdir(folder / "study")
        yield folder
    finally:
        monkeypatch.chdir(tmp_path)
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, n_free: int) -> None:
    """Leave so many bytes."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    with filler.open("wb", buffering=0) as file:
        with suppress(OSError):
            while file.write(bytes(4096)):
                pass
        file.truncate(max(0, file.tell() - n_free))


@pytest.mark.parametrize("stage", COMMANDS)
def test_a_full_disk_is_one_error_and_leaves_the_previous_output_whole(stage: str, disk: Path) -> None:
    new = outputs(stage)
    n_bytes = sum(file.stat().st_size for path in new for file in (path, *path.rglob("*")) if file.is_file())
    for share in (0, 0.5):
        shutil.rmtree(layout.cached_models(), ignore_errors=True)
        fill(disk, int(share * n_bytes))
        said = run(COMMANDS[stage], status=1)
        advice = "No space left on device; free some disk space and run again"
        assert re.fullmatch(ERROR.format(advice), said), said
        assert outputs(stage) == new
        assert [name for name in leftovers() if not name.endswith(".checkpoint")] == []
    (disk / "filler").unlink()
    run(COMMANDS[stage])
    assert leftovers() == []


@pytest.mark.parametrize("stage", COMMANDS)
def test_a_read_only_file_system_is_one_error_and_changes_nothing(stage: str, disk: Path) -> None:
    shutil.rmtree(layout.cached_models())
    before = tree(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    said = run(COMMANDS[stage], status=1)
    assert re.fullmatch(ERROR.format("Read-only file system; the file system is read-only"), said), said
    assert differing(before, tree(disk)) == []


@pytest.mark.parametrize("stage", COMMANDS)
def test_a_limit_on_file_sizes_is_one_error_and_leaves_the_previous_output_whole(stage: str, finished: Path) -> None:
    shutil.rmtree(layout.cached_models())
    before = tree(finished)
    with Child(*COMMANDS[stage].split(), file_bytes=600) as child:
        assert child.end() == 1, child.said()
        said = child.said()
    assert re.fullmatch(ERROR.format(r"File too large; a limit on file sizes is in force \(ulimit -f\)"), said), said
    cache = layout.cached_models().as_posix()
    assert [path for path in differing(before, tree(finished)) if not path.startswith(cache)] == []


# Two at once.


@pytest.mark.parametrize("stage", KILLED)
def test_a_second_run_waits_for_the_first_and_says_so(stage: str, finished: Path) -> None:
    new = outputs(stage)
    words = COMMANDS[stage].partition(" --")[0]
    with ExitStack() as stack:
        with locked(layout.running(*words.split()), "this test"):
            child = stack.enter_context(Child(*COMMANDS[stage].split()))
            expected = f"{words}: another process is doing this; waiting for it to end\n"
            for _ in range(1000):
                if child.said() == expected:
                    break
                time.sleep(0.01)
            assert child.said() == expected
            time.sleep(0.2)
            assert child.process.is_alive()
            other = {"prepare": "check", "perturb": "perturb mnist hot"}.get(stage)
            if other is not None:
                assert "waiting" not in run(other)  # which has nothing to do with it
        assert child.end() == 0, child.said()
        assert child.said().startswith(expected)
    check_whole(stage, new)


@pytest.mark.parametrize("stage", KILLED)
def test_many_runs_at_once_end_one_after_the_other_with_the_same_bytes(stage: str, finished: Path) -> None:
    new = outputs(stage)
    shutil.rmtree(layout.cached_models())
    with ExitStack() as stack:
        children = [stack.enter_context(Child(*COMMANDS[stage].split())) for _ in range(4)]
        assert [child.end() for child in children] == [0] * 4
        waited = [child for child in children if "; waiting for it to end\n" in child.said()]
    assert len(waited) >= 2  # the last may have come after the first
    check_whole(stage, new)


@pytest.mark.parametrize("stage", ["perturb", "strategies"])
def test_a_run_that_waits_for_one_that_is_killed_takes_its_place(stage: str, finished: Path) -> None:
    new = outputs(stage)
    shutil.rmtree(layout.cached_models())
    lock = layout.running(*COMMANDS[stage].partition(" --")[0].split())
    with Child(*COMMANDS[stage].split()) as first:
        while not is_locked(lock):
            assert first.process.is_alive()
        first.signal(signal.SIGSTOP)  # as slow as can be
        assert lock.exists()
        with Child(*COMMANDS[stage].split()) as second:
            while "another process is doing this; waiting" not in second.said():
                assert second.process.is_alive(), second.said()
                time.sleep(0.01)
            first.signal(signal.SIGKILL)  # and none of its workers, which end by themselves
            assert second.end() == 0, second.said()
            check_whole(stage, new)
