"""Triton kernels of the style model's pointwise chain; `style` loads this file when it meets a GPU tensor.

A program owns some channels of one sample and goes over a chunk of its pixels. Maps are read as [pixel,
channel] through two strides, so that one code serves channels-last and contiguous ones. Sums of a chunk go
into a slot of their own and are added up in the order of the slots: no float atomics, the same bits each run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _maps
from ._batch import rows
from ._launch import MapShape, on_device

#: Numbers that shape no access: other values of theirs are no reason to compile a kernel again.
_COUNTS = ("samples", "chunks")


@triton.jit
def _before(x, noise, weight, bias, at, pixels, inside, left):
    """What the leaky ReLU gets, fp32 [BLOCK_P, BLOCK_C]; weight and bias [BLOCK_C], or None."""
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    if bias is not None:
        value += bias[None, :]
    if noise is not None:
        value += weight[None, :] * tl.load(noise + pixels, pixels < left, 0.0).to(tl.float32)[:, None]
    return value


@triton.jit
def _leaky(value, slope):
    return tl.where(value > 0.0, value, slope * value)


@triton.jit
def _own(x, sample, block, start, x_sample, pixel, channel, BLOCK_C: tl.constexpr):
    """The channels of a program, and its map from its first pixel on.

    What may be None stays with the kernels: Triton before 3.7 cannot return it.
    """
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    x += sample * x_sample + start.to(tl.int64) * pixel + (block * BLOCK_C).to(tl.int64) * channel
    return channels, x


@triton.jit
def _numbers(values, channels, c):
    """A number a channel, in fp32."""
    return tl.load(values + channels, channels < c, 0.0).to(tl.float32)


@triton.jit
def _moments(
    x, noise, weight, bias, known, left, count, pixel, channel, slope,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(mean, sum of squares about it), [BLOCK_C], of `count` pixels.

    Summed as differences from the mean of the first tile, so that whatever the values are, no more than the
    number of tiles is lost of the precision of the squares.
    """
    across = tl.arange(0, BLOCK_C)[None, :] * channel
    pixels = tl.arange(0, BLOCK_P)
    inside = (pixels < left)[:, None] & known[None, :]
    h = _leaky(_before(x, noise, weight, bias, pixels[:, None] * pixel + across, pixels, inside, left), slope)
    base = tl.sum(tl.where(inside, h, 0.0), 0) / tl.minimum(count, BLOCK_P).to(tl.float32)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, count, BLOCK_P):
        pixels = first + tl.arange(0, BLOCK_P)
        inside = (pixels < left)[:, None] & known[None, :]
        at = pixels[:, None] * pixel + across
        d = _leaky(_before(x, noise, weight, bias, at, pixels, inside, left), slope) - base[None, :]
        d = tl.where(inside, d, 0.0)
        total += d
        squares += d * d
    return _settled(base, tl.sum(total, 0), tl.sum(squares, 0), count)


@triton.jit
def _settled(base, total, squares, count):
    """(mean, sum of squares about it) from sums of differences from `base`."""
    count = count.to(tl.float32)
    shift = total / count
    squares -= shift * shift * count
    return base + shift, tl.where(squares < 0.0, 0.0, squares)


@triton.jit
def _merged(slots, channels, known, c, n, span, chunks, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """`_moments` of a sample from those of its chunks, slots [chunks, 2, C]; by the same differences."""
    base = tl.load(slots + channels, known, 0.0)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, chunks, BLOCK_P):
        chunk = first + tl.arange(0, BLOCK_P)
        inside = (chunk < chunks)[:, None] & known[None, :]
        at = chunk[:, None] * (2 * c) + channels[None, :]
        count = tl.minimum(n - chunk * span, span).to(tl.float32)[:, None]
        d = tl.where(inside, tl.load(slots + at, inside, 0.0) - base[None, :], 0.0)
        total += count * d
        squares += tl.load(slots + at + c, inside, 0.0) + count * d * d
    return _settled(base, tl.sum(total, 0), tl.sum(squares, 0), n)


@triton.jit(do_not_specialize=_COUNTS)
def moments_kernel(
    x,  # map in [B, C, n]
    noise,  # [B or 1, n] or None
    weight,  # [C] or None
    bias,  # [C] or None
    slots,  # [B, chunks, 2, C] fp32, written: mean, sum of squares about it
    x_sample, noise_sample, pixel, channel, c, n, span, chunks, slope,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    program, block = tl.program_id(0), tl.program_id(1)
    sample, start = (program // chunks).to(tl.int64), (program % chunks) * span
    channels, x = _own(x, sample, block, start, x_sample, pixel, channel, BLOCK_C)
    if noise is not None:
        noise += sample * noise_sample + start
        weight = _numbers(weight, channels, c)
    if bias is not None:
        bias = _numbers(bias, channels, c)
    known, left = channels < c, n - start
    count = tl.minimum(span, left)
    mean, squares = _moments(
        x, noise, weight, bias, known, left, count, pixel, channel, slope, BLOCK_P, BLOCK_C
    )
    slots += program.to(tl.int64) * (2 * c) + channels
    tl.store(slots, mean, known)
    tl.store(slots + c, squares, known)


@triton.jit(do_not_specialize=_COUNTS)
def normalize_kernel(
    x, noise, weight, bias,
    style,  # [B, 2C], scales then shifts, or None
    slots,  # of moments_kernel; None where a program goes over all pixels of a sample
    y,  # map, written, x's strides within a sample
    variance, mean,  # [B, C] fp32, written
    kept,  # [2, B, C] fp32, written: mean, inverse deviation
    x_sample, noise_sample, style_sample, pixel, channel, samples, c, n, span, chunks, slope, eps,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    program, block = tl.program_id(0), tl.program_id(1)
    sample, start = (program // chunks).to(tl.int64), (program % chunks) * span
    channels, x = _own(x, sample, block, start, x_sample, pixel, channel, BLOCK_C)
    if noise is not None:
        noise += sample * noise_sample + start
        weight = _numbers(weight, channels, c)
    if bias is not None:
        bias = _numbers(bias, channels, c)
    known, left = channels < c, n - start
    count = tl.minimum(span, left)
    if slots is None:
        m, squares = _moments(
            x, noise, weight, bias, known, left, count, pixel, channel, slope, BLOCK_P, BLOCK_C
        )
    else:
        slots += sample * chunks * (2 * c)
        m, squares = _merged(slots, channels, known, c, n, span, chunks, BLOCK_P, BLOCK_C)
    v = squares / n
    inverse = tl.rsqrt(v + eps)
    row = sample * c + channels
    first = known & (start == 0)
    tl.store(variance + row, v, first)
    tl.store(mean + row, m, first)
    tl.store(kept + row, m, first)
    tl.store(kept + tl.cast(samples, tl.int64) * c + row, inverse, first)
    shift = tl.zeros([BLOCK_C], tl.float32)
    if style is not None:
        style += sample * style_sample + channels
        inverse *= 1.0 + tl.load(style, known, 0.0).to(tl.float32)
        shift += tl.load(style + c, known, 0.0).to(tl.float32)
    y += sample * c * n + start.to(tl.int64) * pixel + (block * BLOCK_C).to(tl.int64) * channel
    for first in range(0, count, BLOCK_P):
        pixels = first + tl.arange(0, BLOCK_P)
        inside = (pixels < left)[:, None] & known[None, :]
        at = pixels[:, None] * pixel + tl.arange(0, BLOCK_C)[None, :] * channel
        h = _leaky(_before(x, noise, weight, bias, at, pixels, inside, left), slope)
        value = (h - m[None, :]) * inverse[None, :] + shift[None, :]
        tl.store(y + at, value.to(y.dtype.element_ty), inside)


@triton.jit
def _gradient_sums(
    x, noise, weight, bias, by_y, mean, known, left, count, pixel, channel, slope,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over `count` pixels of by_y and of by_y times the distance from the mean, [BLOCK_C]."""
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    product = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, count, BLOCK_P):
        pixels = first + tl.arange(0, BLOCK_P)
        inside = (pixels < left)[:, None] & known[None, :]
        at = pixels[:, None] * pixel + tl.arange(0, BLOCK_C)[None, :] * channel
        h = _leaky(_before(x, noise, weight, bias, at, pixels, inside, left), slope)
        g = tl.load(by_y + at, inside, 0.0).to(tl.float32)
        total += g
        product += tl.where(inside, g * (h - mean[None, :]), 0.0)
    return tl.sum(total, 0), tl.sum(product, 0)


@triton.jit(do_not_specialize=_COUNTS)
def gradient_sums_kernel(
    x, noise, weight, bias, kept,
    by_y,  # map, x's strides within a sample
    slots,  # [B, chunks, 2, C] fp32, written: the sums of a chunk
    x_sample, noise_sample, pixel, channel, c, n, span, chunks, slope,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    program, block = tl.program_id(0), tl.program_id(1)
    sample, start = (program // chunks).to(tl.int64), (program % chunks) * span
    channels, x = _own(x, sample, block, start, x_sample, pixel, channel, BLOCK_C)
    if noise is not None:
        noise += sample * noise_sample + start
        weight = _numbers(weight, channels, c)
    if bias is not None:
        bias = _numbers(bias, channels, c)
    known, left = channels < c, n - start
    by_y += sample * c * n + start.to(tl.int64) * pixel + (block * BLOCK_C).to(tl.int64) * channel
    mean = tl.load(kept + sample * c + channels, known, 0.0)
    total, product = _gradient_sums(
        x, noise, weight, bias, by_y, mean, known, left, tl.minimum(span, left), pixel, channel, slope,
        BLOCK_P, BLOCK_C,
    )  # fmt: skip
    slots += program.to(tl.int64) * (2 * c) + channels
    tl.store(slots, total, known)
    tl.store(slots + c, product, known)


@triton.jit
def _added(slots, channels, known, c, chunks, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sums of a sample from those of its chunks, slots [chunks, 2, C]."""
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    product = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, chunks, BLOCK_P):
        chunk = first + tl.arange(0, BLOCK_P)
        inside = (chunk < chunks)[:, None] & known[None, :]
        at = chunk[:, None] * (2 * c) + channels[None, :]
        total += tl.load(slots + at, inside, 0.0)
        product += tl.load(slots + at + c, inside, 0.0)
    return tl.sum(total, 0), tl.sum(product, 0)


@triton.jit
def _slopes(style, by_variance, by_mean, row, known, inverse, total, product, n):
    """(steep, even, apart): the gradient at the activation is steep * by_y + even + apart * (h - mean)."""
    steep = inverse
    if style is not None:
        steep *= 1.0 + style
    even = -steep * total
    apart = -inverse * steep * product
    if by_mean is not None:
        even += tl.load(by_mean + row, known, 0.0).to(tl.float32)
    if by_variance is not None:
        apart += 2.0 * tl.load(by_variance + row, known, 0.0).to(tl.float32)
    return steep, even / n, apart / n


@triton.jit(do_not_specialize=_COUNTS)
def gradient_kernel(
    x, noise, weight, bias, style, kept,
    by_y,  # map, or None
    by_variance, by_mean,  # [B, C] contiguous, or None
    slots,  # of gradient_sums_kernel; None where a program goes over all pixels of a sample
    to_x,  # map, written, or None
    to_style,  # [B, 2C] contiguous, written, or None
    to_weight, to_bias,  # [B * chunks, C] fp32, written: the share of a chunk; or None
    x_sample, noise_sample, style_sample, pixel, channel, samples, c, n, span, chunks, slope,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    program, block = tl.program_id(0), tl.program_id(1)
    if slots is None and by_y is not None:  # one chunk: known to the compiler, which saves registers
        sample, start = program.to(tl.int64), program * 0
    else:
        sample, start = (program // chunks).to(tl.int64), (program % chunks) * span
    channels, x = _own(x, sample, block, start, x_sample, pixel, channel, BLOCK_C)
    if noise is not None:
        noise += sample * noise_sample + start
        weight = _numbers(weight, channels, c)
    if bias is not None:
        bias = _numbers(bias, channels, c)
    known, left = channels < c, n - start
    count = tl.minimum(span, left)
    row = sample * c + channels
    origin = sample * c * n + start.to(tl.int64) * pixel + (block * BLOCK_C).to(tl.int64) * channel
    mean = tl.load(kept + row, known, 0.0)
    inverse = tl.load(kept + tl.cast(samples, tl.int64) * c + row, known, 0.0)
    total = tl.zeros([BLOCK_C], tl.float32)
    product = tl.zeros([BLOCK_C], tl.float32)
    if by_y is not None:
        by_y += origin
        if slots is None:
            total, product = _gradient_sums(
                x, noise, weight, bias, by_y, mean, known, left, count, pixel, channel, slope,
                BLOCK_P, BLOCK_C,
            )  # fmt: skip
        else:
            slots += sample * chunks * (2 * c)
            total, product = _added(slots, channels, known, c, chunks, BLOCK_P, BLOCK_C)
    product *= inverse
    if to_style is not None:
        first = known & (start == 0)
        to_style += sample * (2 * c) + channels
        tl.store(to_style, product.to(to_style.dtype.element_ty), first)
        tl.store(to_style + c, total.to(to_style.dtype.element_ty), first)
    if style is not None:
        style = tl.load(style + sample * style_sample + channels, known, 0.0).to(tl.float32)
    steep, even, apart = _slopes(style, by_variance, by_mean, row, known, inverse, total, product, n)
    weight_share = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    bias_share = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, count, BLOCK_P):
        pixels = first + tl.arange(0, BLOCK_P)
        inside = (pixels < left)[:, None] & known[None, :]
        at = pixels[:, None] * pixel + tl.arange(0, BLOCK_C)[None, :] * channel
        before = _before(x, noise, weight, bias, at, pixels, inside, left)
        g = even[None, :] + apart[None, :] * (_leaky(before, slope) - mean[None, :])
        if by_y is not None:
            g += steep[None, :] * tl.load(by_y + at, inside, 0.0).to(tl.float32)
        g = tl.where(before > 0.0, g, slope * g)
        if to_x is not None:
            tl.store(to_x + origin + at, g.to(to_x.dtype.element_ty), inside)
        g = tl.where(inside, g, 0.0)
        if to_weight is not None:
            weight_share += g * tl.load(noise + pixels, pixels < left, 0.0).to(tl.float32)[:, None]
        if to_bias is not None:
            bias_share += g
    place = program.to(tl.int64) * c + channels
    if to_weight is not None:
        tl.store(to_weight + place, tl.sum(weight_share, 0), known)
    if to_bias is not None:
        tl.store(to_bias + place, tl.sum(bias_share, 0), known)


class _Launch:
    """What all launches over one map share."""

    def __init__(self, x: Tensor, noise, weight, bias, style, slope: float):
        x = _maps.dense(x)
        self.x, (self.samples, self.c, h, w) = x, x.shape
        self.last = _maps.is_last(x)
        self.n = h * w
        self.shape = MapShape.of(self.c, self.n, self.last, x.element_size())
        noise = None if noise is None else rows(noise)
        shared = noise is None or len(noise) == 1
        self.style = None if style is None else rows(style)
        self.maps = x, noise, weight, bias
        self.apart = x.stride(0), 0 if shared else noise.stride(0)
        self.strides = _maps.strides(x)
        self.sizes = self.c, self.n, self.shape.span, self.shape.chunks, slope
        self.style_apart = 0 if style is None else self.style.stride(0)

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def slots(self) -> Tensor | None:
        chunks = self.shape.chunks
        return None if chunks == 1 else self.new(self.samples, chunks, 2, self.c)

    def __call__(self, kernel, *given) -> None:
        shape = self.shape
        grid = (self.samples * shape.chunks, -(-self.c // shape.block_c))
        with on_device(self.x):
            kernel[grid](*given, BLOCK_P=shape.block_p, BLOCK_C=shape.block_c, num_warps=shape.warps)


def forward(x: Tensor, noise, weight, bias, style, eps: float, slope: float) -> list[Tensor]:
    """[y, variance [B, C], mean [B, C], kept [2, B, C]] in two launches, one for maps of up to 32x32."""
    launch = _Launch(x, noise, weight, bias, style, slope)
    slots = launch.slots()
    if slots is not None:
        launch(moments_kernel, *launch.maps, slots, *launch.apart, *launch.strides, *launch.sizes)
    y, kept = _maps.like(launch.x), launch.new(2, launch.samples, launch.c)
    variance, mean = (launch.new(launch.samples, launch.c) for _ in range(2))
    launch(
        normalize_kernel, *launch.maps, launch.style, slots, y, variance, mean, kept, *launch.apart,
        launch.style_apart, *launch.strides, launch.samples, *launch.sizes, eps,
    )  # fmt: skip
    return [y, variance, mean, kept]


def backward(
    by_y,
    by_variance,
    by_mean,
    x: Tensor,
    noise,
    weight,
    bias,
    style,
    kept: Tensor,
    slope: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, weight, bias and style, None where not needed."""
    launch = _Launch(x, noise, weight, bias, style, slope)
    slots = None
    if by_y is not None:
        by_y = by_y.contiguous(memory_format=_maps.memory_format(launch.last))
        slots = launch.slots()
    if slots is not None:
        launch(
            gradient_sums_kernel,
            *launch.maps,
            kept,
            by_y,
            slots,
            *launch.apart,
            *launch.strides,
            *launch.sizes,
        )
    to_x = _maps.like(launch.x) if needs[0] else None
    to_style = torch.empty(style.shape, dtype=style.dtype, device=style.device) if needs[3] else None
    shares = launch.new(needs[1] + needs[2], launch.samples * launch.shape.chunks, launch.c)
    by_moments = [None if g is None else g.contiguous() for g in (by_variance, by_mean)]
    launch(
        gradient_kernel, *launch.maps, launch.style, kept, by_y, *by_moments, slots, to_x, to_style,
        shares[0] if needs[1] else None, shares[-1] if needs[2] else None, *launch.apart,
        launch.style_apart, *launch.strides, launch.samples, *launch.sizes,
    )  # fmt: skip
    sums = shares.sum(1)
    to_weight = sums[0].to(weight.dtype) if needs[1] else None
    to_bias = sums[-1].to(bias.dtype) if needs[2] else None
    return [to_x, to_weight, to_bias, to_style]
