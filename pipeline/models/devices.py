"""On which device and in which number format a network computes; deterministic on each."""

import os

import psutil
import torch

from pipeline.runtime.errors import PipelineError

# Of the image in whose terms batch sizes of evaluation are given: 32x32 pixels in colour.
_VALUES = 32 * 32 * 3


def select_device(name: str) -> torch.device:
    """The device that `device` in params.yaml names, with deterministic algorithms switched on.

    Args:
        name: `auto` (CUDA if there is one, else CPU), `cpu`, `cuda` or `cuda:N`.

    Raises:
        PipelineError: A CUDA device is asked for that is not there.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    # Tensors in pages of 2 MiB where the kernel gives them: MNIST training takes 7 % less time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    torch.set_deterministic_debug_mode("error")  # as use_deterministic_algorithms, which imports a compiler, 1.3 s
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a pass over all memory
    torch.backends.cudnn.benchmark = False
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PipelineError(
            f"device: '{name}' is not there; {torch.cuda.device_count()} CUDA device(s), try auto or cpu"
        )
    return device


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """The type in which convolutions and matrix products are computed.

    Args:
        name: `float32`, `bfloat16`, or `auto`: bfloat16 where the processor is faster with it.
        device: Where the network runs.

    Which processors are: measured. AMD's Zen 4 multiplies twice as fast in bfloat16 as in float32; Intel's with AVX-512
    instructions for it, but without AMX, half as fast.
    """
    if name == "auto":
        if device.type == "cuda":
            is_faster = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has = torch.cpu.get_capabilities()
            is_intel = str(has.get("cpu_name", "")).startswith("Intel")
            is_faster = bool(has.get("amx_bf16") or has.get("bf16") or (has.get("avx512_bf16") and not is_intel))
        name = "bfloat16" if is_faster else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def free_memory(device: torch.device) -> int:
    """Bytes that a device has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def images_per_pass(n_small: int, image_values: int) -> int:
    """How many images a network takes at a time, so that memory does not grow with their size; at least 1.

    Args:
        n_small: How many of 32x32 pixels in colour.
        image_values: Values of an image, H·W·C.
    """
    return max(1, n_small * _VALUES // image_values)
