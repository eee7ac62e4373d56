"""Compiles this package's C code, when first needed, for the processor that it runs on."""

import ctypes
import hashlib
import os
import shlex
import subprocess
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from uuid import uuid4

import torch

from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import read_file
from pipeline.runtime.stopping import run_command

# Fused multiply-add depends on the processor; nothing else may change a result, hence no -ffast-math.
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-trapping-math", "-fPIC", "-shared")
_FOLDER = Path(__file__).parent
_MAX_BYTES = 16 * 2**20


@cache
def compiler_version() -> str | None:
    """Return the version line of the C compiler (the environment's CC, or cc); None if there is none."""
    try:
        said = run_command([*_compiler(), "--version"]).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.partition("\n")[0] or None


@cache
def load_library(name: str, macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL | None:
    """Load the functions of a C file, which is compiled once and kept where Python keeps its bytecode.

    Args:
        name: Name of the file in this package, without suffix.
        macros: Names and values.

    Returns:
        The library; None, with a single warning, if it cannot be compiled.
    """
    version = compiler_version()
    if version is None:
        warnings.warn("no C compiler: networks are slower without", RuntimeWarning, stacklevel=2)
        return None
    source = _FOLDER / f"{name}.c"
    arguments = [*_FLAGS, *(f"-D{macro}={value}" for macro, value in macros)]
    decides = [source.read_text(encoding="utf-8"), version, *arguments, str(torch.cpu.get_capabilities())]
    stem = f"{name}.{_digest(chr(0).join(decides).encode())}"
    try:
        return ctypes.CDLL(str(_find(stem) or _compile(source, arguments, stem)))
    except (OSError, subprocess.CalledProcessError) as error:
        problem = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        warnings.warn(f"{source}: not compiled, networks are slower without: {problem}", RuntimeWarning, stacklevel=2)
        return None


def digest_of(library: ctypes.CDLL) -> str:
    """Return the digest of a library from `load_library`; it is in the file name, and was checked when loading."""
    return Path(library._name).name.split(".")[-2]


def _find(stem: str) -> Path | None:
    """Find a library compiled before. Its name ends with its digest, as a damaged one would crash the process."""
    for path in (_FOLDER / "__pycache__").glob(f"{stem}.*.so"):
        with suppress(PipelineError, FileNotFoundError):  # no file, or a link to nowhere
            if path.name == _named(stem, read_file(path, _MAX_BYTES)):
                return path
        with suppress(OSError):
            path.unlink()
    return None


def _compile(source: Path, arguments: list[str], stem: str) -> Path:
    """Compile a library. Several processes may do so at once: each writes its own file until it is complete."""
    folder = _FOLDER / "__pycache__"
    folder.mkdir(exist_ok=True)
    partial = folder / f"{stem}.{uuid4().hex}.partial"  # machines that share the folder may have equal process numbers
    try:
        run_command([*_compiler(), *arguments, str(source), "-o", str(partial)])
        return partial.replace(folder / _named(stem, read_file(partial, _MAX_BYTES)))
    finally:
        partial.unlink(missing_ok=True)


def _named(stem: str, content: bytes) -> str:
    return f"{stem}.{_digest(content)}.so"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC", "")) or ["cc"]
