"""Command describe: inspect a folder or file of images, and print its block for params.yaml."""

from pathlib import Path

import click

from pipeline.stages.options import progress_bar, workers_option


@click.command(short_help="Inspect your own images and print blocks for params.yaml.")
@click.argument("path", type=click.Path(path_type=Path, readable=False))
@click.option("--name", default="photos", show_default=True, help="Name of the data set in params.yaml.")
@click.option(
    "--test-share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.2,
    show_default=True,
    help="Share of the images that becomes the test set, where there is none.",
)
@click.option("--torchvision", "dataset", help="Read PATH as this class of torchvision.datasets does.")
@workers_option
@click.pass_context
def describe(
    context: click.Context, path: Path, name: str, test_share: float, dataset: str | None, workers: int
) -> None:
    """Inspect all images in PATH: a folder of pictures, an npz file, or a Zarr store.

    Prints the classes with their counts, the sizes, what is odd (files that cannot be read, images that are both in the
    training and in the test set), and the blocks for params.yaml: the data set, and levels of damaged pixels and blur
    that suit its size. The exit status is 1 if some images cannot be used.
    """
    from pipeline.data.datasets import Canonical
    from pipeline.data.describing import describe, detect, open_detected
    from pipeline.runtime.engine import LocalProcesses
    from pipeline.runtime.errors import printable
    from pipeline.runtime.values import to_yaml
    from pipeline.study.params import check_source
    from pipeline.study.suggesting import suggest_levels

    detected = check_source(name, detect(path, dataset))
    assert not isinstance(detected, Canonical)
    source, opened = open_detected(detected, test_share, LocalProcesses(workers))
    n_images = sum(len(split.labels) for split in opened.splits.values())
    with progress_bar(f"describe {path}", n_images) as bar:
        described = describe(name, source, opened, bar.update)
    height, width = described.size
    block = [
        *("", "For params.yaml:", "", *to_yaml({"datasets": described.datasets}, is_block=True).splitlines()),
        f"# Damaged pixels and blur of {height}x{width}, in the place of the blocks and lists of these names:",
        *to_yaml(suggest_levels(described.size), is_block=True).splitlines(),
    ]
    for line in (*described.lines, *block):
        click.echo(printable(line))
    if not described.is_usable:
        context.exit(1)
