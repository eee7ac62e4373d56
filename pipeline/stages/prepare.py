"""Stage prepare: read a data set from its source, and write its clean store."""

from pathlib import Path

import click

from pipeline.stages.options import Stage, dataset_argument, params_option, progress_bar, workers_option


@click.command(cls=Stage, short_help="Read a data set and write its clean store.")
@dataset_argument
@params_option
@workers_option
def prepare(dataset: str, params_path: Path, workers: int) -> None:
    """Read DATASET from its source and write data/clean/DATASET.zarr.

    A published data set (`kind: canonical`) is fetched from the first of `prepare.sources` that works, and written only
    if it has the published SHA-256 digests. Your own images are decoded in parallel, resized, and written shard by
    shard; a run that was stopped resumes where it was.
    """
    from pipeline.data import own, preparing, sources, store
    from pipeline.data.datasets import DATASETS, Canonical
    from pipeline.runtime import layout
    from pipeline.runtime.engine import LocalProcesses
    from pipeline.runtime.errors import printable
    from pipeline.runtime.memory import keep_freed_memory
    from pipeline.study.params import load

    params = load(params_path)
    source, path = params.subset(dataset).source, layout.clean_store(dataset)
    if isinstance(source, Canonical):
        spec = DATASETS[dataset]
        sources.write_clean(path, spec, sources.load(spec, params.prepare, lambda line: click.echo(line, err=True)))
        said = "digests verified"
    else:
        keep_freed_memory()  # the next shard needs as much memory again
        engine = LocalProcesses(workers)
        opened = own.open_source(source, engine)
        with progress_bar(f"prepare {dataset}", sum(len(split.labels) for split in opened.splits.values())) as bar:
            preparing.write_own(path, dataset, source, opened, bar.update)
        for remark in opened.remarks:
            click.echo(printable(f"{dataset}: {remark}"), err=True)
        spec = store.read_facts(dataset)
        said = f"{len(spec.classes)} classes"
    sizes = ", ".join(f"{spec.n_examples[split]:,} {split}" for split in ("train", "test"))
    click.echo(f"{path}: {sizes} images, {said}")
