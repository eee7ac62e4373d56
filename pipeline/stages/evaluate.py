"""Stage evaluate: the models of all strategies on clean images, on what they were trained on, and on all else."""

from pathlib import Path

import click

from pipeline.stages.options import Stage, dataset_argument, params_option, progress_bar


@click.command(cls=Stage, short_help="Measure the models of all strategies.")
@dataset_argument
@params_option
def evaluate(dataset: str, params_path: Path) -> None:
    """Evaluate the models of all strategies of DATASET, and the natural model, at the levels of `evaluate.levels`.

    Writes summary/DATASET/ (what `dvc metrics` shows) and cells/DATASET.csv in metrics/evaluate/, and how often which
    class is taken for which to metrics/confusion/DATASET.csv: of the natural model on clean images and at the hardest
    level of each perturbation, and there of the best model that was trained on that family of perturbations.
    """
    from pipeline.recipes.plan import CLEAN
    from pipeline.study.opening import open_study
    from pipeline.study.params import load
    from pipeline.study.planning import plan_study

    study = plan_study(load(params_path), dataset)
    data = open_study(study, "evaluate")

    # torch takes seconds to import: only once params and data are right.
    from pipeline.evaluation.measuring import Confusions, Shown, count_confusions, list_confusions, load_models, measure
    from pipeline.evaluation.metrics import to_frame
    from pipeline.evaluation.results import confused_models, write_cells

    models = load_models(study, "evaluate")
    hardest = {(CLEAN, 0.0), *study.hardest.items()}

    def count(shown: Shown) -> Confusions:
        level = shown.cells[0].perturbation, shown.cells[0].level
        return count_confusions(shown) if level in hardest else {}

    with progress_bar(f"{dataset} evaluate, {len(models)} models", data.n_images) as bar:
        cells, counted = measure(study, "evaluate", models, data, count, bar.update)
    confusions = list_confusions(counted, confused_models(study, to_frame(cells)))
    for line in write_cells(study, "evaluate", cells, confusions=confusions):
        click.echo(line)
