"""Stage ablations: the natural model of one data set trained by changed recipes, and how far each falls."""

from pathlib import Path

import click

from pipeline.stages.options import Stage, dataset_argument, params_option, train_side_by_side, workers_option


@click.command(cls=Stage, short_help="Train the natural model by changed recipes and measure it.")
@dataset_argument
@params_option
@workers_option
def ablations(dataset: str, params_path: Path, workers: int) -> None:
    """Train the natural model of DATASET once for every variant of every ablation and measure it as `impact` does.

    Writes the models to models/DATASET/ablations/, every cell to metrics/ablations/cells/DATASET.csv and what
    `dvc metrics` shows to metrics/ablations/summary/DATASET/. A variant that changes nothing is the natural model
    itself.
    """
    from pipeline.runtime import layout
    from pipeline.study.opening import open_tested, read_examples
    from pipeline.study.params import load
    from pipeline.study.planning import plan_study

    study = plan_study(load(params_path), dataset)
    jobs = study.jobs("ablations")
    open_tested(study, study.cells("ablations"))
    for split in ("train", "test"):
        read_examples(study, split)

    # torch takes seconds to import: only once params and data are right.
    from pipeline.stages.measuring import measure, write_cells
    from pipeline.training import work

    train_side_by_side(jobs, f"{dataset} ablations", workers)
    work.collect(jobs, layout.ablation_models(dataset))
    cells = [cell for _, counted in measure(study, "ablations") for cell in counted]
    write_cells(study, "ablations", cells, {})
