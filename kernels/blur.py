"""The style model's blur: every channel convolved with [1, 2, 1] x [1, 2, 1] / 16, zeros outside.

On a GPU a kernel runs it, at one read and one write of a map each way; elsewhere and for fp64 it is PyTorch's
convolution of each channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _maps
from ._launch import runs_triton
from ._operator import FusedOperator


def blur_weight(channels: int, gain: float = 1.0) -> Tensor:
    """The convolution's weight, [channels, 1, 3, 3] fp32."""
    row = torch.tensor([0.25, 0.5, 0.25])
    return gain * torch.outer(row, row).repeat(channels, 1, 1, 1)


def blur(x: Tensor, gain: float = 1.0) -> Tensor:
    """Maps `x` [B, C, H, W] blurred, times `gain`, in the dtype of `x`.

    x: channels-last or contiguous; other layouts are copied.
    On a GPU first derivatives only, except for fp64.
    Raises ValueError for another number of dimensions and TypeError for a dtype that is no float.
    """
    if x.dim() != 4:
        raise ValueError(f"x has shape {list(x.shape)}: accepted is [B, C, H, W]")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}: accepted are float16, bfloat16, float32 and float64")
    if runs_triton((x,)) and x.numel():
        return _BLUR([x], [], [int(_maps.is_last(x))], (gain,))[0]
    return F.conv2d(x, blur_weight(x.shape[1], gain).to(x), padding=1, groups=x.shape[1])


def _forward(tensors, constants, plan, numbers, kind) -> list[Tensor]:
    from . import _blur_triton

    return [_blur_triton.blur(tensors[0], *numbers)]


def _fake(tensors, constants, plan, numbers, kind) -> list[Tensor]:
    return [_maps.like(tensors[0])]


def _backward(upstream, tensors, constants, outputs, needs, plan, numbers, kind) -> list[Tensor]:
    by_y = upstream[0].contiguous(memory_format=_maps.memory_format(bool(plan[0])))
    return _forward([by_y], constants, plan, numbers, kind)  # the weight is symmetric


def _backward_fake(upstream, tensors, constants, outputs, needs, plan, numbers, kind) -> list[Tensor]:
    (by_y,) = upstream
    return [torch.empty_like(by_y, memory_format=_maps.memory_format(bool(plan[0])))]


_BLUR = FusedOperator(
    "blur",
    forward=_forward,
    fake=_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    keeps_tensors=False,
)
