"""Tells the C library to keep freed memory, which training uses again at once."""

import ctypes
import sys


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
