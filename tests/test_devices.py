"""Devices, precision, and memory that is kept."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.models.devices import images_per_pass, select_device, select_precision
from pipeline.runtime import memory
from pipeline.runtime.engine import count_cores
from pipeline.training import work
from tests.conftest import command_environment

CPU = torch.device("cpu")

COUNT_FAULTS = """
import resource, torch
from pipeline.models.devices import select_device
from pipeline.runtime.memory import keep_freed_memory
keep_freed_memory()  # as a command does first
select_device("cpu")
values = torch.rand(4_000_000)
for number in range(40):
    if number == 30:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    values + 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back so eagerly")
def test_memory_of_a_tensor_is_used_again_instead_of_being_given_back() -> None:
    command = [sys.executable, "-c", COUNT_FAULTS]
    output = subprocess.run(command, env=command_environment(), capture_output=True, text=True, check=True).stdout
    # Ten tensors of 16 MB are 39,000 pages of 4 KiB. Which of the first dozen find a gap depends on addresses.
    assert int(output) < 4000


def test_free_memory_is_that_of_the_container_if_it_has_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (tmp_path / "cgroup").write_text("0::/own\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUP", tmp_path / "cgroup")
    (own / "memory.current").write_text("3000\n")
    (own / "memory.stat").write_text("anon 1000\ninactive_file 2000\n")
    (own / "memory.max").write_text("max\n")
    assert memory.available() > 2**20
    (own / "memory.max").write_text("5000\n")
    assert memory.available() == 4000
    (tmp_path / "cgroup").write_text("0::/own/step\n")  # the limit of a Slurm job is that of a group above
    (own / "step").mkdir()
    (own / "step/memory.max").write_text("max\n")
    assert memory.available() == 4000


def test_models_are_trained_one_at_a_time_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert work.local_engine(None, "cpu").n_workers == count_cores()
    monkeypatch.setattr(work, "select_device", torch.device)
    assert work.local_engine(None, "cuda").n_workers == 1
    assert work.local_engine(3, "cuda").n_workers == 3


def test_algorithms_are_deterministic_and_tensors_are_not_filled_for_it() -> None:
    select_device("cpu")
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.allow_tf32  # ten bits of mantissa are not float32
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, torch.bfloat16),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, torch.float32),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"cpu_name": "ARM Neoverse", "bf16": True}, torch.bfloat16),
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_precision_is_what_was_asked_for_or_what_the_processor_is_faster_with(
    processor: dict[str, str | bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert select_precision("auto", CPU) is expected
    assert select_precision("float32", CPU) is torch.float32
    assert select_precision("bfloat16", CPU) is torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "expected"), [((32, 32, 3), 500), ((28, 28, 1), 1959), ((224, 224, 3), 10), ((4000, 3000, 3), 1)]
)
def test_a_pass_takes_the_memory_of_so_many_images_of_cifar10(shape: tuple[int, int, int], expected: int) -> None:
    assert images_per_pass(500, shape[0] * shape[1] * shape[2]) == expected
