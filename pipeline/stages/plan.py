"""Command plan: list what stages would do, before they do it."""

from math import prod
from pathlib import Path

import click

from pipeline.stages.options import params_option

_STAGES = ("perturb", "train", "impact", "strategies", "evaluate", "ablations")


@click.command(short_help="Print what a stage would do.")
@click.argument("stage", type=click.Choice(_STAGES), required=False)
@click.argument("dataset", required=False)
@params_option
def plan(stage: str | None, dataset: str | None, params_path: Path) -> None:
    """List the arrays, models and measurements that params.yaml asks for, of one STAGE and DATASET or of all.

    Reads only params.yaml, and the clean stores of your own images; writes nothing. Sizes of arrays are in bytes before
    compression.
    """
    from collections import Counter

    from pipeline.study.params import load
    from pipeline.study.planning import MEASURING, Study, plan_studies, plan_study

    def show(stage: str, study: Study) -> None:
        name = study.dataset.name
        if stage == "perturb":
            arrays = [array for of_store in study.arrays.values() for array in of_store]
            n_images = sum(array.n_images for array in arrays)
            n_bytes = sum(prod(array.shape) for array in arrays)
            click.echo(f"{name} perturb: {len(arrays)} arrays, {n_images:,} images, {n_bytes:,} bytes")
            for array in arrays:
                shape = "x".join(map(str, array.shape))
                click.echo(f"  {array.path}/{array.name}: {shape}, {prod(array.shape):,} bytes")
            return
        if stage in ("train", "strategies", "ablations"):
            jobs = study.jobs(stage)
            n_images = sum(job.plan.recipe.epochs * job.n_train for job in jobs)
            click.echo(f"{name} {stage}: {len(jobs)} models, {n_images:,} training images seen")
            for job in jobs:
                click.echo(f"  {job.path}: {job.plan.recipe.epochs} epochs")
        if stage in MEASURING:
            cells = study.cells(stage)
            n_images = sum(cell.n_examples for cell in cells)
            click.echo(f"{name} {stage}: {len(cells):,} cells, {n_images:,} images classified")
            for model, n_cells in Counter(cell.model for cell in cells).items():
                click.echo(f"  {model}: {n_cells:,} cells")

    params = load(params_path)
    studies = [plan_study(params, dataset)] if dataset else list(plan_studies(params).values())
    for study in studies:
        for name in [stage] if stage else _STAGES:
            show(name, study)
