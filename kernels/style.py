"""The pointwise chain of the style model's two networks: noise, bias, leaky ReLU, instance norm, modulation.

On a GPU the kernels of `_style_triton` run, at two reads and one write of a map; elsewhere, for fp64 and
without Triton the definition below, which autograd differentiates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _maps
from ._launch import runs_triton
from ._operator import FusedOperator

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fuses(x: Tensor) -> bool:
    """Whether the chain after `x` runs as kernels, which add a bias and noise for no further bytes."""
    return runs_triton((x,))


def activate_normalize(
    x: Tensor,
    *,
    eps: float,
    bias: Tensor | None = None,
    noise: Tensor | None = None,
    weight: Tensor | None = None,
    style: Tensor | None = None,
    slope: float = 0.2,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, variance, mean) of a map x [B, C, H, W].

    h = leaky_relu(x + bias + weight noise)
    y = (h - mean) / sqrt(variance + eps) (1 + style[:, :C]) + style[:, C:]

    variance (biased) and mean: of each channel of each sample of h, [B, C] fp32 (fp64 for fp64), with
    gradients. y: in the dtype of x. Sums run in fp32 or wider and do not lose a small variance about a large
    mean. x: channels-last or contiguous; other layouts are copied.
    bias, weight: [C] or [1, C, 1, 1]. noise: [B or 1, 1, H, W], without a gradient, together with `weight`.
    style: [B, 2C], scales and then shifts; x may then be one sample for all of them.
    Any of bias, noise with weight, and style may be missing.
    inplace: x may be overwritten where that saves memory. It must then not be a leaf.
    On a GPU first derivatives only, except for fp64.
    Raises ValueError or TypeError for arguments that do not fit together.
    """
    bias, weight = (None if t is None else t.reshape(-1).contiguous() for t in (bias, weight))
    _check(x, bias, noise, weight, style, eps, slope)
    present = [t for t in (weight, bias, style) if t is not None]
    if not runs_triton((x, *present)):
        return reference(x, bias, noise, weight, style, eps, slope, inplace)
    if style is not None and len(x) < len(style):
        x = x.expand(len(style), -1, -1, -1)
    plan = [int(t is not None) for t in (weight, bias, style)]
    return tuple(_STYLE([x, *present], [] if noise is None else [noise], plan, (eps, slope))[:3])


def _check(x, bias, noise, weight, style, eps, slope) -> None:
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"x has shape {list(x.shape)}: accepted is [B, C, H, W] with no dimension of 0")
    if x.dtype not in _FLOATS:
        raise TypeError(f"x is {x.dtype}: accepted are float16, bfloat16, float32 and float64")
    if (noise is None) != (weight is None):
        raise ValueError("noise and weight: give both or none of them")
    b, c, h, w = x.shape
    if b == 1 and style is not None:
        b = len(style)
    accepted = {
        "bias": (bias, [(c,)]),
        "weight": (weight, [(c,)]),
        "noise": (noise, [(b, 1, h, w), (1, 1, h, w)]),
        "style": (style, [(b, 2 * c)]),
    }
    for name, (tensor, shapes) in accepted.items():
        if tensor is None:
            continue
        if tensor.shape not in shapes:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)} beside x {list(x.shape)}: accepted is "
                + " or ".join(str(list(shape)) for shape in shapes)
            )
        if tensor.dtype not in _FLOATS or tensor.device != x.device:
            raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}: must be a float on {x.device}")
    if noise is not None and noise.requires_grad:
        raise ValueError("noise requires a gradient: it has none here")
    if not (math.isfinite(eps) and eps > 0 and math.isfinite(slope)):
        raise ValueError(f"eps is {eps} and slope {slope}: eps must be positive, both finite")


# Definition, CPU path and test oracle.


class Moments(torch.autograd.Function):
    """Biased variance and mean of every channel of every sample: [B, C, H, W] -> twice [B, C, 1, 1].

    They are fp32 or wider. Saves nothing but `x` in its own dtype and goes over it once in the backward pass.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if x.is_cuda:
            variance, mean = torch.var_mean(wide, dim=(2, 3), correction=0, keepdim=True)
        else:  # var_mean is not vectorised there: ten times slower than two passes
            mean = wide.mean(dim=(2, 3), keepdim=True)
            variance = (wide - mean).square_().mean(dim=(2, 3), keepdim=True)
        ctx.save_for_backward(x, mean)
        return variance, mean

    @staticmethod
    def backward(ctx, grad_variance: Tensor, grad_mean: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        pixels = x.shape[2] * x.shape[3]
        slope = grad_variance * (2 / pixels)
        return torch.addcmul(grad_mean / pixels - slope * mean, x, slope).to(x.dtype)


def reference(
    x: Tensor, bias, noise, weight, style, eps: float, slope: float, inplace: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As `activate_normalize`, in plain PyTorch; bias and weight [C]."""
    mine = inplace
    for factor, summand in ((weight, noise), (bias, None)):
        if factor is not None:
            factor, mine = factor.to(x.dtype)[:, None, None], True
            x = x + factor if summand is None else torch.addcmul(x, factor, summand.to(x.dtype))
    h = F.leaky_relu_(x, slope) if mine else F.leaky_relu(x, slope)
    variance, mean = Moments.apply(h)
    scale = (variance + eps).rsqrt()
    if style is None:
        base = -mean * scale
    else:
        factor, shift = style[:, :, None, None].chunk(2, dim=1)
        scale = (1 + factor) * scale
        base = shift - mean * scale
    y = torch.addcmul(base, h, scale).to(h.dtype)
    variance, mean = variance.flatten(1), mean.flatten(1)
    if len(h) < len(y):
        variance, mean = variance.expand(len(y), -1), mean.expand(len(y), -1)
    return y, variance, mean


# The operator, opaque to the compiler.


def _parts(tensors: Sequence[Tensor], constants: Sequence[Tensor], plan: Sequence[int]):
    """(x, noise, weight, bias, style), None where absent."""
    rest = iter(tensors[1:])
    weight, bias, style = (next(rest) if present else None for present in plan)
    return tensors[0], constants[0] if constants else None, weight, bias, style


def _forward(tensors, constants, plan, numbers, kind) -> list[Tensor]:
    from . import _style_triton

    return _style_triton.forward(*_parts(tensors, constants, plan), *numbers)


def _fake(tensors, constants, plan, numbers, kind) -> list[Tensor]:
    x = tensors[0]
    new = lambda *shape: x.new_empty(shape, dtype=torch.float32)
    return [_maps.like(x), *(new(*x.shape[:2]) for _ in range(2)), new(2, *x.shape[:2])]


def _backward(upstream, tensors, constants, outputs, needs, plan, numbers, kind) -> list[Tensor]:
    from . import _style_triton

    given = iter(upstream)
    by = [next(given) if there else None for there in needs[:3]]
    wanted = iter(needs[4:])
    needed = [needs[3], *(next(wanted) if present else False for present in plan)]
    parts = _parts(tensors, constants, plan)
    found = _style_triton.backward(*by, *parts, outputs[0], numbers[1], needed)
    return [gradient for gradient in found if gradient is not None]


def _backward_fake(upstream, tensors, constants, outputs, needs, plan, numbers, kind) -> list[Tensor]:
    gradients = [_maps.like(tensors[0]), *(t.new_empty(t.shape) for t in tensors[1:])]
    return [gradient for gradient, needed in zip(gradients, needs[3:], strict=True) if needed]


_STYLE = FusedOperator(
    "style_chain",
    forward=_forward,
    fake=_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    differentiable=3,
)
