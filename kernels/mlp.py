"""Small fully connected networks: ReLU layers of one width between a few inputs and a few outputs.

On a GPU one launch goes through all layers forward, one backward, one more for the gradients of weights;
elsewhere they are PyTorch's layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._launch import runs_triton
from ._operator import FusedOperator

#: Numbers of a row that a program holds, at a layer and at the edges of the network.
MOST_WIDTH, MOST_EDGE = 256, 16
#: With more rows the products take longer than launches: they are left to PyTorch.
MOST_ROWS = 4096


def mlp(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """y [n, outputs] of rows x [n, inputs] through ReLU layers and a linear one, in the dtype of x.

    weights: [width, inputs], any number of [width, width], [outputs, width]. biases: a number a row of them.
    dtype: of the values between hidden layers; products there are of this dtype, all others of that of x.
    On a GPU first derivatives only, except for fp64.
    """
    if not _fits(x, weights, biases, dtype):
        return reference(x, weights, biases, dtype)
    # Views: of leaves a backward pass cannot tell whether it wants their gradients.
    parameters = [tensor.view_as(tensor).contiguous() for tensor in (*weights, *biases)]
    kind = str(dtype).removeprefix("torch.")
    return _MLP([x, *parameters], [], [len(weights)], (), kind)[0]


def reference(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """As `mlp`, in plain PyTorch."""
    (first, *hidden, last), (first_bias, *hidden_biases, last_bias) = weights, biases
    y = F.relu(F.linear(x, first, first_bias)).to(dtype)
    for weight, bias in zip(hidden, hidden_biases, strict=True):
        y = F.relu(F.linear(y, weight.to(dtype), bias.to(dtype)))
    return F.linear(y.to(x.dtype), last, last_bias)


def _fits(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype) -> bool:
    width, inputs = weights[0].shape
    return (
        runs_triton((x,))
        and {x.dtype, *(tensor.dtype for tensor in (*weights, *biases))} == {torch.float32}
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
        and width <= MOST_WIDTH
        and max(inputs, len(weights[-1])) <= MOST_EDGE
        and 0 < len(x) <= MOST_ROWS
    )


def _parts(tensors: Sequence[Tensor], plan: Sequence[int]):
    layers = plan[0]
    return tensors[0], tensors[1 : 1 + layers], tensors[1 + layers :]


def _forward(tensors, constants, plan, numbers, kind) -> list[Tensor]:
    from . import _mlp_triton

    return _mlp_triton.forward(*_parts(tensors, plan), getattr(torch, kind))


def _fake(tensors, constants, plan, numbers, kind) -> list[Tensor]:
    x, weights, _ = _parts(tensors, plan)
    hidden = x.new_empty(len(weights) - 1, len(x), len(weights[0]), dtype=getattr(torch, kind))
    return [x.new_empty(len(x), len(weights[-1])), hidden]


def _backward(upstream, tensors, constants, outputs, needs, plan, numbers, kind) -> list[Tensor]:
    from . import _mlp_triton

    x, weights, _ = _parts(tensors, plan)
    by_x, by_weights, by_biases = _mlp_triton.backward(
        *upstream, x, weights, *outputs, needs[1], any(needs[2:])
    )
    found = [by_x, *(by_weights or [None] * len(weights)), *(by_biases or [None] * len(weights))]
    return [gradient for gradient, needed in zip(found, needs[1:], strict=True) if needed]


def _backward_fake(upstream, tensors, constants, outputs, needs, plan, numbers, kind) -> list[Tensor]:
    wanted = zip(tensors, needs[1:], strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, needed in wanted if needed]


_MLP = FusedOperator("mlp", forward=_forward, fake=_fake, backward=_backward, backward_fake=_backward_fake)
