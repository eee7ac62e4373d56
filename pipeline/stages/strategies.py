"""Stage strategies: all models of one strategy for one data set."""

from pathlib import Path

import click

from pipeline.stages.options import (
    Stage,
    dataset_argument,
    params_option,
    progress_bar,
    training_imported,
    workers_option,
)


@click.command(cls=Stage, short_help="Train against every perturbation by one strategy.")
@dataset_argument
@click.argument("strategy")
@params_option
@workers_option
def strategies(dataset: str, strategy: str, params_path: Path, workers: int) -> None:
    """Train a model of DATASET against every training level of every perturbation, by STRATEGY.

    STRATEGY is constant, incremental or transfer. Writes models/DATASET/STRATEGY/ and the learning curves to
    metrics/strategies/DATASET/STRATEGY.csv. Finished models are kept in models/.finished by all that decides them, so
    a run that was killed, or one with one level more, trains only what is missing.
    """
    from pipeline.runtime import layout
    from pipeline.study.opening import remove_stale_stores
    from pipeline.study.params import load

    params = load(params_path)
    spec = params.dataset(dataset)
    for path in remove_stale_stores(params, spec):
        click.echo(f"{path}: removed, {params_path} does not name it (DVC's cache keeps it)")
    params.plan(strategy, dataset)

    with training_imported():
        # torch takes seconds to import: only once params are right.
        from pipeline.runtime.files import replacing_folder, write_text
        from pipeline.training import jobs
        from pipeline.training.cache import curves_to_csv

        tasks = jobs.plan_strategy(params, spec, strategy)
        n_models, rows = len(tasks), []
        with progress_bar(f"{dataset} {strategy}", n_models, unit=" models") as bar:
            for task, was_finished in jobs.train_all(tasks, workers):
                bar.update(1)
                how = "kept from an earlier run" if was_finished else "trained"
                bar.write(f"{dataset} {strategy} {task.label}: {how}")
    with replacing_folder(layout.strategy_models(dataset, strategy)) as folder:
        for task in tasks:
            rows += jobs.collect(task, folder)
    write_text(layout.strategy_curves(dataset, strategy), curves_to_csv(rows, is_named=True))
    click.echo(f"{layout.strategy_models(dataset, strategy)}: {n_models} models")
