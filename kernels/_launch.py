"""Which backend runs a tensor, and the shapes of Triton launches: closed forms, nothing is tuned online."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

#: Tests set this: CPU tensors then go through the Triton kernels, which need Triton's interpreter for it.
INTERPRET = False


def _found(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ImportError:  # of a finder that blocks packages
        return False


_TRITON_FOUND = _found("triton")  # looked up once: torch.compile cannot trace the search


def runs_triton(tensors: Sequence[Tensor]) -> bool:
    """Whether Triton kernels take these tensors: on a GPU, none of them float64."""
    if not (tensors[0].is_cuda or INTERPRET) or not _TRITON_FOUND:
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


class MapShape(NamedTuple):
    """How the programs of a launch share maps [B, C, H, W]; the same for every batch, so are the results.

    A program goes over `span` pixels of BLOCK_C channels of one sample, BLOCK_P pixels at a time; `chunks` of
    them cover a map. Two 16-byte loads of a map a thread leave room for sums and for numbers a channel. Maps
    of up to 32x32 are one chunk: the second time they are read, they are in the cache, and there are few
    programs, so that each has more warps.
    """

    block_p: int
    block_c: int
    span: int
    chunks: int
    warps: int

    @classmethod
    def of(cls, channels: int, pixels: int, channels_last: bool, item_bytes: int) -> MapShape:
        few = pixels <= 1024
        most_warps = 8 if few else 4
        tile = most_warps * 1024 // item_bytes
        if channels_last:
            block_c = min(32 if few else 64, power_of_2(channels))
            block_p = min(tile // block_c, power_of_2(pixels))
        else:
            block_p = min(tile // 4, power_of_2(pixels))
            block_c = min(tile // block_p, power_of_2(channels), 64)
        tiles = -(-pixels // block_p)
        most = 1 if few else min(max(tiles // 16, 1), 64)
        span = -(-tiles // most) * block_p
        return cls(block_p, block_c, span, -(-pixels // span), _warps(most_warps * block_p * block_c // tile))


def blur_shape(rows: int, width: int, item_bytes: int) -> tuple[int, int, int]:
    """(numbers of a row a program, warps, rows a program) of the blur: a 16-byte load a thread and place.

    A program also reads the rows before its first and after its last, hence 16 rows where there are enough.
    """
    block = min(max(power_of_2(width), 64), 2048 // item_bytes)
    return block, _warps(4 * block * item_bytes // 2048), min(max(rows // 4, 4), 16)


def rgb_shape(features: int, pixels: int, item_bytes: int) -> MapShape:
    """As `MapShape.of`, between images and `features`: for products on tensor cores no side is below 16."""
    block_c = min(max(power_of_2(features), 16), 64)
    block_p = 8192 // item_bytes // block_c
    tiles = -(-pixels // block_p)
    span = -(-tiles // min(max(tiles // 8, 1), 64)) * block_p
    return MapShape(block_p, block_c, span, -(-pixels // span), _warps(4))


def _warps(nvidia: int) -> int:
    """Warps of 32 threads, or half as many wavefronts of 64."""
    return max(nvidia // 2 if torch.version.hip else nvidia, 1)
