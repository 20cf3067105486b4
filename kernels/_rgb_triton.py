"""Triton kernels between images and feature maps; `rgb` loads this file when it meets a GPU tensor.

A program goes over a chunk of the pixels of one sample, a tile [pixel, channel] at a time. Products with the
few colours run on tensor cores, which want 16 of them: what is missing are zeros, except for a column of
ones that makes the gradient of a bias. Sums of a chunk go into a slot of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _maps
from ._launch import on_device, rgb_shape
from ._math import product_dtype

COLORS = tl.constexpr(16)
_COUNTS = ("n", "span", "chunks")


@triton.jit
def _dot(a, b, PRODUCT: tl.constexpr):
    return tl.dot(a.to(PRODUCT), b.to(PRODUCT), input_precision="ieee")


@triton.jit
def _weight(weight, channels, colors, c, color, feature):
    """[COLORS, BLOCK_C], zeros outside."""
    k = tl.arange(0, COLORS)[:, None]
    inside = (k < colors) & (channels < c)[None, :]
    return tl.load(weight + k * color + channels[None, :] * feature, inside, 0.0)


@triton.jit
def _image(image, pixels, left, colors, pixel, channel):
    """[BLOCK_P, COLORS], zeros outside."""
    k = tl.arange(0, COLORS)[None, :]
    inside = (pixels[:, None] < left) & (k < colors)
    return tl.load(image + pixels[:, None] * pixel + k * channel, inside, 0.0)


@triton.jit
def _leaky_gradient(g, image, weight, bias, slope, PRODUCT: tl.constexpr):
    """g through a leaky ReLU, whose signs are found once more: cheaper than to read what came out of it."""
    value = _dot(image, weight, PRODUCT) + bias[None, :]
    wide = g.to(tl.float32)
    return tl.where(value > 0.0, wide, slope * wide).to(g.dtype)


@triton.jit(do_not_specialize=_COUNTS)
def widen_kernel(
    image,  # [B, K, n]
    weight,  # [K, C] by two strides
    bias,  # [C], with which the result goes through a leaky ReLU; or None
    features,  # [B, C, n], written
    image_sample, image_pixel, image_channel, color, feature, pixel, channel,
    colors, c, n, span, chunks, slope,
    PRODUCT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """features = image weight, or leaky_relu(image weight + bias)."""
    program = tl.program_id(0)
    sample, start = (program // chunks).to(tl.int64), (program % chunks) * span
    left = n - start
    image += sample * image_sample + start * image_pixel
    features += sample * c * n + start.to(tl.int64) * pixel
    kind = features.dtype.element_ty
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    w = _weight(weight, channels, colors, c, color, feature).to(kind)
    if bias is not None:
        bias = tl.load(bias + channels, channels < c, 0.0).to(tl.float32)
    for first in range(0, tl.minimum(span, left), BLOCK_P):
        pixels = first + tl.arange(0, BLOCK_P)
        value = _dot(_image(image, pixels, left, colors, image_pixel, image_channel).to(kind), w, PRODUCT)
        if bias is not None:
            value += bias[None, :]
            value = tl.where(value > 0.0, value, slope * value)
        at = pixels[:, None] * pixel + channels[None, :] * channel
        tl.store(features + at, value.to(kind), (pixels < left)[:, None] & (channels < c)[None, :])


@triton.jit(do_not_specialize=_COUNTS)
def narrow_kernel(
    features,  # [B, C, n]
    weight,  # [K, C] by two strides
    bias,  # [K], added; or None
    image, leaky_bias,  # what `widen_kernel` made its features of, if these are their gradients; or None
    out,  # [B, K, n], written
    features_sample, image_sample, color, feature, pixel, channel, image_pixel, image_channel, out_pixel,
    out_channel, colors, c, n, span, chunks, slope,
    PRODUCT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = features weight' + bias."""
    program = tl.program_id(0)
    sample, start = (program // chunks).to(tl.int64), (program % chunks) * span
    left = n - start
    features += sample * features_sample + start.to(tl.int64) * pixel
    out += sample * colors * n + start * out_pixel
    if image is not None:
        image += sample * image_sample + start * image_pixel
    kind = features.dtype.element_ty
    k = tl.arange(0, COLORS)
    for first in range(0, tl.minimum(span, left), BLOCK_P):
        pixels = first + tl.arange(0, BLOCK_P)
        value = tl.zeros([BLOCK_P, COLORS], tl.float32)
        if bias is not None:
            value += tl.load(bias + k, k < colors, 0.0).to(tl.float32)[None, :]
        for block in range(0, c, BLOCK_C):
            channels = block + tl.arange(0, BLOCK_C)
            w = _weight(weight, channels, colors, c, color, feature).to(kind)
            at = pixels[:, None] * pixel + channels[None, :] * channel
            tile = tl.load(features + at, (pixels < left)[:, None] & (channels < c)[None, :], 0.0)
            if image is not None:
                colour = _image(image, pixels, left, colors, image_pixel, image_channel).to(kind)
                b = tl.load(leaky_bias + channels, channels < c, 0.0).to(tl.float32)
                tile = _leaky_gradient(tile, colour, w, b, slope, PRODUCT)
            value += _dot(tile, tl.trans(w), PRODUCT)
        at = pixels[:, None] * out_pixel + k[None, :] * out_channel
        inside = (pixels < left)[:, None] & (k < colors)[None, :]
        tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=_COUNTS)
def shares_kernel(
    features,  # [B, C, n]
    image,  # [B, K, n]
    weight, leaky_bias,  # with which `widen_kernel` made features of image, if these are their gradients
    slots,  # [B * chunks, C, K + 1] fp32, written: the share of a chunk
    features_sample, image_sample, color, feature, pixel, channel, image_pixel, image_channel,
    colors, c, n, span, chunks, slope,
    PRODUCT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """slots = sums over pixels of features' [image, 1]: gradients of a weight and a bias."""
    program = tl.program_id(0)
    sample, start = (program // chunks).to(tl.int64), (program % chunks) * span
    left = n - start
    features += sample * features_sample + start.to(tl.int64) * pixel
    image += sample * image_sample + start * image_pixel
    kind = features.dtype.element_ty
    channels, k = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, COLORS)
    if weight is not None:
        w = _weight(weight, channels, colors, c, color, feature).to(kind)
        b = tl.load(leaky_bias + channels, channels < c, 0.0).to(tl.float32)
    shares = tl.zeros([BLOCK_C, COLORS], tl.float32)
    for first in range(0, tl.minimum(span, left), BLOCK_P):
        pixels = first + tl.arange(0, BLOCK_P)
        colour = _image(image, pixels, left, colors, image_pixel, image_channel).to(kind)
        at = pixels[:, None] * pixel + channels[None, :] * channel
        tile = tl.load(features + at, (pixels < left)[:, None] & (channels < c)[None, :], 0.0)
        if weight is not None:
            tile = _leaky_gradient(tile, colour, w, b, slope, PRODUCT)
        colour = tl.where((k == colors)[None, :], 1.0, colour.to(tl.float32)).to(kind)
        shares += _dot(tl.trans(tile), colour, PRODUCT)
    columns = colors + 1
    at = (program.to(tl.int64) * c + channels[:, None]) * columns + k[None, :]
    tl.store(slots + at, shares, (channels < c)[:, None] & (k < columns)[None, :])


class _Launch:
    """What all launches over a map of features share."""

    def __init__(self, features: Tensor):
        b, self.c, h, w = features.shape
        self.features, self.n = features, h * w
        self.shape = rgb_shape(self.c, self.n, features.element_size())
        self.programs = b * self.shape.chunks
        self.strides = _maps.strides(features)

    def __call__(self, kernel, *given, blocks: int = 1, slope: float) -> None:
        block_p, block_c, span, chunks, warps = self.shape
        options = {"PRODUCT": product_dtype(self.features.dtype), "num_warps": warps}
        with on_device(self.features):
            kernel[(self.programs, blocks)](
                *given, self.c, self.n, span, chunks, slope, BLOCK_P=block_p, BLOCK_C=block_c, **options
            )

    @property
    def blocks(self) -> int:
        return -(-self.c // self.shape.block_c)


def widen(image: Tensor, weight: Tensor, bias: Tensor | None, slope: float, features: Tensor) -> Tensor:
    """Fills and returns features [B, C, H, W]: image [B, K, H, W] times weight [K, C], see the kernel."""
    launch, image = _Launch(features), _maps.dense(image)
    launch(
        widen_kernel, image, weight, bias, features, image.stride(0), *_maps.strides(image), *weight.stride(),
        *launch.strides, image.shape[1], blocks=launch.blocks, slope=slope,
    )  # fmt: skip
    return features


def narrow(features: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, image=None, leaky=(None, 1.0)):
    """Fills and returns out [B, K, H, W]: features [B, C, H, W] times weight' [C, K], plus bias [K].

    image, leaky: where features are gradients by `widen(image, weight, *leaky, ...)`.
    """
    features = _maps.dense(features)
    launch, image = _Launch(features), None if image is None else _maps.dense(image)
    launch(
        narrow_kernel, features, weight, bias, image, leaky[0], out, features.stride(0),
        0 if image is None else image.stride(0), *weight.stride(), *launch.strides,
        *_maps.strides(out if image is None else image), *_maps.strides(out), out.shape[1], slope=leaky[1],
    )  # fmt: skip
    return out


def shares(features: Tensor, image: Tensor, weight: Tensor | None = None, leaky=(None, 1.0)) -> Tensor:
    """Sums over samples and pixels of features' [image, 1], [C, K + 1] fp32.

    weight, leaky: where features are gradients by `widen(image, weight, *leaky, ...)`.
    """
    features, image = _maps.dense(features), _maps.dense(image)
    launch, colors = _Launch(features), image.shape[1]
    shape = launch.programs, launch.c, colors + 1
    slots = torch.empty(shape, dtype=torch.float32, device=image.device)
    launch(
        shares_kernel, features, image, weight, leaky[0], slots, features.stride(0), image.stride(0),
        *((0, 0) if weight is None else weight.stride()), *launch.strides, *_maps.strides(image), colors,
        blocks=launch.blocks, slope=leaky[1],
    )  # fmt: skip
    return slots.sum(0)
