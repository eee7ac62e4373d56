"""How far a study scales: seconds of every stage on 1 to 256 workers, simulated from what one worker takes.

    python -m benchmarks.scaling cifar10 --json costs.json      # five minutes on two cores
    python -m benchmarks.scaling cifar10 --costs costs.json --seeds 5     # simulated only
    python -m benchmarks.scaling cifar10 --costs costs.json --seconds-per-image 0.001     # a machine that trains faster

Nothing of the study is run. It is planned, which gives the jobs of every stage. What a job takes is reckoned from
costs that are measured on this machine, in CPU time of as many processes of one thread as it has cores, all at the
same time. The jobs are given to workers in the order in which stages give them to the engine, each to the worker that
is free first. That is what Dask does, too: `--dask` has its own scheduler place the jobs of `strategies`, which sleep.

Left out are the time that DVC takes between stages, and fetching the data. Workers are alike; a file system that they
share gives each what the disk here gives a process; a model of stage `train` has `--cores` cores and is as many times
faster. Busy is the share of their time that workers spend on jobs. Needs the clean store
(`python -m pipeline prepare cifar10`).
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import click
import torch

from pipeline.data import store
from pipeline.data.datasets import Dataset
from pipeline.evaluation.measuring import MODELS_PER_JOB, Predictor
from pipeline.models import storage
from pipeline.models.classifier import Classifier
from pipeline.models.devices import images_per_pass, select_device
from pipeline.perturbations.generation import write_perturbed
from pipeline.perturbations.variants import PlannedArray, Variant
from pipeline.recipes.plan import CLEAN, Plan
from pipeline.runtime import layout
from pipeline.runtime.engine import LocalProcesses, LocalThreads
from pipeline.study import params
from pipeline.study.planning import PlannedCell, Study, plan_study
from pipeline.training.job import TrainingJob
from pipeline.training.loop import Epoch, Examples, TrainingData, train_model
from pipeline.training.work import PRELOAD, longest_first

# What a stage's process imports before its first job.
_IMPORTS = "import distributed, pipeline.evaluation.measuring, pipeline.evaluation.results, pipeline.training.work"

# How long the simulation on Dask takes.
_DASK_SECONDS = 20.0


@dataclass(frozen=True)
class NetworkCosts:
    """Seconds of one thread for models of one network.

    Attributes:
        training: For a training image.
        epoch: For an epoch, however few images it has: mostly its checkpoint.
        model: Before the first epoch.
        evaluating: For an image that is classified.
        loading: For reading a model from its file.
    """

    training: float
    epoch: float
    model: float
    evaluating: float
    loading: float


@dataclass(frozen=True)
class Costs:
    """What everything takes on this machine, in seconds of one thread while its other cores do the same.

    Attributes:
        networks: By `name_network`.
        generating: Perturbation → for an image that is made and stored.
        reading: For an image of a store.
        stage: From the start of a command until its imports are done.
    """

    networks: Mapping[str, NetworkCosts]
    generating: Mapping[str, float]
    reading: float
    stage: float


@dataclass(frozen=True)
class Phase:
    """Jobs that are given to the engine at once, all done before the next phase begins.

    Attributes:
        name: The stage, and what of it.
        seconds: What every job takes, in the order in which they are given.
        worker: Seconds of every worker before its first job, for reading what all jobs need.
        alone: Seconds in which no job is done.
    """

    name: str
    seconds: Sequence[float]
    worker: float = 0.0
    alone: float = 0.0

    def simulate(self, n_workers: int) -> float:
        """Seconds from beginning to end."""
        return self.alone + simulate(self.seconds, n_workers, self.worker)


def simulate(seconds: Sequence[float], n_workers: int, worker: float = 0.0) -> float:
    """Seconds until all jobs are done, if the next one in order always goes to the worker that is free first.

    Args:
        seconds: What every job takes.
        n_workers: How many workers there are.
        worker: What each worker takes before its first job.
    """
    free = [0.0] * n_workers
    for number, took in enumerate(seconds):
        heappush(free, heappop(free) + took + (worker if number < n_workers else 0.0))
    return max(free)


def simulate_in_portions(seconds: Sequence[float], portion: float, n_workers: int) -> float:
    """As `simulate`, if jobs can be put aside after every `portion` seconds: the one with most left goes first."""
    left = [-took for took in seconds]
    heapify(left)
    ends: list[tuple[float, float]] = []  # when a worker is free, and minus what is left of its job
    now = 0.0
    while left or ends:
        while left and len(ends) < n_workers:
            todo = -heappop(left)
            done = min(portion, todo)
            heappush(ends, (now + done, done - todo))
        now, minus_left = heappop(ends)
        if minus_left < -1e-9:
            heappush(left, minus_left)
    return now


def simulate_side_by_side(stages: Sequence[Sequence[Phase]], n_workers: int) -> float:
    """Seconds until all are done, if several stages give their jobs to the same workers.

    Args:
        stages: The phases of every stage, which it does one after the other. Jobs wait behind all that were given
            before, as Dask has it.
        n_workers: How many workers there are.
    """
    phases = [deque(phases) for phases in stages]
    events = [(todo[0].alone, number, -1) for number, todo in enumerate(phases)]  # when, stage, the worker that is free
    heapify(events)
    idle, waiting = list(range(n_workers)), deque[tuple[int, Phase, float]]()
    n_left, have_read = [0] * len(phases), set[tuple[int, str]]()
    now = 0.0
    while events:
        now, stage, worker = heappop(events)
        if worker < 0:  # the stage's next phase begins
            phase = phases[stage].popleft()
            waiting.extend((stage, phase, took) for took in phase.seconds)
            n_left[stage] = len(phase.seconds)
        else:
            idle.append(worker)
            n_left[stage] -= 1
            if n_left[stage] == 0 and phases[stage]:
                heappush(events, (now + phases[stage][0].alone, stage, -1))
        while idle and waiting:
            (of_stage, phase, took), worker = waiting.popleft(), idle.pop()
            reading = 0.0 if (worker, phase.name) in have_read else phase.worker
            have_read.add((worker, phase.name))
            heappush(events, (now + reading + took, of_stage, worker))
    return now


def least_time(seconds: Sequence[float], n_workers: int) -> float:
    """No order of whole jobs ends sooner: of k·n + 1 jobs, one worker does k + 1."""
    ordered = sorted(seconds, reverse=True)
    stacked = [(k + 1) * ordered[k * n_workers] for k in range(-(-len(ordered) // n_workers))]
    return max(sum(seconds) / n_workers, *stacked)


def simulate_on_dask(seconds: Sequence[float], n_workers: int, scale: float) -> float:
    """As `simulate`, by Dask's scheduler with workers in this process, whose jobs sleep; `scale` times faster."""
    import dask
    from distributed import Client, LocalCluster

    # Or as many workers would leave one process no time for work.
    watching = {"distributed.worker.profile.enabled": False, "distributed.admin.system-monitor.interval": "10s"}
    with (
        dask.config.set(watching),
        LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=n_workers,
            threads_per_worker=1,
            processes=False,
            memory_limit=0,
            dashboard_address=None,
            protocol="inproc://",
        ) as cluster,
        Client(cluster) as client,  # type: ignore[no-untyped-call]
    ):
        client.wait_for_workers(n_workers)
        began = time.perf_counter()
        client.gather(client.map(time.sleep, [took / scale for took in seconds], pure=False))
        return scale * (time.perf_counter() - began)


def name_network(plan: Plan) -> str:
    """All of a plan that decides what an image costs, as JSON."""
    recipe = plan.recipe.model_dump(mode="json", include={"network", "batch_size", "precision"})
    return json.dumps({**recipe, "frozen": plan.freezes_start}, sort_keys=True)


def plan_phases(study: Study, costs: Costs, n_cores: int) -> list[Phase]:
    """All that a study does after `prepare`, in the order of `dvc repro`.

    Args:
        study: The study.
        costs: What it takes.
        n_cores: Cores of a machine: a model of stage `train` has them all, and is taken to be as many times faster.
    """
    phases = [
        Phase(
            f"perturb {name}",
            sorted((array.n_images * costs.generating[name] for array in arrays), reverse=True),
            worker=read_clean(study, costs),
            alone=costs.stage,
        )
        for name, arrays in study.arrays.items()
    ]
    train = plan_training(study, "train", costs)
    phases += [
        replace(train, seconds=[took / n_cores for took in train.seconds]),
        plan_measuring(study, "impact", costs),
        plan_training(study, "strategies", costs),
        plan_measuring(study, "evaluate", costs),
        plan_training(study, "ablations", costs),
        replace(plan_measuring(study, "ablations", costs), alone=0.0),  # in the same command
    ]
    return [phase for phase in phases if phase.seconds]


def read_clean(study: Study, costs: Costs) -> float:
    """Seconds for reading the clean images of a data set."""
    return costs.reading * sum(study.dataset.n_examples.values())


def plan_training(study: Study, stage: str, costs: Costs) -> Phase:
    """The models of stage `train`, `strategies` or `ablations`."""

    def reckon(job: TrainingJob) -> float:
        network, n_epochs = costs.networks[name_network(job.plan)], job.plan.recipe.epochs
        perturbed = 0 if job.trained_on is None else job.trained_on.n_images
        epoch = network.epoch + job.n_train * network.training + job.n_test * network.evaluating
        return perturbed * costs.reading + network.model + n_epochs * epoch

    seconds = [reckon(job) for job in longest_first(study.jobs(stage))]
    return Phase(f"{stage}, training", seconds, read_clean(study, costs), costs.stage)


def by_array(cell: PlannedCell) -> tuple[object, ...]:
    """What cells of clean images or of a stored array have in common."""
    return cell.images[:3]


def plan_measuring(
    study: Study, stage: str, costs: Costs, part: Callable[[PlannedCell], tuple[object, ...]] | None = None
) -> Phase:
    """What stage `impact`, `evaluate` or `ablations` measures.

    The cells that `part` says the same of are one job; without it, as on a cluster, those of some models on an array.
    """
    groups = {model.key: number // MODELS_PER_JOB for number, model in enumerate(study.models(stage))}
    part = part or (lambda cell: (*by_array(cell), groups[cell.model]))
    of_model = {model.key: costs.networks[name_network(model.plan)] for model in trained(study, stage)}
    jobs = defaultdict(list)
    for cell in study.cells(stage):
        jobs[part(cell)].append(cell)

    def reckon(cells: Sequence[PlannedCell]) -> float:
        n_read = 0 if cells[0].perturbation == CLEAN else sum({cell.images: cell.n_examples for cell in cells}.values())
        classified = sum(cell.n_examples * of_model[cell.model].evaluating for cell in cells)
        return n_read * costs.reading + classified

    worker = read_clean(study, costs) + sum(network.loading for network in of_model.values())
    return Phase(f"{stage}, measuring", sorted(map(reckon, jobs.values()), reverse=True), worker, costs.stage)


def trained(study: Study, stage: str) -> list[TrainingJob]:
    """The models that a stage measures, which must all be of our own training."""
    return [model for model in study.models(stage) if isinstance(model, TrainingJob)]


@dataclass(frozen=True)
class _Task:
    """What a process measures beside others that do the same: of this study, on so many images, in a folder."""

    study: Study
    n_images: int
    folder: Path


def measure_costs(study: Study, n_images: int) -> Costs:
    """What everything takes on this machine.

    Args:
        study: Whose networks and perturbations to measure.
        n_images: Training images of an epoch that is timed, at least; four batches if those are more.
    """
    n_cores = torch.get_num_threads()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        tasks = [_Task(study, n_images, Path(folder, str(number))) for number in range(n_cores)]
        found = [costs for _, costs in LocalProcesses(n_cores, PRELOAD).run(_measure, tasks)]
    networks = {name: _mean([costs.networks[name] for costs in found]) for name in found[0].networks}
    return Costs(
        networks,
        generating={key: statistics.mean(costs.generating[key] for costs in found) for key in found[0].generating},
        reading=statistics.mean(costs.reading for costs in found),
        stage=median_of(3, lambda: subprocess.run([sys.executable, "-c", _IMPORTS], check=True), time.perf_counter),
    )


def _mean(found: Sequence[NetworkCosts]) -> NetworkCosts:
    rows = [asdict(costs) for costs in found]
    return NetworkCosts(**{key: statistics.mean(row[key] for row in rows) for key in rows[0]})


def _measure(task: _Task) -> Costs:
    torch.set_num_threads(1)
    task.folder.mkdir()
    study = task.study
    natural, classifier = measure_network(task, study.natural[0], None)
    networks = {name_network(study.natural[0].plan): natural}
    for job in (*study.jobs("strategies"), *study.jobs("ablations")):
        if (name := name_network(job.plan)) not in networks:
            networks[name], _ = measure_network(task, job, classifier if job.plan.starts_from_natural else None)
    stores = {name: measure_store(task, arrays[-1].variant) for name, arrays in study.arrays.items() if arrays}
    generating = {name: written for name, (written, _) in stores.items()}
    return Costs(networks, generating, statistics.mean(read for _, read in stores.values()), 0.0)


def measure_network(task: _Task, job: TrainingJob, natural: Classifier | None) -> tuple[NetworkCosts, Classifier]:
    """What the network of a job takes, and a model of it."""
    plan, dataset, size, device = job.plan, task.study.dataset, job.plan.recipe.batch_size, select_device("cpu")
    few, many = size, max(4, -(-task.n_images // size)) * size
    checkpoint = task.folder / "model.checkpoint"
    short = replace(
        plan, recipe=plan.recipe.model_copy(update={"epochs": 2}), perturbed_share=plan.perturbed_share[:1] * 2
    )

    def train(n: int) -> tuple[float, float, Classifier]:
        """Seconds before the first epoch and of an epoch."""
        ends: list[float] = []

        def look(epoch: Epoch) -> None:
            ends.append(time.process_time() - began)

        data = TrainingData(read_examples(dataset, n), read_examples(dataset, 10))
        began = time.process_time()
        classifier, _ = train_model(short, data, (1,), device, natural, checkpoint, look)
        checkpoint.unlink()
        epoch = ends[1] - ends[0]
        return max(0.0, ends[0] - epoch), epoch, classifier

    if natural is None:
        train(few)  # what a process does once
    before, epoch_of_few, _ = train(few)
    _, epoch_of_many, classifier = train(many)
    training = (epoch_of_many - epoch_of_few) / (many - few)

    predict = Predictor(classifier, device, plan.recipe.precision)
    images = torch.from_numpy(read_examples(dataset, many).images)
    batches = torch.split(images, images_per_pass(task.study.batch_sizes["impact"], images[0].numel()))
    evaluating = median_of(3, lambda: [predict(batch).argmax(1) for batch in batches]) / many

    path = task.folder / "model.safetensors"
    storage.save(classifier, path, job.description)
    loading = median_of(3, partial(storage.load, path, ""))
    return NetworkCosts(training, epoch_of_few - few * training, before, evaluating, loading), classifier


def measure_store(task: _Task, like: Variant) -> tuple[float, float]:
    """Seconds for making and storing a perturbed image, and for reading it."""
    clean = store.read_clean(task.study.dataset, "train", "images")[:10_000]
    path = task.folder / "store.zarr"
    dataset = task.study.dataset
    planned = PlannedArray(dataset, replace(like, split="train"), (len(clean),))
    given = dataset, like.perturbation, [planned], {"train": clean}, LocalThreads(1)
    written = median_of(3, partial(write_perturbed, path, *given))
    read = median_of(3, lambda: store.read(store.get_array(store.open_store(path, ""), planned.name, ""), ""))
    shutil.rmtree(path)
    return written / len(clean), read / len(clean)


def read_examples(dataset: Dataset, n: int) -> Examples:
    """The first training images and their labels."""
    images, labels = (store.read_clean(dataset, "train", kind)[:n] for kind in ("images", "labels"))
    return Examples(images, labels, len(dataset.classes))


def median_of(n: int, work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of the median of n runs."""
    seconds = []
    for _ in range(n):
        began = clock()
        work()
        seconds.append(clock() - began)
    return statistics.median(seconds)


def as_trained_in(costs: Costs, natural: Plan, seconds: float) -> Costs:
    """Costs where a training image of the natural model takes so many seconds, and networks all else in proportion."""
    factor = seconds / costs.networks[name_network(natural)].training
    networks = {
        name: NetworkCosts(**{key: factor * value for key, value in asdict(network).items()})
        for name, network in costs.networks.items()
    }
    return replace(costs, networks=networks)


def read_costs(file: TextIO) -> Costs:
    """The costs in a file that `--json` has written."""
    values = json.load(file)["costs"]
    return Costs(**{**values, "networks": {name: NetworkCosts(**one) for name, one in values["networks"].items()}})


@dataclass(frozen=True)
class Row:
    """A line of a table: worker-seconds of all jobs, and the seconds that they take by number of workers."""

    name: str
    work: float
    seconds: Mapping[int, float]

    def busy(self, n_workers: int) -> float:
        """Share of their time that workers spend on jobs, in [0, 1]."""
        return self.work / (n_workers * self.seconds[n_workers])


def simulate_phases(phases: Sequence[Phase], workers: Sequence[int]) -> list[Row]:
    """A row for every phase, and one for all of them."""
    rows = [Row(phase.name, sum(phase.seconds), {n: phase.simulate(n) for n in workers}) for phase in phases]
    total = {n: sum(row.seconds[n] for row in rows) for n in workers}
    return [*rows, Row("all", sum(row.work for row in rows), total)]


def simulate_changes(study: Study, costs: Costs, workers: Sequence[int]) -> list[Row]:
    """What other ways of doing it would take: other orders, larger stages, smaller jobs."""
    strategies, ablations = (plan_training(study, name, costs) for name in ("strategies", "ablations"))
    together = replace(strategies, seconds=sorted([*strategies.seconds, *ablations.seconds], reverse=True))
    epochs = max(job.plan.recipe.epochs for job in study.jobs("strategies"))
    impact, evaluate = (plan_measuring(study, name, costs, lambda cell: cell.images) for name in ("impact", "evaluate"))
    whole = plan_measuring(study, "evaluate", costs, by_array)
    ways: dict[str, tuple[Phase, Callable[[Phase, int], float]]] = {
        "strategies, shortest first": (replace(strategies, seconds=strategies.seconds[::-1]), Phase.simulate),
        "strategies, no order is faster than": (strategies, lambda phase, n: least_time(phase.seconds, n)),
        "strategies, in portions of an epoch": (
            strategies,
            lambda phase, n: simulate_in_portions(phase.seconds, phase.seconds[0] / epochs, n),
        ),
        "strategies and ablations in one": (together, Phase.simulate),
        "impact, a job for every trial": (impact, Phase.simulate),
        "evaluate, a job for every trial": (evaluate, Phase.simulate),
        "evaluate, a job for every array": (whole, Phase.simulate),
    }
    return [Row(name, sum(phase.seconds), {n: way(phase, n) for n in workers}) for name, (phase, way) in ways.items()]


def simulate_stages_side_by_side(phases: Sequence[Phase], workers: Sequence[int]) -> list[Row]:
    """What it takes if stages that do not need each other run at the same time (docs/cluster.md)."""
    of_stage: dict[str, list[Phase]] = defaultdict(list)
    for phase in phases:
        of_stage[phase.name.partition(",")[0]].append(phase)
    chains = [of_stage.pop("ablations", []), of_stage.pop("strategies", []) + of_stage.pop("evaluate", [])]
    chains = [phases for phases in (*chains, of_stage.pop("impact", [])) if phases]
    before = list(chain.from_iterable(of_stage.values()))
    took = {n: simulate_side_by_side(chains, n) for n in workers}
    total = {n: took[n] + sum(phase.simulate(n) for phase in before) for n in workers}
    work, work_before = (sum(sum(phase.seconds) for phase in some) for some in (chain.from_iterable(chains), before))
    return [
        Row("impact, strategies and evaluate, ablations", work, took),
        Row("all, these side by side", work + work_before, total),
    ]


def format_seconds(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def format_table(rows: Sequence[Row], workers: Sequence[int]) -> str:
    """Markdown, for each number of workers the time and how busy they are."""
    names = ["", *(f"{n} worker{'s' if n > 1 else ''}" for n in workers)]
    lines = [names, ["---", *["--:"] * len(workers)]]
    for row in rows:
        lines.append([row.name, *(f"{format_seconds(row.seconds[n])}, {row.busy(n):.0%}" for n in workers)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@click.command()
@click.argument("dataset")
@click.option(
    "--profile",
    type=click.Choice(sorted(path.stem for path in layout.PROFILES.glob("*.yaml"))),
    default="paper",
    show_default=True,
    help="Whose study.",
)
@click.option("--seeds", type=click.IntRange(min=1), help="How many train.seeds.  [default: the profile's]")
@click.option(
    "--workers",
    multiple=True,
    type=click.IntRange(min=1),
    default=(1, 2, 8, 64, 256),
    show_default=True,
    help="Replayed.",
)
@click.option("--cores", type=click.IntRange(min=1), default=2, show_default=True, help="Of each machine.")
@click.option("--images", "n_images", type=click.IntRange(min=1), default=1000, show_default=True, help="To train on.")
@click.option("--costs", "costs_file", type=click.File(), help="Of an earlier --json: nothing is measured.")
@click.option("--seconds-per-image", type=click.FloatRange(min=0, min_open=True), help="Of training, on one thread.")
@click.option("--dask", is_flag=True, help="Have Dask place the jobs of strategies too: half a minute each.")
@click.option("--json", "json_file", type=click.File("w", lazy=False), help="Write costs and results here too.")
def main(
    dataset: str,
    profile: str,
    seeds: int | None,
    workers: tuple[int, ...],
    cores: int,
    n_images: int,
    costs_file: TextIO | None,
    seconds_per_image: float | None,
    dask: bool,
    json_file: TextIO | None,
) -> None:
    """Say how long every stage of DATASET takes on so many workers, how busy they are, and what that costs."""
    values = params.load(layout.PROFILES / f"{profile}.yaml")
    if seeds is not None:
        train = values.train.model_copy(update={"seeds": tuple(range(1, seeds + 1))})
        values = values.model_copy(update={"train": train})
    study = plan_study(values, dataset)
    if study.external:
        raise click.ClickException(f"{profile}: models of others are measured too; take those out of `models`")
    costs = measure_costs(study, n_images) if costs_file is None else read_costs(costs_file)
    if seconds_per_image is not None:
        costs = as_trained_in(costs, study.natural[0].plan, seconds_per_image)
    phases = plan_phases(study, costs, cores)
    rows = simulate_phases(phases, workers)
    changes = [*simulate_stages_side_by_side(phases, workers), *simulate_changes(study, costs, workers)]
    natural = costs.networks[name_network(study.natural[0].plan)]
    click.echo(
        f"{profile}, {dataset}, {len(study.natural)} seed(s). One thread: {1 / natural.training:,.0f} images/s "
        f"trained, {1 / natural.evaluating:,.0f} evaluated. Time, and how busy the workers are:\n"
    )
    click.echo(format_table(rows, workers))
    for phase in phases:
        click.echo(f"{phase.name}: {len(phase.seconds)} jobs, the longest {format_seconds(phase.seconds[0])}")
    click.echo(f"\nIf it were done otherwise:\n\n{format_table(changes, workers)}\n")
    for n in workers:
        hours = n * rows[-1].seconds[n] / 3600
        click.echo(f"{n} worker(s): {hours:,.1f} worker-hours; times the price of an hour of one worker: the cost")
    result: dict[str, Any] = {
        "costs": asdict(costs),
        "rows": list(map(asdict, rows)),
        "changes": list(map(asdict, changes)),
    }
    if dask:
        result["dask"] = {}
        for n in workers:
            strategies = plan_training(study, "strategies", costs)
            simulated = simulate(strategies.seconds, n)
            result["dask"][n] = simulate_on_dask(strategies.seconds, n, scale=simulated / _DASK_SECONDS)
            click.echo(
                f"strategies on {n} worker(s): {format_seconds(result['dask'][n])} by Dask's scheduler, "
                f"{format_seconds(simulated)} simulated"
            )
    if json_file is not None:
        json_file.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
