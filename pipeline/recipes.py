"""How a network is built and trained, as frozen values."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# The model trained on clean images only.
NATURAL = "natural"


class Block(BaseModel):
    """A block of params.yaml: no key more, no key less, no value converted, none changed later."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Convolution(Block):
    """One convolution and what follows it; sizes in pixels."""

    filters: Annotated[int, Field(ge=1, le=8192)]
    kernel: Annotated[int, Field(ge=1, le=64)]
    stride: Annotated[int, Field(ge=1, le=64)]
    padding: Annotated[int, Field(ge=0, le=64)]
    pool: Annotated[int, Field(ge=1)]


Widths = Annotated[tuple[Annotated[int, Field(ge=1, le=65_536)], ...], Field(strict=False)]


class Network(Block):
    """A network as the builder takes it."""

    convolutions: Annotated[tuple[Convolution, ...], Field(strict=False)]
    fully_connected: Widths
    activation: Literal["relu", "tanh"]
    batch_norm: bool
    dropout: Annotated[float, Field(ge=0, lt=1)]

    def n_features(self, shape: tuple[int, int, int]) -> int:
        """Values that the convolutions leave of an image of `shape` (H, W, C).

        Raises:
            ValueError: A kernel or pool is larger than what reaches it.
        """
        height, width, channels = shape
        for number, layer in enumerate(self.convolutions, start=1):
            height, width = (
                ((side + 2 * layer.padding - layer.kernel) // layer.stride + 1) // layer.pool
                for side in (height, width)
            )
            channels = layer.filters
            if min(height, width) < 1:
                raise ValueError(f"convolution {number} leaves nothing of a {shape[0]}x{shape[1]} image")
        return height * width * channels


class Adam(Block):
    """The optimizer."""

    learning_rate: Annotated[float, Field(gt=0)]
    beta1: Annotated[float, Field(ge=0, lt=1)]
    beta2: Annotated[float, Field(ge=0, lt=1)]


class Recipe(Block):
    """How a model of one data set is trained."""

    network: Network
    standardize: Literal["pixel", "channel", "none"]
    adam: Adam
    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=2)]
    shuffle: bool
    drop_last: bool
    precision: Literal["auto", "float32", "bfloat16"]


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
