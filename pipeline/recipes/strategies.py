"""Strategies: ways of training against a perturbation, each a pure function from its settings to a training plan.

To add one: write its function `(settings, recipe, dataset) -> Plan`, its settings, a line in `STRATEGIES`, and give it
a block under `strategies` in params.yaml. The training loop knows plans, not names.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from pipeline.recipes.plan import Plan
from pipeline.recipes.recipe import Recipe, Widths
from pipeline.runtime.values import Values

Share = Annotated[float, Field(ge=0, le=1)]


class NoSettings(Values):
    """A strategy without settings."""


class Ramp(Values):
    """Share of perturbed images before the first epoch and after the last."""

    start: Share
    end: Share


class _SecondTraining(Values):
    """How a trained model is fine-tuned."""

    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(ge=2)]
    epochs: Annotated[int, Field(ge=1, le=100_000)]


class FineTuning(_SecondTraining):
    """Fine-tuning of one data set's natural model, with a new head of these widths."""

    fully_connected: Widths


class Transfer(Values):
    """Fine-tuning of the natural model."""

    freeze: bool
    recipes: Mapping[str, FineTuning]


def plan_constant(settings: NoSettings, recipe: Recipe, dataset: str) -> Plan:
    """Plan training on perturbed images only, drawn once, at one level.

    Source: paper section VI-A.
    """
    return Plan(recipe, (1.0,) * recipe.epochs, fits_on_perturbed=True)


def plan_incremental(settings: Ramp, recipe: Recipe, dataset: str) -> Plan:
    """Plan training on a share of perturbed images that rises linearly from epoch to epoch.

    Source: paper section VI-B; the authors' code takes ⌊e/E · batch⌋ images in epoch e = 0..E-1, a ramp from 0 to 1.
    They do not say which images the standardization is fitted on; fitted on the clean ones it gives their numbers.
    """
    rise = settings.end - settings.start
    shares = tuple(settings.start + rise * (epoch / recipe.epochs) for epoch in range(recipe.epochs))
    return Plan(recipe, shares, fits_on_perturbed=False)


def plan_transfer(settings: Transfer, recipe: Recipe, dataset: str) -> Plan:
    """Plan fine-tuning of the natural model, with a new head, on perturbed images.

    Source: paper section VI-C.
    """
    tuning = settings.recipes[dataset]
    return Plan(
        recipe.fine_tuned(tuning.fully_connected, tuning.learning_rate, tuning.batch_size, tuning.epochs),
        (1.0,) * tuning.epochs,
        fits_on_perturbed=True,
        starts_from_natural=True,
        freezes_start=settings.freeze,
    )


class Repairing(_SecondTraining):
    """Fine-tuning of one of the user's models."""

    model: str


class Repair(Values):
    """Fine-tuning of the user's models, of the data sets that `recipes` names; `share` of every batch is perturbed."""

    share: Share
    recipes: Mapping[str, Repairing]


def plan_repair(settings: Repair, recipe: Recipe, dataset: str) -> Plan:
    """Plan fine-tuning of a user's model, with all its layers, on clean and perturbed images.

    Source: our choice; the clean images preserve what the model knows.
    """
    tuning = settings.recipes[dataset]
    return Plan(
        recipe.fine_tuned((), tuning.learning_rate, tuning.batch_size, tuning.epochs),
        (settings.share,) * tuning.epochs,
        fits_on_perturbed=False,
        repairs=tuning.model,
    )


@dataclass(frozen=True)
class Strategy:
    """A strategy of params.yaml.

    Attributes:
        settings: Type of its block in params.yaml.
        plan: `(settings, recipe of the natural model, data set) -> Plan`.
        datasets: settings → the data sets whose models are trained by it; None: all.
    """

    settings: type[Values]
    plan: Callable[[Any, Recipe, str], Plan]
    datasets: Callable[[Any], Collection[str] | None] = lambda settings: None

    def is_for(self, settings: Any, dataset: str) -> bool:
        """Whether models of a data set are trained by it."""
        named = self.datasets(settings)
        return named is None or dataset in named


STRATEGIES: Mapping[str, Strategy] = {
    "constant": Strategy(NoSettings, plan_constant),
    "incremental": Strategy(Ramp, plan_incremental),
    "transfer": Strategy(Transfer, plan_transfer),
    "repair": Strategy(Repair, plan_repair, lambda settings: settings.recipes),
}
