"""Saved models as params ask for them."""

from pipeline.data.datasets import Dataset
from pipeline.data.seeding import level_name
from pipeline.models import classifier, storage
from pipeline.perturbations.variants import Variant, variant_attributes
from pipeline.recipes.plan import NATURAL
from pipeline.runtime import layout
from pipeline.study.params import Params
from pipeline.study.planning import planned_variants


def load_natural(params: Params, dataset: Dataset) -> classifier.Classifier:
    """The natural model of a data set.

    Raises:
        PipelineError: It is missing, damaged, or made with other params.
    """
    expected = params.describe_model(NATURAL, dataset, params.plan(NATURAL, dataset.name), None)
    return storage.load(layout.natural_model(dataset.name), f"python -m pipeline train {dataset.name}", expected)


def load_strategy(params: Params, dataset: Dataset, strategy: str) -> list[tuple[Variant, classifier.Classifier]]:
    """The models of a strategy, each with what it was trained on.

    Raises:
        PipelineError: One is missing, damaged, or made with other params.
    """
    made_by = f"python -m pipeline strategies {dataset.name} {strategy}"
    plan = params.plan(strategy, dataset.name)
    models = []
    for perturbation in params.perturbations:
        for variant, _ in planned_variants(params, dataset.name, perturbation):
            if variant.split == "train":
                path = layout.strategy_model(dataset.name, strategy, perturbation, level_name(variant.level))
                expected = params.describe_model(strategy, dataset, plan, variant_attributes(dataset, variant))
                models.append((variant, storage.load(path, made_by, expected)))
    return models
