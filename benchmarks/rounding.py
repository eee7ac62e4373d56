"""Trains MNIST models on images in floating point and on the same rounded to uint8: is that why numbers differ?

    python -m pipeline profile paper && dvc repro prepare@mnist
    python -m benchmarks.rounding    # into results/rounding-mnist/; a quarter of an hour on two cores

The authors' script keeps images in floating point, the study in uint8. The models here are the paper's, in plain torch,
numpy and scipy, always in float32. Each is tested on images stored in both ways.
"""

from collections.abc import Iterator
from dataclasses import replace

import click
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, unfold

from benchmarks.reproduction import RESULTS, keep
from pipeline.data import store
from pipeline.recipes.plan import CLEAN, NATURAL
from pipeline.runtime.errors import PipelineError
from pipeline.study.params import load
from pipeline.study.planning import Study, plan_study

Values = NDArray[np.float64]
SEEDS = range(1, 6)
# Paper, figure 1: Adam with this learning rate, so many epochs and images per batch.
LEARNING_RATE, EPOCHS, BATCH_SIZE = 0.05, 50, 1500
# σ of the blur that models of constant training see.
TRAINED_ON = 0.28
# (strategy, label, damage, how its training images are stored). Clean images are uint8 to begin with.
MODELS = (
    (NATURAL, CLEAN, CLEAN, "uint8"),
    ("constant", f"blur-{TRAINED_ON:g}", "blur", "float"),
    ("constant", f"blur-{TRAINED_ON:g}", "blur", "uint8"),
)
TESTS = ((CLEAN, 0.0), ("noise", 0.001), ("blur", 1.0))


def damage(images: Values, kind: str, sigma: float) -> Values:
    """Images in [0, 1], (N, 28, 28), with noise or blur in floating point; σ as in params.yaml."""
    if kind == "noise":
        return np.clip(images + np.random.default_rng(0).normal(0, sigma, images.shape), 0, 1)
    return np.asarray(gaussian_filter(images, (0, sigma, sigma)), np.float64) if kind == "blur" else images


def store_as(values: str, images: Values) -> Values:
    """The images as they are (`float`), or at the 256 levels of `uint8`."""
    return np.rint(images * 255) / 255 if values == "uint8" else images


class Standardization:
    """The authors': mean and standard deviation of every position; positions that never vary become 0."""

    def __init__(self, images: Values) -> None:
        self.mean, std = images.mean(axis=0), images.std(axis=0)
        self.factor = np.divide(1, std, out=np.zeros_like(std), where=std > 0)

    def __call__(self, images: Values) -> Tensor:
        """The 8×8 windows of 7×7 standardized values that the convolution sees, float32 (N, 64, 49)."""
        values = torch.from_numpy(((images - self.mean) * self.factor).astype(np.float32))
        return unfold(values[:, None], 7, stride=3).transpose(1, 2).contiguous()


class PaperNetwork(nn.Module):
    """The paper's network for MNIST (figure 1), with its convolution as a product with all windows."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Linear(49, 10)
        after = nn.BatchNorm2d(10), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2), nn.Flatten(), nn.Linear(160, 10)
        self.after = nn.Sequential(*after)

    def forward(self, windows: Tensor) -> Tensor:
        """(N, 64, 49) → logits (N, 10)."""
        maps: Tensor = self.convolution(windows).transpose(1, 2).reshape(-1, 10, 8, 8)
        logits: Tensor = self.after(maps)
        return logits


def train(windows: Tensor, labels: Tensor, seed: int) -> PaperNetwork:
    """Train as the authors do: images in their order, without the last partial batch."""
    torch.manual_seed(seed)
    network = PaperNetwork()
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    for _ in range(EPOCHS):
        for start in range(0, len(windows) - BATCH_SIZE + 1, BATCH_SIZE):
            batch = slice(start, start + BATCH_SIZE)
            loss = cross_entropy(network(windows[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return network.eval()


def run(study: Study) -> Iterator[dict[str, object]]:
    """A row for every model and set of test images; `trained` and `tested` are how their images are stored."""
    images, labels = {}, {}
    for split, n in study.n_examples.items():
        images[split] = store.read_clean(study.dataset, split, "images")[:n, ..., 0] / 255
        labels[split] = torch.from_numpy(store.read_clean(study.dataset, split, "labels")[:n].astype(np.int64))
    for strategy, label, kind, trained in MODELS:
        seen = store_as(trained, damage(images["train"], kind, TRAINED_ON))
        standardize = Standardization(seen)
        windows = standardize(seen)
        tests = {
            (tested, *test): standardize(store_as(tested, damage(images["test"], *test)))
            for tested in ("float", "uint8")
            for test in TESTS
        }
        for seed in SEEDS:
            network = train(windows, labels["train"], seed)
            for (tested, perturbation, level), shown in tests.items():
                with torch.inference_mode():
                    n_correct = int((network(shown).argmax(1) == labels["test"]).sum())
                yield {
                    "strategy": strategy,
                    "label": label,
                    "trained": trained,
                    "seed": seed,
                    "tested": tested,
                    "perturbation": perturbation,
                    "level": level,
                    "n_examples": len(shown),
                    "n_correct": n_correct,
                }


@click.command()
def main() -> None:
    """Train and test the models, and keep the results."""
    try:
        study, rows = plan_study(load(), "mnist"), []
        if dict(study.n_examples) != {"train": 50_000, "test": 10_000}:
            raise PipelineError("params.yaml: other images than the paper's; run `python -m pipeline profile paper`")
        for row in run(study):
            click.echo(" ".join(map(str, row.values())))
            rows.append(row)
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    keep(RESULTS / "rounding-mnist", replace(study, precision="float32"), {"impact": pd.DataFrame(rows)}, {})


if __name__ == "__main__":
    main()
