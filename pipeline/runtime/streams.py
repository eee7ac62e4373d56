"""Standard output and error that may lose their reader: failed writes are dropped, and the work goes on."""

import errno
import io
import os
import select
import sys
from typing import Any


class _Outlet(io.FileIO):
    """A stream that leads to the null device once a write to it has failed."""

    def write(self, content: Any) -> int:
        try:
            while (n_written := super().write(content)) is None:  # someone has made it non-blocking
                select.select([], [self], [])
        except OSError as error:
            number = self.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
            # A broken pipe only says that the reader has seen enough, as `head` has.
            if number == 1 and error.errno != errno.EPIPE:
                sys.stderr.write(f"standard output: {error.strerror}; further output is lost\n")
            return len(content)
        return n_written


def outlive_readers() -> None:
    """Let no write to standard output or error fail from now on, in this process and in those that it forks.

    Closed streams are opened to the null device; otherwise the next file opened would get their number, and libraries'
    messages would go into it. Characters that a stream's encoding lacks are written as escapes.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
    if sys.platform != "win32":  # where consoles are not files
        sys.stdout, sys.stderr = _open(1, sys.stdout), _open(2, sys.stderr)


def _open(number: int, old: Any) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(_Outlet(number, "wb", closefd=False)),
        encoding=None if old is None else old.encoding,
        errors="backslashreplace",
        line_buffering=True,  # also keeps the order with click, which puts its own wrapper around some
    )
