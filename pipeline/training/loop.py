"""The training loop: trains one model and writes a checkpoint after every epoch.

The whole data set is on the device, as uint8.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.data.arrays import Images, Labels
from pipeline.data.seeding import derive_seed
from pipeline.models.classifier import HEAD, Classifier, build_network, check_step, fit_standardization
from pipeline.models.devices import images_per_pass, select_precision
from pipeline.models.layers import Standardize
from pipeline.recipes.plan import Plan
from pipeline.recipes.recipe import FastRecipe
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import MAX_CHECKPOINT, read_file, replacing_file
from pipeline.training.schedules import schedule_of


@dataclass(frozen=True)
class Examples:
    """Images and their labels.

    Attributes:
        images: uint8 (N, H, W, C), 0-255.
        labels: uint8 or uint16 (N,), 0 to n_classes - 1.
        n_classes: Number of classes in the data set.
    """

    images: Images
    labels: Labels
    n_classes: int


@dataclass(frozen=True)
class Epoch:
    """One row of the learning curve.

    Accuracies are in [0, 1]. Training loss and accuracy are taken with dropout, before each optimizer step.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float


@dataclass(frozen=True)
class TrainingData:
    """The images and labels that a model is trained and tested on.

    Attributes:
        train: Clean training set.
        test: Clean test set.
        perturbed: The training images perturbed, uint8 (N, H, W, C); None for a plan that never uses them.
    """

    train: Examples
    test: Examples
    perturbed: Images | None = None


def train_model(
    plan: Plan,
    data: TrainingData,
    seed_names: tuple[int | str, ...],
    device: torch.device,
    start: Classifier | None = None,
    checkpoint: Path | None = None,
    report: Callable[[Epoch], Any] = lambda epoch: None,
    progress: Callable[[int], Any] = lambda n_images: None,
) -> tuple[Classifier, list[Epoch]]:
    """Train a classifier as a plan says and return it with its learning curve.

    The test images are only used to measure accuracy after each epoch; nothing is selected by it.

    Args:
        plan: How to train.
        data: Training and test images.
        seed_names: Names that the seeds of initial weights, image order, dropout and augmentation are derived from. On
            one machine with the same number of threads the weights are the same, bit for bit.
        device: Device to train on.
        start: The model to start from, the natural one or the user's; None for a plan that starts from scratch.
        checkpoint: File with the state after the last complete epoch; training resumes from it and reaches the same
            weights. None: no checkpoints.
        report: Called after every epoch.
        progress: Called with the number of training images seen since the last call.

    Raises:
        PipelineError: Training diverged: a loss, a weight or a logit is not a finite number. Or the plan starts from
            a model and there is none, or a training step does not fit into memory.

    Source: paper sections IV and VI.
    """
    training = _Training(plan, data, seed_names, device, start)
    curve = _resume(checkpoint, training.classifier, training.optimizer)
    for epoch in range(len(curve) + 1, plan.recipe.epochs + 1):
        curve.append(training.run_epoch(epoch, progress))
        if checkpoint is not None:
            _save_checkpoint(checkpoint, training.classifier, training.optimizer, curve)
        report(curve[-1])
    return training.classifier.eval(), curve


class _Training:
    """A model in training: its weights, its optimizer, and all images on the device."""

    def __init__(
        self,
        plan: Plan,
        data: TrainingData,
        seed_names: tuple[int | str, ...],
        device: torch.device,
        start: Classifier | None,
    ) -> None:
        self.plan, self.recipe, self.seed_names = plan, plan.recipe, seed_names
        _seed_torch(*seed_names, "weights")
        self.classifier, started = _start(plan, data, start, device)
        self.classifier.to(device)
        self.classifier.network.to(memory_format=torch.channels_last)
        self.frozen = started if plan.freezes_start else []
        for module in self.frozen:
            module.requires_grad_(False)
        self.schedule = schedule_of(self.recipe)
        self.optimizer = self.schedule.build_optimizer(self.classifier)
        self.full_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.precision = select_precision(self.recipe.precision, device)

        self.clean, self.test = (torch.from_numpy(examples.images).to(device) for examples in (data.train, data.test))
        self.perturbed = self.clean if data.perturbed is None else torch.from_numpy(data.perturbed).to(device)
        self.labels, self.test_labels = (
            torch.from_numpy(examples.labels).to(device, torch.long) for examples in (data.train, data.test)
        )
        self.n_per_pass = min(500, images_per_pass(500, data.test.images[0].size))
        _seed_torch(*seed_names, "flips")
        self.flips = torch.rand(len(self.clean), device=device) < 0.5

    def run_epoch(self, epoch: int, progress: Callable[[int], Any]) -> Epoch:
        """Train for one epoch, then measure accuracy on the test images."""
        # Every epoch has its own seed, so that checkpoints need no generator state.
        _seed_torch(*self.seed_names, "epoch", epoch)
        n, size, device = len(self.clean), self.recipe.batch_size, self.clean.device
        n_used = n - n % size if self.recipe.drop_last else n
        order = torch.randperm(n).to(device) if self.recipe.shuffle else None
        loss_sum, n_correct = torch.zeros((), device=device), torch.zeros((), device=device, dtype=torch.long)
        self.classifier.train()
        for module in self.frozen:
            module.eval()
        for start in range(0, n_used, size):
            done = (epoch - 1 + start / n_used) / self.recipe.epochs
            for group, full_rate in zip(self.optimizer.param_groups, self.full_rates, strict=True):
                group["lr"] = full_rate * self.schedule.rate(done)
            images, labels = self.take_batch(epoch, order, start, min(start + size, n_used))
            with self.arithmetic():
                logits = self.classifier(images, self.schedule.side(done))
            loss = cross_entropy(logits, labels, label_smoothing=self.schedule.label_smoothing)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            loss_sum += loss.detach() * len(images)
            n_correct += (logits.argmax(1) == labels).sum()
            progress(len(images))
        test_accuracy = self.measure(epoch, loss_sum)
        return Epoch(epoch, loss_sum.item() / n_used, n_correct.item() / n_used, test_accuracy)

    def take_batch(self, epoch: int, order: Tensor | None, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return images `start` to `stop` in that order, the plan's share of them perturbed, and their labels.

        The perturbed ones come first.
        """
        middle = start + int(self.plan.perturbed_share[epoch - 1] * (stop - start))
        parts = [_take(self.perturbed, order, start, middle), _take(self.clean, order, middle, stop)]
        parts = [part for part in parts if len(part) > 0]
        images = parts[0] if len(parts) == 1 else torch.cat(parts)
        flips = _take(self.flips, order, start, stop)
        return self.schedule.augment(images, flips, epoch), _take(self.labels, order, start, stop)

    def measure(self, epoch: int, loss_sum: Tensor) -> float:
        """Accuracy on the test images, in [0, 1].

        Raises:
            PipelineError: Training diverged in this epoch.
        """
        self.classifier.eval()
        with torch.inference_mode(), self.arithmetic():
            logits = torch.cat([self.classifier(part) for part in torch.split(self.test, self.n_per_pass)])
        # No loss follows the last step of an epoch: its weights and their logits are checked instead.
        if not all(values.isfinite().all() for values in (loss_sum, logits, *self.classifier.state_dict().values())):
            raise PipelineError(
                f"training diverged in epoch {epoch}: losses or weights are not finite; lower the learning rate "
                f"({self.recipe.learning_rate:g})"
            )
        return (logits.argmax(1) == self.test_labels).sum().item() / len(self.test_labels)

    def arithmetic(self) -> torch.autocast:
        """Return a context in which the network computes in the recipe's precision."""
        return torch.autocast(self.clean.device.type, self.precision, enabled=self.precision != torch.float32)


def _take(values: Tensor, order: Tensor | None, start: int, stop: int) -> Tensor:
    """Return values `start` to `stop` in that order; without an order, as stored and without a copy."""
    return values[start:stop] if order is None else values.index_select(0, order[start:stop])


def _start(
    plan: Plan, data: TrainingData, start: Classifier | None, device: torch.device
) -> tuple[Classifier, list[nn.Module]]:
    """Return the classifier before its first step, and those of its layers that start with the natural weights."""
    clean = data.train.images
    height, width, channels = clean.shape[1:]
    shape = (height, width, channels)
    small = plan.recipe.small_images if isinstance(plan.recipe, FastRecipe) else None
    side = small.side if small is not None and small.share > 0 else None
    check_step(plan.recipe.network, shape, data.train.n_classes, plan.recipe.batch_size, device, side)
    if start is None and (plan.starts_from_natural or plan.repairs is not None):
        raise PipelineError("this strategy starts from another model, and there is none")
    if start is not None and plan.repairs is not None:
        return start, []
    seen = clean if data.perturbed is None or not plan.fits_on_perturbed else data.perturbed
    network = build_network(plan.recipe.network, shape, data.train.n_classes)
    classifier = Classifier(shape, Standardize(*fit_standardization(seen, plan.recipe.standardize)), network)
    classifier.fit(torch.from_numpy(seen[: max(1, min(5000, 5000 * 32 * 32 // (height * width)))]))
    classifier.load_start()
    if start is None:
        return classifier, []
    # All but the output layer, which the new head replaces.
    own, given = (dict(model.network.named_children()) for model in (classifier, start))
    shared = [name for name in own if name in given and name != HEAD]
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
    # Includes the file name, so that two swapped checkpoints are detected.
    return hashlib.sha256(path.name.encode() + content).digest()


def _resume(path: Path | None, classifier: Classifier, optimizer: torch.optim.Optimizer) -> list[Epoch]:
    """Load a checkpoint, if there is one, and return the learning curve so far."""
    if path is None or not path.is_file():
        return []
    device = next(classifier.parameters()).device
    content = read_file(path, MAX_CHECKPOINT)
    if _checkpoint_digest(path, content[32:]) != content[:32]:  # damaged, for example by a power cut: start over
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
                # In the memory layout of the weights, which fused Adam assumes.
                tensor = torch.empty_like(weights[int(number)], requires_grad=False).copy_(tensor)
            state.setdefault(int(number), {})[key] = tensor.to(device)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return curve


def _seed_torch(*names: int | str) -> None:
    torch.manual_seed(derive_seed(*names) % 2**63)
