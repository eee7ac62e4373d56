"""Command clean: remove what the model cache and killed runs hold and nobody uses."""

from pathlib import Path

import click

from pipeline.stages.options import params_option

_ROOTS = (Path("data"), Path("models"), Path("metrics"))


@click.command(short_help="Remove models from the cache that nobody uses.")
@params_option
@click.option("--yes", "is_meant", is_flag=True, help="Remove it; without this, only say what would be removed.")
def clean(params_path: Path, is_meant: bool) -> None:
    """Show, and with --yes remove, what nobody uses: models in models/.finished, and half-made files of killed runs.

    A model is used if the stages, with this params.yaml, code and machine, would take it from there instead of training
    it. To tell, the stores and the natural models must be there: run `dvc repro` first.
    """
    import shutil

    from pipeline import layout
    from pipeline.errors import PipelineError
    from pipeline.files import PARTIAL_SUFFIX, is_taken
    from pipeline.params import load

    params = load(params_path)
    running = [
        path.name for path in sorted(Path().glob(layout.running("*").name.replace("%2A", "*"))) if is_taken(path)
    ]
    if running:
        raise PipelineError(f"{running[0]}: this stage is running; clean up when it has ended")

    # torch takes seconds to import: only once params are right.
    from pipeline.campaign import keys_in_use
    from pipeline.kept import cached_files, name_entry

    in_use = keys_in_use(params)
    cached = cached_files()
    unused = {key: files for key, files in cached.items() if key not in in_use}
    partial = sorted(path for root in _ROOTS for path in root.rglob(f"*{PARTIAL_SUFFIX}"))
    partial = [path for path in partial if not any(path in files for files in unused.values())]
    total = 0
    for files, what in [
        *((files, name_entry(key)) for key, files in unused.items()),
        *(([path], "half made") for path in partial),
    ]:
        size = sum(_size_of(path) for path in files)
        total += size
        click.echo(f"{files[0].with_suffix('') if len(files) > 1 else files[0]}: {size / 2**20:.1f} MiB, {what}")
        for path in files if is_meant else []:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    said = f"{len(unused)} of {len(cached)} models in {layout.finished_models()} and {len(partial)} half-made files"
    if is_meant:
        click.echo(f"{said} removed: {total / 2**20:.1f} MiB")
    else:
        click.echo(f"{said} are not used: {total / 2**20:.1f} MiB. Remove them with `python -m pipeline clean --yes`")


def _size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
