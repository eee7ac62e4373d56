"""All commands, and the messages for errors that a user can fix."""

import errno
import sys
from typing import Any

import click

from pipeline.runtime.errors import PipelineError, lacks_memory, printable
from pipeline.stages.ablations import ablations
from pipeline.stages.check import check
from pipeline.stages.clean import clean
from pipeline.stages.describe import describe
from pipeline.stages.evaluate import evaluate
from pipeline.stages.impact import impact
from pipeline.stages.import_model import import_model
from pipeline.stages.perturb import perturb
from pipeline.stages.plan import plan
from pipeline.stages.prepare import prepare
from pipeline.stages.profile import profile
from pipeline.stages.report import report
from pipeline.stages.strategies import strategies
from pipeline.stages.train import train
from pipeline.stages.verify import verify

_PATH = "check that path"
_ADVICE = {
    errno.ENOSPC: "free some disk space and run again",
    errno.EDQUOT: "your quota is used up: free some disk space and run again",
    errno.EFBIG: "a limit on file sizes is in force (ulimit -f): raise it",
    errno.EACCES: "check who owns it and its permissions",
    errno.EPERM: "check who owns it and its permissions",
    errno.EROFS: "the file system is read-only: run in a folder that can be written",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "all programs together have too many files open: end some of them",
    errno.EAGAIN: "no process or thread can be added: end others, or raise the limit (ulimit -u)",
    errno.EPIPE: "a process that this one talks to has ended: run again",
    errno.ECONNRESET: "a process that this one talks to has ended: run again",
    errno.ENOTCONN: "the file system is no longer connected: mount it anew",
    errno.ESTALE: "the file system is no longer connected: mount it anew",
    errno.EIO: "the disk, or the way to it, fails: see the system's log",
}
# Workers, their pipes, and a store take a few dozen.
_FEWEST_OPEN_FILES = 64
_ASK_FOR_LESS = "ask for less in params.yaml, such as a smaller batch_size, or run with fewer --workers"


def _explain(error: Exception) -> str | None:
    """Return the message for an error that the user can fix; None for a bug."""
    text = " ".join(str(error).split())
    match error:
        case PipelineError():
            return str(error)
        case _ if lacks_memory(error):
            return f"not enough memory{f' ({text[:200]})' if text else ''}; {_ASK_FOR_LESS}"
        case OSError(filename=None):
            # Not about a path: the message must name nothing that could be taken for one.
            name = errno.errorcode.get(error.errno or 0, type(error).__name__)
            return f"{error.strerror or text}; {_ADVICE.get(error.errno or 0, f'the system refuses it ({name})')}"
        case OSError():
            return f"{error.filename}: {error.strerror or text}; {_ADVICE.get(error.errno or 0, _PATH)}"
        case UnicodeEncodeError():
            return f"{error.object!a}: cannot be written as {error.encoding}; set LC_ALL=C.UTF-8"
        case ValueError() if "is malformed, original error message" in text:  # from the reader of zarr's settings
            return f"{text}; fix or remove that file (ZARR_CONFIG says where else zarr looks)"
        case Warning():
            return f"{text} (PYTHONWARNINGS or -W makes an error of this warning)"
        case RuntimeError() if "can't start new thread" in text:
            return f"{text}; {_ADVICE[errno.EAGAIN]}"
    if isinstance(error, RuntimeError) and "does not have a deterministic implementation" in text:
        return f"{text.partition('.')[0]}; choose another architecture, or device: cpu"
    return None


def _most_open_files() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return _FEWEST_OPEN_FILES
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _FEWEST_OPEN_FILES if limit == resource.RLIM_INFINITY else limit


class _Group(click.Group):
    """Turns errors that users can fix into one message and exit status 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the pipeline, not alphabetically."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            text = _explain(error)
            if text is None:
                raise
            raise click.ClickException(printable(text)) from None


@click.group(cls=_Group)
def main() -> None:
    """Measure how much accuracy image classifiers lose when cameras damage images.

    The commands from check to report are the stages that `dvc repro` runs, and work without DVC too.
    """
    n_files = _most_open_files()
    if n_files < _FEWEST_OPEN_FILES:
        raise PipelineError(f"ulimit -n: {n_files} open files are too few; allow {_FEWEST_OPEN_FILES} or more")
    if sys.flags.optimize:
        raise PipelineError("PYTHONOPTIMIZE: zarr does not work without its assert statements; unset it, leave out -O")


for command in (check, prepare, perturb, train, import_model, impact, strategies, evaluate, ablations, report):
    main.add_command(command)
main.add_command(describe)
main.add_command(plan)
main.add_command(verify)
main.add_command(profile)
main.add_command(clean)
