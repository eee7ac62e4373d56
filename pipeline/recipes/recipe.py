"""How a network is built and trained, as frozen values."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, TypeAdapter

from pipeline.runtime.values import Values


class Convolution(Values):
    """One convolution and its pooling; sizes in pixels."""

    filters: Annotated[int, Field(ge=1, le=8192)]
    kernel: Annotated[int, Field(ge=1, le=64)]
    stride: Annotated[int, Field(ge=1, le=64)]
    padding: Annotated[int, Field(ge=0, le=64)]
    pool: Annotated[int, Field(ge=1)]

    def output_side(self, side: int) -> int:
        """Side of the output before pooling."""
        return (side + 2 * self.padding - self.kernel) // self.stride + 1


Widths = Annotated[tuple[Annotated[int, Field(ge=1, le=65_536)], ...], Field(strict=False)]


class Network(Values):
    """A network like the paper's: convolutions with pooling, then fully connected layers."""

    convolutions: Annotated[tuple[Convolution, ...], Field(strict=False)]
    fully_connected: Widths
    activation: Literal["relu", "tanh"]
    batch_norm: bool
    dropout: Annotated[float, Field(ge=0, lt=1)]

    @property
    def summary(self) -> str:
        """Filters and kernels of the convolutions, for tables."""
        return ", ".join(f"{layer.filters}@{layer.kernel}×{layer.kernel}" for layer in self.convolutions)

    def check(self, shape: tuple[int, int, int]) -> None:
        """Refuse images of `shape` (H, W, C) that are too small, as `n_features` does."""
        self.n_features(shape)

    def n_features(self, shape: tuple[int, int, int]) -> int:
        """Number of features that the convolutions compute from an image of `shape` (H, W, C).

        Raises:
            ValueError: A kernel or pool is larger than its input.
        """
        height, width, channels = shape
        for number, layer in enumerate(self.convolutions, start=1):
            height, width = (layer.output_side(side) // layer.pool for side in (height, width))
            channels = layer.filters
            if min(height, width) < 1:
                raise ValueError(f"convolution {number} leaves nothing of a {shape[0]}x{shape[1]} image")
        return height * width * channels


class FastNetwork(Values):
    """A network that learns in few epochs: filters for 2×2 patches, then groups of two 3×3 convolutions.

    The filters whiten the patches of the training set or, without `whiten`, are learned like all others.

    Every group halves the side and ends with its number of channels in `widths`; the last is pooled over the whole
    image, so the network takes images of any size that is large enough.
    """

    widths: Annotated[tuple[Annotated[int, Field(ge=1, le=8192)], ...], Field(strict=False, min_length=1)]
    fully_connected: Widths
    activation: Literal["relu", "tanh", "gelu"]
    whiten: bool

    batch_norm: ClassVar[bool] = True

    @property
    def summary(self) -> str:
        """Widths of the groups, for tables."""
        return f"fast: {', '.join(map(str, self.widths))}"

    def check(self, shape: tuple[int, int, int]) -> None:
        """As `Network.check`."""
        self.n_features(shape)

    def n_features(self, shape: tuple[int, int, int]) -> int:
        """Number of features that the convolutions compute from an image of `shape` (H, W, C).

        Raises:
            ValueError: The image is too small for the groups.
        """
        height, width, _ = shape
        if (min(height, width) - 1) >> len(self.widths) < 1:
            raise ValueError(f"{len(self.widths)} groups leave nothing of a {height}x{width} image")
        return self.widths[-1]


class Weights(Values):
    """A file of weights, and the SHA-256 of its bytes: another file is another model."""

    path: Annotated[str, Field(min_length=1, max_length=1000)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class LibraryNetwork(Values):
    """A network of torchvision.models or timm, with its last layer replaced to fit the data set's classes.

    Attributes:
        kind: `torchvision`, or `timm` where it is installed.
        architecture: Its name there, such as `resnet18`.
        weights: Weights to start from; None: weights as the library draws them.
        stem: `full`: unchanged. `small`, for small images: a first convolution of stride 2 gets stride 1, and the
            pooling after it is removed.
        fully_connected: Widths of layers between it and the output layer, with ReLU.
    """

    kind: Literal["torchvision", "timm"]
    architecture: Annotated[str, Field(pattern=r"^[a-z0-9_.]{1,80}$")]
    weights: Weights | None
    stem: Literal["full", "small"]
    fully_connected: Widths

    # Attributes that the networks above have too; constants here.
    activation: ClassVar[Literal["relu"]] = "relu"
    batch_norm: ClassVar[bool] = True  # most have it; params cannot tell

    @property
    def summary(self) -> str:
        """Its name in the library, for tables."""
        return f"{self.kind} {self.architecture}"

    def check(self, shape: tuple[int, int, int]) -> None:
        """Check nothing: only the library knows which image sizes fit, and `train` asks it before training."""


def _network_tag(value: object) -> str:
    is_library = "kind" in value if isinstance(value, dict) else isinstance(value, LibraryNetwork)
    return "library" if is_library else "layers"


class Adam(Values):
    """The paper's optimizer."""

    learning_rate: Annotated[float, Field(gt=0)]
    beta1: Annotated[float, Field(ge=0, lt=1)]
    beta2: Annotated[float, Field(ge=0, lt=1)]


class Sgd(Values):
    """Stochastic gradient descent with Nesterov momentum, its learning rate rising and then falling linearly."""

    learning_rate: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(gt=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    bias_factor: Annotated[float, Field(gt=0)]
    warm_up: Annotated[float, Field(ge=0, lt=1)]


class SmallImages(Values):
    """Images scaled to `side` pixels for the first `share` of all steps."""

    side: Annotated[int, Field(ge=2, le=64)]
    share: Annotated[float, Field(ge=0, le=1)]


class Recipe(Values):
    """How a model of one data set is trained: the fields that all recipes share."""

    recipe: str
    network: Network | FastNetwork | LibraryNetwork
    standardize: Literal["pixel", "channel", "none"]
    epochs: Annotated[int, Field(ge=1, le=100_000)]
    batch_size: Annotated[int, Field(ge=2)]
    shuffle: bool
    drop_last: bool
    precision: Literal["auto", "float32", "bfloat16"]

    # The field that holds the optimizer.
    OPTIMIZER: ClassVar[str]

    @property
    def learning_rate(self) -> float:
        """The (largest) learning rate."""
        rate: float = getattr(self, self.OPTIMIZER).learning_rate
        return rate

    def fine_tuned(self, fully_connected: tuple[int, ...], learning_rate: float, batch_size: int, epochs: int) -> Self:
        """Return this recipe adapted to fine-tuning, with additional fully connected layers."""
        head = (*self.network.fully_connected, *fully_connected)
        optimizer = getattr(self, self.OPTIMIZER).model_copy(update={"learning_rate": learning_rate})
        network = self.network.model_copy(update={"fully_connected": head})
        changed = {"network": network, self.OPTIMIZER: optimizer, "batch_size": batch_size, "epochs": epochs}
        return self.model_copy(update=changed)


class PaperRecipe(Recipe):
    """Training as in the paper: Adam at a constant learning rate, without augmentation."""

    recipe: Literal["paper"]
    network: Annotated[
        Annotated[Network, Tag("layers")] | Annotated[LibraryNetwork, Tag("library")], Discriminator(_network_tag)
    ]
    adam: Adam

    OPTIMIZER: ClassVar[str] = "adam"


class FastRecipe(Recipe):
    """Training for speed: few epochs, a high learning rate, augmented images, small ones first."""

    recipe: Literal["fast"]
    network: Annotated[
        Annotated[FastNetwork, Tag("layers")] | Annotated[LibraryNetwork, Tag("library")], Discriminator(_network_tag)
    ]
    sgd: Sgd
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    flip: bool
    shift: Annotated[int, Field(ge=0, le=16)]
    small_images: SmallImages

    OPTIMIZER: ClassVar[str] = "sgd"


RecipeOf = Annotated[PaperRecipe | FastRecipe, Field(discriminator="recipe")]
RECIPES: TypeAdapter[PaperRecipe | FastRecipe] = TypeAdapter(RecipeOf)
NETWORKS: TypeAdapter[Network | FastNetwork | LibraryNetwork] = TypeAdapter(Network | FastNetwork | LibraryNetwork)
