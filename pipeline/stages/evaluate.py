"""Stage evaluate: the models of one strategy on clean images, on what they were trained on, and on all else."""

from pathlib import Path

import click

from pipeline.stages.options import Stage, dataset_argument, params_option, progress_bar


@click.command(cls=Stage, short_help="Measure the models of one strategy.")
@dataset_argument
@click.argument("strategy")
@params_option
def evaluate(dataset: str, strategy: str, params_path: Path) -> None:
    """Evaluate the models of DATASET and STRATEGY, and the natural model, at the levels of `evaluate.levels`.

    Writes summary/DATASET/STRATEGY.json (what `dvc metrics` shows) and cells/DATASET/STRATEGY.csv in metrics/evaluate/.
    """
    import json
    from dataclasses import asdict

    from pipeline.data.store import read_clean
    from pipeline.evaluation import metrics
    from pipeline.recipes.plan import NATURAL
    from pipeline.runtime import layout
    from pipeline.runtime.files import write_texts
    from pipeline.study.opening import open_tested
    from pipeline.study.params import load

    params = load(params_path)
    spec = params.dataset(dataset)
    plan = params.plan(strategy, dataset)
    n_test = params.datasets[dataset].n_test
    arrays = open_tested(params, spec, params.evaluate.levels)
    clean, labels = (read_clean(spec, "test", kind)[:n_test] for kind in ("images", "labels"))

    # torch takes seconds to import: only once params and data are right.
    from pipeline.evaluation import measuring
    from pipeline.models.devices import select_device
    from pipeline.study import models

    classifiers = {metrics.ModelName(NATURAL, NATURAL, 0): models.load_natural(params, spec)}
    for variant, classifier in models.load_strategy(params, spec, strategy):
        classifiers[metrics.ModelName(strategy, variant.perturbation, variant.level)] = classifier
    device = select_device(params.device)
    predictors = {
        name: measuring.Predictor(classifier, device, plan.recipe.precision) for name, classifier in classifiers.items()
    }

    def is_wanted(model: metrics.ModelName, perturbation: str, trial: int) -> bool:
        return model.is_tested(perturbation, trial, params.evaluate.cross_trials)

    n_images = n_test + sum(array.shape[0] * n_test for array, _ in arrays.values())
    with progress_bar(f"{dataset} {strategy}, {len(predictors)} models", n_images) as bar:
        measured = measuring.measure_models(
            dataset, predictors, clean, labels, arrays, device, params.evaluate.batch_size, is_wanted, bar.update
        )
    frame = metrics.to_frame([metrics.ModelCell(**asdict(name), **asdict(cell)) for name, cell in measured])
    summary = metrics.summarize_strategy(frame)
    write_texts(
        {
            layout.evaluate_cells(dataset, strategy): metrics.to_csv(frame),
            layout.evaluate_metrics(dataset, strategy): json.dumps(summary, indent=2) + "\n",
        }
    )
    for key, value in summary.items():
        click.echo(f"{dataset} {strategy} {key}: {value}")
