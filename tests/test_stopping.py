"""A signal ends a process and what it has begun, in time and in one line."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.runtime.stopping import run_command
from tests.conftest import ROOT
from tests.test_compiled import wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no sh, no such signals")
CODE = """
import os, signal, subprocess, sys, threading, time
from pipeline.runtime.stopping import ended_when_stopped, stop_on_signals

for number in (signal.SIGINT, signal.SIGHUP):  # ignored where tests run in the background, or under nohup
    signal.signal(number, signal.SIG_DFL)
stop_on_signals("stopped by {signal}")
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
child = subprocess.Popen(["sleep", "60"])
with ended_when_stopped(child.kill):
    try:
        print(child.pid, flush=True)
        os.kill(os.getpid(), signal.NUMBER)
        time.sleep(60)
    finally:
        os.write(2, b"this is not said")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_process_and_what_it_has_begun_in_one_line(name: str) -> None:
    command = [sys.executable, "-c", CODE.replace("NUMBER", name)]
    began = time.monotonic()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    assert time.monotonic() - began < 5
    assert result.stderr == f"stopped by {name}\n"
    assert result.returncode < 0
    assert not Path("/proc", result.stdout.strip(), "exe").exists()


def test_a_command_that_takes_too_long_is_ended_with_all_that_it_has_begun(tmp_path: Path) -> None:
    number = tmp_path / "number"
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        run_command(["sh", "-c", f"sleep 60 & echo $! > {number}; wait"], timeout=0.5)
    assert time.monotonic() - began < 10
    wait_until(lambda: not Path("/proc", number.read_text().strip(), "exe").exists())


def test_a_command_that_fails_tells_what_it_said() -> None:
    assert run_command(["sh", "-c", "cat; echo this"]).stdout == "this\n"
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_command(["sh", "-c", "echo why >&2; exit 3"])
    assert (error.value.returncode, error.value.stderr) == (3, "why\n")
