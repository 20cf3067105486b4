"""The losses in plain PyTorch: definition, CPU path, test oracle and bench baseline in one.

Every function takes any float dtype. It computes in float32, in float64 where an input is float64, and
returns that dtype where nothing else is said. Arguments are not checked here; the public functions beside
this file do that.

Per sample, summed over all of its elements:
    r  reconstruction error between target x and prediction y
    k  KL( N(mean, diag exp(logvar)) || prior )
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RECONSTRUCTIONS = ("sse", "l1", "huber", "bce", "bce_logits")


class Member(IntEnum):
    """What a phase makes of a source's u = a r + b k, with the weights p and q."""

    LINEAR = 0  # mean of u; its p and q must be 0
    EXPONENTIAL = 1  # mean of p exp(-q u)
    HINGE = 2  # mean of p max(q - u, 0)
    BATCH_HINGE = 3  # p max(q - mean of u, 0)


class Source(NamedTuple):
    """One batch of a phase: its reconstruction pair or its errors [B], its posterior, or several of them."""

    target: Tensor | None = None
    prediction: Tensor | None = None
    mean: Tensor | None = None
    logvar: Tensor | None = None
    error: Tensor | None = None


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def element_errors(target: Tensor, prediction: Tensor, kind: str, huber_delta: float = 1.0) -> Tensor:
    """Errors element by element, in the dtype of the arguments.

    Binary cross-entropies are NaN where the target, or the probability of "bce", leaves [0, 1].
    """
    if kind == "sse":
        return (prediction - target).square()
    if kind == "l1":
        return (prediction - target).abs()
    if kind == "huber":
        return F.huber_loss(prediction, target, reduction="none", delta=huber_delta)
    if kind == "bce":
        # logarithms are cut at -100, as in torch.nn.functional.binary_cross_entropy
        log_y, log_rest = prediction.log().clamp(min=-100), (-prediction).log1p().clamp(min=-100)
        errors = -(target * log_y + (1 - target) * log_rest)
    else:
        # Where both are equal, maximum has a slope of 1/2: with it the sum's is right at 0, too.
        positive = torch.maximum(prediction, prediction.new_zeros(()))
        errors = positive - prediction * target + prediction.abs().neg().exp().log1p()
    return inside_unit(target, errors)


def inside_unit(target: Tensor, value: Tensor) -> Tensor:
    """`value`, NaN where the target of a binary cross-entropy is no probability."""
    return value.where((target >= 0) & (target <= 1), torch.nan)


def reconstruction_error(
    target: Tensor, prediction: Tensor, kind: str = "sse", huber_delta: float = 1.0
) -> Tensor:
    """r [B] of target and prediction [B, ...]."""
    dtype = compute_dtype(target, prediction)
    errors = element_errors(target.to(dtype), prediction.to(dtype), kind, huber_delta)
    return errors.flatten(1).sum(1)


def clamp_logvar(logvar: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """Within the bounds, if any. Gradients pass on a bound; there torch.clamp's depend on its version."""
    if bounds is None:
        return logvar
    low, high = bounds
    return torch.where(logvar < low, low, torch.where(logvar > high, high, logvar))


def gaussian_kl(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | float = 0.0,
    prior_logvar: Tensor | float = 0.0,
    bounds: tuple[float, float] | None = None,
) -> Tensor:
    """k [B] of mean and logvar [B, ...]; the prior broadcasts against them.

    With t = logvar - prior_logvar:
    k = 1/2 sum( expm1(t) - t + (mean - prior_mean)^2 exp(-prior_logvar) )
    expm1(t) is exp(t) - 1 without the cancellation of these two near the prior: no term is negative.
    """
    dtype = compute_dtype(mean, logvar)
    logvar = clamp_logvar(logvar.to(dtype), bounds)
    prior_logvar = torch.as_tensor(prior_logvar, dtype=dtype, device=mean.device)
    ratio = logvar - prior_logvar
    distance = (mean.to(dtype) - prior_mean).square() * (-prior_logvar).exp()
    return 0.5 * (ratio.expm1() - ratio + distance).flatten(1).sum(1)


def reparameterize(
    mean: Tensor, logvar: Tensor, noise: Tensor, bounds: tuple[float, float] | None = None
) -> Tensor:
    """z = mean + exp(logvar / 2) noise, in the dtype of `mean`."""
    dtype = compute_dtype(mean, logvar)
    deviation = (0.5 * clamp_logvar(logvar.to(dtype), bounds)).exp()
    return (mean.to(dtype) + deviation * noise.to(dtype)).to(mean.dtype)


def member_value(member: Member, u: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(share of the loss, 0-dim; statistic per sample [B]) of one source.

    The exponent is never positive: a u below 0 counts as 0, with the slope of 0. Only rounding produces one,
    or errors from elsewhere that are negative; nothing overflows then.
    """
    if member == Member.EXPONENTIAL:
        statistic = (-q * (u + (-u).relu().detach())).exp()
        return p * statistic.mean(), statistic
    if member == Member.LINEAR:
        return u.mean(), torch.ones_like(u)
    statistic = (q - u).relu()
    if member == Member.HINGE:
        return p * statistic.mean(), statistic
    return p * (q - u.mean()).relu(), statistic


def phase(
    sources: Sequence[Source],
    members: Sequence[Member],
    weights: Tensor,
    reconstruction: str = "sse",
    huber_delta: float = 1.0,
    prior_std: float = 1.0,
    bounds: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, 0-dim; statistics [3, sources, B]: r, k and the member's statistic) of one phase.

    weights [4, sources] holds a, b, p, q of each source. r or k is 0 where a source has no such part.
    The member's statistic is exp(-q u), max(q - u, 0), or 1 for a linear source.
    """
    dtype = compute_dtype(*(tensor for source in sources for tensor in source))
    prior_logvar = 2 * torch.tensor(prior_std, dtype=torch.float64).log().to(dtype)
    shares, columns = [], []
    for source, member, row in zip(sources, members, weights.to(dtype).unbind(1), strict=True):
        a, b, p, q = row
        r, k = source.error, None
        if source.target is not None:
            r = reconstruction_error(source.target, source.prediction, reconstruction, huber_delta)
        if source.mean is not None:
            k = gaussian_kl(source.mean, source.logvar, 0.0, prior_logvar.to(row.device), bounds)
        r = torch.zeros_like(k) if r is None else r.to(dtype)
        k = torch.zeros_like(r) if k is None else k.to(dtype)
        share, statistic = member_value(member, a * r + b * k, p, q)
        shares.append(share)
        columns.append(torch.stack([r, k, statistic]).detach())
    return torch.stack(shares).sum(), torch.stack(columns, dim=1)
