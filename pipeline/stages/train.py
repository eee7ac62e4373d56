"""Stage train: train the natural models of one data set."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.stages.options import Stage, dataset_argument, params_option, progress_bar, say, show_training

if TYPE_CHECKING:
    from pipeline.training.cache import CacheEntry
    from pipeline.training.job import TrainingJob


@click.command(cls=Stage, short_help="Train the natural model of a data set.")
@dataset_argument
@params_option
def train(dataset: str, params_path: Path) -> None:
    """Train the natural model of DATASET, once for each of `train.seeds`, and write models/DATASET/natural/.

    The learning curves go to metrics/train/DATASET.csv. A run that was killed resumes from its last epoch, and yields
    the same bytes.
    """
    from pipeline.runtime import layout
    from pipeline.runtime.cluster import find_cluster
    from pipeline.runtime.files import write_text
    from pipeline.study.opening import read_examples
    from pipeline.study.params import load
    from pipeline.study.planning import plan_study

    study = plan_study(load(params_path), dataset)
    jobs = study.jobs("train")
    for split in ("train", "test"):
        read_examples(study, split)

    # Imported only once params and data are known to be valid: torch takes seconds.
    from pipeline.training import work

    cluster = find_cluster(say)
    if cluster is None:
        entries = [(job, _train(job)) for job in jobs]
    else:
        entries = show_training(work.train_all(jobs, cluster), jobs, f"{dataset} train")
    rows = work.collect(entries, layout.natural_models(dataset))
    write_text(layout.natural_curves(dataset), work.curves_to_csv(rows))
    for job in jobs:
        accuracy = [row["test_accuracy"] for row in rows if row["seed"] == job.key.seed][-1]
        click.echo(f"{job.path}: clean accuracy {accuracy:.4f} on {job.n_test:,} test images")


def _train(job: "TrainingJob") -> "CacheEntry":
    """Train a model in this process, on all cores, with a progress bar and a line for every epoch."""
    from pipeline.training import work
    from pipeline.training.cache import find_entry
    from pipeline.training.loop import Epoch

    name, n_epochs = f"{job.dataset.name} {job.key}", job.plan.recipe.epochs
    entry = find_entry(job)
    if entry.is_finished():
        click.echo(f"{name}: from the model cache")
        return entry

    def report(epoch: Epoch) -> None:
        bar.write(
            f"{name}: epoch {epoch.epoch}/{n_epochs}, loss {epoch.train_loss:.4f}, "
            f"accuracy {epoch.train_accuracy:.4f} train, {epoch.test_accuracy:.4f} test"
        )

    with progress_bar(name, n_epochs * job.n_train) as bar:
        return work.train(job, report, bar.update)
