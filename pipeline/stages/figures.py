"""Stage figures: the paper's figures 3 to 8 for one data set."""

from pathlib import Path

import click

from pipeline.stages.options import Stage, dataset_argument, params_option


@click.command(cls=Stage, short_help="Draw the paper's figures 3 to 8.")
@dataset_argument
@params_option
def figures(dataset: str, params_path: Path) -> None:
    """Draw the pictures of DATASET into metrics/figures/DATASET/.

    Per family of perturbations: accuracy against level beside the authors' values, example images with the
    predictions before and after, and a gallery of all levels.
    """
    from pipeline.reporting import drawing
    from pipeline.runtime import layout
    from pipeline.study.params import load

    params = load(params_path)
    spec = params.dataset(dataset)
    for path in drawing.draw_all(params, spec, layout.figures(dataset)):
        click.echo(str(path))
