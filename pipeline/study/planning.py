"""Plans a study before any of it is done: the arrays of its stores, its models, and the measurements of the models.

The same lists serve the stages that do the work, the readers of metric files, `verify`, `plan` and the report.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pipeline.data.datasets import Dataset
from pipeline.data.seeding import level_name
from pipeline.perturbations import PERTURBATIONS
from pipeline.perturbations.variants import PlannedArray
from pipeline.recipes.plan import CLEAN, NATURAL, ModelKey, Plan, plan_natural
from pipeline.recipes.recipe import Recipe
from pipeline.recipes.strategies import STRATEGIES
from pipeline.runtime import layout
from pipeline.runtime.errors import PipelineError
from pipeline.study.arrays import find_dataset, plan_arrays
from pipeline.study.params import Params, change_recipe
from pipeline.training.job import ExternalModel, TrainingJob

Levels = Mapping[str, tuple[float, ...]]
# Stages that measure models.
MEASURING = ("impact", "evaluate", "ablations")


@dataclass(frozen=True)
class PlannedCell:
    """A measurement: one model on one set of images.

    Attributes:
        dataset: Name of the data set.
        strategy: With `label` and `seed`, the `ModelKey` of the model.
        label: Likewise.
        seed: Likewise.
        seen: Whether the model was trained on this family of perturbations.
        split: `test`, or `train` for the clean training images.
        perturbation: Name of the perturbation, or `clean`.
        level: Its physical value; 0 for `clean`.
        trial: 0-based repetition.
        n_examples: Images classified.
    """

    dataset: str
    strategy: str
    label: str
    seed: int
    seen: bool
    split: str
    perturbation: str
    level: float
    trial: int
    n_examples: int

    @property
    def model(self) -> ModelKey:
        """The model that is measured."""
        return ModelKey(self.strategy, self.label, self.seed)

    @property
    def images(self) -> tuple[str, str, float, int]:
        """The images that it is measured on: (split, perturbation, level, trial)."""
        return self.split, self.perturbation, self.level, self.trial


@dataclass(frozen=True)
class Study:
    """All that params.yaml asks for of one data set.

    Attributes:
        dataset: The data set.
        n_examples: Split → how many of its images are used, the first ones.
        device: `device` of params.yaml.
        precision: Precision in the natural model's recipe: `auto`, `float32` or `bfloat16`.
        arrays: Perturbation → the arrays of its store.
        natural: The natural models, one for each seed.
        strategies: Strategy → its models.
        ablations: Ablation → its models. A variant that changes nothing is a natural model under another key.
        external: The user's own models.
        levels: Stage → perturbation → the levels that it tests.
        batch_sizes: Stage → images per evaluation step.
        cross_trials: Trials on which `evaluate` tests a model on perturbations that it was not trained on.
        n_pictured: Test images shown with their predictions.
    """

    dataset: Dataset
    n_examples: Mapping[str, int]
    device: str
    precision: str
    arrays: Mapping[str, Sequence[PlannedArray]]
    natural: Sequence[TrainingJob]
    strategies: Mapping[str, Sequence[TrainingJob]]
    ablations: Mapping[str, Sequence[TrainingJob]]
    external: Sequence[ExternalModel]
    levels: Mapping[str, Levels]
    batch_sizes: Mapping[str, int]
    cross_trials: int
    n_pictured: int

    def arrays_of(self, perturbation: str) -> Sequence[PlannedArray]:
        """Return the arrays of one perturbation's store.

        Raises:
            PipelineError: params.yaml has no such perturbation.
        """
        if perturbation not in self.arrays:
            raise PipelineError(f"perturbation: unknown '{perturbation}'; params.yaml has {', '.join(self.arrays)}")
        return self.arrays[perturbation]

    def jobs(self, stage: str) -> list[TrainingJob]:
        """Return the models that stage `train`, `strategies` or `ablations` makes."""
        if stage == "train":
            return list(self.natural)
        groups = self.strategies if stage == "strategies" else self.ablations
        given = {job.path for job in self.natural}
        return [job for jobs in groups.values() for job in jobs if job.path not in given]

    def models(self, stage: str) -> list[TrainingJob | ExternalModel]:
        """Return the models that stage `impact`, `evaluate` or `ablations` measures."""
        if stage == "ablations":
            return [job for jobs in self.ablations.values() for job in jobs]
        trained = self.strategies.values() if stage == "evaluate" else ()
        return [*self.natural, *(job for jobs in trained for job in jobs), *self.external]

    def cells(self, stage: str) -> list[PlannedCell]:
        """Return the measurements of stage `impact`, `evaluate` or `ablations`, in the order of their rows."""
        return self._cells[stage]

    @cached_property
    def _cells(self) -> dict[str, list[PlannedCell]]:
        return {stage: list(self._plan_cells(stage)) for stage in MEASURING}

    def _plan_cells(self, stage: str) -> Iterator[PlannedCell]:
        models = self.models(stage)
        new = partial(PlannedCell, dataset=self.dataset.name)
        for split in self.splits(stage):
            for job in models:
                yield new(
                    **vars(job.key),
                    seen=False,
                    split=split,
                    perturbation=CLEAN,
                    level=0,
                    trial=0,
                    n_examples=self.n_examples[split],
                )
        for array in self.tested(stage):
            variant = array.variant
            for trial in range(array.leading[0]):
                for job in models:
                    seen = job.trained_on is not None and job.trained_on.variant.kernel.family == variant.kernel.family
                    if seen or trial < self.cross_trials or stage != "evaluate" or job.trained_on is None:
                        yield new(
                            **vars(job.key),
                            seen=seen,
                            split="test",
                            perturbation=variant.perturbation,
                            level=variant.level,
                            trial=trial,
                            n_examples=self.n_examples["test"],
                        )

    def splits(self, stage: str) -> tuple[str, ...]:
        """Return the splits whose clean images a stage measures models on."""
        return ("train", "test") if stage == "ablations" else ("test",)

    def tested(self, stage: str) -> list[PlannedArray]:
        """Return the perturbed test images that a stage measures models on."""
        levels = self.levels[stage]
        return [
            array
            for perturbation, arrays in self.arrays.items()
            for array in arrays
            if array.variant.split == "test" and array.variant.level in levels[perturbation]
        ]

    @property
    def baselines(self) -> dict[str, str]:
        """Strategy → its baseline model: the natural model, or the user's own model that the strategy repairs."""
        repaired = {name: jobs[0].plan.repairs for name, jobs in self.strategies.items() if jobs}
        return {name: repaired.get(name) or NATURAL for name in self.strategies}

    @property
    def hardest(self) -> dict[str, float]:
        """Perturbation → the highest of its levels in `evaluate.levels`."""
        levels = self.levels["evaluate"]
        return {name: max(levels[name]) for name in self.arrays if levels[name]}


def plan_studies(params: Params) -> dict[str, Study]:
    """Plan the studies of all data sets: name → study."""
    return {name: plan_study(params, name) for name in params.datasets}


def plan_study(params: Params, name: str) -> Study:
    """Plan all that params.yaml asks for of one data set.

    The order of blocks in params.yaml does not matter: DVC does not see it change, and the files made before must stay
    right.

    Raises:
        PipelineError: As `find_dataset`.
    """
    dataset = find_dataset(params, name)
    recipe = params.train.recipes[name]
    arrays = {name: plan_arrays(params, dataset, name) for name in PERTURBATIONS if name in params.perturbations}
    new = partial(_plan_model, params, dataset)
    natural = {seed: new(ModelKey(NATURAL, CLEAN, seed), plan_natural(recipe)) for seed in params.train.seeds}
    external = {
        model: ExternalModel(
            ModelKey(model, CLEAN, 0),
            dataset,
            spec,
            layout.external_model(model),
            made_by=f"python -m pipeline import-model {model}",
        )
        for model, spec in sorted(params.models.items())
        if spec.dataset == name
    }
    strategies = {
        strategy: [
            new(
                ModelKey(strategy, array.variant.label, seed),
                STRATEGIES[strategy].plan(params.strategies[strategy], recipe, name),
                trained_on=array,
                natural=natural[seed],
                external=external,
            )
            for seed in params.train.seeds
            for of_store in arrays.values()
            for array in of_store
            if array.variant.split == "train"
        ]
        for strategy in STRATEGIES
        if strategy in params.strategies and STRATEGIES[strategy].is_for(params.strategies[strategy], name)
    }
    ablations = {
        ablation: [
            _plan_variant(new, ModelKey(ablation, variant, seed), change_recipe(recipe, changes), natural[seed])
            for seed in params.train.seeds
            for variant, changes in sorted(variants.items())
        ]
        for ablation, variants in sorted(params.ablations.items())
    }
    impact_levels = {name: levels.test_levels for name, levels in params.perturbations.items()}
    return Study(
        dataset,
        n_examples={"train": params.datasets[name].n_train, "test": params.datasets[name].n_test},
        device=params.device,
        precision=recipe.precision,
        arrays=arrays,
        natural=list(natural.values()),
        strategies=strategies,
        ablations=ablations,
        external=list(external.values()),
        levels={"impact": impact_levels, "evaluate": params.evaluate.levels, "ablations": impact_levels},
        batch_sizes={
            "impact": params.impact.batch_size,
            "evaluate": params.evaluate.batch_size,
            "ablations": params.impact.batch_size,
        },
        cross_trials=params.evaluate.cross_trials,
        n_pictured=min(params.impact.n_examples, params.datasets[name].n_test),
    )


def _plan_model(
    params: Params,
    dataset: Dataset,
    key: ModelKey,
    plan: Plan,
    trained_on: PlannedArray | None = None,
    natural: TrainingJob | None = None,
    path: Path | None = None,
    external: Mapping[str, ExternalModel] | None = None,
) -> TrainingJob:
    start: TrainingJob | ExternalModel | None = natural if plan.starts_from_natural else None
    repairs = None
    if plan.repairs is not None:
        assert external is not None
        start = external[plan.repairs]
        # Its preprocessing becomes the standardization of the model that is trained.
        repairs = {"model": plan.repairs, **start.spec.decides}
        plan = replace(plan, recipe=plan.recipe.model_copy(update={"network": start.spec.network}))
    subset = params.datasets[dataset.name]
    stage = "train" if key.strategy == NATURAL else "strategies" if trained_on else "ablations"
    seed_names: tuple[int | str, ...] = (key.seed,)  # an ablation differs from the natural model by its recipe alone
    if trained_on is not None:
        variant = trained_on.variant
        seed_names = (key.seed, key.strategy, variant.perturbation, level_name(variant.level))
    return TrainingJob(
        key,
        dataset,
        subset.n_train,
        subset.n_test,
        plan,
        seed_names,
        trained_on,
        start=start,
        device=params.device,
        n_threads=0 if stage == "train" else 1,
        path=path or layout.model(dataset.name, key.strategy, key.label, key.seed),
        made_by=f"python -m pipeline {stage} {dataset.name}",
        description=_describe_model(subset.n_train, subset.n_test, dataset, key, plan, trained_on, start, repairs),
    )


def _plan_variant(new: Any, key: ModelKey, recipe: Recipe, natural: TrainingJob) -> TrainingJob:
    if recipe == natural.plan.recipe:
        return replace(natural, key=key)
    folder = layout.ablation_models(natural.dataset.name) / key.strategy
    job: TrainingJob = new(key, plan_natural(recipe), path=folder / f"{key.label}-seed{key.seed}.safetensors")
    return job


def _describe_model(
    n_train: int,
    n_test: int,
    dataset: Dataset,
    key: ModelKey,
    plan: Plan,
    trained_on: PlannedArray | None,
    start: TrainingJob | ExternalModel | None,
    repairs: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return everything in params that decides a model and its learning curve, as JSON values."""
    of_start = {"natural": start.description} if isinstance(start, TrainingJob) else {}
    return {
        **of_start,
        "dataset": dataset.name,
        "source_sha256": {f"{split}_{kind}": digest for (split, kind), digest in dataset.digests.items()},
        "n_train": n_train,
        "n_test": n_test,
        "shape": list(dataset.shape),
        "n_classes": len(dataset.classes),
        "strategy": key.strategy if trained_on else NATURAL,
        "trained_on": trained_on.attributes if trained_on else None,
        "perturbed_share": list(plan.perturbed_share),
        "fits_on_perturbed": plan.fits_on_perturbed,
        "starts_from_natural": plan.starts_from_natural,
        "freezes_start": plan.freezes_start,
        "repairs": repairs,
        "seed": key.seed,
        "network": plan.recipe.network.model_dump(mode="json"),
        "recipe": plan.recipe.model_dump(mode="json", exclude={"network"}),
    }
