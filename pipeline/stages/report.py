"""Stage report: write the whole study on one page."""

from pathlib import Path

import click

from pipeline.stages.options import Stage, params_option


@click.command(cls=Stage, short_help="Write the report: the whole study on one page.")
@params_option
def report(params_path: Path) -> None:
    """Write metrics/report/index.html, a single page with its figures, which needs no network.

    Every number on it comes from the metric files of this run.
    """
    from pipeline.reporting.page import write_report
    from pipeline.runtime import layout
    from pipeline.study.params import load

    folder = layout.report()
    n_charts = write_report(load(params_path), params_path, folder)
    click.echo(f"{folder / 'index.html'}: open it in a browser; {n_charts} charts")
