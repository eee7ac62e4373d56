"""What SECURITY.md promises and no other test holds."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.commands import main
from pipeline.data.sources import Arrays
from tests.conftest import ROOT, WriteParams, command_environment, write_originals
from tests.test_graph import MODULES
from tests.test_params import MODEL

# Python runs this first in every process, those that multiprocessing spawns too. It writes down what reaches out of the
# process, and refuses it; that alone would not do, a library may ask in vain and go on.
WATCH = """
import os, sys

def refuse(event, args):
    reaches_out = event in ("socket.getaddrinfo", "socket.gethostbyname", "os.system", "os.exec", "os.posix_spawn")
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        reaches_out = args[0].family.name != "AF_UNIX"
    if event == "subprocess.Popen":
        reaches_out = os.path.basename(os.fsdecode(args[0])) not in LOCAL
    if reaches_out:
        with open(os.environ["WATCHED"], "a") as log:
            log.write(f"{event} {args[:2]!r}\\n")
        raise PermissionError(f"{event} {args[:2]!r}")

sys.addaudithook(refuse)
with open(os.environ["STARTED"], "a") as log:
    log.write("process\\n")
"""
# What libraries ask about this machine: platform for its name, ctypes for shared libraries.
LOCAL = {"uname", "ldconfig", "gcc", "cc", "ld", "objdump", "fc-list", "system_profiler"}

# One process for all stages: importing torch takes seconds.
STAGES = """
import sys
from pipeline.data import datasets
from pipeline.commands import main
from tests.conftest import make_arrays, tiny_dataset

mnist = datasets.DATASETS["mnist"]
datasets.DATASETS["mnist"] = tiny_dataset(mnist, make_arrays(mnist.shape, len("mnist")))
for command in sys.argv[1:]:
    main(command.split(), standalone_mode=False)
"""


def run_offline(folder: Path, code: str, *arguments: str, **environment: str) -> tuple[int, str, list[str], int]:
    """Status, output, what reached out, and how many processes there were, of code that runs without a network.

    `environment` is set beside that of every command.
    """
    watch = folder / "watch"
    watch.mkdir()
    (watch / "sitecustomize.py").write_text(f"LOCAL = {LOCAL}\n{WATCH}")
    log, started = watch / "log", watch / "started"
    # One thread, as fixture `one_thread` has it.
    watched = {"WATCHED": str(log), "STARTED": str(started), "PYTHONPATH": f"{watch}:{ROOT}", "OMP_NUM_THREADS": "1"}
    # Where the system lets us: a network of our own without any interface, for what is no Python too.
    unshare = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        unshare = []
    command = [*unshare, sys.executable, "-c", code, *arguments]
    environment = command_environment() | watched | environment
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    reached_out = log.read_text().splitlines() if log.exists() else []
    return result.returncode, result.stdout + result.stderr, reached_out, len(started.read_text().splitlines())


def brightness_graph() -> bytes:
    """A graph that tells where the tiny MNIST is bright, which is what its classes differ in."""
    rows = np.zeros((28, 10), np.float32)
    for label in range(10):
        rows[2 * label : 2 * label + 6, label] = 1
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["rows"], keepdims=0),
        helper.make_node("MatMul", ["rows", "w"], ["y"]),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 28, 28])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])
    constants = [numpy_helper.from_array(np.array([1, 3]), "axes"), numpy_helper.from_array(rows, "w")]
    graph = helper.make_graph(nodes, "brightness", [given], [answer], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


@pytest.mark.slow
def test_every_stage_runs_without_a_network_in_all_its_processes(
    study: Path, tiny_values: dict[str, Any], tiny_datasets: dict[str, Arrays], write_params: WriteParams
) -> None:
    shutil.rmtree("data")
    shutil.copytree(ROOT / "profiles", "profiles")
    write_originals(Path("originals"), tiny_datasets["mnist"])
    tiny_values["prepare"].update(sources=["local"], local_folder="originals")
    tiny_values["datasets"] = {"mnist": {**tiny_values["datasets"]["mnist"], "n_train": 40, "n_test": 20}}
    (study / "mine.onnx").write_bytes(brightness_graph())
    np.savez(study / "few.npz", images=np.zeros((40, 8, 8), np.uint8), labels=np.arange(40) % 2)
    tiny_values["models"] = {"mine": {**MODEL, "path": "mine.onnx", "classes": None}}
    tiny_values["train"]["recipes"]["mnist"].update(epochs=1, batch_size=20)
    tiny_values["strategies"] = {"constant": {}}
    for name in ("stuck", "dead", "blur"):
        del tiny_values["perturbations"][name], tiny_values["evaluate"]["levels"][name]
    tiny_values["ablations"] = {"components": {"full": {}}}  # the natural model again, so that none is trained
    shutil.copy(write_params(tiny_values), "profiles/mine.yaml")
    commands = [
        *("check", "prepare mnist", "perturb mnist hot --workers 2", "perturb mnist noise --workers 2", "train mnist"),
        *("describe few.npz", "import-model mine", "impact mnist", "strategies mnist --workers 2", "evaluate mnist"),
        *("ablations mnist --workers 2", "report"),
        *("plan", "verify mnist --full", "clean --yes", "profile mine"),
    ]
    assert {command.split()[0] for command in commands} == set(main.commands)
    status, output, reached_out, n_processes = run_offline(study, STAGES, *commands)
    assert status == 0, output
    assert reached_out == []
    assert n_processes > 2  # the workers were watched too


REACHES_OUT = {
    "socket": ("import socket; socket.socket().connect(('192.0.2.1', 80))", "socket.connect"),
    "name": ("import urllib.request as r; r.urlopen('http://example.org')", "socket.getaddrinfo"),
    "program": ("import subprocess; subprocess.run(['curl', 'http://example.org'])", "subprocess.Popen"),
    "child": (
        "import multiprocessing as m, os; m.get_context('spawn').Pool(1).apply(os.system, ('curl example.org',))",
        "os.system",
    ),
}


@pytest.mark.parametrize(("code", "expected"), REACHES_OUT.values(), ids=REACHES_OUT)
def test_what_reaches_out_is_noticed(code: str, expected: str, tmp_path: Path) -> None:
    status, _, reached_out, _ = run_offline(tmp_path, code)
    assert status != 0
    assert [line.split()[0] for line in reached_out[:1]] == [expected]


# Between a stage and its workers jobs are pickled, as Dask's own messages are; nothing of that lies in a file.
ON_A_CLUSTER = ("runtime.cluster", "runtime.engine")


def test_no_module_loads_pickles_or_runs_text() -> None:
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {"pickle", "marshal", "shelve", "dill", "joblib"} & imported or name in ON_A_CLUSTER, name
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        called = {ast.unparse(node.func) for node in calls}
        assert not {"eval", "exec", "np.load", "pd.read_pickle", "os.system"} & called, name
        loads = [ast.unparse(node) for node in calls if ast.unparse(node.func) == "torch.load"]
        assert all("weights_only=True" in load for load in loads), name


# The one command that would ask for updates too.
DVC = "from dvc.cli import main; main(['version'])"


OURS = (ROOT / ".dvc/config").read_text()


# Without our config it tries both: the test sees what it should. Repositories that tests make have no config.
@pytest.mark.parametrize(
    ("config", "environment", "expected"),
    [
        (OURS, {"DVC_NO_ANALYTICS": ""}, set()),
        ("", {"DVC_NO_ANALYTICS": ""}, {"analytics", "updater"}),
        ("", {}, {"updater"}),
    ],
    ids=["our-config", "no-config", "environment-of-tests"],
)
def test_dvc_sends_no_analytics_and_asks_for_no_updates(
    config: str, environment: dict[str, str], expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text(f"{config}[core]\n    no_scm = true\n")
    monkeypatch.delenv("CI", raising=False)  # where it is set, DVC asks for no updates anyway
    _, output, reached_out, _ = run_offline(tmp_path, DVC, **environment)
    assert set(re.findall("'(analytics|updater)'", " ".join(reached_out))) == expected, output
    assert bool(reached_out) is bool(expected)


def test_the_constraints_are_exact_versions_and_name_every_requirement() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(text for extra in extras for text in extra)]
    assert {canonicalize_name(Requirement(text).name) for text in wanted} <= pinned
