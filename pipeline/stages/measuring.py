"""What the stages that measure models share."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click

from pipeline.evaluation.measuring import Predictions, Predictor, count_correct, predict_all
from pipeline.evaluation.metrics import Cell, to_csv, to_frame
from pipeline.evaluation.results import summarize_stage, summary_to_json
from pipeline.models import storage
from pipeline.models.devices import select_device
from pipeline.recipes.plan import ModelKey
from pipeline.runtime import layout
from pipeline.runtime.files import replacing_folder, write_text, write_texts
from pipeline.stages.options import progress_bar
from pipeline.study.opening import open_tested, read_examples
from pipeline.study.planning import Study


def load_models(study: Study, stage: str) -> dict[ModelKey, Predictor]:
    """The models that a stage measures, ready to predict.

    Raises:
        PipelineError: One is missing, damaged, or made with other params.
    """
    device = select_device(study.device)
    return {
        job.key: Predictor(storage.load(job.path, job.made_by, job.description), device, job.plan.recipe.precision)
        for job in study.models(stage)
    }


def measure(
    study: Study, stage: str, models: dict[ModelKey, Predictor] | None = None
) -> Iterator[tuple[Predictions, list[Cell]]]:
    """What the models of a stage say of every set of images, and their cells, with a progress bar."""
    planned = study.cells(stage)
    arrays = open_tested(study, planned)
    examples = {split: read_examples(study, split) for split in sorted({cell.split for cell in planned})}
    models = models or load_models(study, stage)
    clean = {split: images for split, (images, _) in examples.items()}
    device, batch_size = select_device(study.device), study.batch_sizes[stage]
    n_images = sum({cell.images: cell.n_examples for cell in planned}.values())
    with progress_bar(f"{study.dataset.name} {stage}, {len(models)} models", n_images) as bar:
        for predictions in predict_all(planned, models, clean, arrays, device, batch_size):
            yield predictions, count_correct(predictions, examples[predictions.cells[0].split][1])
            bar.update(len(predictions.images))


def write_cells(study: Study, stage: str, cells: Sequence[Cell], others: Mapping[Path, str]) -> None:
    """Write the cells of a stage, the summaries that `dvc metrics` shows, and other files, and say the summaries."""
    name, table = study.dataset.name, to_frame(cells)
    summaries, folder = summarize_stage(study, stage, table), layout.summary(stage, name)
    texts = {path: summary_to_json(summary) for path, summary in summaries.items()}
    if stage != "impact":  # a folder, out of which what is no longer asked for must go
        with replacing_folder(folder) as staged:
            for path, text in texts.items():
                write_text(staged / path.relative_to(folder), text)
        texts = {}
    write_texts({layout.cells(stage, name): to_csv(table), **others, **texts})
    for path, summary in summaries.items():
        names = " ".join((name, *path.with_suffix("").parts[4:]))
        click.echo(f"{names}: " + ", ".join(f"{key} {value}" for key, value in summary.items()))
