"""Stage evaluate: measure all strategies' models on clean images, on what they were trained on, and on all else."""

from functools import partial
from pathlib import Path

import click

from pipeline.stages.options import Stage, dataset_argument, params_option, progress_bar, say


@click.command(cls=Stage, short_help="Measure the models of all strategies.")
@dataset_argument
@params_option
def evaluate(dataset: str, params_path: Path) -> None:
    """Evaluate the models of all strategies of DATASET, and the natural model, at the levels of `evaluate.levels`.

    Writes summary/DATASET/ (what `dvc metrics` shows) and cells/DATASET.csv in metrics/evaluate/, and confusion
    matrices to metrics/confusion/DATASET.csv: of the natural model on clean images and at the hardest level of each
    perturbation, and at that level also of the best model that was trained on that family of perturbations.
    """
    from pipeline.recipes.plan import CLEAN
    from pipeline.runtime.cluster import find_engine
    from pipeline.runtime.engine import Held
    from pipeline.study.opening import open_study
    from pipeline.study.params import load
    from pipeline.study.planning import plan_study

    params = load(params_path)
    study = plan_study(params, dataset)
    data = open_study(study, "evaluate")

    # Imported only once params and data are known to be valid: torch takes seconds.
    from pipeline.evaluation.measuring import count_confusions, list_confusions, load_models, local_engine, measure
    from pipeline.evaluation.metrics import to_frame
    from pipeline.evaluation.results import confused_models, write_cells

    models, held = load_models(study, "evaluate"), Held(study, partial(plan_study, params, dataset))
    count = partial(count_confusions, {(CLEAN, 0.0), *study.hardest.items()})
    engine = find_engine(local_engine(study.device), say)
    with progress_bar(f"{dataset} evaluate, {len(models)} models", data.n_images) as bar:
        cells, counted = measure(held, "evaluate", models, data, count, engine, bar.update)
    confusions = list_confusions(counted, confused_models(study, to_frame(cells)))
    for line in write_cells(study, "evaluate", cells, confusions=confusions):
        click.echo(line)
