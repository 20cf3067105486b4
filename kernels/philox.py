"""Philox 4x32-10 (Salmon et al., 2011) in PyTorch, the numbers that Triton's `tl.randn` makes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def normal(seed: Tensor, shape: torch.Size) -> Tensor:
    """Standard normal numbers of `shape`, float32, a function of `seed` (one int64 number) and the index."""
    index = torch.arange(shape.numel(), device=seed.device)
    first, second = (_uniform(bits) for bits in _bits(seed.view(()), index))
    radius = (-2 * first.clamp(min=1e-7).log()).sqrt()
    return (radius * (2 * math.pi * second).cos()).view(shape)


def _bits(seed: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The first two words, 32 bits each, at `index` of the stream of `seed`."""
    c0, c1, c2, c3 = index & _MASK, index >> 32, torch.zeros_like(index), torch.zeros_like(index)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high2, low2 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """(high, low) words of a product, in int64 without overflow of the high word."""
    high = (word * (factor >> 16) + (word * (factor & 0xFFFF) >> 16)) >> 16
    return high, (word * factor) & _MASK


def _uniform(bits: Tensor) -> Tensor:
    """[0, 1) of 32 random bits, read as a signed number without its sign."""
    signed = torch.where(bits >= 1 << 31, _MASK - bits, bits)
    return signed.to(torch.float32) * 4.6566127342e-10
