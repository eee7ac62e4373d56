"""Stage evaluate: the models of one strategy on clean images, on what they were trained on, and on all else."""

from pathlib import Path

import click

from pipeline.stages.options import dataset_argument, params_option, progress_bar


@click.command(short_help="Measure the models of one strategy.")
@dataset_argument
@click.argument("strategy")
@params_option
def evaluate(dataset: str, strategy: str, params_path: Path) -> None:
    """Evaluate the models of DATASET and STRATEGY, and the natural model, at the levels of `evaluate.levels`.

    Writes metrics/evaluate/DATASET/STRATEGY.json (what `dvc metrics` shows) and .csv (every cell).
    """
    import json

    from pipeline import layout, metrics
    from pipeline.files import write_text
    from pipeline.params import load
    from pipeline.recipes import NATURAL
    from pipeline.store import read_clean
    from pipeline.variants import open_perturbed, variant_attributes

    params = load(params_path)
    spec = params.dataset(dataset)
    plan = params.plan(strategy, dataset)
    n_test = params.datasets[dataset].n_test
    opened = [entry for name in params.perturbations for entry in open_perturbed(params, spec, name)]
    arrays = {
        (variant.perturbation, variant.level): (array, made_by)
        for variant, array, made_by in opened
        if variant.split == "test" and variant.level in params.evaluate.levels[variant.perturbation]
    }
    clean, labels = (read_clean(spec, "test", kind)[:n_test] for kind in ("images", "labels"))

    # torch takes seconds to import: only once params and data are right.
    from pipeline import campaign, evaluation, networks
    from pipeline.devices import select_device, select_precision
    from pipeline.seeding import level_name

    device = select_device(params.device)
    made_by = f"python -m pipeline strategies {dataset} {strategy}"
    models = {metrics.ModelName(NATURAL, NATURAL, 0): campaign.load_natural(params, spec).to(device)}
    for variant, _, _ in opened:
        if variant.split == "train":
            path = layout.strategy_model(dataset, strategy, variant.perturbation, level_name(variant.level))
            expected = params.describe_model(strategy, spec, variant_attributes(spec, variant))
            name = metrics.ModelName(strategy, variant.perturbation, variant.level)
            models[name] = networks.load(path, made_by, expected).to(device)
    n_images = n_test + sum(array.shape[0] * n_test for array, _ in arrays.values())
    with progress_bar(f"{dataset} {strategy}, {len(models)} models", n_images) as bar:
        cells = evaluation.evaluate_models(
            dataset,
            models,
            clean,
            labels,
            arrays,
            device,
            select_precision(plan.recipe.precision, device),
            params.evaluate.batch_size,
            params.evaluate.cross_trials,
            bar.update,
        )
    frame = metrics.to_frame(cells)
    summary = metrics.summarize_strategy(frame)
    write_text(layout.evaluate_cells(dataset, strategy), metrics.to_csv(frame))
    write_text(layout.evaluate_metrics(dataset, strategy), json.dumps(summary, indent=2) + "\n")
    for key, value in summary.items():
        click.echo(f"{dataset} {strategy} {key}: {value}")
