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
_SMALL = 1 << 12  # elements of a batch up to which all pairs are worked on together: calls are what costs
_HUGE = torch.finfo(torch.float32).max
_HALF = torch.tensor(0.5)  # a product with a tensor is 1.5 us faster than with a number
_EVEN = ("sse", "l1", "huber")  # even functions of the difference


def reduce(batch: Batch, weights: Tensor, formula: Formula) -> tuple[Tensor, Tensor]:
    """(loss, 0-dim; statistics [3, sources, B]) of a phase."""
    tensors, sources = batch.tensors, batch.sources
    statistics = tensors[0].new_empty((3, len(sources), len(tensors[0])), dtype=compute_dtype(*tensors))
    r, k, statistic = statistics.unbind()
    _fill_errors(batch, sources, formula, r)
    _fill_kls(batch, sources, formula, k)
    a, b, p, q = _columns(weights, statistics.dtype)
    members = [source[0] for source in sources]
    return _loss(members, (r * a).add_(k * b), p, q, statistic), statistics


def apply(
    batch: Batch,
    statistics: Tensor,
    weights: Tensor,
    upstream: Tensor,
    needs: Sequence[bool],
    formula: Formula,
) -> list[Tensor]:
    """Gradients of those tensors of `batch.tensors` that `needs` marks, as rows in each tensor's dtype.

    upstream: gradient by the loss, 0-dim.
    """
    coefficients = _coefficients([source[0] for source in batch.sources], statistics, weights)
    slopes = coefficients.mul_(upstream.to(coefficients.dtype)).unsqueeze(2).unbind()
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


def _fill_errors(batch: Batch, sources: Sequence[Sequence[int]], formula: Formula, r: Tensor) -> None:
    """r [sources, B] of every source, 0 where it has none; small batches of images all together."""
    images, dtype = batch.images, r.dtype
    if images and images[0].numel() < _SMALL and all(source[1] >= 0 for source in sources):
        images = [_as(dtype, image) for image in images]
        x = torch.stack([images[source[1]] for source in sources])
        y = torch.stack([images[source[2]] for source in sources])
        torch.sum(_element_errors(x, y, formula), 2, out=r)
        return
    for row, (_, target, prediction, _, error) in zip(r.unbind(), sources, strict=True):
        if target >= 0:
            pair_errors(images[target], images[prediction], formula, row)
        elif error >= 0:
            row.copy_(batch.errors[error])
        else:
            row.zero_()


def pair_errors(x: Tensor, y: Tensor, formula: Formula, out: Tensor | None = None) -> Tensor:
    """r [B] of rows, one at a time where they are long; written to `out` where that is given."""
    out = x.new_empty(len(x), dtype=compute_dtype(x, y)) if out is None else out
    dtype = out.dtype
    if x.shape[1] < _LARGE:
        return torch.sum(_element_errors(_as(dtype, x), _as(dtype, y), formula), 1, out=out)
    pairs = zip(x, y, strict=True)
    sums = [_element_errors(_as(dtype, a), _as(dtype, b), formula).sum() for a, b in pairs]
    return torch.stack(sums, out=out)


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


def _fill_kls(batch: Batch, sources: Sequence[Sequence[int]], formula: Formula, k: Tensor) -> None:
    """k [sources, B] of every source, 0 where it has none; all posteriors together, for they are small."""
    if not batch.means:
        k.zero_()
        return
    dtype = k.dtype
    distance = torch.stack([_as(dtype, mean) for mean in batch.means]).square_()
    if formula.prior_logvar:
        distance.mul_(math.exp(-formula.prior_logvar))
    ratio = _ratio(torch.stack([_as(dtype, logvar) for logvar in batch.logvars]), formula)
    terms = ratio.expm1().sub_(ratio).add_(distance)
    if len(batch.means) == len(k):
        torch.sum(terms, 2, out=k).mul_(_HALF)
        return
    kls = terms.sum(2).mul_(_HALF)
    for row, source in zip(k, sources, strict=True):
        row.copy_(kls[source[3]]) if source[3] >= 0 else row.zero_()


def _ratio(logvar: Tensor, formula: Formula) -> Tensor:
    """log(variance / variance of the prior)."""
    if formula.bounded:
        logvar = logvar.clamp(formula.low, formula.high)
    return logvar - formula.prior_logvar if formula.prior_logvar else logvar


def _loss(members: Sequence[int], u: Tensor, p: Tensor, q: Tensor, statistics: Tensor) -> Tensor:
    """The loss, 0-dim, of u [sources, B]; fills `statistics` [sources, B]."""
    linear, samples = members.count(Member.LINEAR), u.shape[1]
    if linear == len(members):
        statistics.fill_(1)
        return u.sum().div_(samples)
    if members == [Member.LINEAR] * linear + [Member.EXPONENTIAL] * (len(members) - linear):
        # p and q of a linear source are 0, so that one formula serves both
        shares = torch.exp(u.clamp(0, _HUGE).mul_(q).neg_(), out=statistics) * p
        shares[:linear] = u[:linear]
        return shares.sum().div_(samples)
    rows = zip(members, u.unbind(), p.unbind(), q.unbind(), statistics.unbind(), strict=True)
    return torch.stack([_share(*row) for row in rows]).sum()


def _share(member: int, u: Tensor, p: Tensor, q: Tensor, statistic: Tensor) -> Tensor:
    """One source's share of the loss, 0-dim."""
    if member in (Member.LINEAR, Member.EXPONENTIAL):
        return _loss([member], u[None], p[None], q[None], statistic[None])
    torch.sub(q, u, out=statistic).relu_()
    return p[0] * ((q - u.mean()).relu()[0] if member == Member.BATCH_HINGE else statistic.mean())


def _coefficients(members: Sequence[int], statistics: Tensor, weights: Tensor) -> Tensor:
    """Derivatives of the loss by r and by k of each source and sample, [2 sources, B]."""
    (a, b, p, q), statistic = _columns(weights, statistics.dtype), statistics[2]
    slope = p * q * statistic  # of the exponential sources, but for its sign
    for s, member in enumerate(members):
        if member == Member.LINEAR:
            slope[s] = -1
        elif member == Member.HINGE:
            slope[s] = p[s].where(statistic[s] > 0, 0)
        elif member == Member.BATCH_HINGE:
            u = a[s] * statistics[0, s] + b[s] * statistics[1, s]
            slope[s] = p[s].where(u.mean() < q[s], 0)
    slope.div_(-slope.shape[1])
    return torch.cat([a * slope, b * slope])


def _columns(weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows of the weights as columns [sources, 1] of `dtype`.

    Kept with the tensor until it changes: making them is a tenth of a small phase.
    """
    # One has no version; on the other a captured graph would go on with the columns of its capture.
    if weights.is_inference() or weights.is_cuda:
        return _as(dtype, weights).unsqueeze(2).unbind()
    state = id(weights), weights._version, dtype  # a copy of a tensor inherits what is kept with it
    kept = getattr(weights, "_columns", None)
    if kept is None or kept[0] != state:
        weights._columns = kept = state, _as(dtype, weights.detach()).clone().unsqueeze(2).unbind()
    return kept[1]


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
