"""Stage impact: how far the natural model of one data set falls."""

from pathlib import Path

import click

from pipeline.stages.options import dataset_argument, params_option, progress_bar


@click.command(short_help="Measure how far the natural model falls.")
@dataset_argument
@params_option
def impact(dataset: str, params_path: Path) -> None:
    """Evaluate the natural model of DATASET on clean test images and on every perturbation, level and trial.

    Writes metrics/impact/DATASET.json (what `dvc metrics` shows), and cells.csv and examples.csv in
    metrics/impact/DATASET/.
    """
    import json

    from pipeline import layout, metrics
    from pipeline.files import write_text
    from pipeline.params import load
    from pipeline.recipes import NATURAL
    from pipeline.store import read_clean
    from pipeline.variants import open_perturbed, remove_stale_stores

    params = load(params_path)
    spec = params.dataset(dataset)
    for path in remove_stale_stores(params, spec):
        click.echo(f"{path}: removed, {params_path} does not name it (DVC's cache keeps it)")
    n_test = params.datasets[dataset].n_test
    arrays = {
        (variant.perturbation, variant.level): (array, made_by)
        for perturbation in params.perturbations
        for variant, array, made_by in open_perturbed(params, spec, perturbation)
        if variant.split == "test" and variant.level in params.perturbations[perturbation].test_levels
    }
    clean = read_clean(spec, "test", "images")[:n_test]
    labels = read_clean(spec, "test", "labels")[:n_test]

    # torch takes seconds to import: only once params and data are right.
    from pipeline import evaluation, networks
    from pipeline.devices import select_device, select_precision

    device = select_device(params.device)
    recipe = params.train.recipes[dataset]
    made_by = f"python -m pipeline train {dataset}"
    expected = params.describe_model(NATURAL, spec, None)
    classifier = networks.load(layout.natural_model(dataset), made_by, expected)
    n_images = n_test + sum(array.shape[0] * n_test for array, _ in arrays.values())
    with progress_bar(f"{dataset} impact", n_images) as bar:
        cells, examples = evaluation.measure_impact(
            dataset,
            classifier.to(device),
            clean,
            labels,
            arrays,
            device,
            select_precision(recipe.precision, device),
            params.impact.batch_size,
            params.impact.n_examples,
            bar.update,
        )
    frame = metrics.to_frame(cells)
    summary = metrics.summarize(frame)
    write_text(layout.impact_cells(dataset), metrics.to_csv(frame))
    write_text(layout.impact_examples(dataset), metrics.to_csv(metrics.to_frame(examples)))
    write_text(layout.impact_metrics(dataset), json.dumps(summary, indent=2) + "\n")
    for name, value in summary.items():
        click.echo(f"{dataset} {name}: {value:.4f}")
