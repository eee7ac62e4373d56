"""Stage prepare: a data set from its original source into a clean store."""

from pathlib import Path

import click

from pipeline.stages.options import Stage, dataset_argument, params_option


@click.command(cls=Stage, short_help="Fetch a data set and write its clean store.")
@dataset_argument
@params_option
def prepare(dataset: str, params_path: Path) -> None:
    """Fetch DATASET (mnist or cifar10) and write data/clean/DATASET.zarr.

    Tries the sources of `prepare.sources` in order, keeps what it downloads, and writes only arrays that have the
    published SHA-256 digests.
    """
    from pipeline.data import sources
    from pipeline.runtime import layout
    from pipeline.study.params import load

    params = load(params_path)
    spec = params.dataset(dataset)
    arrays = sources.load(spec, params.prepare, lambda line: click.echo(line, err=True))
    path = layout.clean_store(dataset)
    sources.write_clean(path, spec, arrays)
    sizes = ", ".join(f"{len(arrays[split, 'images']):,} {split}" for split in ("train", "test"))
    click.echo(f"{path}: {sizes} images, digests verified")
