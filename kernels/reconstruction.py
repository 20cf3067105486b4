"""Reconstruction errors, one number a sample."""

from __future__ import annotations

import math

from torch import Tensor

from . import closed_form, reference
from ._batch import Formula, channels_last, image_like, image_rows
from ._checks import check_tensors, positive
from ._launch import runs_triton
from ._operator import FusedOperator


def reconstruction_error(
    target: Tensor, prediction: Tensor, kind: str = "sse", huber_delta: float = 1.0
) -> Tensor:
    """Errors [B] between target and prediction [B, ...], summed over each sample's elements.

    With d = prediction - target:
        "sse"         d^2
        "l1"          |d|
        "huber"       d^2 / 2 where |d| <= huber_delta, else huber_delta (|d| - huber_delta / 2)
        "bce"         binary cross-entropy of a probability, logarithms cut at -100
        "bce_logits"  binary cross-entropy of a logit

    Any float dtypes, also two different ones; computed and returned in float32 (float64 for float64).
    Gradients to both arguments, in their dtypes. A target outside [0, 1] makes a cross-entropy NaN.
    Raises ValueError or TypeError for arguments that do not fit together.
    """
    if kind not in reference.RECONSTRUCTIONS:
        raise ValueError(f"kind is {kind!r}, must be one of {', '.join(reference.RECONSTRUCTIONS)}")
    huber_delta = positive("huber_delta", huber_delta)
    check_tensors([(target, "target", ""), (prediction, "prediction", "")])
    return _ERROR((target, prediction), (), (0,), (huber_delta,), kind)[0]


def _forward(tensors, constants, plan, numbers, kind) -> list[Tensor]:
    target, prediction = image_rows(tensors)
    if runs_triton(tensors):
        from . import _parts_triton

        return [_parts_triton.errors(target, prediction, kind, *numbers)]
    return [closed_form.pair_errors(target, prediction, _formula(kind, numbers))]


def _fake(tensors, constants, plan, numbers, kind) -> list[Tensor]:
    return [tensors[0].new_empty(tensors[0].shape[0], dtype=reference.compute_dtype(*tensors))]


def _backward(upstream, tensors, constants, outputs, needs, plan, numbers, kind) -> list[Tensor]:
    pair = image_rows(tensors)
    if runs_triton(tensors):
        from . import _parts_triton

        gradients = _parts_triton.error_gradients(*pair, upstream[0], needs[1:], kind, *numbers)
    else:
        gradients = closed_form.pair_gradients(*pair, upstream[0], needs[1:], _formula(kind, numbers))
    return _shaped(gradients, tensors, needs)


def _backward_fake(upstream, tensors, constants, outputs, needs, plan, numbers, kind) -> list[Tensor]:
    gradients = [row.new_empty(row.shape) for row in image_rows(tensors)]
    return _shaped(gradients, tensors, needs)


def _shaped(gradients, tensors, needs) -> list[Tensor]:
    last = channels_last(tensors)
    wanted = zip(gradients, tensors, needs[1:], strict=True)
    return [image_like(gradient, tensor, last) for gradient, tensor, needed in wanted if needed]


def _formula(kind: str, numbers) -> Formula:
    return Formula.of(kind, numbers[0], 1.0, -math.inf, math.inf)


_ERROR = FusedOperator(
    "reconstruction_error",
    forward=_forward,
    fake=_fake,
    backward=_backward,
    backward_fake=_backward_fake,
)
