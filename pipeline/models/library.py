"""Networks of torchvision.models and timm, without their last layer, for images of any size."""

import hashlib
import inspect
import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.models.layers import FirstLayer
from pipeline.recipes.recipe import LibraryNetwork
from pipeline.runtime.errors import PipelineError, lacks_memory, printable
from pipeline.runtime.files import MAX_WEIGHTS, read_file

# A number of classes by which the last layer is recognized: no layer has that width by chance.
_MARKED = 997
# Types of weights and buffers that networks of these libraries have.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)


class Body(FirstLayer):
    """A library's network without its last layer: float32 (N, C, H, W) → features (N, n).

    Grey images are fed to all three of its input channels.

    Attributes:
        model: The library's own module.
        head: Name of the layer that was removed from it.
        n_features: Number of features of an image.
    """

    def __init__(self, network: LibraryNetwork, shape: tuple[int, int, int]) -> None:
        """Build the network, with weights as the library draws them.

        Args:
            network: Its description.
            shape: (H, W, C) of the images.

        Raises:
            PipelineError: There is no such network, or the library is not installed.
        """
        super().__init__()
        self._weights = network.weights
        self.model = build_model(network, shape[:2], _MARKED)
        if network.stem == "small":
            _keep_resolution(self.model)
        self.head, self.n_features = _take_out_head(self.model, network)

    def load_start(self, following: nn.Module) -> None:
        """Load the weights of the file that params name, if they name one.

        The next layer gets the weights of the file's last layer if they fit it, that is, if the file is of a model for
        as many classes.

        Args:
            following: The next layer.

        Raises:
            PipelineError: The file is missing or damaged, is not the one that params name, or is of another
                architecture.
        """
        if self._weights is None:
            return
        self.take(read_tensors(Path(self._weights.path), self._weights.sha256), following, self._weights.path)

    def take(self, tensors: Mapping[str, Tensor], following: nn.Module, where: str) -> bool:
        """Load the weights of a complete model of this architecture, and return whether those of its last layer fit.

        Args:
            tensors: Its state_dict.
            following: The next layer, which gets the weights of the last layer if they fit it.
            where: Path of the model, for messages.

        Raises:
            PipelineError: They are of another architecture.
        """
        of_head = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{self.head}.")}
        rest = {name: tensor for name, tensor in tensors.items() if name not in of_head}
        load_tensors(self.model, rest, where)
        given = {name.rpartition(".")[2]: tensor for name, tensor in of_head.items()}
        own = following.state_dict()
        fits = bool(own) and {n: v.shape for n, v in given.items()} == {n: v.shape for n, v in own.items()}
        if fits:
            following.load_state_dict(given)
        return fits

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features of standardized images."""
        features: Tensor = self.model(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)
        return features


def build_model(network: LibraryNetwork, size: tuple[int, int], n_classes: int) -> nn.Module:
    """Build a library's complete network for three channels, with newly drawn weights.

    Args:
        network: Its description.
        size: Height and width of the images, which some architectures have to know.
        n_classes: Number of classes.

    Raises:
        PipelineError: As `Body`.
    """
    name, where = network.architecture, f"architecture: {network.kind}"
    with explained(name, size):
        if network.kind == "torchvision":
            from torchvision import models  # takes seconds; only these networks need it

            if name not in models.list_models(module=models):
                raise PipelineError(f"{where} has no {name!r}; torchvision.models.list_models() names what it has")
            make = models.get_model_builder(name)
            takes = {**inspect.signature(_class_of(make)).parameters, **inspect.signature(make).parameters}
            options: dict[str, Any] = {"num_classes": n_classes}
            # These would add a second output in training, or waste time on weights that are replaced.
            options |= {option: False for option in ("aux_logits", "init_weights") if option in takes}
            if "image_size" in takes:
                options["image_size"] = size[0]
            try:
                model: nn.Module = make(weights=None, **options)
            except NotImplementedError:  # computes with its weights, which have no values on device `meta`
                with torch.device("cpu"):
                    model = make(weights=None, **options)
                model = model.to(torch.get_default_device())
            return model
        try:
            import timm  # an extra
        except ImportError:
            raise PipelineError(f"{where} is not installed: `pip install -c constraints.txt -e '.[timm]'`") from None
        if name not in timm.list_models():
            raise PipelineError(f"{where} has no {name!r}; timm.list_models() names what it has")
        try:
            model = timm.create_model(name, pretrained=False, num_classes=n_classes, img_size=size)
        except TypeError:  # most do not have to know the size
            model = timm.create_model(name, pretrained=False, num_classes=n_classes)
        return model


def _class_of(builder: Any) -> Any:
    # A builder's options are those of the class in its return annotation.
    return inspect.signature(builder).return_annotation


@contextmanager
def explained(architecture: str, size: tuple[int, ...]) -> Iterator[None]:
    """Turn an error of a network's layers on images of some size into a PipelineError that names both."""
    try:
        yield
    except PipelineError:
        raise
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
        if lacks_memory(error):
            raise
        said = " ".join(str(error).split())[:200]
        raise PipelineError(
            f"architecture: {architecture} does not take images of {size[0]}x{size[1]} ({said}); give another "
            "size, the other stem, or another architecture"
        ) from None


def _keep_resolution(model: nn.Module) -> None:
    """Give the first convolution stride 1 instead of 2, and remove the pooling after it, as is usual for small images.

    Source: He et al., "Deep Residual Learning" (arXiv 1512.03385), section 4.2, which has no pooling for CIFAR-10.
    """
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    if first is not None and first.stride == (2, 2):
        first.stride = (1, 1)
    for name, child in model.named_children():
        if isinstance(child, nn.MaxPool2d):
            setattr(model, name, nn.Identity())
            return


def _take_out_head(model: nn.Module, network: LibraryNetwork) -> tuple[str, int]:
    """Replace the output layer by the identity; return its name and the number of features that it took."""
    for name, layer in reversed(list(model.named_modules())):
        if isinstance(layer, nn.Linear) and layer.out_features == _MARKED:
            n_features = layer.in_features
        elif isinstance(layer, nn.Conv2d) and layer.out_channels == _MARKED:
            n_features = layer.in_channels
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
        return name, n_features
    raise PipelineError(f"architecture: {network.architecture} has no last layer that could be replaced")


def try_step(
    network: LibraryNetwork, shape: tuple[int, int, int], n_classes: int, batch_size: int, small: int | None = None
) -> int:
    """Try a network on images without data, and return the bytes that a training step will need.

    Args:
        network: Its description.
        shape: (H, W, C) of the images.
        n_classes: Number of classes.
        batch_size: Images per step.
        small: Height and width that images are scaled to in a part of the training; None: in none.

    Raises:
        PipelineError: As `Body`; the images are too small for the network, or it takes one size only.
    """
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.device("meta"):
        body = Body(network, shape)
        height, width, channels = shape
        images = torch.empty(batch_size, channels, height, width)
        with (
            explained(network.architecture, (height, width)),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            features = body(images)
        if small is not None:
            with explained(network.architecture, (small, small)), torch.no_grad():
                body(torch.empty(batch_size, channels, small, small))
        if features.shape != (batch_size, body.n_features):
            raise PipelineError(
                f"architecture: {network.architecture} gives {tuple(features.shape)} of {batch_size} images of "
                f"{height}x{width}, not features (N, {body.n_features}); take larger images or another architecture"
            )
    n_weights = sum(weight.numel() for weight in body.parameters()) + body.n_features * n_classes
    # Weights, gradients, and optimizer state of two values for each weight.
    return sum(held.values()) + 4 * 4 * n_weights


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], path: str) -> None:
    """Load weights into a network.

    Raises:
        PipelineError: They are of another network.
    """
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    # Auxiliary heads that are only used in training, such as those of googlenet, are left out here.
    given = {name: tensor for name, tensor in tensors.items() if not name.lower().startswith("aux")}
    wrong = [name for name in own if name not in given] + [name for name in given if name not in own]
    wrong += [name for name in own if name in given and own[name] != given[name].shape]
    resized = [name for name in own if name in given and own[name][1:] == given[name].shape[1:]]
    if wrong and len(resized) == len(own) == len(given):
        raise PipelineError(
            f"{path}: weights for {given[wrong[-1]].shape[0]:,} classes, and there are {own[wrong[-1]][0]:,}; a model "
            "for other classes needs a new last layer"
        )
    if wrong:
        some = ", ".join(wrong[:3])
        raise PipelineError(f"{path}: weights of another architecture: {len(wrong)} do not fit, such as {some}")
    model.load_state_dict(dict(given))


def read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read the tensors of a file: safetensors, or a state_dict written by torch.save. Only tensors are unpickled.

    Args:
        path: The file.
        sha256: Expected SHA-256 of its bytes.

    Raises:
        PipelineError: It is missing or damaged, holds anything else or values that are not finite, or has another
            digest.
    """
    try:
        content = read_file(path, MAX_WEIGHTS)
    except FileNotFoundError:
        raise PipelineError(f"{path}: no such file of weights") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise PipelineError(f"{path}: has SHA-256 {digest}, params.yaml names {sha256}")
    return parse_tensors(content, str(path))


def parse_tensors(content: bytes, where: str) -> dict[str, Tensor]:
    """Read the tensors of safetensors, or of a state_dict written by torch.save.

    Args:
        content: Content of the file.
        where: Its path, for messages.

    Raises:
        PipelineError: As `read_tensors`.
    """
    try:
        if content[8:9] != b"{":  # the header of safetensors; the length before it can be anything
            with warnings.catch_warnings(action="ignore"):  # what matters of them is checked below
                loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            loaded = loaded.get("state_dict", loaded.get("model", loaded)) if isinstance(loaded, dict) else loaded
        else:
            loaded = safetensors.torch.load(content)
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise ValueError("no state_dict")
    except Exception as error:  # what damaged files make libraries raise
        if isinstance(error, MemoryError):
            raise
        if "Unsupported global" in str(error):  # torch refuses to unpickle anything but tensors
            raise PipelineError(
                f"{where}: more than weights; save them by torch.save(model.state_dict(), ...)"
            ) from None
        said = printable(" ".join(str(error).split())[:160])
        raise PipelineError(
            f"{where}: no weights: neither safetensors nor what torch.save(model.state_dict()) writes ({said})"
        ) from None
    tensors = {str(name).removeprefix("module."): value for name, value in loaded.items()}  # of DataParallel
    if not all(map(_is_usable, tensors.values())):
        raise PipelineError(f"{where}: some of its weights are sparse, quantized, complex, or not finite numbers")
    return tensors


def _is_usable(tensor: Tensor) -> bool:
    is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu"  # meta: without values
    return is_dense and tensor.dtype in _DTYPES and bool(tensor.isfinite().all())


def version(network: object) -> str | None:
    """Return the library that a network comes from, with its version; None for our own layers."""
    if not isinstance(network, LibraryNetwork):
        return None
    return f"{network.kind} {metadata.version(network.kind)}"
