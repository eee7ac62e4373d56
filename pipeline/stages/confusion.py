"""Stage confusion: which classes are taken for which, natural images against each perturbation's hardest level."""

from pathlib import Path

import click

from pipeline.stages.options import Stage, dataset_argument, params_option


@click.command(cls=Stage, short_help="Count which classes are taken for which.")
@dataset_argument
@params_option
def confusion(dataset: str, params_path: Path) -> None:
    """Count the confusions of DATASET: of the natural model, and of the best model of all strategies.

    The natural model sees natural images and the hardest of `evaluate.levels` of each perturbation; at each of those
    levels the most accurate model trained on that family of perturbations joins it. All trials count. Writes
    metrics/confusion/DATASET.csv.
    """
    from dataclasses import asdict

    import pandas as pd

    from pipeline.data.store import read_clean
    from pipeline.evaluation import metrics, results
    from pipeline.recipes.plan import NATURAL
    from pipeline.runtime import layout
    from pipeline.runtime.files import write_text
    from pipeline.study.opening import open_tested
    from pipeline.study.params import load

    params = load(params_path)
    spec = params.dataset(dataset)
    arrays = open_tested(params, spec, results.hardest_levels(params))
    tables = [results.read_evaluation(params, spec, strategy) for strategy in params.strategies]
    found = {name: metrics.find_best(pd.concat(tables), name, level) for name, level in arrays} if tables else {}
    best = {perturbation: name for perturbation, name in found.items() if name is not None}
    n_test = params.datasets[dataset].n_test
    clean, labels = (read_clean(spec, "test", kind)[:n_test] for kind in ("images", "labels"))

    # torch takes seconds to import: only once params and data are right.
    from pipeline.evaluation import measuring
    from pipeline.models.devices import select_device
    from pipeline.study import models

    natural = metrics.ModelName(NATURAL, NATURAL, 0)
    classifiers = {natural: models.load_natural(params, spec)}
    for strategy in dict.fromkeys(name.strategy for name in best.values()):
        for variant, classifier in models.load_strategy(params, spec, strategy):
            name = metrics.ModelName(strategy, variant.perturbation, variant.level)
            if name in best.values():
                classifiers[name] = classifier
    device, precision = select_device(params.device), params.train.recipes[dataset].precision
    predictors = {name: measuring.Predictor(classifier, device, precision) for name, classifier in classifiers.items()}

    def is_wanted(model: metrics.ModelName, perturbation: str) -> bool:
        return model in (natural, best.get(perturbation))

    counted = measuring.count_confusions(
        predictors, clean, labels, arrays, device, params.evaluate.batch_size, len(spec.classes), is_wanted
    )
    rows = [metrics.ModelConfusion(**asdict(name), **asdict(pair)) for name, pair in counted]
    write_text(layout.confusion(dataset), metrics.to_csv(metrics.to_frame(rows)))
    for perturbation, name in best.items():
        click.echo(f"{dataset} {perturbation}: best is {name.strategy}, trained on {name.trained_on}")
