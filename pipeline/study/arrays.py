"""Which arrays the perturbed stores must hold."""

from functools import partial

from pipeline.data.datasets import Dataset
from pipeline.perturbations import PERTURBATIONS
from pipeline.perturbations.variants import PlannedArray, Variant
from pipeline.runtime.errors import PipelineError
from pipeline.study.params import Params


def plan_arrays(params: Params, dataset: Dataset, perturbation: str) -> list[PlannedArray]:
    """The arrays of one perturbation's store: training levels, then test levels, each from the lowest to the highest.

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
