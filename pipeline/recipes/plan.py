"""What the training loop is asked to do, and what a trained model is called, as frozen values."""

from dataclasses import dataclass

from pipeline.recipes.recipe import Recipe

# The strategy of the models trained on clean images only.
NATURAL = "natural"
# In the place of a perturbation: none.
CLEAN = "clean"


@dataclass(frozen=True)
class ModelKey:
    """Which model of a data set.

    Attributes:
        strategy: `natural`, a strategy of params.yaml, or an ablation.
        label: What it was trained on, `clean` or such as `noise-0.05`; of an ablation, the variant's name.
        seed: One of `train.seeds`.
    """

    strategy: str
    label: str
    seed: int

    def __str__(self) -> str:
        return f"{self.strategy} {self.label} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """All that tells the training loop what to do.

    Attributes:
        recipe: Network, optimizer, epochs, batches.
        perturbed_share: Share of every batch that is perturbed, in [0, 1], for each epoch.
        fits_on_perturbed: Whether input standardization is fitted on the perturbed images instead of the clean.
        starts_from_natural: Whether the layers that the natural model has too start with its weights.
        freezes_start: Whether those layers stay as they start.
        repairs: Name of the model of the user's that is trained on, with its output layer and its standardization; None
            for a model of our own.
    """

    recipe: Recipe
    perturbed_share: tuple[float, ...]
    fits_on_perturbed: bool
    starts_from_natural: bool = False
    freezes_start: bool = False
    repairs: str | None = None


def plan_natural(recipe: Recipe) -> Plan:
    """Clean images only; the model that every strategy is compared with."""
    return Plan(recipe, (0.0,) * recipe.epochs, fits_on_perturbed=False)
