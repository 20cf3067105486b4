"""One phase of an introspective VAE: every reconstruction error, every KL and the loss made of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import reference
from .reference import Member, Source


def phase(
    sources: Sequence[Source],
    members: Sequence[Member],
    weights: Tensor,
    reconstruction: str = "sse",
    huber_delta: float = 1.0,
    prior_std: float = 1.0,
    bounds: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    return reference.phase(sources, members, weights, reconstruction, huber_delta, prior_std, bounds)
