"""Stage report: the whole study on one page, and its figures."""

from pathlib import Path

import click

from pipeline.runtime.workers import imported_ahead
from pipeline.stages.options import Stage, params_option, workers_option


@click.command(cls=Stage, short_help="Put the whole study on one page.")
@params_option
@workers_option
def report(params_path: Path, workers: int) -> None:
    """Write metrics/report/index.html, one page that needs no network, and its figures as PNG beside it.

    Every number on it comes from the metric files of this run.
    """
    with imported_ahead("pipeline.reporting.page"):
        from pipeline.reporting import page
        from pipeline.runtime import layout
        from pipeline.study.params import load

        folder = layout.report()
        n_figures = page.write_report(load(params_path), params_path, folder, workers)
    click.echo(f"{folder / 'index.html'}: open it in a browser; {n_figures} figures beside it")
