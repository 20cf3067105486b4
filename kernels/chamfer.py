"""Chamfer distance of point clouds: each point's squared distance to the nearest point of the other cloud.

Neighbours are searched tile by tile on coordinate differences (never the expanded square, which can go
negative), so memory is O(N + M); their indices are kept and make the backward pass a gather.
On a GPU the kernels of `_chamfer_triton` run, elsewhere, for fp64 and without Triton the definition below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import runs_triton

_TILE = 1 << 17  # distances in flight on the CPU: 512 KiB in fp32, what a core's second-level cache holds
_LANES, _GROUP = 32, 32  # at least so many points side by side for vectors, at most so many in a group


def chamfer(x: Tensor, y: Tensor, reduction: str = "sum") -> Tensor:
    """Chamfer distance of each pair of clouds, symmetric, with squared Euclidean distances.

    sum:  d = sum_i min_j |x_i - y_j|^2 + sum_j min_i |x_i - y_j|^2      (the training error)
    mean: the same with each sum divided by its number of points         (the metric of MMD and coverage)

    x: [B, N, 3] and y: [B, M, 3], fp16, bf16, fp32 or fp64 of one dtype and device; any strides. Returns [B]
    fp32 (fp64 for fp64), accumulated in that dtype, never negative. A NaN coordinate makes its row NaN,
    an infinite one infinity, or NaN where both clouds have some.
    Ties go to one neighbour, the same one in every run. First derivatives only, to both arguments.
    Raises ValueError for a wrong shape, an empty cloud or an unknown reduction, TypeError for a wrong dtype.
    """
    _check(x, y)
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction={reduction!r}: accepted are 'sum' and 'mean'")
    sums = _chamfer(x, y)[0]
    if reduction == "mean":
        return sums[:, 0] / x.shape[1] + sums[:, 1] / y.shape[1]
    return sums.sum(1)


def _check(x: Tensor, y: Tensor) -> None:
    for name, cloud in (("x", x), ("y", y)):
        if cloud.dim() != 3 or cloud.shape[2] != 3 or cloud.shape[1] == 0:
            raise ValueError(f"{name} has shape {list(cloud.shape)}: accepted is [B, points, 3], points > 0")
        if not cloud.is_floating_point():
            raise TypeError(f"{name} is {cloud.dtype}: accepted are fp16, bf16, fp32 and fp64")
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"{x.shape[0]} clouds against {y.shape[0]}: x and y must hold the same number")
    if x.dtype != y.dtype or x.device != y.device:
        raise TypeError(
            f"x is {x.dtype} on {x.device}, y is {y.dtype} on {y.device}: accepted is one dtype on one device"
        )


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# Definition, CPU path and test oracle.


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance [B, N] to, int32 index [B, N] of the point of y [B, M, 3] nearest to x [B, N, 3]."""
    points = y.shape[1]
    size = min(max(1, points // _LANES), _GROUP)
    groups = -(-points // size)
    # Whole groups let the minimum run in two vectorised levels; the last point repeated changes no minimum.
    whole = torch.arange(groups * size, device=y.device).clamp_(max=points - 1)
    others = y.transpose(1, 2)[:, :, whole].contiguous()
    distance = x.new_empty(x.shape[:2])
    index = torch.empty(x.shape[:2], dtype=torch.int32, device=x.device)
    rows = max(1, _TILE // whole.numel())
    square, difference = x.new_empty(2, rows, whole.numel()).unbind()
    for cloud, other, best, at in zip(x, others, distance, index, strict=True):
        for start in range(0, x.shape[1], rows):
            part = cloud[start : start + rows]
            count = len(part)
            _squares(part, other, square[:count], difference[:count])
            lanes = square[:count].view(count, size, groups)
            lane = lanes.amin(1).argmin(1, keepdim=True)
            column = lanes.gather(2, lane[:, None].expand(-1, size, 1)).squeeze(2)
            value, group = column.min(1, keepdim=True)
            best[start : start + rows] = value[:, 0]
            at[start : start + rows] = (group * groups + lane)[:, 0].clamp_(max=points - 1)
    return distance, index


def reference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sums [B, 2] of the squared distances from x to y and from y to x, indices [B, N] and [B, M] int32)."""
    x, y = x.to(_accumulator(x)), y.to(_accumulator(y))
    to_y, index_x = nearest(x, y)
    to_x, index_y = nearest(y, x)
    return torch.stack([to_y.sum(1), to_x.sum(1)], 1), index_x, index_y


def _squares(part: Tensor, other: Tensor, out: Tensor, difference: Tensor) -> None:
    """|part_i - other_j|^2 of part [n, 3] and other [3, m] into `out` [n, m]; `difference` is scratch."""
    torch.sub(part[:, 0, None], other[0], out=difference)
    torch.mul(difference, difference, out=out)
    for axis in (1, 2):
        torch.sub(part[:, axis, None], other[axis], out=difference)
        out.addcmul_(difference, difference)


def reference_pull(
    toward: Tensor, back: Tensor, x: Tensor, y: Tensor, index_x: Tensor, index_y: Tensor
) -> Tensor:
    """Gradient at x of `toward` * sum_i |x_i - y_index_x[i]|^2 + `back` * sum_j |y_j - x_index_y[j]|^2.

    toward, back: [B]; x: [B, N, 3]; y: [B, M, 3]; index_x: [B, N]; index_y: [B, M]. Returns [B, N, 3].
    """
    to_x, to_y = (i.long()[:, :, None].expand(-1, -1, 3) for i in (index_x, index_y))
    wide = _accumulator(x)
    toward, back = (2 * g.to(wide)[:, None, None] for g in (toward, back))
    p, q = x.to(wide), y.to(wide)
    gradient = toward * (p - q.gather(1, to_x))
    return gradient.scatter_add_(1, to_y, back * (p.gather(1, to_y) - q)).to(x.dtype)


# The operators, opaque to the compiler; the tensors choose what runs.


@torch.library.custom_op("sivae_fast::chamfer", mutates_args=())
def _chamfer(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sums [B, 2] from x to y and from y to x, nearest indices [B, N] and [B, M] int32)."""
    if not runs_triton((x, y)):
        return reference(x, y)
    from . import _chamfer_triton

    return _chamfer_triton.forward(x, y)


@torch.library.custom_op("sivae_fast::chamfer_pull", mutates_args=())
def _pull(toward: Tensor, back: Tensor, x: Tensor, y: Tensor, index_x: Tensor, index_y: Tensor) -> Tensor:
    if not runs_triton((x, y)):
        return reference_pull(toward, back, x, y, index_x, index_y)
    from . import _chamfer_triton

    return _chamfer_triton.pull(toward, back, x, y, index_x, index_y)


@_chamfer.register_fake
def _(x, y):
    index = (x.new_empty(cloud.shape[:2], dtype=torch.int32) for cloud in (x, y))
    return x.new_empty((x.shape[0], 2), dtype=_accumulator(x)), *index


@_pull.register_fake
def _(toward, back, x, y, index_x, index_y):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])


def _backward(ctx, gradient, _index_x, _index_y):
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("chamfer has no second derivatives: leave out create_graph=True")
    x, y, index_x, index_y = ctx.saved_tensors
    to_y, to_x = gradient.unbind(1)
    at_x = _pull(to_y, to_x, x, y, index_x, index_y) if ctx.needs_input_grad[0] else None
    at_y = _pull(to_x, to_y, y, x, index_y, index_x) if ctx.needs_input_grad[1] else None
    return at_x, at_y


_chamfer.register_autograd(_backward, setup_context=_save)
