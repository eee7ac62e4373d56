"""Arguments, options and progress bars that the commands share."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from tqdm import tqdm

from pipeline.runtime import layout
from pipeline.runtime.engine import count_cores
from pipeline.runtime.files import locked

if TYPE_CHECKING:
    from pipeline.study.planning import Study
    from pipeline.training.job import TrainingJob

Entry = TypeVar("Entry")


class Stage(click.Command):
    """A command that waits while the same command is running with the same arguments."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command once no other process runs it with the same arguments."""
        words = [self.name or "", *(ctx.params[item.name] for item in self.params if isinstance(item, click.Argument))]
        with locked(layout.running(*words), " ".join(words)):
            return super().invoke(ctx)


dataset_argument = click.argument("dataset")

params_option = click.option(
    "--params",
    "params_path",
    type=click.Path(path_type=Path, readable=False),  # its reader reports what is wrong with it
    default=layout.PARAMS,
    show_default=True,
    metavar="FILE",
    help="The params file.",
)

workers_option = click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=count_cores,
    help="How much is done at the same time; the bytes written do not depend on it.  [default: all cores, at most 8]",
)

training_workers_option = click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="How many models are trained at the same time; their weights do not depend on it.  [default: all cores, at "
    "most 8; 1 on a GPU]",
)


@contextmanager
def progress_bar(description: str, total: int, unit: str = " images") -> Iterator["tqdm[NoReturn]"]:
    """Show a progress bar with rate and time left; nothing if standard error is not a terminal."""
    with tqdm(total=total, desc=description, unit=unit, unit_scale=True, leave=False, disable=None) as bar:
        yield bar


def say(line: str) -> None:
    """Print a line for people, which is not a result, to standard error."""
    click.echo(line, err=True)


def remove_stale_stores(study: "Study") -> None:
    """Remove a data set's perturbed stores that params do not name, and say so."""
    from pipeline.study import opening

    for path in opening.remove_stale_stores(study):
        click.echo(f"{path}: removed, params do not name it (DVC's cache keeps it)")


def show_training(
    trained: Iterable[tuple["TrainingJob", Entry, bool]], jobs: Sequence["TrainingJob"], description: str
) -> list[tuple["TrainingJob", Entry]]:
    """Show a progress bar and a line for each model as models are finished (`training.work.train_all`).

    Returns:
        Every job with the cache entry of its model, in the order of `jobs`.
    """
    entries = {}
    with progress_bar(description, len(jobs), unit=" models") as bar:
        for job, entry, was_finished in trained:
            entries[job.path] = entry
            bar.update(1)
            bar.write(f"{job.dataset.name} {job.key}: {'from the model cache' if was_finished else 'trained'}")
    return [(job, entries[job.path]) for job in jobs]
