"""Command clean: remove unused models from the model cache, and half-made files of killed runs."""

from collections.abc import Iterator
from pathlib import Path

import click

from pipeline.stages.options import params_option

# Folder in which a killed compiler leaves files.
_COMPILED = Path(__file__).parents[1] / "models/accelerated/__pycache__"


@click.command(short_help="Remove unused models from the model cache.")
@params_option
@click.option("--yes", "is_confirmed", is_flag=True, help="Remove it; without this, only say what would be removed.")
def clean(params_path: Path, is_confirmed: bool) -> None:
    """Show, and with --yes remove, unused models in models/.finished and half-made files of killed runs.

    A model is used if the stages, with this params.yaml, code and machine, would take it from there instead of training
    it; models of other params, such as those of experiments, are unused. To find out, the command needs the stores and
    the natural models: run `dvc repro` first.
    """
    from pipeline.runtime import layout
    from pipeline.runtime.errors import PipelineError
    from pipeline.runtime.files import is_locked, remove
    from pipeline.study.params import load
    from pipeline.study.planning import plan_studies

    params = load(params_path)
    for lock in sorted(Path().glob(".*.running")):
        if is_locked(lock):
            raise PipelineError(f"{lock}: this stage is running; clean up when it has ended")

    # Imported only once params are known to be valid: torch takes seconds.
    from pipeline.training.cache import cached_files, find_entry, name_entry

    stages = ("train", "strategies", "ablations")
    jobs = [job for study in plan_studies(params).values() for stage in stages for job in study.jobs(stage)]
    in_use, cached = {find_entry(job).key for job in jobs}, cached_files()
    waste = [(files, name_entry(key)) for key, files in cached.items() if key not in in_use]
    n_models, listed = len(waste), {path for files, _ in waste for path in files}
    partial = [path for path in _half_made(params_path, params.prepare.downloads / "npm") if path not in listed]
    waste += [([path], "half made") for path in partial]
    n_bytes = 0
    for files, what in waste:
        n_bytes_here = sum(_size_of(path) for path in files)
        n_bytes += n_bytes_here
        click.echo(f"{files[0]}: {n_bytes_here / 2**10:,.0f} KiB, {what}")
        for path in files if is_confirmed else []:
            remove(path)
    said = f"{n_models} of {len(cached)} models in {layout.cached_models()} and {len(partial)} half-made files"
    if is_confirmed:
        click.echo(f"{said} removed: {n_bytes / 2**20:.1f} MiB")
    else:
        click.echo(f"{said} are not used: {n_bytes / 2**20:.1f} MiB. Remove them with `python -m pipeline clean --yes`")


def _size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def _half_made(params_path: Path, downloads: Path) -> Iterator[Path]:
    """Find what killed runs leave, by this project's own names; a user's files may be called `.partial` too."""
    from pipeline.runtime import layout
    from pipeline.runtime.files import PARTIAL_SUFFIX

    for root in (*layout.WRITTEN, downloads):
        yield from sorted(root.rglob(f".*{PARTIAL_SUFFIX}"))
    yield from sorted(params_path.parent.glob(f".{params_path.name}*{PARTIAL_SUFFIX}"))
    yield from sorted(Path().glob(f".{'[0-9a-f]' * 32}{PARTIAL_SUFFIX}"))  # of a stage on a cluster
    yield from sorted(_COMPILED.glob(f"*{PARTIAL_SUFFIX}"))
