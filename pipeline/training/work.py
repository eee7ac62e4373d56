"""Training of all models of a stage: finished ones come from the model cache, the others are trained in parallel."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pipeline.data import store
from pipeline.data.datasets import Dataset
from pipeline.models import external, storage
from pipeline.models.classifier import Classifier
from pipeline.models.devices import select_device
from pipeline.recipes.plan import ModelKey
from pipeline.runtime.engine import Engine, LocalProcesses, check_wanted, count_cores
from pipeline.runtime.files import locked, replacing_folder
from pipeline.training.cache import CacheEntry, find_entry
from pipeline.training.job import ExternalModel, TrainingJob
from pipeline.training.loop import Epoch, Examples, TrainingData, train_model

# torch's compiler is not used, but the first optimizer of a process imports it, which takes two seconds.
PRELOAD = ("torch._dynamo",)
# The images of the latest models: a worker trains many models on the same images.
_examples: dict[tuple[Path, str, str, int], Examples] = {}


def train_all(jobs: Sequence[TrainingJob], engine: Engine) -> Iterator[tuple[TrainingJob, CacheEntry, bool]]:
    """Train all models that are not in the cache yet.

    A killed run loses at most the current epoch: the next run resumes from its checkpoint, to the same weights.

    Args:
        jobs: Models; results do not depend on their order.
        engine: Trains them, several in parallel.

    Yields:
        Each job when it is finished, its cache entry, and whether it was in the cache already.

    Raises:
        PipelineError: A store or a starting model is missing, damaged, or made with other params; a worker was killed.
    """
    for start in {job.start.path: job.start for job in jobs if job.start is not None}.values():
        _load_start(start)
    waiting = []
    for job in jobs:
        entry = find_entry(job)
        if entry.is_finished():
            yield job, entry, True
        else:
            # Set here, for other machines too: the weights depend on the number of threads.
            waiting.append(replace(job, n_threads=job.n_threads or torch.get_num_threads()))
    for job, entry in engine.run(train, longest_first(waiting)):
        yield job, entry, False


def local_engine(n_workers: int | None, device: str) -> LocalProcesses:
    """Return the engine that trains models on this machine.

    Args:
        n_workers: How many models are trained at the same time; None: one for each core, or one on a GPU.
        device: `device` of params.yaml.

    Raises:
        PipelineError: As `select_device`.
    """
    n_workers = n_workers or (count_cores() if select_device(device).type == "cpu" else 1)
    return LocalProcesses(n_workers, PRELOAD)


def longest_first(jobs: Sequence[TrainingJob]) -> list[TrainingJob]:
    """Sort jobs by the images they train on, most first: a long job started last would keep other workers waiting."""
    return sorted(jobs, key=lambda job: job.plan.recipe.epochs * job.n_train, reverse=True)


def train(
    job: TrainingJob,
    report: Callable[[Epoch], Any] = lambda epoch: None,
    progress: Callable[[int], Any] = lambda n_images: None,
) -> CacheEntry:
    """Train one model into the cache, unless it is finished there, and return its entry.

    Args:
        job: Which model.
        report: Called after every epoch.
        progress: Called with the number of training images seen since the last call.
    """
    device = select_device(job.device)
    if job.n_threads and device.type == "cpu":
        torch.set_num_threads(job.n_threads)
    entry = find_entry(job)
    with locked(entry.lock, f"{job.dataset.name} {job.key}"):
        if entry.is_finished():
            return entry

        def step(n_images: int) -> None:
            check_wanted()
            progress(n_images)

        def keep(epoch: Epoch) -> None:
            entry.send_checkpoint()
            report(epoch)

        entry.fetch_checkpoint()
        start = None if job.start is None else _load_start(job.start)
        data = TrainingData(
            train=_read_examples(job.dataset, "train", job.n_train),
            test=_read_examples(job.dataset, "test", job.n_test),
            perturbed=None if job.trained_on is None else job.trained_on.opened().read(),
        )
        entry.finish(*train_model(job.plan, data, job.seed_names, device, start, entry.checkpoint, keep, step))
    return entry


def _load_start(start: TrainingJob | ExternalModel) -> Classifier:
    if isinstance(start, TrainingJob):
        return storage.load(start.path, start.made_by, start.description)
    shape, n_classes = start.dataset.shape, len(start.dataset.classes)
    return external.load(start.path, start.spec, shape, n_classes, start.made_by).to_train()


def _read_examples(dataset: Dataset, split: str, n: int) -> Examples:
    key = Path.cwd(), split, dataset.digests[split, "images"], n
    if key not in _examples:
        if len(_examples) > 1:
            _examples.clear()
        images, labels = (store.read_clean(dataset, split, kind)[:n] for kind in ("images", "labels"))
        _examples[key] = Examples(images, labels, len(dataset.classes))
    return _examples[key]


def collect(trained: Sequence[tuple[TrainingJob, CacheEntry]], folder: Path) -> list[dict[str, Any]]:
    """Copy finished models out of the cache to their paths, all in `folder`, and return their learning curves.

    Args:
        trained: All models of the folder, in order; anything else in it is removed.
        folder: Replaced as a whole or not at all.

    Returns:
        A row per model and epoch: `strategy`, `label`, `seed` and the fields of `Epoch`.
    """
    rows = []
    with replacing_folder(folder) as staged:
        for job, entry in trained:
            path = staged / job.path.relative_to(folder)
            path.parent.mkdir(exist_ok=True)
            rows += [{**vars(job.key), **row} for row in entry.copy_to(path)]
    return rows


def curves_to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Learning curves from `collect` as CSV, numbers rounded to 6 decimals."""
    columns = [field.name for kind in (ModelKey, Epoch) for field in fields(kind)]
    return pd.DataFrame(rows, columns=columns).round(6).to_csv(index=False)
