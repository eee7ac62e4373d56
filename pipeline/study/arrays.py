"""Looks up a data set by its name, and lists the arrays that its perturbed stores must hold."""

from functools import partial

from pipeline.data import store
from pipeline.data.datasets import DATASETS, Canonical, Dataset
from pipeline.perturbations import PERTURBATIONS
from pipeline.perturbations.variants import PlannedArray, Variant
from pipeline.runtime import layout
from pipeline.runtime.errors import PipelineError
from pipeline.study.params import Params


def find_dataset(params: Params, name: str) -> Dataset:
    """Return the data set `name`; facts about a user's own that params do not state are read from its clean store.

    Raises:
        PipelineError: `datasets` does not have it; or it is the user's own, and was not prepared, was prepared with
            other settings, or has fewer images than params use.
    """
    subset = params.subset(name)
    if isinstance(subset.source, Canonical):
        return DATASETS[name]
    dataset, path = store.read_facts(name), layout.clean_store(name)
    if (dataset.source, dataset.shape) != (subset.source.attributes, subset.source.shape):
        raise PipelineError(f"{path}: made with other params; make it again with `python -m pipeline prepare {name}`")
    for split, wanted in (("train", subset.n_train), ("test", subset.n_test)):
        if wanted > dataset.n_examples[split]:
            raise PipelineError(
                f"datasets.{name}.n_{split}: {wanted} is more than the {dataset.n_examples[split]} images there are"
            )
    return dataset


def plan_arrays(params: Params, dataset: Dataset, perturbation: str) -> list[PlannedArray]:
    """List the arrays of one perturbation's store: training levels, then test levels, each in ascending order.

    Raises:
        PipelineError: params.yaml has no such perturbation.
    """
    if perturbation not in params.perturbations:
        known = ", ".join(params.perturbations)
        raise PipelineError(f"perturbation: unknown '{perturbation}'; params.yaml has {known}")
    levels, subset = params.perturbations[perturbation], params.datasets[dataset.name]
    trials = params.perturb.trials if PERTURBATIONS[perturbation].is_random else 1
    number = int if PERTURBATIONS[perturbation].unit == "n_pixels" else float  # YAML may say 1 for 1.0
    new = partial(Variant, perturbation, seed=params.perturb.seed, options=levels.options)
    train = sorted(levels.train_levels)
    test = sorted({*levels.test_levels, *params.evaluate.levels[perturbation]})
    return [
        *(PlannedArray(dataset, new(level=number(level), split="train"), (subset.n_train,)) for level in train),
        *(PlannedArray(dataset, new(level=number(level), split="test"), (trials, subset.n_test)) for level in test),
    ]
