"""Stage impact: measure how far the natural model of one data set falls."""

from functools import partial
from pathlib import Path

import click

from pipeline.stages.options import Stage, dataset_argument, params_option, progress_bar, remove_stale_stores, say


@click.command(cls=Stage, short_help="Measure the natural model under all damage.")
@dataset_argument
@params_option
def impact(dataset: str, params_path: Path) -> None:
    """Evaluate the natural model of DATASET on clean test images and on every perturbation, level and trial.

    Writes summary/DATASET.json (what `dvc metrics` shows), cells/DATASET.csv and examples/DATASET.csv in
    metrics/impact/.
    """
    from pipeline.runtime.cluster import find_engine
    from pipeline.runtime.engine import Held
    from pipeline.study.opening import open_study
    from pipeline.study.params import load
    from pipeline.study.planning import plan_study

    params = load(params_path)
    study = plan_study(params, dataset)
    remove_stale_stores(study)
    data = open_study(study, "impact")

    # Imported only once params and data are known to be valid: torch takes seconds.
    from pipeline.evaluation.measuring import describe_examples, load_models, local_engine, measure
    from pipeline.evaluation.results import write_cells

    models, held = load_models(study, "impact"), Held(study, partial(plan_study, params, dataset))
    describe = partial(describe_examples, study.natural[0].key, study.n_pictured)
    engine = find_engine(local_engine(study.device), say)
    with progress_bar(f"{dataset} impact", data.n_images) as bar:
        cells, described = measure(held, "impact", models, data, describe, engine, bar.update)
    examples = [example for of_set in described for example in of_set]
    for line in write_cells(study, "impact", cells, examples=examples):
        click.echo(line)
