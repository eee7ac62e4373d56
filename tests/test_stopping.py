"""Signals wait where they are told to, whichever thread the system hands them to."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

CODE = """
import os, signal, threading, time
from pipeline.stopping import signals_delayed, stop_on_signals

for number in (signal.SIGINT, signal.SIGHUP):  # ignored where tests run in the background, or under nohup
    signal.signal(number, signal.SIG_DFL)
stop_on_signals("stopped by {signal}")
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
with signals_delayed("SIGHUP"):
    os.kill(os.getpid(), signal.NUMBER)
    time.sleep(0.2)
    os.write(2, b"block has ended, ")
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_waits_for_the_end_of_the_block_though_other_threads_do_not_block_it(name: str) -> None:
    command = [sys.executable, "-c", CODE.replace("NUMBER", name)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    assert result.stderr == f"block has ended, stopped by {name}\n"
    assert result.returncode < 0
