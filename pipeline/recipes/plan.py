"""What the training loop is asked to do, as a frozen value."""

from dataclasses import dataclass

from pipeline.recipes.recipe import Recipe

# The model trained on clean images only.
NATURAL = "natural"


@dataclass(frozen=True)
class Plan:
    """All that tells the training loop what to do.

    Attributes:
        recipe: Network, optimizer, epochs, batches.
        perturbed_share: Share of every batch that is perturbed, in [0, 1], for each epoch.
        fits_on_perturbed: Whether input standardization is fitted on the perturbed images instead of the clean.
        starts_from_natural: Whether the layers that the natural model has too start with its weights.
        freezes_start: Whether those layers stay as they start.
    """

    recipe: Recipe
    perturbed_share: tuple[float, ...]
    fits_on_perturbed: bool
    starts_from_natural: bool = False
    freezes_start: bool = False


def plan_natural(recipe: Recipe) -> Plan:
    """Clean images only; the model that every strategy is compared with."""
    return Plan(recipe, (0.0,) * recipe.epochs, fits_on_perturbed=False)
