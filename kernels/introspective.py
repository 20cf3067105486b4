"""One phase of an introspective VAE: every reconstruction error, every KL and the loss made of them.

On the CPU `phase` runs `closed_form`, on a GPU two Triton launches (`_phase_triton`). Beside inputs and
statistics the second holds two numbers a sample and source between forward and backward, the first nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import closed_form
from ._batch import Batch, Formula, channels_last, image_like, image_rows, pack, rows
from ._checks import check_sources
from ._launch import runs_triton
from ._operator import FusedOperator, refuse_second_derivative, refuse_transform
from .reference import Source, compute_dtype

_UNBOUNDED = (float("-inf"), float("inf"))


def phase(
    sources: Sequence[Source],
    members: Sequence[int],
    weights: Tensor,
    reconstruction: str = "sse",
    huber_delta: float = 1.0,
    prior_std: float = 1.0,
    bounds: tuple[float, float] | None = None,
    names: Sequence[str] | None = None,
    single_launch: bool = False,
) -> tuple[Tensor, Tensor]:
    """(loss, 0-dim; statistics [3, sources, B]: r, k and the member's statistic) of one phase.

    As `reference.phase`, differentiable once by every tensor of every source; the statistics are not.
    weights: float [4, sources] on the sources' device. `names` are used in error messages.
    single_launch: read every input once and write the gradients in the forward pass, where that is possible
        (a GPU, float32 and bfloat16, samples that fit on the device, no hinge of a batch mean, outside
        torch.compile); elsewhere the two launches are used. One backward pass only, and only a loss whose
        upstream gradient is 1 gains from it.
    Raises ValueError and TypeError for sources that do not fit together, before anything runs.
    """
    check_sources(sources, names or [f"source {i}" for i in range(len(sources))])
    if weights.shape != (4, len(sources)):
        raise ValueError(f"weights has shape {list(weights.shape)}, must be [4, {len(sources)}]")
    weights = weights.contiguous()  # kernels read it as rows
    images, means, logvars, errors, layout = pack(sources, members)
    plan = (len(images), len(means), *layout)
    numbers = (huber_delta, prior_std, *(bounds or _UNBOUNDED))
    tensors = (*images, *means, *logvars, *errors)
    if single_launch and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        output = _single(tensors, weights, plan, numbers, reconstruction)
        if output is not None:
            return output
    output = _PHASE(tensors, (weights,), plan, numbers, reconstruction)
    return output[0], output[1]


def _forward(tensors, constants, plan, numbers, kind) -> list[Tensor]:
    batch = _batch(tensors, plan)
    return [*_backend(tensors).reduce(batch, constants[0], Formula.of(kind, *numbers))]


def _fake(tensors, constants, plan, numbers, kind) -> list[Tensor]:
    samples, sources = tensors[0].shape[0], (len(plan) - 2) // 5
    shapes = [(), (3, sources, samples)]
    if runs_triton(tensors):
        shapes.append((2, sources, samples))
    return [tensors[0].new_empty(shape, dtype=compute_dtype(*tensors)) for shape in shapes]


def _backward(upstream, tensors, constants, outputs, needs, plan, numbers, kind) -> list[Tensor]:
    batch, rest = _batch(tensors, plan), (upstream[0], needs[1:], Formula.of(kind, *numbers))
    statistics, *coefficients = outputs
    if coefficients:
        gradients = _backend(tensors).apply(batch, *coefficients, *rest)
    else:
        gradients = closed_form.apply(batch, statistics, *constants, *rest)
    return _shaped(gradients, tensors, needs[1:], plan)


def _backward_fake(upstream, tensors, constants, outputs, needs, plan, numbers, kind) -> list[Tensor]:
    like = _batch(tensors, plan).tensors
    gradients = [row.new_empty(row.shape) for row, needed in zip(like, needs[1:], strict=True) if needed]
    return _shaped(gradients, tensors, needs[1:], plan)


_PHASE = FusedOperator(
    "phase", forward=_forward, fake=_fake, backward=_backward, backward_fake=_backward_fake
)


def _batch(tensors: Sequence[Tensor], plan: Sequence[int]) -> Batch:
    images, means, *layout = plan
    logvars, errors = images + means, images + 2 * means
    return Batch(
        image_rows(tensors[:images]),
        [rows(mean) for mean in tensors[images:logvars]],
        [rows(logvar) for logvar in tensors[logvars:errors]],
        [*tensors[errors:]],
        tuple(layout),
    )


def _backend(tensors: Sequence[Tensor]):
    if runs_triton(tensors):
        from . import _phase_triton

        return _phase_triton
    return closed_form


def _shaped(
    gradients: Sequence[Tensor], tensors: Sequence[Tensor], needs: Sequence[bool], plan: Sequence[int]
) -> list[Tensor]:
    """Rows of gradients in the shapes of the tensors they belong to."""
    images, last = plan[0], channels_last(tensors[: plan[0]])
    wanted = [(i < images and last, tensor) for i, tensor in enumerate(tensors) if needs[i]]
    return [image_like(row, tensor, last) for row, (last, tensor) in zip(gradients, wanted, strict=True)]


def _single(tensors, weights, plan, numbers, kind) -> tuple[Tensor, Tensor] | None:
    """(loss, statistics) by the single launch; None where it does not apply."""
    if not runs_triton(tensors) or torch._C._are_functorch_transforms_active():
        return None
    from . import _single_triton

    if not _single_triton.fits(_batch(tensors, plan), Formula.of(kind, *numbers)):
        return None
    return _SingleLaunch.apply(weights, plan, numbers, kind, *tensors)


class _SingleLaunch(torch.autograd.Function):
    """Gradients made in the forward pass, scaled by the upstream gradient and handed out once."""

    @staticmethod
    def forward(ctx, weights, plan, numbers, kind, *tensors):
        from . import _single_triton

        batch, needs = _batch(tensors, plan), ctx.needs_input_grad[4:]
        loss, statistics, gradients = _single_triton.value_and_gradients(
            batch, weights, needs, Formula.of(kind, *numbers)
        )
        ctx.rows = [gradient for gradient in gradients if gradient is not None]
        shaped = iter(_shaped(ctx.rows, tensors, needs, plan))
        ctx.gradients = [next(shaped) if needed else None for needed in needs]
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return loss, statistics

    @staticmethod
    def jvp(ctx, *_):
        refuse_transform()

    @staticmethod
    def backward(ctx, upstream, _):
        from . import _single_triton

        if torch.is_grad_enabled():
            refuse_second_derivative()
        if upstream is None:
            return (None,) * (4 + len(ctx.gradients))
        if ctx.rows is None:
            raise RuntimeError("single_launch=True allows one backward pass: its gradients were handed out")
        _single_triton.scale_(ctx.rows, upstream)
        gradients, ctx.rows, ctx.gradients = ctx.gradients, None, [None] * len(ctx.gradients)
        return None, None, None, None, *gradients
