"""Memory of the process, on a CPU and on a GPU."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sivae_fast.config import ConfigError

_OUT_OF_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "unable to find an engine")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt in glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20


def keep_freed_memory() -> bool:
    """Lets glibc keep freed tensors for the next iteration; whether it could.

    By default it gives megabytes back to the system, which has to clear them when the next iteration asks for
    them again: a sixth of the time of a small model's iteration.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not Linux with glibc
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_TRIM_THRESHOLD, 1 << 30))


def check_fills(gpu: torch.device, option: str) -> None:
    """Raises ConfigError, naming the option that asks for a GPU's memory, where the device is a CPU."""
    if gpu.type != "cuda":
        raise ConfigError(f"{option} fills the memory of a GPU, this run is on a CPU: give a number")


@contextmanager
def limited(gpu: torch.device, option: str, share: float, reserved: int = 0) -> Iterator[None]:
    """PyTorch runs out of memory at this share of what is free on the GPU now, less `reserved` bytes.

    Raises ConfigError, naming the option that asks for it, where the device is a CPU.
    """
    check_fills(gpu, option)
    free, total = torch.cuda.mem_get_info(gpu)
    usable = share * (free + torch.cuda.memory_reserved(gpu)) - reserved
    before = torch.cuda.get_per_process_memory_fraction(gpu)
    torch.cuda.set_per_process_memory_fraction(min(before, max(0.0, usable / total)), gpu)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, gpu)


def ran_out(error: RuntimeError) -> bool:
    """Whether memory was missing: near the limit cuBLAS and cuDNN say so in words of their own."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def free_memory(device: torch.device) -> None:
    """Gives back what no tensor uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
