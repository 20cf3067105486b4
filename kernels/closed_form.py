"""A phase on the CPU, and wherever Triton cannot go: no graph, gradients by their formulas.

Equal to `reference.phase` and its gradients in fewer operations and passes, with temporaries that fit a
cache. `reduce` and `apply` are also the names of the two launches of `_phase_triton`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._batch import Batch, Formula
from .reference import Member, compute_dtype, element_errors, inside_unit

_LARGE = 1 << 16  # elements of a row from which on rows are worked on one by one
_SMALL = 1 << 14  # elements of a batch up to which all pairs are worked on together: calls are what costs
_HUGE = torch.finfo(torch.float32).max
_EVEN = ("sse", "l1", "huber")  # even functions of the difference


def reduce(batch: Batch, weights: Tensor, formula: Formula) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, 0-dim; statistics [3, sources, B]; coefficients [2, sources, B]) of a phase.

    coefficients: derivatives of the loss by r and by k of each source and sample.
    """
    tensors, sources = batch.tensors, batch.sources
    dtype, samples = compute_dtype(*tensors), len(tensors[0])
    statistics = torch.empty(3, len(sources), samples, dtype=dtype, device=tensors[0].device)
    parts = statistics[:2]
    _fill_errors(batch, formula, parts[0])
    _fill_kls(batch, formula, parts[1])
    table = weights.to(dtype)[:, :, None]
    ab = table[:2]
    members = [source[0] for source in sources]
    loss, slope = _members(members, (parts * ab).sum(0), table[2], table[3], statistics[2])
    return loss, statistics, ab * slope


def apply(
    batch: Batch, coefficients: Tensor, upstream: Tensor, needs: Sequence[bool], formula: Formula
) -> list[Tensor]:
    """Gradients of those tensors of `batch.tensors` that `needs` marks, as rows in each tensor's dtype.

    upstream: gradient by the loss, 0-dim, or one number a sample [B].
    """
    slopes = (coefficients * upstream.to(coefficients.dtype))[..., None].flatten(0, 1).unbind()
    sources = len(batch.sources)
    gradients: list[Tensor | None] = [None] * len(needs)
    means = len(batch.images)
    logvars, errors = means + len(batch.means), means + 2 * len(batch.means)
    for s, (_, target, prediction, posterior, error) in enumerate(batch.sources):
        by_r, by_k = slopes[s], slopes[sources + s]
        if target >= 0:
            _add_pair(gradients, needs, batch.images, (target, prediction), by_r, formula)
        if posterior >= 0 and needs[means + posterior]:
            gradients[means + posterior] = _mean_gradient(batch.means[posterior], by_k, formula)
        if posterior >= 0 and needs[logvars + posterior]:
            gradients[logvars + posterior] = _logvar_gradient(batch.logvars[posterior], by_k, formula)
        if error >= 0 and needs[errors + error]:
            gradients[errors + error] = by_r[:, 0].clone()
    return [_as(t.dtype, g) for g, t, needed in zip(gradients, batch.tensors, needs, strict=True) if needed]


def _fill_errors(batch: Batch, formula: Formula, r: Tensor) -> None:
    """r [sources, B] of every source, 0 where it has none; small batches of images all together."""
    images = [_as(r.dtype, image) for image in batch.images] if _small(batch) else []
    if images and all(source[1] >= 0 for source in batch.sources):
        x = torch.stack([images[source[1]] for source in batch.sources])
        y = torch.stack([images[source[2]] for source in batch.sources])
        torch.sum(_element_errors(x, y, formula), 2, out=r)
        return
    for row, (_, target, prediction, _, error) in zip(r, batch.sources, strict=True):
        if target >= 0:
            row.copy_(pair_errors(batch.images[target], batch.images[prediction], formula, r.dtype))
        elif error >= 0:
            row.copy_(batch.errors[error])
        else:
            row.zero_()


def pair_errors(x: Tensor, y: Tensor, formula: Formula, dtype: torch.dtype | None = None) -> Tensor:
    """r [B] of rows, one at a time where they are long."""
    dtype = dtype or compute_dtype(x, y)
    if x.shape[1] < _LARGE:
        return _element_errors(_as(dtype, x), _as(dtype, y), formula).sum(1)
    pairs = zip(x, y, strict=True)
    return torch.stack([_element_errors(_as(dtype, a), _as(dtype, b), formula).sum() for a, b in pairs])


def pair_gradients(
    x: Tensor, y: Tensor, upstream: Tensor, needs: Sequence[bool], formula: Formula
) -> list[Tensor | None]:
    """Gradients of `pair_errors` by x and y, where needed; upstream [B]."""
    gradients: list[Tensor | None] = [None, None]
    by_r = upstream.to(compute_dtype(x, y))[:, None]
    _add_pair(gradients, needs, [x, y], (0, 1), by_r, formula)
    return [None if g is None else _as(t.dtype, g) for g, t in zip(gradients, (x, y), strict=True)]


def _element_errors(x: Tensor, y: Tensor, formula: Formula) -> Tensor:
    if formula.kind == "sse":
        return (y - x).square_()
    return element_errors(x, y, formula.kind, formula.delta)


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _fill_kls(batch: Batch, formula: Formula, k: Tensor) -> None:
    """k [sources, B] of every source, 0 where it has none; all posteriors together, for they are small."""
    if not batch.means:
        k.zero_()
        return
    mean = torch.stack([_as(k.dtype, mean) for mean in batch.means])
    ratio = _ratio(torch.stack([_as(k.dtype, logvar) for logvar in batch.logvars]), formula)
    terms = ratio.expm1().sub_(ratio).addcmul_(mean, mean, value=math.exp(-formula.prior_logvar))
    if len(batch.means) == len(k):
        torch.sum(terms, 2, out=k).mul_(0.5)
        return
    kls = terms.sum(2).mul_(0.5)
    for row, source in zip(k, batch.sources, strict=True):
        row.copy_(kls[source[3]]) if source[3] >= 0 else row.zero_()


def _small(batch: Batch) -> bool:
    return bool(batch.images) and batch.images[0].numel() < _SMALL


def _ratio(logvar: Tensor, formula: Formula) -> Tensor:
    """log(variance / variance of the prior)."""
    if formula.bounded:
        logvar = logvar.clamp(formula.low, formula.high)
    return logvar - formula.prior_logvar if formula.prior_logvar else logvar


def _members(
    members: Sequence[int], u: Tensor, p: Tensor, q: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss, 0-dim; its derivatives by u [sources, B]); fills `statistics` [sources, B]."""
    share = 1 / u.shape[1]
    if set(members) <= {Member.LINEAR, Member.EXPONENTIAL}:
        # p and q of a linear source are 0, so that one formula serves both
        linear = (q == 0).to(u.dtype)
        power = torch.exp(u.clamp(0, _HUGE).mul_(q).neg_(), out=statistics).mul(p)
        loss = torch.addcmul(power, linear, u).sum() * share
        return loss, torch.addcmul(linear, power, q, value=-1).mul_(share)
    rows = [
        _member(member, *row)
        for member, *row in zip(members, u.unbind(), p.unbind(), q.unbind(), statistics.unbind(), strict=True)
    ]
    shares, slopes = zip(*rows, strict=True)
    return torch.stack(shares).sum(), torch.stack(slopes) * share


def _member(member: int, u: Tensor, p: Tensor, q: Tensor, statistic: Tensor) -> tuple[Tensor, Tensor]:
    """(share of the loss, 0-dim; its derivatives by u [B], before the mean) of one source."""
    if member in (Member.LINEAR, Member.EXPONENTIAL):
        loss, slope = _members([member], u[None], p[None], q[None], statistic[None])
        return loss, slope[0] * len(u)
    torch.sub(q, u, out=statistic).relu_()
    if member == Member.BATCH_HINGE:
        u = u.mean().expand_as(u)
    return p[0] * (q - u).relu().mean(), torch.where(u < q, -p, 0.0)


def _add_pair(
    gradients: list[Tensor | None],
    needs: Sequence[bool],
    images: list[Tensor],
    places: tuple[int, int],
    by_r: Tensor,
    formula: Formula,
) -> None:
    """Adds the gradients of one pair to those of its two images; a shared image collects several."""
    target, prediction = places
    x, y = images[target], images[prediction]
    if needs[prediction]:
        to_prediction = _scaled(_prediction_slope, x, y, by_r, formula)
        known = gradients[prediction]
        gradients[prediction] = to_prediction if known is None else known.add_(to_prediction)
    if needs[target] and needs[prediction] and formula.kind in _EVEN:
        known = gradients[target]
        gradients[target] = to_prediction.neg() if known is None else known.sub_(to_prediction)
    elif needs[target]:
        to_target = _scaled(_target_slope, x, y, by_r, formula)
        known = gradients[target]
        gradients[target] = to_target if known is None else known.add_(to_target)


def _scaled(slope: Callable[..., Tensor], x: Tensor, y: Tensor, by_r: Tensor, formula: Formula) -> Tensor:
    """by_r [B, 1] times the slopes of the error at each element, [B, N]."""
    dtype = by_r.dtype
    if formula.kind == "sse":
        by_r = 2 * by_r
    if x.shape[1] < _LARGE:
        return slope(_as(dtype, x), _as(dtype, y), formula).mul_(by_r)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for a, b, c, row in zip(x, y, by_r, out, strict=True):
        torch.mul(slope(_as(dtype, a), _as(dtype, b), formula), c, out=row)
    return out


def _target_slope(x: Tensor, y: Tensor, formula: Formula) -> Tensor:
    if formula.kind == "bce":
        log_y, log_rest = y.log().clamp_(min=-100), (-y).log1p_().clamp_(min=-100)
        return inside_unit(x, log_rest - log_y)
    if formula.kind == "bce_logits":
        return inside_unit(x, -y)
    return _prediction_slope(y, x, formula)


def _prediction_slope(x: Tensor, y: Tensor, formula: Formula) -> Tensor:
    """Derivative of an element's error by the prediction; half of it for "sse"."""
    if formula.kind == "sse":
        return y - x
    if formula.kind == "l1":
        return (y - x).sgn_()
    if formula.kind == "huber":
        return (y - x).clamp_(-formula.delta, formula.delta)
    if formula.kind == "bce":
        return inside_unit(x, (y - x).div_((y - y.square()).clamp_(min=1e-12)))
    return inside_unit(x, y.sigmoid().sub_(x))


def _mean_gradient(mean: Tensor, by_k: Tensor, formula: Formula) -> Tensor:
    if formula.prior_logvar:
        by_k = by_k * math.exp(-formula.prior_logvar)
    return _as(by_k.dtype, mean) * by_k


def _logvar_gradient(logvar: Tensor, by_k: Tensor, formula: Formula) -> Tensor:
    logvar = _as(by_k.dtype, logvar)
    gradient = _ratio(logvar, formula).expm1().mul_(0.5 * by_k)
    if formula.bounded:
        gradient.masked_fill_((logvar < formula.low) | (logvar > formula.high), 0.0)
    return gradient
