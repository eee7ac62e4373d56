"""Stage train: the natural model of one data set."""

from pathlib import Path

import click

from pipeline.stages.options import Stage, dataset_argument, params_option, progress_bar


@click.command(cls=Stage, short_help="Train the natural model of a data set.")
@dataset_argument
@params_option
def train(dataset: str, params_path: Path) -> None:
    """Train the natural model of DATASET and write models/DATASET/natural.safetensors and .json.

    The learning curve goes to metrics/train/DATASET/learning_curve.csv. A run that was killed goes on from its last
    epoch, to the same bytes.
    """
    from pipeline.data.store import read_clean
    from pipeline.recipes.plan import NATURAL
    from pipeline.runtime import layout
    from pipeline.runtime.files import taking_turns, write_text
    from pipeline.study.params import load

    params = load(params_path)
    spec = params.dataset(dataset)
    plan, subset = params.plan(NATURAL, dataset), params.datasets[dataset]
    images, labels = (read_clean(spec, "train", kind)[: subset.n_train] for kind in ("images", "labels"))
    test_images, test_labels = (read_clean(spec, "test", kind)[: subset.n_test] for kind in ("images", "labels"))

    # torch takes seconds to import: only once params and data are right.
    from pipeline.models.devices import select_device
    from pipeline.training import loop
    from pipeline.training.cache import curves_to_csv, keep_natural

    kept = keep_natural(params, spec)

    def report(epoch: loop.Epoch) -> None:
        bar.write(
            f"{dataset} natural: epoch {epoch.epoch}/{plan.recipe.epochs}, loss {epoch.train_loss:.4f}, "
            f"accuracy {epoch.train_accuracy:.4f} train, {epoch.test_accuracy:.4f} test"
        )

    with taking_turns(kept.lock, f"{dataset} natural"):
        if kept.is_finished():
            click.echo(f"{dataset} natural: kept from an earlier run")
        else:
            with progress_bar(f"{dataset} natural", plan.recipe.epochs * subset.n_train) as bar:
                classifier, curve = loop.train_model(
                    plan,
                    loop.Examples(images, labels, len(spec.classes)),
                    None,
                    None,
                    loop.Examples(test_images, test_labels, len(spec.classes)),
                    (params.train.seed,),
                    select_device(params.device),
                    kept.checkpoint,
                    report=report,
                    progress=bar.update,
                )
            kept.finish(classifier, curve)
    path = layout.natural_model(dataset)
    rows = kept.copy_to(path)
    write_text(layout.learning_curve(dataset), curves_to_csv(rows, is_named=False))
    click.echo(f"{path}: clean accuracy {rows[-1]['test_accuracy']:.4f} on {subset.n_test:,} test images")
