"""Models that the user supplies: where their files are and what input they expect, as frozen values."""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.recipes.recipe import LibraryNetwork
from pipeline.runtime.values import Values

Side = Annotated[int, Field(ge=1, le=4096)]
PerChannel = Annotated[tuple[float, ...], Field(strict=False, min_length=1, max_length=3)]
_MAX_LISTED = 5


class External(Values):
    """A model that the user supplies: measured like the natural model, not trained itself.

    Attributes:
        dataset: Name of the data set that it classifies.
        kind: `onnx`: a graph with one input, the images, and an output (N, n_classes). `torchvision`, `timm`: weights
            for one of their architectures, as safetensors or as a state_dict written by torch.save.
        path: The file, absolute or relative to the repository.
        architecture: Its name in the library; None for `onnx`.
        channels: What it takes: `rgb`, `bgr` or, `onnx` only, `grey`.
        size: Height and width, in pixels, that images are resized to for it; None: not resized.
        scale: Values, 0-255, are divided by this first: 255 for a model that takes values in [0, 1].
        mean: Subtracted next, one number for each channel in the model's order, or one for all.
        std: The divisor after that, likewise.
        classes: Names of the data set's classes in the order of the model's outputs; None: in the data set's order.
    """

    dataset: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,60}$")]
    kind: Literal["onnx", "torchvision", "timm"]
    path: Annotated[str, Field(min_length=1, max_length=1000)]
    architecture: Annotated[str, Field(pattern=r"^[a-z0-9_.]{1,80}$")] | None
    channels: Literal["rgb", "bgr", "grey"]
    size: Annotated[tuple[Side, Side], Field(strict=False)] | None
    scale: Annotated[float, Field(gt=0)]
    mean: PerChannel
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False, min_length=1, max_length=3)]
    classes: Annotated[tuple[str, ...], Field(strict=False)] | None

    @model_validator(mode="after")
    def _check(self) -> Self:
        allowed = (1,) if self.channels == "grey" else (1, 3)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in allowed:
                raise ValueError(
                    f"{name}: {len(values)} values for {self.channels}; give {' or '.join(map(str, allowed))}"
                )
        if self.kind != "onnx" and self.channels == "grey":
            raise ValueError("channels: networks of torchvision and timm take three; give rgb, also for grey images")
        if (self.architecture is None) != (self.kind == "onnx"):
            raise ValueError("architecture: name the one of torchvision or timm; leave it empty for onnx")
        twice = [name for name, n in Counter(self.classes).items() if n > 1]
        if twice:
            raise ValueError(f"classes: {_some(twice)} more than once; name every class once")
        return self

    def find_outputs(self, classes: Sequence[str]) -> list[int] | None:
        """Return the index of the model's output for each class of the data set; None if both have the same order.

        Args:
            classes: Names of the data set's classes, in order.

        Raises:
            ValueError: `classes` has other names; the message begins with the key.
        """
        if self.classes is None or self.classes == tuple(classes):
            return None
        number = {name: i for i, name in enumerate(self.classes)}
        known = set(classes)
        unknown, missing = [name for name in number if name not in known], [n for n in classes if n not in number]
        if unknown or missing:
            said = [f"unknown {_some(unknown)}"] * bool(unknown) + [f"without {_some(missing)}"] * bool(missing)
            raise ValueError(
                f"classes: {', '.join(said)}; give the names of {self.dataset}, {_some(classes)}, in the order of the "
                "model's outputs, or leave it empty for that order"
            )
        return [number[name] for name in classes]

    @property
    def network(self) -> LibraryNetwork:
        """The network that strategy `repair` trains.

        Raises:
            ValueError: The model cannot be trained: it is an ONNX graph, or does not take images as they are, in RGB.
        """
        if self.kind == "onnx" or self.architecture is None:
            raise ValueError("an ONNX graph cannot be trained; give its weights as kind torchvision or timm")
        if self.channels != "rgb" or self.size is not None:
            raise ValueError(
                "only a model that takes images as they are can be trained: give it channels: rgb and size: null, and "
                "its own size to the data set (source.size)"
            )
        return LibraryNetwork(
            kind=self.kind, architecture=self.architecture, weights=None, stem="full", fully_connected=()
        )

    @property
    def decides(self) -> dict[str, Any]:
        """All that determines its outputs apart from the file, as JSON values."""
        return self.model_dump(mode="json", exclude={"path"})


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(map(repr, names[:_MAX_LISTED])) + more
