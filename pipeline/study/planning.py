"""What a study asks for: which arrays its stores hold and which models it trains."""

from functools import partial

from pipeline.perturbations import PERTURBATIONS
from pipeline.perturbations.variants import Variant
from pipeline.runtime.errors import PipelineError
from pipeline.study.params import Params


def planned_variants(params: Params, dataset: str, perturbation: str) -> list[tuple[Variant, tuple[int, ...]]]:
    """The arrays of one perturbed store: what each holds, and its leading shape, (N,) or (trials, N).

    Raises:
        PipelineError: params.yaml has no such perturbation.
    """
    if perturbation not in params.perturbations:
        raise PipelineError(
            f"perturbation: unknown '{perturbation}'; params.yaml has {', '.join(params.perturbations)}"
        )
    levels = params.perturbations[perturbation]
    subset = params.datasets[dataset]
    trials = params.perturb.trials if PERTURBATIONS[perturbation].is_random else 1
    number = int if PERTURBATIONS[perturbation].unit == "n_pixels" else float  # YAML may say 1 for 1.0
    new = partial(Variant, perturbation, seed=params.perturb.seed, options=levels.options)
    planned: list[tuple[Variant, tuple[int, ...]]] = []
    for level in sorted(levels.train_levels):
        planned.append((new(level=number(level), split="train"), (subset.n_train,)))
    for level in sorted({*levels.test_levels, *params.evaluate.levels[perturbation]}):
        planned.append((new(level=number(level), split="test"), (trials, subset.n_test)))
    return planned
