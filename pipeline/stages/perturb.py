"""Stage perturb: apply one perturbation to one data set, at all levels and trials, and write the store."""

from pathlib import Path

import click

from pipeline.stages.options import Stage, dataset_argument, params_option, progress_bar, say, workers_option


@click.command(cls=Stage, short_help="Perturb a data set and write the store.")
@dataset_argument
@click.argument("perturbation")
@params_option
@workers_option
def perturb(dataset: str, perturbation: str, params_path: Path, workers: int) -> None:
    """Perturb DATASET by PERTURBATION and write data/perturbed/DATASET/PERTURBATION.zarr.

    The store has a group per level with the arrays `train` (N, H, W, C) and `test` (trials, N, H, W, C) that params
    ask for. PERTURBATION is one of those under `perturbations` in params.yaml.
    """
    from pipeline.data.store import read_clean
    from pipeline.perturbations.generation import write_perturbed
    from pipeline.runtime import layout
    from pipeline.runtime.cluster import find_engine
    from pipeline.runtime.engine import LocalThreads
    from pipeline.study.arrays import find_dataset, plan_arrays
    from pipeline.study.params import load

    params = load(params_path)
    spec = find_dataset(params, dataset)
    arrays = plan_arrays(params, spec, perturbation)
    splits = sorted({array.variant.split for array in arrays})
    clean = {split: read_clean(spec, split, "images") for split in splits}
    n_images = sum(array.n_images for array in arrays)
    path = layout.perturbed_store(dataset, perturbation)
    with progress_bar(f"{dataset} {perturbation}", n_images) as bar:
        write_perturbed(path, spec, perturbation, arrays, clean, find_engine(LocalThreads(workers), say), bar.update)
    click.echo(f"{path}: {n_images:,} images in {len(arrays)} arrays")
