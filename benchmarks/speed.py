"""Compares the speed of this project with what a user would pick instead; gives a table and a JSON file.

    pip install -c constraints.txt -e '.[dev,benchmarks]'
    python -m benchmarks.speed --json speed.json            # a quarter of an hour on two cores
    python -m benchmarks.speed accuracy                     # time to 86.92 %: 3 seeds of the fast recipe
    python -m benchmarks.speed accuracy --profile paper --seeds 1   # and of the paper's: 40 minutes or more

Every number is the median over rounds; in a round every contender runs once, so that a busy machine affects all alike.
Ratios are to this project: 0.25 is a quarter of its speed. Contenders get the same images and return the same type, and
those that compute with torch have a process of their own, so that no setting of one affects another. Peers that cannot
be imported are named with their error. Needs the clean stores (`python -m pipeline prepare cifar10`, and mnist).
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TextIO

import click
import cv2
import numpy as np
import torch
import zarr
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import VisionDataset

from benchmarks import peers
from benchmarks.stage_costs import describe_machine
from pipeline.data import seeding, store
from pipeline.data.arrays import Images, Labels
from pipeline.data.datasets import CIFAR10, DATASETS
from pipeline.evaluation import measuring
from pipeline.models.classifier import Classifier, build_network, fit_standardization
from pipeline.models.devices import images_per_pass, select_device
from pipeline.models.layers import Standardize
from pipeline.perturbations import generation
from pipeline.perturbations.variants import PlannedArray, Variant
from pipeline.recipes.plan import plan_natural
from pipeline.recipes.recipe import Network, Recipe
from pipeline.runtime import layout
from pipeline.runtime.engine import LocalThreads
from pipeline.runtime.memory import keep_freed_memory
from pipeline.runtime.values import to_yaml
from pipeline.study import params
from pipeline.study.reading import read
from pipeline.training.loop import Epoch, Examples, TrainingData, train_model

US = "this project"
# Perturbation → level.
LEVELS = {"stuck": 3, "hot": 3, "dead": 3, "noise": 0.05, "blur": 1.0}
# Best clean accuracy of the paper's CIFAR-10 network, in percent; the time to reach it is measured.
PAPER_ACCURACY = 86.92


@dataclass(frozen=True)
class Measurement:
    """The speed of one contender at one task.

    Attributes:
        task: What was done, such as `generation, noise 0.05`.
        contender: Its name.
        per_second: Images per second, or bytes if `unit` says so; the median.
        unit: What is counted.
        ratio: `per_second` over this project's.
        seconds: Seconds of every round.
    """

    task: str
    contender: str
    per_second: float
    unit: str
    ratio: float
    seconds: list[float]


def compare(
    task: str, contenders: Mapping[str, Callable[[], float]], n: float, rounds: int, unit: str = "images"
) -> list[Measurement]:
    """Run all contenders in turn, once to warm up and then `rounds` times.

    Args:
        task: Its name in the table.
        contenders: Name → function that does the work and returns the seconds it took.
        n: Units of work.
        rounds: Timed runs of each.
        unit: What `n` counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            took = run()
            if number:
                seconds[name].append(took)
    speed = {name: n / statistics.median(took) for name, took in seconds.items()}
    measured = [
        Measurement(task, name, speed[name], unit, speed[name] / speed[US], took) for name, took in seconds.items()
    ]
    for one in measured:
        click.echo(f"{one.task}: {one.contender}: {one.per_second:,.0f} {unit}/s ({one.ratio:.2f})", err=True)
    return measured


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that `work` took."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare_generation(images: Images, rounds: int) -> tuple[list[Measurement], dict[str, str]]:
    """Compare every kernel with its peers; also return the peers that do not run, with their errors."""
    n_cores = torch.get_num_threads()
    found: list[Measurement] = []
    failed: dict[str, str] = {}
    for name, level in LEVELS.items():
        builders = peers.of(name, level)
        options = {"blur": {"mix_channels": False}, "noise": {}}.get(name, {"scope": "image"})
        variant = Variant(name, level, "train", 1, options)
        contenders: dict[str, Callable[[], float]] = {
            f"{US}, 1 thread": partial(timed, partial(generate, images, variant, 1)),
            US: partial(timed, partial(generate, images, variant, n_cores)),
        }
        for peer, build in builders.items():
            try:
                damage = build()
                assert damage(images[:2]).shape == images[:2].shape
                contenders[peer] = partial(timed, partial(damage, images))
            except Exception as error:  # whatever a peer raises is a result
                failed[f"{peer}, {name}"] = repr(error)
        found += compare(f"generation, {name} {seeding.level_name(level)}", contenders, len(images), rounds)
    return found, failed


def generate(images: Images, variant: Variant, n_threads: int) -> None:
    """Perturb all images in memory, block by block as the stage does."""
    cv2.setNumThreads(1)
    keep_freed_memory()
    with ThreadPoolExecutor(n_threads) as pool:
        starts = range(0, len(images), seeding.BLOCK_SIZE)
        stops = [min(start + seeding.BLOCK_SIZE, len(images)) for start in starts]
        list(pool.map(lambda *block: generation.perturb_images(images, variant, 0, *block), starts, stops))
    cv2.setNumThreads(-1)


def compare_stores(images: Images, rounds: int) -> list[Measurement]:
    """Compare perturbing into a store with writing the finished arrays by zarr alone and copying them in memory."""
    found = []
    n_trials = 4
    for name, level in LEVELS.items():
        options = {"blur": {"mix_channels": False}, "noise": {}}.get(name, {"scope": "image"})
        # Blur has one trial; more levels make up for it.
        levels = [level * (1 - 0.1 * step) for step in range(n_trials)] if name == "blur" else [level]
        trials = 1 if name == "blur" else n_trials
        arrays_planned = [
            PlannedArray(CIFAR10, Variant(name, value, "test", 1, options), (trials, len(images))) for value in levels
        ]
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            ours, theirs = Path(folder, "ours.zarr"), Path(folder, "theirs.zarr")
            engine = LocalThreads(torch.get_num_threads())
            write = partial(generation.write_perturbed, ours, CIFAR10, name, arrays_planned, {"test": images}, engine)
            write()
            arrays: list[Any] = [group["test"] for _, group in zarr.open_group(ours, mode="r").groups()]
            finished = [array[...] for array in arrays]
            layouts = [(array.chunks, array.shards) for array in arrays]
            spare = [np.empty_like(array) for array in finished]
            contenders = {
                US: partial(timed, write),
                "zarr alone": partial(timed, partial(write_plainly, theirs, finished, layouts)),
                "memory copy": partial(timed, partial(copy_all, spare, finished)),
            }
            n_bytes = sum(array.nbytes for array in finished)
            found += compare(f"store, {name} {seeding.level_name(level)}", contenders, n_bytes, rounds, "bytes")
    return found


def compare_preparing(images: Images, n: int, rounds: int) -> list[Measurement]:
    """Compare the command `prepare`, on a folder of JPEGs as cameras write them, with a script that only decodes them.

    The pictures are images of CIFAR-10, enlarged to 480x360 pixels; they are resized to 64x64 and to 224x224. Both
    commands have equally many workers and are run as a user would: workers of this process would import torch first.
    """
    found, n_workers = [], str(torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        source, study = Path(folder, "photos"), Path(folder, "study")
        study.mkdir()
        for i in range(n):
            path = source / str(i % 5) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i % len(images)]).resize((480, 360), Image.Resampling.BICUBIC).save(path, quality=90)
        values = read(layout.PROFILES / "own.yaml")
        for side in (64, 224):
            values["datasets"]["photos"]["source"].update(path=str(source), size=[side, side])
            (study / layout.PARAMS).write_text(to_yaml(values))
            commands = {
                US: ["pipeline", "prepare", "photos", "--workers", n_workers],
                "decoding alone": ["benchmarks.decoding", str(source), str(side), n_workers],
            }
            contenders = {name: partial(timed, partial(run_module, words, study)) for name, words in commands.items()}
            found += compare(f"prepare, JPEGs to {side}x{side}", contenders, n, rounds)
    return found


def run_module(words: list[str], folder: Path) -> None:
    """Run a module of this checkout, with its arguments, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def copy_all(targets: list[Any], arrays: list[Any]) -> None:
    """Copy arrays in memory."""
    for target, array in zip(targets, arrays, strict=True):
        np.copyto(target, array)


def write_plainly(path: Path, arrays: list[Any], layouts: list[tuple[Any, Any]]) -> None:
    """Write finished arrays to a store with the same chunks, shards and codecs, as zarr's documentation does."""
    group = zarr.create_group(path, overwrite=True)
    for number, (array, (chunks, shards)) in enumerate(zip(arrays, layouts, strict=True)):
        target = group.create_array(
            str(number),
            shape=array.shape,
            dtype=array.dtype,
            chunks=chunks,
            shards=shards,
            compressors=[zarr.codecs.ZstdCodec(level=-1), zarr.codecs.Crc32cCodec()],
        )
        target[...] = array


class PlainDataset(VisionDataset):  # type: ignore[misc]  # torchvision has no types
    """Images one by one through PIL and transforms, like torchvision's own MNIST and CIFAR10."""

    def __init__(self, images: Images, labels: Labels) -> None:
        mean, std = (images / 255).mean((0, 1, 2)), (images / 255).std((0, 1, 2))
        super().__init__("", transform=transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)]))
        self.images, self.labels = images.squeeze(), labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Image float32 (C, H, W) and label."""
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def plain_network(network: Network, shape: tuple[int, int, int]) -> nn.Sequential:
    """Build the paper's network from torch's own layers, in the authors' order."""
    layers: list[nn.Module] = []
    channels = shape[2]
    for layer in network.convolutions:
        layers += [
            nn.Conv2d(channels, layer.filters, layer.kernel, stride=layer.stride, padding=layer.padding),
            nn.BatchNorm2d(layer.filters),
            nn.ReLU(),
        ]
        if layer.pool > 1:
            layers += [nn.MaxPool2d(layer.pool), nn.Dropout(network.dropout)]
        channels = layer.filters
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(network.n_features(shape), 10))


@lru_cache
def load_study(dataset: str, n: int) -> tuple[Recipe, Examples]:
    """The paper's recipe and the first n training images."""
    recipe = params.load(layout.PROFILES / "paper.yaml").train.recipes[dataset]
    images, labels = (store.read_clean(DATASETS[dataset], "train", kind)[:n] for kind in ("images", "labels"))
    return recipe, Examples(images, labels, 10)


def train_ours(dataset: str, n: int) -> float:
    """Train for one epoch on n images, with all that `train_model` does besides; return the seconds."""
    recipe, examples = load_study(dataset, n)
    plan = plan_natural(recipe.model_copy(update={"epochs": 1}))
    few = Examples(examples.images[:10], examples.labels[:10], 10)
    return timed(lambda: train_model(plan, TrainingData(examples, few), (1,), select_device("cpu")))


def train_plainly(dataset: str, n: int, n_workers: int) -> float:
    """Train for the same epoch by a plain loop in float32; return the seconds."""
    recipe, examples = load_study(dataset, n)
    assert isinstance(recipe.network, Network)
    loader: DataLoader[Any] = DataLoader(
        PlainDataset(examples.images, examples.labels), recipe.batch_size, num_workers=n_workers, drop_last=True
    )
    model = plain_network(recipe.network, DATASETS[dataset].shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)

    def epoch() -> None:
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return timed(epoch)


def evaluate_ours(dataset: str, n: int) -> float:
    """Evaluate one model on n images, by the function that the stages call; return the seconds."""
    recipe, examples = load_study(dataset, n)
    shape = DATASETS[dataset].shape
    standardize = Standardize(*fit_standardization(examples.images, recipe.standardize))
    device = select_device("cpu")
    classifier = Classifier(shape, standardize, build_network(recipe.network, shape, 10))
    classifier.network.to(memory_format=torch.channels_last)
    predict = measuring.Predictor(classifier, device, recipe.precision)
    images = torch.from_numpy(examples.images)

    def count() -> int:
        parts = torch.split(images, images_per_pass(500, images[0].numel()))
        with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            classes = np.concatenate(list(pool.map(lambda part: predict(part).argmax(1).numpy(), parts)))
        return int((classes == examples.labels).sum())

    return timed(count)


def evaluate_plainly(dataset: str, n: int, n_workers: int) -> float:
    """Evaluate the same network by a plain loop in float32; return the seconds."""
    recipe, examples = load_study(dataset, n)
    assert isinstance(recipe.network, Network)
    loader: DataLoader[Any] = DataLoader(PlainDataset(examples.images, examples.labels), 1000, num_workers=n_workers)
    model = plain_network(recipe.network, DATASETS[dataset].shape).eval()

    def count() -> int:
        with torch.inference_mode():
            return sum(int((model(images).argmax(1) == labels).sum()) for images, labels in loader)

    return timed(count)


def run_in(pool: ProcessPoolExecutor, work: Callable[[], float]) -> float:
    """Run `work` in the process of `pool` and return its result."""
    return pool.submit(work).result()


def compare_networks(rounds: int) -> list[Measurement]:
    """Compare training and evaluation of the paper's networks with plain loops."""
    found = []
    spawn = multiprocessing.get_context("spawn")
    for dataset, n in (("mnist", 50_000), ("cifar10", 2_000)):
        for task, ours, plain in (
            ("training", train_ours, train_plainly),
            ("evaluation", evaluate_ours, evaluate_plainly),
        ):
            works = {
                US: partial(ours, dataset, n),
                "DataLoader, no workers": partial(plain, dataset, n, 0),
                "DataLoader, 2 workers": partial(plain, dataset, n, 2),
            }
            pools = {name: ProcessPoolExecutor(1, mp_context=spawn) for name in works}
            contenders = {name: partial(run_in, pools[name], work) for name, work in works.items()}
            found += compare(f"{task}, {dataset}", contenders, n, rounds)
            for pool in pools.values():
                pool.shutdown()
    return found


@dataclass(frozen=True)
class Training:
    """One CIFAR-10 model trained on all cores.

    Attributes:
        profile: The profile whose recipe it was trained by.
        epochs: Number of epochs.
        seed: Seed of weights, image order and dropout.
        accuracy: On the clean test images, after the last epoch.
        seconds: Training time, with a test after every epoch.
        seconds_to_paper: Time until a test first reached `PAPER_ACCURACY`; None if none did.
    """

    profile: str
    epochs: int
    seed: int
    accuracy: float
    seconds: float
    seconds_to_paper: float | None


def measure_accuracy(profile: str, n_seeds: int, epochs: int | None) -> list[Training]:
    """Train a profile's natural CIFAR-10 models, one per seed, one after the other; for `epochs` if given."""
    study = params.load(layout.PROFILES / f"{profile}.yaml")
    plan, subset = plan_natural(study.train.recipes["cifar10"]), study.datasets["cifar10"]
    if epochs is not None:
        plan = plan_natural(plan.recipe.model_copy(update={"epochs": epochs}))
    train, test = (
        Examples(store.read_clean(CIFAR10, split, "images")[:n], store.read_clean(CIFAR10, split, "labels")[:n], 10)
        for split, n in (("train", subset.n_train), ("test", subset.n_test))
    )
    found = []
    for seed in range(1, n_seeds + 1):
        reached: list[float] = []
        start = time.perf_counter()

        def look(epoch: Epoch, start: float = start, reached: list[float] = reached) -> None:
            seconds = time.perf_counter() - start
            click.echo(f"epoch {epoch.epoch}: {100 * epoch.test_accuracy:.2f} % after {seconds:.0f} s", err=True)
            if 100 * epoch.test_accuracy >= PAPER_ACCURACY:
                reached.append(seconds)

        _, curve = train_model(plan, TrainingData(train, test), (seed,), select_device("auto"), report=look)
        seconds = time.perf_counter() - start
        one = Training(profile, len(curve), seed, curve[-1].test_accuracy, seconds, min(reached, default=None))
        to_paper = "never" if one.seconds_to_paper is None else f"after {one.seconds_to_paper:.0f} s"
        click.echo(
            f"{profile}, {one.epochs} epochs, seed {seed}: {100 * one.accuracy:.2f} % in {seconds:.0f} s; "
            f"{PAPER_ACCURACY} % {to_paper}"
        )
        found.append(one)
    return found


def format_table(measured: list[Measurement]) -> str:
    """Format measurements as Markdown, a row per task and contender."""
    lines = ["| task | contender | per second | relative to ours |", "|---|---|--:|--:|"]
    for one in measured:
        speed = f"{one.per_second / 1e6:,.0f} MB" if one.unit == "bytes" else f"{one.per_second:,.0f} images"
        lines.append(f"| {one.task} | {one.contender} | {speed} | {one.ratio:.2f} |")
    return "\n".join(lines)


SECTIONS = ("generation", "stores", "preparing", "networks", "accuracy")


@click.command()
@click.argument("sections", nargs=-1, type=click.Choice(SECTIONS))
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Timed runs of each.")
@click.option(
    "--images", "n_images", type=click.IntRange(2, 10_000), default=10_000, show_default=True, help="CIFAR-10."
)
@click.option("--pictures", "n_pictures", type=click.IntRange(min=100), default=2000, show_default=True, help="JPEGs.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Of the section accuracy.")
@click.option(
    "--profile",
    type=click.Choice(sorted(path.stem for path in layout.PROFILES.glob("*.yaml"))),
    default="fast",
    show_default=True,
    help="Of the section accuracy: whose recipe.",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Of the section accuracy.  [default: the profile's]")
@click.option("--json", "json_file", type=click.File("w", lazy=False), help="Write every round here too.")
def main(
    sections: tuple[str, ...],
    rounds: int,
    n_images: int,
    n_pictures: int,
    seeds: int,
    profile: str,
    epochs: int | None,
    json_file: TextIO | None,
) -> None:
    """Measure SECTIONS (all but accuracy, if none is named) and print a Markdown table."""
    chosen = sections or SECTIONS[:-1]
    images = store.read_clean(CIFAR10, "test", "images")[:n_images]
    result: dict[str, Any] = {"machine": asdict(describe_machine())}
    measured: list[Measurement] = []
    if "generation" in chosen:
        found, result["failed"] = compare_generation(images, rounds)
        measured += found
    if "stores" in chosen:
        measured += compare_stores(store.read_clean(CIFAR10, "test", "images"), rounds)
    if "preparing" in chosen:
        measured += compare_preparing(images, n_pictures, rounds)
    if "networks" in chosen:
        measured += compare_networks(rounds)
    result["measured"] = [asdict(one) for one in measured]
    if measured:
        click.echo(format_table(measured))
    for peer, error in result.get("failed", {}).items():
        click.echo(f"{peer}: did not run: {error}")
    if "accuracy" in chosen:
        trained = measure_accuracy(profile, seeds, epochs)
        result["accuracy"] = [asdict(one) for one in trained]
        mean = 100 * statistics.mean(one.accuracy for one in trained)
        seconds = statistics.mean(one.seconds for one in trained)
        click.echo(f"{profile}: {mean:.2f} % in {seconds:.0f} s, mean of {seeds} seeds")
    if json_file is not None:
        json_file.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
