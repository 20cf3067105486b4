"""The style model's 1x1 convolutions between images and feature maps.

On a GPU kernels run them: `from_rgb` writes its map once, where a convolution, its bias and the leaky ReLU
write it three times and read it twice, and reads the gradient once. Elsewhere and for fp64 they are
PyTorch's convolutions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _maps
from ._launch import runs_triton
from ._operator import FusedOperator

#: More of them make an ordinary convolution, which PyTorch is good at.
MOST_COLORS = 15


def from_rgb(x: Tensor, weight: Tensor, bias: Tensor, slope: float = 1.0) -> Tensor:
    """leaky_relu(conv(x) + bias) of images x [B, K, H, W]: features [B, C, H, W].

    weight: [C, K, 1, 1]. bias: [C]. Under autocast the result has its dtype, else that of x; products are
    taken in that dtype and summed in fp32. On a GPU first derivatives only, except for fp64.
    Raises ValueError for shapes that do not fit together.
    """
    _check(x, weight, bias)
    if not _fits(x.shape[1], x, weight, bias):
        return F.leaky_relu_(F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype)), slope)
    kind = str(_dtype(x)).removeprefix("torch.")
    return _FROM([x, *_parameters(weight, bias)], [], [], (slope,), kind)[0]


def to_rgb(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """conv(x) + bias of features x [B, C, H, W]: images [B, K, H, W].

    weight: [K, C, 1, 1]. bias: [K]. Otherwise as `from_rgb`.
    """
    _check(x, weight, bias)
    if not _fits(len(weight), x, weight, bias):
        return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype))
    return _TO([x.to(_dtype(x)), *_parameters(weight, bias)], [], [], ())[0]


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.dim() != 4 or weight.shape[1:] != (x.shape[1], 1, 1) or bias.shape != weight.shape[:1]:
        shapes = [list(tensor.shape) for tensor in (x, weight, bias)]
        raise ValueError(
            "x, weight and bias have shapes {}, {} and {}: accepted are [B, I, H, W], [O, I, 1, 1] and "
            "[O]".format(*shapes)
        )


def _fits(colors: int, *tensors: Tensor) -> bool:
    return colors <= MOST_COLORS and tensors[0].numel() > 0 and runs_triton(tensors)


def _parameters(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As [O, I] and [O], views: of leaves a backward pass cannot tell whether it wants their gradients."""
    return weight.flatten(1), bias.view_as(bias).contiguous()


def _dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# from_rgb: weight as [C, K].


def _from_forward(tensors, constants, plan, numbers, kind) -> list[Tensor]:
    from . import _rgb_triton

    x, weight, bias = tensors
    features = _from_fake(tensors, constants, plan, numbers, kind)
    return [_rgb_triton.widen(x, weight.t(), bias, *numbers, *features)]


def _from_fake(tensors, constants, plan, numbers, kind) -> list[Tensor]:
    return [_maps.like(tensors[0], len(tensors[1]), getattr(torch, kind))]


def _from_backward(upstream, tensors, constants, outputs, needs, plan, numbers, kind) -> list[Tensor]:
    from . import _rgb_triton

    (by_features,), (x, weight, bias) = upstream, tensors
    by_color, leaky, found = weight.t(), (bias, *numbers), []
    if needs[1]:
        found.append(_rgb_triton.narrow(by_features, by_color, None, _maps.like(x), x, leaky))
    if needs[2] or needs[3]:
        sums = _rgb_triton.shares(by_features, x, by_color, leaky)
        if needs[2]:
            found.append(sums[:, :-1].to(weight.dtype))
        if needs[3]:
            found.append(sums[:, -1].to(bias.dtype))
    return found


def _from_backward_fake(upstream, tensors, constants, outputs, needs, plan, numbers, kind) -> list[Tensor]:
    x, *rest = tensors
    found = [_maps.like(x), *(tensor.new_empty(tensor.shape) for tensor in rest)]
    return [gradient for gradient, needed in zip(found, needs[1:], strict=True) if needed]


_FROM = FusedOperator(
    "from_rgb",
    forward=_from_forward,
    fake=_from_fake,
    backward=_from_backward,
    backward_fake=_from_backward_fake,
)


# to_rgb: weight as [K, C].


def _to_forward(tensors, constants, plan, numbers, kind) -> list[Tensor]:
    from . import _rgb_triton

    x, weight, bias = tensors
    (image,) = _to_fake(tensors, constants, plan, numbers, kind)
    return [_rgb_triton.narrow(x, weight, bias, image)]


def _to_fake(tensors, constants, plan, numbers, kind) -> list[Tensor]:
    return [_maps.like(tensors[0], len(tensors[1]))]


def _to_backward(upstream, tensors, constants, outputs, needs, plan, numbers, kind) -> list[Tensor]:
    from . import _rgb_triton

    (by_image,), (x, weight, bias) = upstream, tensors
    found = []
    if needs[1]:
        found.append(_rgb_triton.widen(by_image, weight, None, 1.0, _maps.like(x)))
    if needs[2]:
        sums = _rgb_triton.shares(x, by_image)
        found.append(sums[:, :-1].t().to(weight.dtype))
    if needs[3]:
        found.append(by_image.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype))
    return found


_TO = FusedOperator(
    "to_rgb",
    forward=_to_forward,
    fake=_to_fake,
    backward=_to_backward,
    backward_fake=_from_backward_fake,
)
