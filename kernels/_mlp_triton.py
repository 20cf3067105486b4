"""Triton kernels of small fully connected networks; `mlp` loads this file when it meets a GPU tensor.

One launch goes through all layers forward, one backward, and one makes the gradients of all weights and
biases: layers of 256 numbers take less time than launches. A program owns some rows. What a layer gives goes
through memory to the next one, since a program reads it again in parts; the backward pass needs it anyhow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import on_device, power_of_2
from ._math import product_dtype

#: Inputs and outputs of a network are filled up to this, the least that tensor cores multiply.
EDGE = tl.constexpr(16)


@triton.jit
def _dot(a, b, total, PRODUCT: tl.constexpr):
    return tl.dot(a.to(PRODUCT), b.to(PRODUCT), total, input_precision="ieee")


@triton.jit
def _matrix(matrix, rows, columns, height, width, row, column):
    """[rows, columns] of a matrix [height, width] with two strides, zeros outside."""
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(matrix + rows[:, None] * row + columns[None, :] * column, inside, 0.0)


@triton.jit
def forward_kernel(
    x,  # [n, inputs]
    weights, biases,  # tuples: [width, inputs], [width, width], ..., [outputs, width], contiguous
    hidden,  # [layers, n, width], written: what the ReLUs give
    y,  # [n, outputs], written
    n, inputs, width, outputs, x_row, x_column,
    PRODUCT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,  # width, or the next power of two
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    edge, columns = tl.arange(0, EDGE), tl.arange(0, WIDTH)
    kind = hidden.dtype.element_ty
    inside = (rows < n)[:, None] & (columns < width)[None, :]
    first = _matrix(weights[0], edge, columns, inputs, width, 1, inputs)
    value = tl.dot(_matrix(x, rows, edge, n, inputs, x_row, x_column), first, input_precision="ieee")
    for i in tl.static_range(len(weights) - 1):
        value += tl.load(biases[i] + columns, columns < width, 0.0)[None, :]
        at = rows.to(tl.int64)[:, None] * width + columns[None, :]
        layer = hidden + tl.cast(n, tl.int64) * width * i
        value = tl.where(value < 0.0, 0.0, value)  # NaN stays
        tl.store(layer + at, value.to(kind), inside)
        tl.debug_barrier()  # the next layer reads what other threads of this program wrote
        if i < len(weights) - 2:
            value = tl.zeros([BLOCK_N, WIDTH], tl.float32)
            for k in range(0, width, BLOCK_K):
                part = k + tl.arange(0, BLOCK_K)
                left = _matrix(layer, rows, part, n, width, width, 1)
                right = _matrix(weights[i + 1], part, columns, width, width, 1, width).to(kind)
                value = _dot(left, right, value, PRODUCT)
    total = tl.zeros([BLOCK_N, EDGE], tl.float32)
    for k in range(0, width, BLOCK_K):
        part = k + tl.arange(0, BLOCK_K)
        left = _matrix(layer, rows, part, n, width, width, 1).to(tl.float32)
        right = _matrix(weights[len(weights) - 1], part, edge, width, outputs, 1, width)
        total = tl.dot(left, right, total, input_precision="ieee")
    total += tl.load(biases[len(weights) - 1] + edge, edge < outputs, 0.0)[None, :]
    inside = (rows < n)[:, None] & (edge < outputs)[None, :]
    tl.store(y + rows[:, None] * outputs + edge[None, :], total, inside)


@triton.jit
def backward_kernel(
    by_y,  # [n, outputs] contiguous
    weights,
    hidden,  # of forward_kernel
    by_hidden,  # as hidden, written: gradients by what goes into the ReLUs
    to_x,  # [n, inputs], written; or None
    n, inputs, width, outputs,
    PRODUCT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    edge, columns = tl.arange(0, EDGE), tl.arange(0, WIDTH)
    kind = hidden.dtype.element_ty
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    inside = (rows < n)[:, None] & (columns < width)[None, :]
    value = _matrix(by_y, rows, edge, n, outputs, outputs, 1)
    last = _matrix(weights[len(weights) - 1], edge, columns, outputs, width, width, 1)
    value = tl.dot(value, last, input_precision="ieee")
    for i in tl.static_range(len(weights) - 2, -1, -1):
        step = tl.cast(n, tl.int64) * width * i
        value = tl.where(tl.load(hidden + step + at, inside, 0.0) <= 0.0, 0.0, value)
        layer = by_hidden + step
        tl.store(layer + at, value.to(kind), inside)
        tl.debug_barrier()
        if i > 0:
            value = tl.zeros([BLOCK_N, WIDTH], tl.float32)
            for k in range(0, width, BLOCK_K):
                part = k + tl.arange(0, BLOCK_K)
                left = _matrix(layer, rows, part, n, width, width, 1)
                right = _matrix(weights[i], part, columns, width, width, width, 1).to(kind)
                value = _dot(left, right, value, PRODUCT)
    if to_x is not None:
        total = tl.zeros([BLOCK_N, EDGE], tl.float32)
        for k in range(0, width, BLOCK_K):
            part = k + tl.arange(0, BLOCK_K)
            left = _matrix(by_hidden, rows, part, n, width, width, 1).to(tl.float32)
            right = _matrix(weights[0], part, edge, width, inputs, inputs, 1)
            total = tl.dot(left, right, total, input_precision="ieee")
        tl.store(
            to_x + rows[:, None] * inputs + edge[None, :], total,
            (rows < n)[:, None] & (edge < inputs)[None, :],
        )  # fmt: skip


@triton.jit
def _weight_tile(
    to_weight, to_bias, by_output, input_, first, second, n, height, width, row, column,
    PRODUCT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of by_output' input_, and the sums over rows of by_output where it is the first of its row."""
    down, across = first * BLOCK + tl.arange(0, BLOCK), second * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for k in range(0, n, BLOCK_N):
        rows = k + tl.arange(0, BLOCK_N)
        left = _matrix(by_output, down, rows, height, n, 1, height)
        right = _matrix(input_, rows, across, n, width, row, column)
        total = _dot(left, right, total, PRODUCT)
        sums += tl.sum(left.to(tl.float32), 1)
    inside = (down < height)[:, None] & (across < width)[None, :]
    tl.store(to_weight + down[:, None] * width + across[None, :], total, inside)
    tl.store(to_bias + down, sums, (down < height) & (second == 0))


@triton.jit
def weights_kernel(
    x, by_y, hidden, by_hidden,  # of the other kernels
    to_weights, to_biases,  # tuples, written
    n, inputs, width, outputs, x_row, x_column,
    PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program makes one tile of one layer: [tiles, tiles] of a hidden one, [tiles, 1] and [1, tiles] at the
    edges."""
    layer, first, second = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    size = tl.cast(n, tl.int64) * width
    for i in tl.static_range(len(to_weights)):
        if layer == i:
            if i == 0:
                if second == 0:
                    _weight_tile(
                        to_weights[0], to_biases[0], by_hidden, x, first, second, n, width, inputs, x_row,
                        x_column, tl.float32, BLOCK, BLOCK_N,
                    )  # fmt: skip
            elif i == len(to_weights) - 1:
                if first == 0:
                    _weight_tile(
                        to_weights[i], to_biases[i], by_y, hidden + size * (i - 1), first, second, n, outputs,
                        width, width, 1, tl.float32, BLOCK, BLOCK_N,
                    )  # fmt: skip
            else:
                _weight_tile(
                    to_weights[i], to_biases[i], by_hidden + size * i, hidden + size * (i - 1), first, second,
                    n, width, width, width, 1, PRODUCT, BLOCK, BLOCK_N,
                )  # fmt: skip


def _shape(x: Tensor, weights: list[Tensor], dtype: torch.dtype) -> tuple[tuple[int, ...], dict]:
    """(n, inputs, width, outputs) and what kernels are compiled for."""
    sizes = len(x), x.shape[1], len(weights[0]), len(weights[-1])
    return sizes, {"PRODUCT": product_dtype(dtype)}


def forward(x: Tensor, weights: list[Tensor], biases: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """[y [n, outputs] fp32, hidden [layers, n, width] in `dtype`]."""
    (n, inputs, width, outputs), compiled = _shape(x, weights, dtype)
    hidden = torch.empty(len(weights) - 1, n, width, dtype=dtype, device=x.device)
    y = torch.empty(n, outputs, dtype=torch.float32, device=x.device)
    with on_device(x):
        forward_kernel[(-(-n // 16),)](
            x, tuple(weights), tuple(biases), hidden, y, n, inputs, width, outputs, *x.stride(),
            BLOCK_N=16, BLOCK_K=32, WIDTH=power_of_2(width), num_warps=8, **compiled,
        )  # fmt: skip
    return [y, hidden]


def backward(
    by_y: Tensor, x: Tensor, weights: list[Tensor], hidden: Tensor, to_x: bool, to_weights: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients of x, of the weights and of the biases, where wanted, in fp32."""
    (n, inputs, width, outputs), compiled = _shape(x, weights, hidden.dtype)
    by_y, by_hidden = by_y.contiguous(), torch.empty_like(hidden)
    by_x = torch.empty(n, inputs, dtype=torch.float32, device=x.device) if to_x else None
    by_weights, by_biases = [], []
    with on_device(x):
        backward_kernel[(-(-n // 16),)](
            by_y, tuple(weights), hidden, by_hidden, by_x, n, inputs, width, outputs,
            BLOCK_N=16, BLOCK_K=32, WIDTH=power_of_2(width), num_warps=8, **compiled,
        )  # fmt: skip
        if to_weights:
            by_weights = [torch.empty_like(weight) for weight in weights]
            by_biases = [torch.empty(len(w), dtype=torch.float32, device=x.device) for w in weights]
            tiles = -(-width // 32)
            weights_kernel[(len(weights), tiles, tiles)](
                x, by_y, hidden, by_hidden, tuple(by_weights), tuple(by_biases), n, inputs, width, outputs,
                *x.stride(), BLOCK=32, BLOCK_N=32, **compiled,
            )  # fmt: skip
    return by_x, by_weights, by_biases
