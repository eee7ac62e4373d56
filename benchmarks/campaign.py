"""Trains and measures the models of a study that takes days, the most wanted first, and keeps what every one gives.

    python -m pipeline profile paper                             # in a clone of its own
    dvc repro prepare@cifar10 perturb@cifar10-{stuck,hot,dead,noise,blur}
    python -m benchmarks.campaign paper cifar10 --list           # what is to do, in which order, and what is done
    python -m benchmarks.campaign paper cifar10                  # do it, at the lowest priority; Ctrl-C at any time
    python -m benchmarks.campaign paper cifar10 --only transfer  # what is quick first: five epochs instead of twenty

What is known of a model is in results/NAME-DATASET/: its learning curve, with the machine that made it, as soon as it
is trained, and every cell as soon as it is measured. Commit them, and no other machine repeats a finished model; to go
on with committed results, first `cp results/NAME-DATASET/params.yaml .`. After a stop, training goes on from the last
whole epoch and measuring from the last whole level of damage. Finished models stay in the model cache, where `dvc
repro` finds them.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import click
import pandas as pd
import torch

from benchmarks.claims import PIXELS
from benchmarks.reproduction import RESULTS, describe_machine
from benchmarks.timing import train_timed
from pipeline.evaluation.measuring import load_models, local_engine, measure
from pipeline.evaluation.metrics import Cell, to_csv
from pipeline.models import storage
from pipeline.recipes.plan import NATURAL
from pipeline.runtime import layout
from pipeline.runtime.engine import Held, LocalProcesses
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import locked, read_file, write_text
from pipeline.runtime.stopping import ended_when_stopped, stop_on_signals
from pipeline.study.opening import open_study
from pipeline.study.params import load
from pipeline.study.planning import Study, plan_study
from pipeline.study.reading import MAX_BYTES
from pipeline.training import work
from pipeline.training.cache import CacheEntry
from pipeline.training.job import TrainingJob

# Training levels by what they tell: the hardest, and three pixels, which the paper's text discusses; then the middle.
_HARDEST = ("noise-0.05", "blur-1", *(f"{name}-{n}" for n in (11, 3) for name in PIXELS))
_MIDDLE = {"noise-0.0255", "blur-0.52", *(f"{name}-6" for name in PIXELS)}
_MODEL = ["strategy", "label", "seed"]
_IMAGES = ["split", "perturbation", "level", "trial"]


@dataclass(frozen=True)
class Group:
    """Models that are trained side by side before those of the next group.

    Attributes:
        name: What they are, in words.
        jobs: The models.
        stages: The stages whose cells are measured of each.
        only_own: Whether they are measured on clean images and the damage that they were trained on only, as the paper
            did; this takes half of the time or less.
        trains: Whether models whose weights are not on this machine are trained.
    """

    name: str
    jobs: Sequence[TrainingJob]
    stages: tuple[str, ...]
    only_own: bool = False
    trains: bool = True

    def part(self, study: Study, job: TrainingJob) -> Study:
        """The study of one of its models: what is measured of it."""
        return only(replace(study, cross_trials=0) if self.only_own else study, job)


def order(study: Study) -> list[Group]:
    """All models of a study, the most wanted first; groups without models are left out."""
    models = [job for jobs in study.strategies.values() for job in jobs]
    hardest = [job for label in _HARDEST for job in models if job.key.label == label]
    transfer = [job for job in models if job.plan.starts_from_natural and job not in hardest]
    middle = [job for job in models if job.key.label in _MIDDLE and job not in transfer]
    rest = [job for job in models if job not in (*hardest, *transfer, *middle)]
    table_1 = study.ablations.get("components", ())
    others = [job for name, jobs in study.ablations.items() if name != "components" for job in jobs]
    groups = [
        Group("natural models", study.natural, ("impact", "evaluate")),
        Group("Table I", table_1, ("ablations",)),
        Group("hardest levels", hardest, ("evaluate",), only_own=True),
        Group("transfer", transfer, ("evaluate",), only_own=True),
        Group("middle levels", middle, ("evaluate",), only_own=True),
        Group("other levels", rest, ("evaluate",), only_own=True),
        Group("other ablations", others, ("ablations",)),
        Group("other damage", [*hardest, *transfer, *middle, *rest], ("evaluate",), trains=False),
    ]
    return [group for group in groups if group.jobs]


def of_strategy(study: Study, name: str) -> list[Group]:
    """The groups' models of one strategy or ablation, or the natural ones; groups without models are left out.

    Raises:
        PipelineError: There is no such strategy.
    """
    groups = [replace(group, jobs=[job for job in group.jobs if job.key.strategy == name]) for group in order(study)]
    if not any(group.jobs for group in groups):
        names = ", ".join([NATURAL, *study.strategies, *study.ablations])
        raise PipelineError(f"--only: unknown '{name}'; params.yaml has {names}")
    return [group for group in groups if group.jobs]


def only(study: Study, job: TrainingJob) -> Study:
    """The study of one model: the same arrays and levels, and nothing else to measure."""
    name = job.key.strategy
    return replace(
        study,
        natural=[job] if name == NATURAL else [],
        strategies={name: [job]} if name in study.strategies else {},
        ablations={name: [job]} if name in study.ablations else {},
        external=[],
    )


def without(study: Study, stage: str, measured: Collection[object]) -> Study:
    """The study of one model without the arrays all of whose cells are measured; clean images stay."""
    wanted = {(cell.perturbation, cell.level) for cell in study.cells(stage) if cell.images not in measured}
    arrays = {
        name: [array for array in arrays if (name, array.variant.level) in wanted]
        for name, arrays in study.arrays.items()
    }
    return replace(study, arrays=arrays)


@dataclass(frozen=True)
class Results:
    """What is known of a study's models.

    Attributes:
        folder: Where it lies.
    """

    folder: Path

    def check_params(self) -> None:
        """Check that the results that are there were made with params.yaml.

        Raises:
            PipelineError: With others.
        """
        path = self.folder / layout.PARAMS
        if path.exists() and load(path) != load():
            raise PipelineError(f"{path}: differs from {layout.PARAMS}; copy it there, or choose another NAME")

    def keep_params(self) -> None:
        """Put params.yaml beside the results."""
        if not (self.folder / layout.PARAMS).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / layout.PARAMS, read_file(layout.PARAMS, MAX_BYTES).decode())

    def table(self, name: str) -> pd.DataFrame:
        """A table of results; empty, without columns, where there is none."""
        path = self.folder / f"{name}.csv"
        if not path.exists():
            return pd.DataFrame()
        try:
            return pd.read_csv(path, dtype={"commit": str, "label": str})
        except pd.errors.ParserError as error:
            raise PipelineError(f"{path}: damaged ({error}); restore it with `git checkout`, or delete it") from None
        except pd.errors.EmptyDataError:  # after a power cut
            return pd.DataFrame()

    def rows(self, name: str, job: TrainingJob) -> pd.DataFrame:
        """What a table has of a model."""
        table = self.table(name)
        rows: pd.DataFrame = table[_rows_of(table, job)]
        return rows

    def has(self, study: Study, group: Group, job: TrainingJob) -> bool:
        """Whether a model's learning curve and all of its cells are there."""
        one = group.part(study, job)
        return bool(len(self.rows("models", job))) and all(
            images_of(self.rows(stage, job)) >= {cell.images for cell in one.cells(stage)} for stage in group.stages
        )

    def has_weights(self, job: TrainingJob) -> bool:
        """Whether the model whose learning curve is there is at its path on this machine."""
        try:
            description = storage.read_checked(job.path, job.made_by, job.description)
        except PipelineError:
            return False
        return to_csv(self.rows("curves", job)) == to_csv(curve_of(job, description["learning_curve"]))

    def add(self, name: str, job: TrainingJob, rows: pd.DataFrame) -> None:
        """Put a model's rows in the place of those that are there."""
        table = self.table(name)
        old = _rows_of(table, job)
        place, others = int(old.argmax()) if old.any() else len(table), table[~old]
        path, changed = self.folder / f"{name}.csv", pd.concat([others[:place], rows, others[place:]])
        if len(changed.columns):
            write_text(path, to_csv(changed))

    def add_trained(self, job: TrainingJob, curve: pd.DataFrame, facts: dict[str, Any], stages: Iterable[str]) -> None:
        """Put a trained model's curve and facts into the tables, unless these very weights are known.

        Cells of another model of this name, of another machine or of an earlier training, are removed.
        """
        known = self.rows("curves", job)
        if len(known) and to_csv(known) == to_csv(curve):
            return
        for stage in stages:
            if len(self.rows(stage, job)):
                self.add(stage, job, pd.DataFrame())
        # The curve last: a stop before it leaves another curve, and these rows are written again.
        self.add("models", job, pd.DataFrame([{**vars(job.key), **facts}]))
        self.add("curves", job, curve)


def images_of(rows: pd.DataFrame) -> set[tuple[Any, ...]]:
    """The images, as `PlannedCell.images`, that a model's rows are measured on."""
    return set() if rows.empty else set(rows[_IMAGES].itertuples(index=False, name=None))


def _rows_of(table: pd.DataFrame, job: TrainingJob) -> Any:
    if table.empty:
        return pd.Series(dtype=bool)
    return (table[_MODEL] == list(vars(job.key).values())).all(axis=1)


def curve_of(job: TrainingJob, epochs: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A model's learning curve as rows of results."""
    return pd.DataFrame({**vars(job.key), **epoch} for epoch in epochs).round(6)


def copy_out(entry: CacheEntry, job: TrainingJob) -> pd.DataFrame:
    """Copy a finished model from the cache to its path, and return its learning curve."""
    job.path.parent.mkdir(parents=True, exist_ok=True)
    return curve_of(job, entry.copy_to(job.path))


def train_starts(jobs: Iterable[TrainingJob]) -> None:
    """Train the natural models that jobs start from where they are missing: another machine may have measured them."""
    for start in {job.start.path: job.start for job in jobs if isinstance(job.start, TrainingJob)}.values():
        if not start.path.exists():
            copy_out(work.train(start), start)


def run(study: Study, group: Group, found: Results, n_workers: int) -> Iterator[str]:
    """Train and measure the models of a group that have no results yet; a line for each that is finished."""
    waiting = [job for job in group.jobs if not found.has(study, group, job)]
    trained = [job for job in waiting if found.has_weights(job)]
    for job in trained:
        _measure(study, group, job, found)
        yield f"{study.dataset.name} {job.key}: measured"
    # The number of threads is set here, for workers too, as in `work.train_all`: the weights depend on it.
    rest = [replace(job, n_threads=job.n_threads or torch.get_num_threads()) for job in waiting if job not in trained]
    if not group.trains:
        if rest:
            yield f"{len(rest)} models are left: their weights are not on this machine"
        return
    train_starts(rest)
    finished: Any = ((job, train_timed(job)) for job in rest)  # on all cores, as stage train does
    if rest and rest[0].key.strategy != NATURAL:
        finished = LocalProcesses(n_workers, work.PRELOAD).run(train_timed, rest)
    for job, (entry, seconds) in finished:
        facts = {"seconds": round(seconds), "threads": job.n_threads, **describe_machine(study)}
        found.add_trained(job, copy_out(entry, job), facts, group.stages)
        _measure(study, group, job, found)
        yield f"{study.dataset.name} {job.key}: trained in {seconds:.0f} s, and measured"


def _measure(study: Study, group: Group, job: TrainingJob, found: Results) -> None:
    """Measure what is not known of a model, and keep every cell at once, in the order of the stage's rows."""
    for stage in group.stages:
        known = pd.concat(found.rows(name, job) for name in group.stages)  # stages may share images
        rows = [cell.images for cell in only(study, job).cells(stage)]
        _measure_stage(group.part(study, job), stage, job, rows, known, found)


def _measure_stage(
    study: Study, stage: str, job: TrainingJob, rows: Sequence[object], known: pd.DataFrame, found: Results
) -> None:
    lock = Lock()
    cells: dict[object, Mapping[Any, Any]] = {tuple(row[c] for c in _IMAGES): row for row in known.to_dict("records")}

    def keep(measured: Sequence[Cell]) -> None:
        with lock:  # called in several threads
            cells.update({cell.images: vars(cell) for cell in measured})
            found.add(stage, job, pd.DataFrame([cells[images] for images in rows if images in cells]))

    if cells:
        keep(())
    if cells.keys() >= {cell.images for cell in study.cells(stage)}:
        return
    rest = without(study, stage, cells)
    here, models, data = Held(rest, lambda: rest), load_models(rest, stage), open_study(rest, stage)
    measure(here, stage, models, data, lambda predictions: keep(predictions.cells), local_engine(rest.device))


@contextmanager
def lowest_priority() -> Iterator[None]:
    """Give way to all other work of this machine."""
    os.nice(19)
    # Linux weighs sessions (terminals) against each other, and `nice` only within one: man 7 sched, autogroup. This
    # slows the other commands of this terminal too, and is undone at the end.
    session, before = Path("/proc/self/autogroup"), "19"
    with suppress(OSError, IndexError):  # the file may be missing, empty or read-only
        before = session.read_text(encoding="ascii").split()[-1]
        session.write_text("19", encoding="ascii")

    def put_back() -> None:
        if before != "19":  # another campaign of this terminal
            with suppress(OSError):
                session.write_text(before, encoding="ascii")

    try:
        with ended_when_stopped(put_back):
            yield
    finally:
        put_back()


@click.command()
@click.argument("name")
@click.argument("dataset")
@click.option("--list", "only_list", is_flag=True, help="Say what is to do, in which order, and do nothing.")
@click.option("--workers", "n_workers", default=os.cpu_count() or 1, show_default=True, help="Models side by side.")
@click.option("--only", "strategy", help="Only models of this strategy or ablation.  [default: all]")
def main(name: str, dataset: str, only_list: bool, n_workers: int, strategy: str | None) -> None:
    """Train and measure all models of DATASET in params.yaml, the most wanted first, into results/NAME-DATASET/."""
    try:
        study, found = plan_study(load(), dataset), Results(RESULTS / f"{name}-{dataset}")
        groups = order(study) if strategy is None else of_strategy(study, strategy)
        found.check_params()
        if not only_list:
            found.keep_params()
        alone = locked(found.folder / ".running", f"campaign {name} {dataset}")  # or they would lose rows of each other
        with nullcontext() if only_list else alone, nullcontext() if only_list else lowest_priority():
            for group in groups:
                n_done = sum(found.has(study, group, job) for job in group.jobs)
                click.echo(f"{group.name}: {n_done} of {len(group.jobs)} done")
                for line in () if only_list else run(study, group, found, n_workers):
                    click.echo(line)
    except PipelineError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    stop_on_signals("Stopped by {signal}: whole epochs and measured cells are kept; run again to go on.")
    main()
