"""One phase of an introspective VAE: every reconstruction error, every KL and the loss made of them.

On the CPU `phase` runs `closed_form`, on a GPU two Triton launches (`_phase_triton`). Both hold two numbers
a sample and source between forward and backward, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import closed_form
from ._batch import Batch, Formula, channels_last, image_like, image_rows, pack, rows
from ._checks import check_sources
from ._launch import runs_triton
from ._operator import FusedOperator
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
) -> tuple[Tensor, Tensor]:
    """(loss, 0-dim; statistics [3, sources, B]: r, k and the member's statistic) of one phase.

    As `reference.phase`, differentiable once by every tensor of every source; the statistics are not.
    weights: float [4, sources] on the sources' device. `names` are used in error messages.
    Raises ValueError and TypeError for sources that do not fit together, before anything runs.
    """
    check_sources(sources, names or [f"source {i}" for i in range(len(sources))])
    images, means, logvars, errors, layout = pack(sources, members)
    plan = (len(images), len(means), *layout)
    numbers = (huber_delta, prior_std, *(bounds or _UNBOUNDED))
    output = _PHASE((*images, *means, *logvars, *errors), (weights,), plan, numbers, reconstruction)
    return output[0], output[1]


def _forward(tensors, constants, plan, numbers, kind) -> list[Tensor]:
    batch = _batch(tensors, plan)
    return [*_backend(batch).reduce(batch, constants[0], Formula.of(kind, *numbers))]


def _fake(tensors, constants, plan, numbers, kind) -> list[Tensor]:
    samples, sources = len(tensors[0]), (len(plan) - 2) // 5
    shapes = (), (3, sources, samples), (2, sources, samples)
    return [tensors[0].new_empty(shape, dtype=compute_dtype(*tensors)) for shape in shapes]


def _backward(upstream, tensors, constants, outputs, needs, plan, numbers, kind) -> list[Tensor]:
    batch = _batch(tensors, plan)
    formula = Formula.of(kind, *numbers)
    gradients = _backend(batch).apply(batch, outputs[1], upstream[0], needs[1:], formula)
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


def _backend(batch: Batch):
    if runs_triton(batch.tensors):
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
