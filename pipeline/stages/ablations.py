"""Stage ablations: train the natural model of one data set with changed recipes, and measure how far each falls."""

from functools import partial
from pathlib import Path

import click

from pipeline.stages.options import (
    Stage,
    dataset_argument,
    params_option,
    progress_bar,
    remove_stale_stores,
    say,
    show_training,
    training_workers_option,
)


@click.command(cls=Stage, short_help="Train variants of the natural model and measure them.")
@dataset_argument
@params_option
@training_workers_option
def ablations(dataset: str, params_path: Path, workers: int | None) -> None:
    """Train the natural model of DATASET once for every variant of every ablation, and measure it as `impact` does.

    Writes the models to models/DATASET/ablations/, every cell to metrics/ablations/cells/DATASET.csv, and what
    `dvc metrics` shows to metrics/ablations/summary/DATASET/. A variant that changes nothing is the natural model
    itself.
    """
    from pipeline.runtime import layout
    from pipeline.runtime.cluster import find_engine
    from pipeline.runtime.engine import Held
    from pipeline.study.opening import open_study
    from pipeline.study.params import load
    from pipeline.study.planning import plan_study

    params = load(params_path)
    study = plan_study(params, dataset)
    remove_stale_stores(study)
    jobs, data = study.jobs("ablations"), open_study(study, "ablations")

    # Imported only once params and data are known to be valid: torch takes seconds.
    from pipeline.evaluation.measuring import extract_nothing, load_models, local_engine, measure
    from pipeline.evaluation.results import write_cells
    from pipeline.training import work

    trained = work.train_all(jobs, find_engine(work.local_engine(workers, study.device), say))
    entries = show_training(trained, jobs, f"{dataset} ablations")
    work.collect(entries, layout.ablation_models(dataset))
    models, held = load_models(study, "ablations"), Held(study, partial(plan_study, params, dataset))
    engine = find_engine(local_engine(study.device), say)
    with progress_bar(f"{dataset} ablations, {len(models)} models", data.n_images) as bar:
        cells, _ = measure(held, "ablations", models, data, extract_nothing, engine, bar.update)
    for line in write_cells(study, "ablations", cells):
        click.echo(line)
