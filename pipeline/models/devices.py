"""Selects the device and the number format in which networks compute, deterministically on each device."""

import os

import torch

from pipeline.runtime import memory
from pipeline.runtime.errors import PipelineError

# Values of the image that batch sizes of evaluation are given for: 32x32 pixels in colour.
_VALUES = 32 * 32 * 3


def select_device(name: str) -> torch.device:
    """Return the device that `device` in params.yaml names, and switch on deterministic algorithms.

    Args:
        name: `auto` (CUDA if there is one, else CPU), `cpu`, `cuda` or `cuda:N`.

    Raises:
        PipelineError: There is no such CUDA device.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    # Tensors in pages of 2 MiB where the kernel gives them: MNIST training takes 7 % less time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    torch.set_deterministic_debug_mode("error")  # like use_deterministic_algorithms, which imports a compiler, 1.3 s
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a pass over all memory
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # or float32 would have ten bits of mantissa on GPUs
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PipelineError(
            f"device: '{name}' is not there; {torch.cuda.device_count()} CUDA device(s), try auto or cpu"
        )
    return device


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype in which convolutions and matrix products are computed.

    Which processors are faster in bfloat16 was measured: AMD's Zen 4 multiplies twice as fast as in float32; Intel's
    with AVX-512 instructions for it, but without AMX, half as fast.

    Args:
        name: `float32`, `bfloat16`, or `auto`: bfloat16 where the processor is faster with it.
        device: Where the network runs.
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
    """Return the free memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return memory.available()


def images_per_pass(n_small: int, image_values: int) -> int:
    """Return the number of images per forward pass, at least 1, such that memory does not grow with their size.

    Args:
        n_small: Number of images of 32x32 pixels in colour per pass.
        image_values: Values of an image, H·W·C.
    """
    return max(1, n_small * _VALUES // image_values)
