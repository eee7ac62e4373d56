"""Stage check: validate params.yaml before anything runs."""

import os
from pathlib import Path

import click

from pipeline.stages.options import params_option


@click.command(short_help="Validate params.yaml.")
@params_option
def check(params_path: Path) -> None:
    """Validate all of params.yaml and say what it asks for.

    It is a stage of its own because DVC runs the others only when a key that they track has changed: a mistyped key
    would otherwise go unnoticed. A dvc.lock that an interrupted `dvc repro` has left half written is an error too.
    """
    from contextlib import suppress

    from pipeline.lockfile import read_lock
    from pipeline.study.params import load

    params = load(params_path)
    if "DVC_STAGE" not in os.environ:  # otherwise DVC has read it itself, and may be writing it
        with suppress(FileNotFoundError):
            read_lock()
    click.echo(
        f"{params_path}: valid; {', '.join(params.datasets)}; {', '.join(params.perturbations)}; "
        f"{', '.join(params.strategies)}"
    )
