"""Stage train: the natural model of one data set."""

from pathlib import Path

import click

from pipeline.stages.options import dataset_argument, params_option, progress_bar


@click.command(short_help="Train the natural model of a data set.")
@dataset_argument
@params_option
def train(dataset: str, params_path: Path) -> None:
    """Train the natural model of DATASET and write models/DATASET/natural.safetensors and .json.

    The learning curve goes to metrics/train/DATASET/learning_curve.csv.
    """
    from dataclasses import asdict

    import pandas as pd

    from pipeline import layout
    from pipeline.files import write_text
    from pipeline.params import load
    from pipeline.recipes import NATURAL
    from pipeline.store import read_clean

    params = load(params_path)
    spec = params.dataset(dataset)
    recipe, subset = params.train.recipes[dataset], params.datasets[dataset]

    images, labels = (read_clean(spec, "train", kind)[: subset.n_train] for kind in ("images", "labels"))
    test_images, test_labels = (read_clean(spec, "test", kind)[: subset.n_test] for kind in ("images", "labels"))

    # torch takes seconds to import: only once params and data are right.
    from pipeline import networks, training
    from pipeline.devices import select_device, select_precision

    device = select_device(params.device)
    plan = params.plan(NATURAL, dataset)

    def report(epoch: training.Epoch) -> None:
        bar.write(
            f"{dataset} natural: epoch {epoch.epoch}/{recipe.epochs}, loss {epoch.train_loss:.4f}, "
            f"accuracy {epoch.train_accuracy:.4f} train, {epoch.test_accuracy:.4f} test"
        )

    with progress_bar(f"{dataset} natural", recipe.epochs * subset.n_train) as bar:
        classifier, curve = training.train_model(
            plan,
            training.Examples(images, labels),
            None,
            None,
            training.Examples(test_images, test_labels),
            (params.train.seed,),
            device,
            report=report,
            progress=bar.update,
        )
    path = layout.natural_model(dataset)
    described = params.describe_model(NATURAL, spec, plan, None)
    precision = str(select_precision(recipe.precision, device)).removeprefix("torch.")
    networks.save(classifier, path, {**described, "computed_in": precision})
    rows = pd.DataFrame([asdict(epoch) for epoch in curve]).round(6)
    write_text(layout.learning_curve(dataset), rows.to_csv(index=False))
    click.echo(f"{path}: clean accuracy {curve[-1].test_accuracy:.4f} on {subset.n_test:,} test images")
