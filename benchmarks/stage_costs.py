"""Measures what every stage costs in seconds, memory and disk, by running the graph one stage at a time.

Commands run in the order of `dvc repro`, but without DVC and even if they are up to date: dvc.lock stays as it is, and
the outputs in the working folder are made again. Nothing is subtracted from these numbers, and nothing is left out:

- Seconds are wall time from the start of the command to its end, with the start of Python and all imports. What DVC
  adds in `dvc repro` (its own start, hashing, linking into its cache) is not part of a command and not measured.
- Memory is the largest resident set of any one process of the stage, as the kernel counted it; no sampling that could
  miss a peak. A stage with n workers runs n such processes at once, which together take up to n times that number.
  Memory of a GPU is not measured.
- Disk is the length of all files in the stage's outputs. What lies outside the outputs is listed separately: downloads,
  and models/.finished, the cache of finished models.

A cached model is not trained again, and its strategy would look free: if there is anything in models/.finished, this
refuses to run without `--keep`. Downloads that exist are not fetched again either; the header says what was there
before. Needs Linux or macOS.
"""

import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import click

from pipeline.runtime import layout
from pipeline.runtime.errors import PipelineError

_MIB = 2**20


@dataclass(frozen=True)
class Stage:
    """A node of the graph: its name in DVC, such as `perturb@mnist-noise`, its command line and its outputs."""

    name: str
    command: str
    outs: tuple[Path, ...]


@dataclass(frozen=True)
class Cost:
    """The cost of running one stage. `dataset` is empty for a stage that is not about a data set."""

    name: str
    stage: str
    dataset: str
    command: str
    wall_seconds: float
    peak_memory_mib: float
    disk_mib: float


@dataclass(frozen=True)
class Machine:
    """The machine it ran on. `device` is the one that the networks ran on."""

    processor: str
    n_cores: int
    memory_gib: float
    python: str
    torch: str
    device: str


def read_stages(targets: tuple[str, ...]) -> list[Stage]:
    """Return the stages that `dvc repro TARGETS` goes through, in its order.

    Raises:
        PipelineError: There is no such target, or DVC cannot read the graph.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.repo.reproduce import collect_stages, plan_repro

    try:
        with Repo() as repo:
            stages = plan_repro(repo.index.graph, collect_stages(repo, targets or ("dvc.yaml",)))
            return [
                Stage(stage.addressing, stage.cmd, tuple(Path(out.fs_path) for out in stage.outs)) for stage in stages
            ]
    except DvcException as error:
        raise PipelineError(str(error)) from None


def describe_machine() -> Machine:
    """Describe the machine that this runs on.

    Raises:
        PipelineError: params.yaml is wrong, or names a device that does not exist.
    """
    import torch

    from pipeline.models.devices import select_device
    from pipeline.study.params import load

    device = select_device(load(layout.PARAMS).device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return Machine(
        processor=models[0] if models else platform.processor() or platform.machine(),
        n_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        python=platform.python_version(),
        torch=str(torch.__version__),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


def find_cached() -> dict[str, float]:
    """Return the MiB of each folder that makes later runs cheaper and is not a stage's output."""
    from pipeline.study.params import load

    folders = (Path(load(layout.PARAMS).prepare.download_folder), layout.cached_models())
    return {str(folder): measure_disk(folder) for folder in folders}


def measure_disk(path: Path) -> float:
    """Return the length of a file, or of all files in a folder, in MiB; 0 if it does not exist."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / _MIB


def measure_stage(stage: Stage) -> Cost:
    """Run the command of a stage; what it prints goes to standard error.

    Raises:
        PipelineError: The command failed.
    """
    # So that commands find this Python, even if its environment is not the active one.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    start = time.perf_counter()
    with subprocess.Popen(stage.command, shell=True, env={**os.environ, "PATH": path}, stdout=sys.stderr) as process:
        # The maximum over the process and all its descendants that were waited for.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise PipelineError(f"{stage.name}: `{stage.command}` failed with exit status {process.returncode}")
    name, _, item = stage.name.partition("@")
    return Cost(
        name=stage.name,
        stage=name,
        dataset=item.partition("-")[0],
        command=stage.command,
        wall_seconds=seconds,
        peak_memory_mib=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / _MIB,
        disk_mib=sum(measure_disk(out) for out in stage.outs),
    )


def format_table(costs: list[Cost]) -> str:
    """Format as Markdown, a row per stage and data set: seconds and disk summed, memory the maximum; and a total."""
    groups: dict[tuple[str, str], list[Cost]] = {}
    for cost in costs:
        groups.setdefault((cost.stage, cost.dataset), []).append(cost)
    lines = [
        "| stage | data set | n stages | seconds | largest process, MiB | disk, MiB |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for (stage, dataset), group in [*groups.items(), (("total", ""), costs)]:
        seconds, disk = sum(cost.wall_seconds for cost in group), sum(cost.disk_mib for cost in group)
        memory = max(cost.peak_memory_mib for cost in group)
        lines.append(f"| {stage} | {dataset} | {len(group)} | {seconds:,.1f} | {memory:,.0f} | {disk:,.2f} |")
    return "\n".join(lines)


@click.command()
@click.argument("targets", nargs=-1)
@click.option("--json", "json_file", type=click.File("w", lazy=False), help="Write every stage here too.")
@click.option("--keep", is_flag=True, help="Run although models are kept, which are then not trained.")
def main(targets: tuple[str, ...], json_file: TextIO | None, keep: bool) -> None:
    """Run every stage that TARGETS need, all by default, and print what each costs as a Markdown table.

    A target is what `dvc repro` takes: impact@mnist, or perturb for all data sets and perturbations. Run it in the
    root of a checkout. Outputs are replaced, dvc.lock is not.
    """
    finished = layout.cached_models()
    if not keep and finished.is_dir() and any(finished.iterdir()):
        raise click.ClickException(
            f"{finished}: models of an earlier run are kept there and would not be trained again, so that their "
            "stages look free; remove that folder, or measure with --keep"
        )
    try:
        # The kernel counts a command's peak memory from its parent's on, so this process imports neither DVC nor torch.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            stages = pool.submit(read_stages, targets).result()
            machine = pool.submit(describe_machine).result()
            before = pool.submit(find_cached).result()
        costs = []
        for number, stage in enumerate(stages, start=1):
            cost = measure_stage(stage)
            costs.append(cost)
            click.echo(
                f"{number}/{len(stages)} {cost.name}: {cost.wall_seconds:.1f} s, {cost.peak_memory_mib:.0f} MiB, "
                f"{cost.disk_mib:.2f} MiB on disk",
                err=True,
            )
        after = find_cached()
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    kept = {folder: {"before_mib": before[folder], "after_mib": after[folder]} for folder in before}
    click.echo(
        f"{machine.processor}, {machine.n_cores} cores, {machine.memory_gib:.1f} GiB memory; Python {machine.python}, "
        f"torch {machine.torch}, networks on {machine.device}"
    )
    for folder, sizes in kept.items():
        click.echo(f"{folder}: {sizes['before_mib']:.2f} MiB before, {sizes['after_mib']:.2f} MiB after")
    click.echo(f"\n{format_table(costs)}")
    if json_file is not None:
        result = {"machine": asdict(machine), "kept": kept, "stages": [asdict(cost) for cost in costs]}
        json_file.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
