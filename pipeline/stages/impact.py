"""Stage impact: how far the natural model of one data set falls."""

from pathlib import Path

import click

from pipeline.stages.options import Stage, dataset_argument, params_option, progress_bar


@click.command(cls=Stage, short_help="Measure how far the natural model falls.")
@dataset_argument
@params_option
def impact(dataset: str, params_path: Path) -> None:
    """Evaluate the natural model of DATASET on clean test images and on every perturbation, level and trial.

    Writes summary/DATASET.json (what `dvc metrics` shows), cells/DATASET.csv and examples/DATASET.csv in
    metrics/impact/.
    """
    import json

    from pipeline.data.store import read_clean
    from pipeline.evaluation import metrics
    from pipeline.recipes.plan import NATURAL
    from pipeline.runtime import layout
    from pipeline.runtime.files import write_texts
    from pipeline.study.opening import open_tested, remove_stale_stores
    from pipeline.study.params import load

    params = load(params_path)
    spec = params.dataset(dataset)
    for path in remove_stale_stores(params, spec):
        click.echo(f"{path}: removed, {params_path} does not name it (DVC's cache keeps it)")
    n_test = params.datasets[dataset].n_test
    arrays = open_tested(params, spec, params.impact_levels)
    clean = read_clean(spec, "test", "images")[:n_test]
    labels = read_clean(spec, "test", "labels")[:n_test]

    # torch takes seconds to import: only once params and data are right.
    from pipeline.evaluation import measuring
    from pipeline.models.devices import select_device
    from pipeline.study import models

    device, precision = select_device(params.device), params.train.recipes[dataset].precision
    predict = measuring.Predictor(models.load_natural(params, spec), device, precision)
    n_images = n_test + sum(array.shape[0] * n_test for array, _ in arrays.values())
    with progress_bar(f"{dataset} impact", n_images) as bar:
        measured = measuring.measure_models(
            dataset, {NATURAL: predict}, clean, labels, arrays, device, params.impact.batch_size, progress=bar.update
        )
    n_examples = params.impact.n_examples
    examples = measuring.describe_examples(predict, clean[:n_examples], labels[:n_examples], arrays, device)
    frame = metrics.to_frame([cell for _, cell in measured])
    summary = metrics.summarize(frame)
    write_texts(
        {
            layout.impact_cells(dataset): metrics.to_csv(frame),
            layout.impact_examples(dataset): metrics.to_csv(metrics.to_frame(examples)),
            layout.impact_metrics(dataset): json.dumps(summary, indent=2) + "\n",
        }
    )
    for name, value in summary.items():
        click.echo(f"{dataset} {name}: {value:.4f}")
