"""Output that perhaps nobody reads: what cannot be written is lost, and the work goes on."""

import errno
import io
import os
import select
import sys
from typing import Any


class _Outlet(io.FileIO):
    """A stream that leads to nowhere from the moment that writing to it fails."""

    def write(self, content: Any) -> int:
        try:
            while (n_written := super().write(content)) is None:  # others have made it one that does not wait
                select.select([], [self], [])
        except OSError as error:
            number = self.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
            # A broken pipe only says that the reader has seen enough, as `head` has.
            if number == 1 and error.errno != errno.EPIPE:
                sys.stderr.write(f"standard output: {error.strerror}; what is said from here on is lost\n")
            return len(content)
        return n_written


def outlive_readers() -> None:
    """Let no write to standard output or error fail from now on, in this process and in those that it forks.

    Streams that are closed are opened to nowhere: or the next file to be opened would have their number, and what
    libraries say would go into it. What the encoding of a stream does not have is written as an escape.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    if sys.platform != "win32":  # whose consoles are no files
        sys.stdout, sys.stderr = _open(1, sys.stdout), _open(2, sys.stderr)


def _open(number: int, old: Any) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(_Outlet(number, "wb", closefd=False)),
        encoding=None if old is None else old.encoding,
        errors="backslashreplace",
        line_buffering=True,  # and click, which has a wrapper of its own around some, does not overtake
    )
