"""How much of an impact number is the seed of the network: several natural models on the same perturbed images.

Prints a Markdown table of the authors' values beside ours, mean and standard deviation over seeds. Needs the clean and
perturbed stores of the data set (`dvc repro` up to `perturb`).
"""

from pathlib import Path

import click
import pandas as pd

from pipeline.data import store
from pipeline.data.seeding import level_name
from pipeline.evaluation.measuring import Predictor, measure_models
from pipeline.evaluation.metrics import NATURAL, aggregate_trials, to_frame
from pipeline.models.devices import select_device
from pipeline.recipes.plan import plan_natural
from pipeline.reporting import published
from pipeline.runtime import layout
from pipeline.study.opening import open_perturbed
from pipeline.study.params import load
from pipeline.training.loop import Examples, train_model


@click.command()
@click.argument("dataset")
@click.option("--seeds", type=click.IntRange(min=2), default=6, show_default=True, help="Seeds 1 to this number.")
@click.option("--params", "params_path", type=click.Path(path_type=Path), default=layout.PARAMS, show_default=True)
def main(dataset: str, seeds: int, params_path: Path) -> None:
    """Train the natural model of DATASET with several seeds and compare every impact cell with the authors'."""
    params = load(params_path)
    spec = params.dataset(dataset)
    subset, recipe = params.datasets[dataset], params.train.recipes[dataset]
    device = select_device(params.device)
    train, test = (
        Examples(store.read_clean(spec, split, "images")[:n], store.read_clean(spec, split, "labels")[:n], 10)
        for split, n in (("train", subset.n_train), ("test", subset.n_test))
    )
    perturbed = {
        (variant.perturbation, variant.level): (array, made_by)
        for name in params.perturbations
        for variant, array, made_by in open_perturbed(params, spec, name)
        if variant.split == "test"
    }
    tables = []
    for seed in range(1, seeds + 1):
        classifier, _ = train_model(plan_natural(recipe), train, None, None, test, (seed,), device)
        predict = Predictor(classifier, device, recipe.precision)
        measured = measure_models(
            dataset, {NATURAL: predict}, test.images, test.labels, perturbed, device, params.impact.batch_size
        )
        tables.append(aggregate_trials(to_frame([cell for _, cell in measured])).assign(seed=seed))
        click.echo(f"seed {seed}: clean accuracy {100 * tables[-1]['mean'].iloc[0]:.2f} %", err=True)
    table = pd.concat(tables)
    authors = published.read_impact(spec)
    click.echo(
        f"| cell | authors | ours, mean of {seeds} seeds | sd over seeds | sd over trials | authors - ours, in sd |"
    )
    click.echo("|---|---|---|---|---|---|")
    for _, rows in table.groupby(["perturbation", "level"], sort=False):
        name, level = str(rows["perturbation"].iloc[0]), float(rows["level"].iloc[0])
        ours, spread, trials = 100 * rows["mean"].mean(), 100 * rows["mean"].std(), 100 * rows["std"].mean()
        if name == NATURAL:
            theirs = authors["natural"].iloc[:1]
        else:
            theirs = authors.loc[(authors["kind"] == name) & (authors["level"] == level), "mean"]
        stated = f"{theirs.iloc[0]:.2f} | " if len(theirs) else "| "
        distance = f"{(theirs.iloc[0] - ours) / spread:+.1f}" if len(theirs) else ""
        label = name if name == NATURAL else f"{name} {level_name(level)}"
        click.echo(f"| {label} | {stated}{ours:.2f} | {spread:.2f} | {trials:.2f} | {distance} |")


if __name__ == "__main__":
    main()
