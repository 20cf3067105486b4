"""How kernels lay out maps [B, C, H, W]: channels-last, or contiguous where a sample came so."""

from __future__ import annotations

import torch
from torch import Tensor


def is_last(x: Tensor) -> bool:
    """Whether kernels read and write `x` as channels-last; so is what is both, and what is neither."""
    one = x[:1]
    return one.is_contiguous(memory_format=torch.channels_last) or not one.is_contiguous()


def memory_format(last: bool) -> torch.memory_format:
    return torch.channels_last if last else torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """`x` with dense samples, which may lie apart; copied only where they are not."""
    one = x[:1]
    if one.is_contiguous() or one.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def like(x: Tensor, channels: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A new map laid out as kernels lay out `x`, without values."""
    shape = x.shape[0], channels or x.shape[1], *x.shape[2:]
    form = memory_format(is_last(x))
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=form)


def strides(x: Tensor) -> tuple[int, int]:
    """From pixel to pixel and from channel to channel, of a map that kernels have laid out."""
    _, c, h, w = x.shape
    return (c, 1) if is_last(x) else (1, h * w)
