"""The command line: `python -m pipeline COMMAND`."""

import _signal  # type: ignore[import-not-found]  # `signal` makes enums of it, which takes a millisecond


def start() -> None:
    """Run the command that the process was started with."""
    # Imports take a tenth of a second, in which Ctrl-C would end in a traceback. Instead it ends the process: silently
    # during the first import, with a message during the others.
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    from pipeline.runtime.stopping import stop_on_signals

    stop_on_signals("Stopped by {signal}: no output is half written; run again to go on.")
    from pipeline.commands import main
    from pipeline.runtime.memory import keep_freed_memory
    from pipeline.runtime.streams import outlive_readers

    outlive_readers()
    keep_freed_memory()
    main(prog_name="python -m pipeline")


if __name__ == "__main__":
    start()
