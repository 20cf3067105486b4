"""Triton kernels of the Chamfer distance; `chamfer` loads this file when it meets a GPU tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import on_device

ROWS, COLUMNS, WARPS = 64, 32, 4  # about 128 registers for the search on Hopper, no spills


@triton.jit
def _place(tiles):
    """(tile, batch) of a program. The grid has one axis, since the others end at 65,535."""
    program = tl.program_id(0)
    return program % tiles, (program // tiles).to(tl.int64)


@triton.jit
def _load(cloud, at, inside, along, across):
    """Coordinates of the points `at` in fp32; a point that is not `inside` lies at infinity."""
    x = tl.load(cloud + at * along, inside, float("inf")).to(tl.float32)
    y = tl.load(cloud + at * along + across, inside, float("inf")).to(tl.float32)
    z = tl.load(cloud + at * along + 2 * across, inside, float("inf")).to(tl.float32)
    return x, y, z


@triton.jit
def nearest_kernel(
    x,  # [B, N, 3] any strides
    y,  # [B, M, 3] any strides
    index_x,  # [B, N] int32, written
    index_y,  # [B, M] int32, written
    partial,  # [B, tiles of x, then tiles of y] fp32, written: the sum of the squared distances of a tile
    n,
    m,
    tiles_x,
    tiles,
    x_batch, x_point, x_axis,
    y_batch, y_point, y_axis,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: the nearest neighbours of ROWS points. Tiles below `tiles_x` search y, the others x."""
    tile, batch = _place(tiles)
    slot = partial + batch * tiles + tile
    if tile < tiles_x:
        _search(
            x + batch * x_batch, x_point, x_axis, n, y + batch * y_batch, y_point, y_axis, m,
            index_x + batch * n, slot, tile, ROWS, COLUMNS,
        )  # fmt: skip
    else:
        _search(
            y + batch * y_batch, y_point, y_axis, m, x + batch * x_batch, x_point, x_axis, n,
            index_y + batch * m, slot, tile - tiles_x, ROWS, COLUMNS,
        )  # fmt: skip


@triton.jit
def _search(
    own, own_point, own_axis, own_count, other, other_point, other_axis, other_count, index, slot, tile,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
    lanes = tl.arange(0, COLUMNS)
    inside = rows < own_count
    x0, x1, x2 = _load(own, rows, inside, own_point, own_axis)
    # A running minimum per (row, lane) leaves the reduction over lanes to the end.
    best = tl.full([ROWS, COLUMNS], float("inf"), tl.float32)
    where = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, other_count, COLUMNS):
        columns = start + lanes
        y0, y1, y2 = _load(other, columns.to(tl.int64), columns < other_count, other_point, other_axis)
        d0, d1, d2 = x0[:, None] - y0[None, :], x1[:, None] - y1[None, :], x2[:, None] - y2[None, :]
        distance = d0 * d0 + d1 * d1 + d2 * d2
        nearer = distance < best
        best = tl.where(nearer, distance, best)
        where = tl.where(nearer, start, where)
    least = tl.min(best, 1)
    candidates = tl.where(best == least[:, None], where + lanes[None, :], other_count - 1)
    tl.store(index + rows, tl.min(candidates, 1), inside)
    # Comparisons drop NaN, which a bad point has to bring into the sum.
    bad = (x0 != x0) | (x1 != x1) | (x2 != x2)
    least = tl.where(bad, float("nan"), least)
    tl.store(slot, tl.sum(tl.where(inside, least, 0.0), 0))


@triton.jit
def pull_kernel(
    toward,  # [B] any stride
    back,  # [B] any stride
    x,  # [B, N, 3] any strides
    y,  # [B, M, 3] any strides
    index_x,  # [B, N] int32
    index_y,  # [B, M] int32
    gradient,  # [B, N, 3] contiguous, written
    n,
    m,
    tiles,
    toward_batch, back_batch,
    x_batch, x_point, x_axis,
    y_batch, y_point, y_axis,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: the gradient at ROWS points of x.

    The points of y that chose a row are found by comparing indices: no float atomics, one order of sums.
    """
    tile, batch = _place(tiles)
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    x += batch * x_batch
    y += batch * y_batch
    x0, x1, x2 = _load(x, rows.to(tl.int64), inside, x_point, x_axis)
    chosen = tl.load(index_x + batch * n + rows, inside, 0).to(tl.int64)
    y0, y1, y2 = _load(y, chosen, inside, y_point, y_axis)
    ahead = 2.0 * tl.load(toward + batch * toward_batch).to(tl.float32)
    behind = 2.0 * tl.load(back + batch * back_batch).to(tl.float32)
    s0 = tl.zeros([ROWS, COLUMNS], tl.float32)
    s1 = tl.zeros([ROWS, COLUMNS], tl.float32)
    s2 = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, m, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        o0, o1, o2 = _load(y, columns.to(tl.int64), columns < m, y_point, y_axis)
        by = tl.load(index_y + batch * m + columns, columns < m, -1)
        chose = by[None, :] == rows[:, None]
        s0 += tl.where(chose, x0[:, None] - o0[None, :], 0.0)
        s1 += tl.where(chose, x1[:, None] - o1[None, :], 0.0)
        s2 += tl.where(chose, x2[:, None] - o2[None, :], 0.0)
    g = gradient + (batch * n + rows) * 3
    tl.store(g, (ahead * (x0 - y0) + behind * tl.sum(s0, 1)).to(gradient.dtype.element_ty), inside)
    tl.store(g + 1, (ahead * (x1 - y1) + behind * tl.sum(s1, 1)).to(gradient.dtype.element_ty), inside)
    tl.store(g + 2, (ahead * (x2 - y2) + behind * tl.sum(s2, 1)).to(gradient.dtype.element_ty), inside)


def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `sivae_fast::chamfer`: (sums [B, 2] fp32, index_x [B, N] int32, index_y [B, M] int32)."""
    (batch, n, _), m = x.shape, y.shape[1]
    tiles_x = triton.cdiv(n, ROWS)
    tiles = tiles_x + triton.cdiv(m, ROWS)
    index_x, index_y = (torch.empty(batch, c, dtype=torch.int32, device=x.device) for c in (n, m))
    partial = torch.empty(batch, tiles, dtype=torch.float32, device=x.device)
    if batch:
        with on_device(x):
            nearest_kernel[(tiles * batch,)](
                x, y, index_x, index_y, partial, n, m, tiles_x, tiles, *x.stride(), *y.stride(),
                ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
            )  # fmt: skip
    return torch.stack([partial[:, :tiles_x].sum(1), partial[:, tiles_x:].sum(1)], 1), index_x, index_y


def pull(toward: Tensor, back: Tensor, x: Tensor, y: Tensor, index_x: Tensor, index_y: Tensor) -> Tensor:
    """The operator `sivae_fast::chamfer_pull`: the gradient at x [B, N, 3], in the dtype of x."""
    (batch, n, _), m = x.shape, y.shape[1]
    gradient = torch.empty(batch, n, 3, dtype=x.dtype, device=x.device)
    if batch:
        with on_device(x):
            tiles = triton.cdiv(n, ROWS)
            pull_kernel[(tiles * batch,)](
                toward, back, x, y, index_x, index_y, gradient, n, m, tiles,
                toward.stride(0), back.stride(0), *x.stride(), *y.stride(),
                ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
            )  # fmt: skip
    return gradient
