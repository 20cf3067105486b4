"""Which backend runs a tensor, and the shapes of Triton launches: closed forms, nothing is tuned online."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

#: Tests set this: CPU tensors then go through the Triton kernels, which need Triton's interpreter for it.
INTERPRET = False


@cache
def _triton_found() -> bool:
    return find_spec("triton") is not None


def runs_triton(tensors: Sequence[Tensor]) -> bool:
    """Whether Triton kernels take these tensors: on a GPU, none of them float64."""
    if not (tensors[0].is_cuda or INTERPRET) or not _triton_found():
        return False
    return all(tensor.dtype != torch.float64 for tensor in tensors)


def on_device(tensor: Tensor):
    """Context in which `tensor`'s device is the current one: Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def power_of_2(number: int) -> int:
    """The smallest power of two that is not below `number`, at least 1."""
    return 1 << max(number - 1, 0).bit_length()


def row_block(elements: int, kind: str, most: int = 4096) -> tuple[int, int]:
    """(elements a program, at most `most`; warps) for rows of images.

    Five bf16 images at 4096 elements and 8 warps leave 42 registers a thread in the reduction and 64 in the
    gradients on Hopper: five and four programs a multiprocessor, ten 16-byte loads under way in each thread.
    Cross-entropies need registers for their logarithms and take half as many elements.
    """
    largest = 2048 if kind.startswith("bce") else most
    block = min(max(power_of_2(elements), 128), largest)
    return block, _warps(8 * block // largest)


def latent_block(latents: int) -> int:
    return min(max(power_of_2(latents), 32), 1024)


def latent_warps(block: int) -> int:
    """Eight latents a thread: 16 bytes of bf16."""
    return _warps(block // 256)


def _warps(nvidia: int) -> int:
    """Warps of 32 threads, or half as many wavefronts of 64."""
    return max(nvidia // 2 if torch.version.hip else nvidia, 1)
