"""Triton kernel of the blur; `blur` loads this file when it meets a GPU tensor."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _maps
from ._launch import blur_shape, on_device


@triton.jit
def _across(x, row, rows, width, step, at):
    """A row blurred along itself, fp32 [BLOCK]; rows outside are zeros."""
    inside = (row >= 0) & (row < rows) & (at < width)
    x += row * width
    left = tl.load(x + at - step, inside & (at >= step), 0.0).to(tl.float32)
    here = tl.load(x + at, inside, 0.0).to(tl.float32)
    right = tl.load(x + at + step, inside & (at < width - step), 0.0).to(tl.float32)
    return 0.25 * (left + right) + 0.5 * here


@triton.jit(do_not_specialize=("rows", "span", "chunks"))
def blur_kernel(
    x, y,  # [images, rows, width], y written
    rows, width, step,  # width: numbers of a row; step: from a pixel to the next
    span, chunks,  # rows a program, programs a column
    gain,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program goes down some rows and keeps the last two: every number is loaded for its own row alone."""
    program, block = tl.program_id(0), tl.program_id(1)
    image = (program // chunks).to(tl.int64) * rows * width
    x += image
    y += image
    first = (program % chunks) * span
    at = block * BLOCK + tl.arange(0, BLOCK)
    above = _across(x, first - 1, rows, width, step, at)
    here = _across(x, first, rows, width, step, at)
    for row in range(first, tl.minimum(first + span, rows)):
        below = _across(x, row + 1, rows, width, step, at)
        value = gain * (0.25 * (above + below) + 0.5 * here)
        tl.store(y + row * width + at, value.to(y.dtype.element_ty), at < width)
        above = here
        here = below


def blur(x: Tensor, gain: float) -> Tensor:
    """`x` [B, C, H, W] blurred, times `gain`."""
    x = x.contiguous(memory_format=_maps.memory_format(_maps.is_last(x)))
    y = _maps.like(x)
    b, c, h, w = x.shape
    pixel, _ = _maps.strides(x)
    images = b * c // pixel
    block, warps, span = blur_shape(h, w * pixel, x.element_size())
    chunks = -(-h // span)
    with on_device(x):
        blur_kernel[(images * chunks, -(-w * pixel // block))](
            x, y, h, w * pixel, pixel, span, chunks, gain, BLOCK=block, num_warps=warps
        )
    return y
