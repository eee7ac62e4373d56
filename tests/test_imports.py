"""Importing this package changes nothing for whoever imports it: no library's settings, no signals, no randomness."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, command_environment

CODE = """
import asyncio, copy, importlib, json, locale, logging, multiprocessing, os
import pkgutil, random, signal, socket, sys, threading, warnings
from decimal import getcontext

import cv2
import numcodecs.registry
import numpy as np
import pandas as pd
import torch
import zarr
import zarr.registry

import pipeline


def registries():
    for name, value in vars(zarr.registry).items():
        if "registr" in name and isinstance(value, dict):
            yield name, {key: dict(one) if isinstance(one, dict) else one for key, one in value.items()}


def states():
    torch_flags = {
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": torch.is_grad_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cudnn": [getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")],
        "mkldnn": torch.backends.mkldnn.enabled,
        "seed": torch.initial_seed(),
        "random state": torch.get_rng_state().tolist(),
        "flush denormal": float(torch.tensor(1e-40) * 1),
    }
    return {
        "zarr.config": copy.deepcopy(zarr.config.config),
        "zarr.config.defaults": copy.deepcopy(zarr.config.defaults),
        "zarr registries": dict(registries()),
        "zarr codec classes": {name: zarr.registry.get_codec_class(name) for name in zarr.config.get("codecs")
                               if not name.startswith("numcodecs")},
        "zarr threads": (zarr.core.sync._executor, zarr.core.sync.loop[0]),
        "numcodecs": dict(numcodecs.registry.codec_registry),
        "numpy errors": np.geterr(),
        "numpy printing": np.get_printoptions(),
        "numpy random": repr(np.random.get_state()),
        "random": random.getstate(),
        "decimal": repr(getcontext()),
        "pandas": {key: pd.get_option(key) for key in pd._config.config._registered_options},
        "cv2": (cv2.getNumThreads(), cv2.useOptimized(), cv2.ocl.useOpenCL()),
        "torch": torch_flags,
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "signal mask": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "warnings": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "umask": (os.umask(0o022), os.umask(0o022)),
        "hooks": (sys.excepthook, threading.excepthook, sys.displayhook, sys.unraisablehook),
        "recursion": (sys.getrecursionlimit(), sys.get_int_max_str_digits()),
        "switching": sys.getswitchinterval(),
        "path": list(sys.path),
        "streams": (sys.stdin, sys.stdout, sys.stderr, sys.stdout.encoding, sys.stdout.line_buffering),
        "logging": (logging.root.level, list(logging.root.handlers), logging.raiseExceptions),
        "locale": locale.setlocale(locale.LC_ALL),
        "sockets": socket.getdefaulttimeout(),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "event loop": type(asyncio.get_event_loop_policy()),
        "threads": threading.active_count(),
        "mkdir": os.mkdir,
    }


with warnings.catch_warnings():
    for name in ("torchvision", "ruamel.yaml", "pydantic", "click", "safetensors.torch", "jinja2"):
        importlib.import_module(name)
    states()
before = states()
imported = []
for module in pkgutil.walk_packages(pipeline.__path__, "pipeline."):
    importlib.import_module(module.name)
    imported.append(module.name)
after = states()
changed = [name for name in before if repr(before[name]) != repr(after[name])]
print(json.dumps([changed, imported]))
"""


@pytest.mark.slow
def test_no_module_changes_the_state_of_a_library_or_of_the_process() -> None:
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    said = subprocess.run(command, cwd=ROOT, env=command_environment(), capture_output=True, text=True, check=True)
    changed, imported = json.loads(said.stdout)
    assert changed == []
    assert len(imported) >= 40
