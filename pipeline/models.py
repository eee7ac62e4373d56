"""Saved models as params ask for them."""

from pipeline import layout, networks
from pipeline.datasets import Dataset
from pipeline.params import Params
from pipeline.recipes import NATURAL
from pipeline.seeding import level_name
from pipeline.variants import Variant, planned_variants, variant_attributes


def load_natural(params: Params, dataset: Dataset) -> networks.Classifier:
    """The natural model of a data set.

    Raises:
        PipelineError: It is missing, damaged, or made with other params.
    """
    expected = params.describe_model(NATURAL, dataset, params.plan(NATURAL, dataset.name), None)
    return networks.load(layout.natural_model(dataset.name), f"python -m pipeline train {dataset.name}", expected)


def load_strategy(params: Params, dataset: Dataset, strategy: str) -> list[tuple[Variant, networks.Classifier]]:
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
                models.append((variant, networks.load(path, made_by, expected)))
    return models
