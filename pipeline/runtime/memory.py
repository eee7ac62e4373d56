"""Free memory, and what the C library does with it."""

import ctypes
import sys
from contextlib import suppress
from math import inf
from pathlib import Path

import psutil

from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import read_file

_MAX_BYTES = 2**16
_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available() -> int:
    """Return the free memory of this machine, or of the container or job if that has less, in bytes.

    Limits are those of cgroups of version 2, which Kubernetes, Slurm and systemd set.
    """
    free: float = psutil.virtual_memory().available
    with suppress(PipelineError, OSError, ValueError, IndexError):  # no Linux, or no cgroups
        own = read_file(_OWN_CGROUP, _MAX_BYTES).decode().partition("0::")[2].splitlines()[0]
        folder = _CGROUPS / own.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(_CGROUPS):
                free = min(free, _free_in(group))
    return int(free)


def _free_in(group: Path) -> float:
    """The memory that processes of a group may still take, in bytes; infinite without a limit."""
    try:
        limit, used = (int(read_file(group / f"memory.{name}", _MAX_BYTES)) for name in ("max", "current"))
        stat = dict(line.split() for line in read_file(group / "memory.stat", _MAX_BYTES).decode().splitlines())
    except (PipelineError, OSError, ValueError):  # "max", or the root, which has no limit
        return inf
    return max(0, limit - used + int(stat.get("inactive_file", 0)))  # the page cache gives way


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next array instead of returning it to the system, which costs page faults.

    Measured: a training step of the fast recipe takes 0.46 instead of 0.55 s, one max pooling 6 instead of 33 ms, a
    block of noise 1.9 instead of 2.3 ms.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            trim_threshold, top_pad, mmap_max = -1, -2, -4
            libc.mallopt(mmap_max, 0)
            libc.mallopt(trim_threshold, 2**31 - 1)
            libc.mallopt(top_pad, 2**28)
