"""Training of a classifier: one loop, the whole data set on the device as uint8."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.data.arrays import Images
from pipeline.data.seeding import derive_seed
from pipeline.models.classifier import Classifier, Standardize, build_network, fit_standardization
from pipeline.models.devices import images_per_pass, select_precision
from pipeline.models.layers import Whitening
from pipeline.recipes.plan import Plan
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import read_file, replacing_file
from pipeline.training.schedules import regimen_of

# Weights and what an optimizer keeps for each.
_MAX_CHECKPOINT = 16 * 2**30


@dataclass(frozen=True)
class Examples:
    """Images and their labels.

    Attributes:
        images: uint8 (N, H, W, C), 0-255.
        labels: uint8 (N,), 0 to n_classes - 1.
        n_classes: How many classes the data set has.
    """

    images: Images
    labels: NDArray[np.uint8]
    n_classes: int


@dataclass(frozen=True)
class Epoch:
    """One row of the learning curve; accuracies in [0, 1], the training ones with dropout and before each step."""

    epoch: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float


def train_model(
    plan: Plan,
    train: Examples,
    perturbed: Images | None,
    natural: Classifier | None,
    test: Examples,
    seed_names: tuple[int | str, ...],
    device: torch.device,
    checkpoint: Path | None = None,
    report: Callable[[Epoch], Any] = lambda epoch: None,
    progress: Callable[[int], Any] = lambda n_images: None,
) -> tuple[Classifier, list[Epoch]]:
    """A classifier trained as a plan says, and its learning curve.

    The test images are only looked at after each epoch; nothing is chosen by them.

    Args:
        plan: What to do.
        train: Clean training set.
        perturbed: The same images perturbed, uint8 (N, H, W, C); None for a plan that never uses them.
        natural: The model to start from; None for a plan that starts from scratch.
        test: Clean test set.
        seed_names: Decide initial weights, order and dropout; on one machine with the same number of threads the
            weights are the same, bit for bit.
        device: Where to train.
        checkpoint: File that holds the state after the last whole epoch; training goes on from it, to the same
            weights. None: no checkpoints.
        report: Called after every epoch.
        progress: Called with the number of training images seen since the last call.

    Raises:
        PipelineError: Training diverged: a loss, a weight or an answer is not a finite number.

    Source: paper sections IV and VI.
    """
    recipe = plan.recipe
    precision = select_precision(recipe.precision, device)
    clean_images = torch.from_numpy(train.images).to(device)
    perturbed_images = clean_images if perturbed is None else torch.from_numpy(perturbed).to(device)
    labels = torch.from_numpy(train.labels).to(device, torch.long)
    test_images, test_labels = torch.from_numpy(test.images).to(device), torch.from_numpy(test.labels).to(device)
    _seed_torch(*seed_names, "weights")
    seen = train.images if perturbed is None else perturbed
    classifier, started = _start(plan, seen, train.images, natural, train.n_classes)
    classifier.to(device)
    classifier.network.to(memory_format=torch.channels_last)
    frozen = started if plan.freezes_start else []
    for module in frozen:
        module.requires_grad_(False)
    regimen = regimen_of(recipe)
    optimizer = regimen.build_optimizer(classifier)
    full_rates = [group["lr"] for group in optimizer.param_groups]
    curve = _resume(checkpoint, classifier, optimizer)
    n, size = len(clean_images), recipe.batch_size
    n_used = n - n % size if recipe.drop_last else n
    _seed_torch(*seed_names, "flips")
    flips = torch.rand(n, device=device) < 0.5
    autocast = partial(torch.autocast, device.type, precision, enabled=precision != torch.float32)
    n_per_pass = min(500, images_per_pass(500, test.images[0].size))
    is_packed = classifier.packing(device) is not None
    if is_packed:  # once for all epochs
        test_images, clean_images, perturbed_images = (
            classifier.prepare(images) for images in (test_images, clean_images, perturbed_images)
        )
    for epoch in range(len(curve) + 1, recipe.epochs + 1):
        # Every epoch has a seed of its own, so that the state of no generator outlives it.
        _seed_torch(*seed_names, "epoch", epoch)
        order = torch.randperm(n).to(device) if recipe.shuffle else None
        loss_sum = torch.zeros((), device=device)
        n_correct = torch.zeros((), device=device, dtype=torch.long)
        classifier.train()
        for module in frozen:
            module.eval()
        for start in range(0, n_used, size):
            done = (epoch - 1 + start / n_used) / recipe.epochs
            for group, full_rate in zip(optimizer.param_groups, full_rates, strict=True):
                group["lr"] = full_rate * regimen.rate(done)
            stop = min(start + size, n_used)
            middle = start + int(plan.perturbed_share[epoch - 1] * (stop - start))
            parts = [_take(perturbed_images, order, start, middle), _take(clean_images, order, middle, stop)]
            parts = [part for part in parts if len(part) > 0]
            images = parts[0] if len(parts) == 1 else torch.cat(parts)
            images = regimen.augment(images, _take(flips, order, start, stop), epoch)
            batch_labels = _take(labels, order, start, stop)
            with autocast():
                logits = classifier.classify(images) if is_packed else classifier(images, regimen.side(done))
            loss = cross_entropy(logits, batch_labels, label_smoothing=regimen.label_smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss_sum += loss.detach() * len(images)
            n_correct += (logits.argmax(1) == batch_labels).sum()
            progress(len(images))
        classifier.eval()
        with torch.inference_mode(), autocast():
            classify = classifier.classify if is_packed else classifier
            test_logits = torch.cat([classify(part) for part in torch.split(test_images, n_per_pass)])
        # The last step of an epoch has no loss after it: its weights, and what they make of images, say how it went.
        if not all(values.isfinite().all() for values in (loss_sum, test_logits, *classifier.state_dict().values())):
            raise PipelineError(
                f"training diverged in epoch {epoch}: losses or weights are not finite; lower the learning rate "
                f"({recipe.learning_rate:g})"
            )
        curve.append(
            Epoch(
                epoch=epoch,
                train_loss=loss_sum.item() / n_used,
                train_accuracy=n_correct.item() / n_used,
                test_accuracy=(test_logits.argmax(1) == test_labels).sum().item() / len(test_labels),
            )
        )
        if checkpoint is not None:
            _save_checkpoint(checkpoint, classifier, optimizer, curve)
        report(curve[-1])
    return classifier.eval(), curve


def _take(values: Tensor, order: Tensor | None, start: int, stop: int) -> Tensor:
    """Values `start` to `stop` in that order, or as they lie: then nothing is copied."""
    return values[start:stop] if order is None else values.index_select(0, order[start:stop])


def _start(
    plan: Plan, perturbed: Images, clean: Images, natural: Classifier | None, n_classes: int
) -> tuple[Classifier, list[nn.Module]]:
    """The classifier before its first step, and those of its layers that come from the natural model."""
    _, height, width, channels = clean.shape
    shape = (height, width, channels)
    fitted = fit_standardization(perturbed if plan.fits_on_perturbed else clean, plan.recipe.standardize)
    classifier = Classifier(shape, Standardize(*fitted), build_network(plan.recipe.network, shape, n_classes))
    for module in classifier.network:
        if isinstance(module, Whitening):
            seen = perturbed if plan.fits_on_perturbed else clean
            module.fit(classifier.standardize(torch.from_numpy(seen[:5000])))
    if not plan.starts_from_natural:
        return classifier, []
    if natural is None:
        raise PipelineError("this strategy starts from the natural model, and there is none")
    # All but the output layer, which the new head replaces.
    own = {name: module for name, module in classifier.network.named_children() if name != "output"}
    given = dict(natural.network.named_children())
    shared = [name for name in own if name in given]
    for name in shared:
        own[name].load_state_dict(given[name].state_dict())
    return classifier, [own[name] for name in shared]


def _save_checkpoint(path: Path, classifier: Classifier, optimizer: torch.optim.Optimizer, curve: list[Epoch]) -> None:
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": tensor.contiguous() for name, tensor in state.items()}
    said = json.dumps([asdict(epoch) for epoch in curve]).encode()
    tensors["curve"] = torch.tensor(list(said), dtype=torch.uint8)
    content = safetensors.torch.save(tensors)
    with replacing_file(path) as partial:
        partial.write_bytes(_checkpoint_digest(path, content) + content)


def _checkpoint_digest(path: Path, content: bytes) -> bytes:
    # With its name: two that have changed places are not taken for each other.
    return hashlib.sha256(path.name.encode() + content).digest()


def _resume(path: Path | None, classifier: Classifier, optimizer: torch.optim.Optimizer) -> list[Epoch]:
    """Load a checkpoint, if there is one, and return the learning curve so far."""
    if path is None or not path.is_file():
        return []
    device = next(classifier.parameters()).device
    content = read_file(path, _MAX_CHECKPOINT)
    if _checkpoint_digest(path, content[32:]) != content[:32]:  # damaged, after a power cut say: begin anew
        return []
    tensors = safetensors.torch.load(content[32:])
    curve = [Epoch(**epoch) for epoch in json.loads(tensors.pop("curve").numpy().tobytes())]
    classifier.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
    weights = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            if key != "step":
                # In the memory order of the weights, which fused Adam takes for granted.
                tensor = torch.empty_like(weights[int(number)], requires_grad=False).copy_(tensor)
            state.setdefault(int(number), {})[key] = tensor.to(device)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return curve


def _seed_torch(*names: int | str) -> None:
    torch.manual_seed(derive_seed(*names) % 2**63)
