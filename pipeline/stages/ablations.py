"""Stage ablations: the natural model of one data set trained by changed recipes, and how far each falls."""

from pathlib import Path

import click

from pipeline.stages.options import (
    Stage,
    dataset_argument,
    params_option,
    progress_bar,
    training_imported,
    workers_option,
)


@click.command(cls=Stage, short_help="Train the natural model by changed recipes and measure it.")
@dataset_argument
@click.argument("ablation")
@params_option
@workers_option
def ablations(dataset: str, ablation: str, params_path: Path, workers: int) -> None:
    """Train the natural model of DATASET once for every variant of ABLATION and measure it as `impact` does.

    ABLATION is one of those under `ablations` in params.yaml. Writes the models to models/ablations/DATASET/ABLATION/,
    every cell to metrics/ablations/cells/DATASET/ABLATION.csv and what `dvc metrics` shows to
    metrics/ablations/summary/DATASET/ABLATION/. A variant that changes nothing is the natural model itself.
    """
    import json
    from dataclasses import asdict

    from pipeline.data.store import read_clean
    from pipeline.evaluation import metrics
    from pipeline.runtime import layout
    from pipeline.runtime.files import replacing_folder, write_text
    from pipeline.study.opening import open_tested
    from pipeline.study.params import load

    params = load(params_path)
    spec = params.dataset(dataset)
    recipes = params.ablation(ablation, dataset)
    with training_imported():
        arrays = open_tested(params, spec, params.impact_levels)
        subset = params.datasets[dataset]
        train_images, train_labels = (
            read_clean(spec, "train", kind)[: subset.n_train] for kind in ("images", "labels")
        )
        clean, labels = (read_clean(spec, "test", kind)[: subset.n_test] for kind in ("images", "labels"))

        # torch takes seconds to import: only once params and data are right.
        from pipeline.evaluation import measuring
        from pipeline.models import storage
        from pipeline.models.devices import select_device
        from pipeline.study import models
        from pipeline.training import jobs

        changed = {name: recipe for name, recipe in recipes.items() if recipe != params.train.recipes[dataset]}
        tasks = jobs.plan_ablation(params, spec, changed)
        classifiers = {name: models.load_natural(params, spec) for name in recipes if name not in changed}
        with progress_bar(f"{dataset} {ablation}", len(tasks), unit=" models") as bar:
            for task, was_finished in jobs.train_all(tasks, workers):
                bar.update(1)
                how = "kept from an earlier run" if was_finished else "trained"
                bar.write(f"{dataset} {ablation} {task.label}: {how}")
    made_by = f"python -m pipeline ablations {dataset} {ablation}"
    with replacing_folder(layout.ablation_models(dataset, ablation)) as folder:
        for task in tasks:
            jobs.collect(task, folder)
            classifiers[task.label] = storage.load(folder / f"{task.label}.safetensors", made_by, task.description)

    device = select_device(params.device)
    predictors = {
        name: measuring.Predictor(classifiers[name], device, recipe.precision) for name, recipe in recipes.items()
    }
    n_images = subset.n_train + subset.n_test + sum(array.shape[0] * subset.n_test for array, _ in arrays.values())
    with progress_bar(f"{dataset} {ablation}, {len(predictors)} models", n_images) as bar:
        trained, tested = (
            measuring.measure_models(
                dataset, predictors, *examples, device, params.impact.batch_size, progress=bar.update
            )
            for examples in ((train_images, train_labels, {}), (clean, labels, arrays))
        )
    frame = metrics.to_frame(
        [
            metrics.AblationCell(**asdict(cell), variant=name, split=split)
            for split, cells in (("train", trained), ("test", tested))
            for name, cell in cells
        ]
    )
    write_text(layout.ablation_cells(dataset, ablation), metrics.to_csv(frame))
    with replacing_folder(layout.ablation_metrics(dataset, ablation)) as folder:
        for name, summary in metrics.summarize_ablation(frame).items():
            write_text(folder / f"{name}.json", json.dumps(summary, indent=2) + "\n")
            click.echo(f"{dataset} {ablation} {name}: " + ", ".join(f"{key} {value}" for key, value in summary.items()))
