"""Stage check: params.yaml says something that can run."""

from pathlib import Path

import click

from pipeline.stages.options import params_option


@click.command(short_help="Validate params.yaml.")
@params_option
def check(params_path: Path) -> None:
    """Validate all of params.yaml and say what it asks for.

    A stage of its own, because DVC runs the others only when a key that they track has changed: a mistyped key would
    otherwise go unnoticed.
    """
    from pipeline.params import load

    params = load(params_path)
    click.echo(
        f"{params_path}: valid; {', '.join(params.datasets)}; {', '.join(params.perturbations)}; "
        f"{', '.join(params.strategies)}"
    )
