"""Stage impact: how far the natural model of one data set falls."""

from pathlib import Path

import click

from pipeline.stages.options import Stage, dataset_argument, params_option


@click.command(cls=Stage, short_help="Measure how far the natural model falls.")
@dataset_argument
@params_option
def impact(dataset: str, params_path: Path) -> None:
    """Evaluate the natural model of DATASET on clean test images and on every perturbation, level and trial.

    Writes summary/DATASET.json (what `dvc metrics` shows), cells/DATASET.csv and examples/DATASET.csv in
    metrics/impact/.
    """
    from pipeline.runtime import layout
    from pipeline.study.opening import open_tested, read_examples, remove_stale_stores
    from pipeline.study.params import load
    from pipeline.study.planning import plan_study

    study = plan_study(load(params_path), dataset)
    for path in remove_stale_stores(study):
        click.echo(f"{path}: removed, {params_path} does not name it (DVC's cache keeps it)")
    open_tested(study, study.cells("impact"))
    _, labels = read_examples(study, "test")

    # torch takes seconds to import: only once params and data are right.
    from pipeline.evaluation import metrics
    from pipeline.evaluation.measuring import describe_examples
    from pipeline.models.devices import select_device
    from pipeline.stages.measuring import load_models, measure, write_cells

    models, device = load_models(study, "impact"), select_device(study.device)
    natural, shown = models[study.natural[0].key], study.n_pictured
    cells, examples = [], []
    for predictions, counted in measure(study, "impact", models):
        cells += counted
        first = predictions.cells[0]
        if first.trial == 0:
            images = predictions.images[:shown]
            examples += describe_examples(natural, first.perturbation, first.level, images, labels[:shown], device)
    pictured = metrics.to_csv(metrics.to_frame(examples, metrics.Example))
    write_cells(study, "impact", cells, {layout.examples(dataset): pictured})
