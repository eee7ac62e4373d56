"""The one error that users see: what is wrong, where, and what to do."""

import errno
import re

# What libraries say of a lack of memory. Their own error classes are not imported for it: torch takes seconds.
_NO_MEMORY = re.compile(r"(allocate|enough|out of|insufficient) memory|ALLOC_FAILED|map segment", re.IGNORECASE)


class PipelineError(Exception):
    """A mistake in params, inputs or the environment that the user can fix.

    The message stands alone: it names the key or file, the value found, and the way out. Stages print it
    without a traceback and exit with status 1.
    """


class UnreachableError(PipelineError):
    """Object storage does not answer, or refuses."""


def is_outage(error: BaseException) -> bool:
    """Whether an error means exhausted or unreachable resources, and so says nothing about the data being read."""
    if isinstance(error, UnreachableError):
        return True
    return isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EMFILE, errno.ENFILE)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error, Python's own or a library's, means that there is not enough memory."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    from_library = isinstance(error, RuntimeError | ImportError) or type(error).__module__ == "cv2"
    return from_library and _NO_MEMORY.search(str(error)) is not None


def printable(text: str) -> str:
    """Escape unprintable characters (lone surrogates, terminal commands) in a text that may quote untrusted input."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
