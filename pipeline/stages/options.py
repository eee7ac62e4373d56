"""What the commands share: arguments, options, and progress bars."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import click
from tqdm import tqdm

from pipeline import layout

dataset_argument = click.argument("dataset")

params_option = click.option(
    "--params",
    "params_path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=layout.PARAMS,
    show_default=True,
    help="The params file.",
)


@contextmanager
def progress_bar(description: str, n_images: int) -> Iterator["tqdm[NoReturn]"]:
    """A bar with rate and time left over `n_images`; nothing where standard error is no terminal."""
    with tqdm(total=n_images, desc=description, unit=" images", unit_scale=True, leave=False, disable=None) as bar:
        yield bar
