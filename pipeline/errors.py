"""The one error that users see: what is wrong, where, and what to do."""

import errno


class PipelineError(Exception):
    """A mistake in params, inputs or the environment that the user can mend.

    The message stands alone: it names the key or file, the value found, and the way out. Stages print it
    without a traceback and exit with status 1.
    """


def is_exhausted(error: BaseException) -> bool:
    """Whether memory or open files have run out, which says nothing against the file that was to be read."""
    exhausted = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in exhausted)
