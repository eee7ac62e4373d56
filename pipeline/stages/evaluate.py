"""Stage evaluate: the models of all strategies on clean images, on what they were trained on, and on all else."""

from pathlib import Path

import click

from pipeline.stages.options import Stage, dataset_argument, params_option


@click.command(cls=Stage, short_help="Measure the models of all strategies.")
@dataset_argument
@params_option
def evaluate(dataset: str, params_path: Path) -> None:
    """Evaluate the models of all strategies of DATASET, and the natural model, at the levels of `evaluate.levels`.

    Writes summary/DATASET/ (what `dvc metrics` shows) and cells/DATASET.csv in metrics/evaluate/, and how often which
    class is taken for which to metrics/confusion/DATASET.csv: of the natural model on clean images and at the hardest
    level of each perturbation, and there of the best model that was trained on that family of perturbations.
    """
    from pipeline.runtime import layout
    from pipeline.study.opening import open_tested, read_examples
    from pipeline.study.params import load
    from pipeline.study.planning import plan_study

    study = plan_study(load(params_path), dataset)
    open_tested(study, study.cells("evaluate"))
    _, labels = read_examples(study, "test")

    # torch takes seconds to import: only once params and data are right.
    from pipeline.evaluation import metrics
    from pipeline.evaluation.measuring import ConfusionCounter
    from pipeline.evaluation.results import confused_models
    from pipeline.recipes.plan import CLEAN
    from pipeline.stages.measuring import measure, write_cells

    cells, counter = [], ConfusionCounter(len(study.dataset.classes))
    hardest = {(CLEAN, 0.0), *study.hardest.items()}
    for predictions, counted in measure(study, "evaluate"):
        cells += counted
        if (counted[0].perturbation, counted[0].level) in hardest:
            counter.add(predictions, labels)
    confusions = [row for counted in confused_models(study, metrics.to_frame(cells)) for row in counter.rows(*counted)]
    confused = metrics.to_csv(metrics.to_frame(confusions, metrics.Confusion))
    write_cells(study, "evaluate", cells, {layout.confusion(dataset): confused})
