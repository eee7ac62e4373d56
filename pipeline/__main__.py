"""The command line: `python -m pipeline COMMAND`."""

import errno
from typing import Any

import click

from pipeline.errors import PipelineError
from pipeline.stages.ablations import ablations
from pipeline.stages.check import check
from pipeline.stages.clean import clean
from pipeline.stages.confusion import confusion
from pipeline.stages.evaluate import evaluate
from pipeline.stages.figures import figures
from pipeline.stages.impact import impact
from pipeline.stages.perturb import perturb
from pipeline.stages.prepare import prepare
from pipeline.stages.profile import profile
from pipeline.stages.report import report
from pipeline.stages.strategies import strategies
from pipeline.stages.train import train
from pipeline.stages.verify import verify
from pipeline.stopping import stop_on_signals

_ADVICE = {
    errno.ENOSPC: "free some disk space and run again",
    errno.EDQUOT: "your quota is used up: free some disk space and run again",
    errno.EFBIG: "a limit on file sizes is in force (ulimit -f): raise it",
    errno.EACCES: "check who owns it and its permissions",
    errno.EROFS: "the file system is read-only: run in a folder that can be written",
}


class _Group(click.Group):
    """Turns the errors that users can mend into one message and exit status 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of the pipeline, not of the alphabet."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PipelineError as error:
            # What a damaged file holds may be quoted: no lone surrogates, no commands for the terminal.
            text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(error))
            raise click.ClickException(text) from None
        except MemoryError as error:
            raise click.ClickException(f"not enough memory ({error}); ask for less in params.yaml") from None
        except OSError as error:
            advice = _ADVICE.get(error.errno or 0, "check that path")
            raise click.ClickException(f"{error.filename or 'output'}: {error.strerror or error}; {advice}") from None


@click.group(cls=_Group)
def main() -> None:
    """How far image classifiers fall when cameras damage images.

    Each command is one stage of the pipeline that `dvc repro` runs, and works without DVC too.
    """


for command in (check, prepare, perturb, train, impact, figures, strategies, evaluate, ablations, confusion, report):
    main.add_command(command)
main.add_command(verify)
main.add_command(profile)
main.add_command(clean)


def start() -> None:
    """Run the command that the process was started with."""
    stop_on_signals("Stopped by {signal}: no output is half written; run again to go on.")
    main(prog_name="python -m pipeline")


if __name__ == "__main__":
    start()
