"""Stage strategies: train the models of all strategies for one data set."""

from pathlib import Path

import click

from pipeline.stages.options import (
    Stage,
    dataset_argument,
    params_option,
    remove_stale_stores,
    say,
    show_training,
    training_workers_option,
)


@click.command(cls=Stage, short_help="Train against every perturbation with every strategy.")
@dataset_argument
@params_option
@training_workers_option
def strategies(dataset: str, params_path: Path, workers: int | None) -> None:
    """Train a model of DATASET against every training level of every perturbation, by every strategy of params.yaml.

    Writes models/DATASET/strategies/, and the learning curves to metrics/strategies/DATASET.csv. Finished models are
    cached in models/.finished by a digest of all that decides them, so that the next run after a kill, or one with one
    more level, trains only what is missing.
    """
    from pipeline.runtime import layout
    from pipeline.runtime.cluster import find_engine
    from pipeline.runtime.files import write_text
    from pipeline.study.params import load
    from pipeline.study.planning import plan_study

    study = plan_study(load(params_path), dataset)
    remove_stale_stores(study)
    jobs = study.jobs("strategies")
    for job in jobs:
        if job.trained_on is not None:
            job.trained_on.opened()

    # Imported only once params and data are known to be valid: torch takes seconds.
    from pipeline.training import work

    trained = work.train_all(jobs, find_engine(work.local_engine(workers, study.device), say))
    entries = show_training(trained, jobs, f"{dataset} strategies")
    rows = work.collect(entries, layout.strategy_models(dataset))
    write_text(layout.strategy_curves(dataset), work.curves_to_csv(rows))
    click.echo(f"{layout.strategy_models(dataset)}: {len(jobs)} models")
