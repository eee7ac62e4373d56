"""Many models of one stage: finished ones are kept by what decides them, the others trained side by side."""

from collections.abc import Iterator, Mapping
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.data import store
from pipeline.data.datasets import Dataset
from pipeline.data.seeding import level_name
from pipeline.models import storage
from pipeline.models.devices import select_device
from pipeline.perturbations.variants import Variant, variant_attributes
from pipeline.recipes.plan import NATURAL, Plan, plan_natural
from pipeline.recipes.recipe import Recipe
from pipeline.runtime import layout
from pipeline.runtime.files import taking_turns
from pipeline.runtime.stopping import signals_delayed
from pipeline.runtime.workers import worker_pool
from pipeline.study.models import load_natural
from pipeline.study.opening import open_perturbed
from pipeline.study.params import Params
from pipeline.training.cache import Kept, keep, keep_natural
from pipeline.training.loop import Examples, train_model


@dataclass(frozen=True)
class Task:
    """One model to train.

    Attributes:
        params: The study.
        dataset: Which data set.
        label: The model's name within its stage, such as `noise-0.05`.
        plan: How it is trained.
        description: All that decides the model, as JSON values.
        seed_names: Decide initial weights, order and dropout.
        variant: The perturbed training images; None for a plan that never uses any.
        images_sha256: Digest of those images.
        natural_sha256: Digest of the natural model's weights, for a plan that starts from it.
        n_threads: Threads of torch, one where models are trained side by side; 0 leaves them alone.
    """

    params: Params
    dataset: Dataset
    label: str
    plan: Plan
    description: Mapping[str, Any]
    seed_names: tuple[int | str, ...]
    variant: Variant | None
    images_sha256: str | None
    natural_sha256: str | None
    n_threads: int

    @property
    def kept(self) -> Kept:
        """Where the model is kept."""
        return keep(
            self.description,
            self.plan.recipe,
            select_device(self.params.device),
            self.n_threads,
            self.seed_names,
            self.images_sha256,
            self.natural_sha256,
        )


def plan_strategy(params: Params, dataset: Dataset, strategy: str) -> list[Task]:
    """The models of a strategy: one for every training level of every perturbation.

    Raises:
        PipelineError: A store or the natural model is missing, damaged, or made with other params.
    """
    plan = params.plan(strategy, dataset.name)
    natural_sha256 = None
    if plan.starts_from_natural:
        load_natural(params, dataset)
        described = storage.read_description(layout.natural_model(dataset.name), "")
        natural_sha256 = str(described["weights_sha256"])
    return [
        Task(
            params,
            dataset,
            label=f"{perturbation}-{level_name(variant.level)}",
            plan=plan,
            description=params.describe_model(strategy, dataset, plan, variant_attributes(dataset, variant)),
            seed_names=(params.train.seed, strategy, perturbation, level_name(variant.level)),
            variant=variant,
            images_sha256=str(array.attrs["sha256"]),
            natural_sha256=natural_sha256,
            n_threads=_threads_per_model(params),
        )
        for perturbation in params.perturbations
        for variant, array, _ in open_perturbed(params, dataset, perturbation, lambda variant: variant.split == "train")
    ]


def plan_ablation(params: Params, dataset: Dataset, recipes: Mapping[str, Recipe]) -> list[Task]:
    """The natural model trained by other recipes, with the same seed.

    Args:
        params: The study.
        dataset: Which data set.
        recipes: Label → recipe.
    """
    return [
        Task(
            params,
            dataset,
            label=label,
            plan=plan_natural(recipe),
            description=params.describe_model(NATURAL, dataset, plan_natural(recipe), None),
            seed_names=(params.train.seed,),
            variant=None,
            images_sha256=None,
            natural_sha256=None,
            n_threads=_threads_per_model(params),
        )
        for label, recipe in recipes.items()
    ]


def keys_in_use(params: Params) -> set[str]:
    """The keys under which the stages would look for the models of a study, with this code on this machine.

    Raises:
        PipelineError: A store or the natural model is missing, damaged, or made with other params: their digests are
            part of the keys.
    """
    keys = set()
    for name in params.datasets:
        dataset = params.dataset(name)
        tasks = [task for strategy in params.strategies for task in plan_strategy(params, dataset, strategy)]
        for ablation in params.ablations:
            tasks += plan_ablation(params, dataset, params.ablation(ablation, name))
        keys |= {keep_natural(params, dataset).key, *(task.kept.key for task in tasks)}
    return keys


def _threads_per_model(params: Params) -> int:
    # Side by side on CPU, each on one thread: the weights then do not depend on the number of cores.
    return 1 if select_device(params.device).type == "cpu" else 0


def train_all(tasks: list[Task], n_workers: int) -> Iterator[tuple[Task, bool]]:
    """Train what is not finished yet, and yield every task when it is, with whether it was before.

    A killed run loses at most the epoch under way: the next one goes on from there, to the same weights.

    Args:
        tasks: From `plan_strategy` or `plan_ablation`.
        n_workers: Models trained at the same time; results do not depend on it.

    Raises:
        PipelineError: A worker was killed.
    """
    waiting = []
    for task in tasks:
        if task.kept.is_finished():
            yield task, True
        else:
            waiting.append(task)
    if not waiting:
        return
    uses_cuda = select_device(waiting[0].params.device).type == "cuda"
    with worker_pool(min(n_workers, len(waiting)), uses_cuda) as pool:
        with signals_delayed("SIGINT", "SIGHUP"):  # a terminal sends them to the workers too, which their parent ends
            futures = {pool.submit(train_one, task): task for task in waiting}
        for future in as_completed(futures):
            future.result()
            yield futures[future], False


def train_one(task: Task) -> None:
    """Train one model and keep it under its key."""
    params, dataset = task.params, task.dataset
    if task.n_threads:
        torch.set_num_threads(task.n_threads)
    device = select_device(params.device)
    subset = params.datasets[dataset.name]
    train, test = (
        Examples(
            store.read_clean(dataset, split, "images")[:n],
            store.read_clean(dataset, split, "labels")[:n],
            len(dataset.classes),
        )
        for split, n in (("train", subset.n_train), ("test", subset.n_test))
    )
    perturbed = None
    if task.variant is not None:
        ((_, array, made_by),) = open_perturbed(params, dataset, task.variant.perturbation, task.variant.__eq__)
        perturbed = store.read(array, made_by)
    natural = load_natural(params, dataset) if task.plan.starts_from_natural else None
    kept = task.kept
    with taking_turns(kept.lock, f"{dataset.name} {task.label}"):
        if not kept.is_finished():  # by another run, while this one waited
            trained = train_model(task.plan, train, perturbed, natural, test, task.seed_names, device, kept.checkpoint)
            kept.finish(*trained)


def collect(task: Task, folder: Path) -> list[dict[str, Any]]:
    """Copy a finished model into `folder` and return its learning curve, a row per epoch."""
    return [{"model": task.label, **row} for row in task.kept.copy_to(folder / f"{task.label}.safetensors")]
