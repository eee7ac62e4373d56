"""The one error that users see: what is wrong, where, and what to do."""


class PipelineError(Exception):
    """A mistake in params, inputs or the environment that the user can mend.

    The message stands alone: it names the key or file, the value found, and the way out. Stages print it
    without a traceback and exit with status 1.
    """
