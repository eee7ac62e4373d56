"""Training plans, and the names of trained models, as frozen values."""

from dataclasses import dataclass

from pipeline.recipes.recipe import Recipe

# The strategy of the models trained on clean images only.
NATURAL = "natural"
# Stands for a perturbation's name where there is none.
CLEAN = "clean"


@dataclass(frozen=True)
class ModelKey:
    """The name of a model, unique within its data set.

    Attributes:
        strategy: `natural`, a strategy of params.yaml, an ablation, or the name of a user's model.
        label: What it was trained on, such as `clean` or `noise-0.05`; for an ablation, the variant's name.
        seed: One of `train.seeds`; 0 for a user's model.
    """

    strategy: str
    label: str
    seed: int

    def __str__(self) -> str:
        return f"{self.strategy} {self.label} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """All that the training loop needs to know about how to train a model.

    Attributes:
        recipe: Network, optimizer, epochs, batches.
        perturbed_share: Share of every batch that is perturbed, in [0, 1], for each epoch.
        fits_on_perturbed: Whether input standardization is fitted on the perturbed images instead of the clean.
        starts_from_natural: Whether the layers shared with the natural model start with its weights.
        freezes_start: Whether those layers are frozen.
        repairs: Name of the user's model that training starts from, its output layer and standardization included; None
            for a model of our own.
    """

    recipe: Recipe
    perturbed_share: tuple[float, ...]
    fits_on_perturbed: bool
    starts_from_natural: bool = False
    freezes_start: bool = False
    repairs: str | None = None


def plan_natural(recipe: Recipe) -> Plan:
    """Plan training on clean images only: the natural model, baseline of all strategies but `repair`."""
    return Plan(recipe, (0.0,) * recipe.epochs, fits_on_perturbed=False)
