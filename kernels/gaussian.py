"""Reparameterized samples of diagonal Gaussians and their KL to a Gaussian prior.

z, kl = sample_and_kl(mean, logvar, torch.randn_like(mean))     # one launch instead of about a dozen
kl = gaussian_kl(mean, logvar, prior_mean=m, prior_logvar=v)    # any diagonal prior, also a trained one
z = reparameterize(mean, logvar, seed=seed)                     # noise made inside the kernel
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._batch import rows
from ._checks import bounds, check_tensors, positive
from ._launch import runs_triton
from ._operator import FusedOperator
from .philox import normal


def sample_and_kl(
    mean: Tensor,
    logvar: Tensor,
    noise: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    prior_std: float = 1.0,
    logvar_clamp: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """(z, kl) of q = N(mean, diag exp(logvar)).

    z = mean + exp(logvar / 2) noise                          in the shape and dtype of `mean`
    kl = 1/2 sum( exp(t) + (mean - m)^2 / exp(v) - 1 - t ),   t = logvar - v, [B] float32 (float64 for
    float64)

    mean, logvar: [B, ...] of one shape, any float dtypes.
    noise: standard normal numbers of that shape; or `seed`: an int64 tensor of one number on the device, from
        which the noise is made where it is used (Philox 4x32-10: the same numbers for the same seed on every
        device, up to rounding). New noise needs a new seed: `seed = torch.randint(2**62, (1,), device=...)`.
    prior_mean m, prior_logvar v: tensors that broadcast against `mean`, both or none, with gradients;
        without them the prior is N(0, prior_std^2 I).
    logvar_clamp: (low, high), bounds on logvar; its gradient is 0 outside.
    Raises ValueError or TypeError for arguments that do not fit together.
    """
    if (noise is None) == (seed is None):
        raise ValueError("noise and seed: exactly one of them must be given")
    z, kl = _gaussian(mean, logvar, noise, seed, prior_mean, prior_logvar, prior_std, logvar_clamp)
    return z.view(mean.shape), kl


def gaussian_kl(
    mean: Tensor,
    logvar: Tensor,
    *,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    prior_std: float = 1.0,
    logvar_clamp: tuple[float, float] | None = None,
) -> Tensor:
    """kl [B] of `sample_and_kl`."""
    return _gaussian(mean, logvar, None, None, prior_mean, prior_logvar, prior_std, logvar_clamp)[1]


def reparameterize(
    mean: Tensor,
    logvar: Tensor,
    noise: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    logvar_clamp: tuple[float, float] | None = None,
) -> Tensor:
    """z of `sample_and_kl`."""
    if noise is not None and seed is None and not runs_triton((mean, logvar, noise)):
        _check(mean, logvar, noise, None, None, None, 1.0)
        logvar_clamp = bounds("logvar_clamp", logvar_clamp)
        return reference.reparameterize(mean, logvar, noise, logvar_clamp)
    return sample_and_kl(mean, logvar, noise, seed=seed, logvar_clamp=logvar_clamp)[0]


def _gaussian(mean, logvar, noise, seed, prior_mean, prior_logvar, prior_std, clamp) -> Sequence[Tensor]:
    _check(mean, logvar, noise, seed, prior_mean, prior_logvar, prior_std)
    low, high = bounds("logvar_clamp", clamp) or (-math.inf, math.inf)
    tensors = [mean, logvar]
    if noise is not None:
        tensors.append(noise)
    if prior_mean is not None:
        # expanded before the operator, so that autograd adds up the gradients of a shared prior
        tensors += [prior_mean.expand_as(mean), prior_logvar.expand_as(mean)]
    constants = [] if seed is None else [seed]
    plan = (noise is not None, seed is not None, prior_mean is not None)
    return _GAUSSIAN(tensors, constants, [int(has) for has in plan], (2 * math.log(prior_std), low, high))


def _check(mean, logvar, noise, seed, prior_mean, prior_logvar, prior_std) -> None:
    named = [(mean, "mean", ""), (logvar, "logvar", "")]
    check_tensors(named if noise is None else [*named, (noise, "noise", "")])
    positive("prior_std", prior_std)
    if (prior_mean is None) != (prior_logvar is None):
        raise ValueError("prior_mean and prior_logvar: give both or none of them")
    if prior_mean is not None:
        for prior, name in ((prior_mean, "prior_mean"), (prior_logvar, "prior_logvar")):
            if not isinstance(prior, Tensor) or not prior.is_floating_point() or prior.device != mean.device:
                raise TypeError(f"{name} must be a float tensor on {mean.device}, got {prior!r}")
            sizes = zip(reversed(prior.shape), reversed(mean.shape), strict=False)
            if prior.dim() > mean.dim() or any(size not in (1, whole) for size, whole in sizes):
                raise ValueError(
                    f"{name} has shape {list(prior.shape)}, must broadcast against mean, {list(mean.shape)}"
                )
        if prior_std != 1.0:
            raise ValueError(f"prior_std is {prior_std}, must be left out where prior_mean is given")
    if seed is not None and not isinstance(seed, Tensor):
        raise TypeError(f"seed is {seed!r}, must be a tensor of one int64 number on {mean.device}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != mean.device):
        raise ValueError(
            f"seed is {seed.dtype} of shape {list(seed.shape)} on {seed.device}, "
            f"must be one int64 number on {mean.device}"
        )


def _parts(tensors: Sequence[Tensor], constants: Sequence[Tensor], plan: Sequence[int]):
    """(mean, logvar, noise, seed, (prior mean, prior logvar)) as rows, None where absent."""
    flat = [rows(tensor) for tensor in tensors]
    noise = flat[2] if plan[0] else None
    prior = (flat[-2], flat[-1]) if plan[2] else (None, None)
    return flat[0], flat[1], noise, constants[0] if plan[1] else None, prior


def _forward(tensors, constants, plan, numbers, kind) -> list[Tensor]:
    mean, logvar, noise, seed, prior = _parts(tensors, constants, plan)
    if runs_triton(tensors):
        from . import _parts_triton

        z, kl = _parts_triton.sample(mean, logvar, noise, seed, prior, numbers)
    else:
        centre, spread = _known(prior, numbers)
        # near the prior expm1(t) - t has lost half of float32's digits
        wide = [t.double() if t.device.type == "cpu" else t for t in (mean, logvar)]
        kl = reference.gaussian_kl(*wide, centre, spread, numbers[1:]).to(reference.compute_dtype(*tensors))
        noise = noise if seed is None else normal(seed, mean.shape)
        z = None if noise is None else reference.reparameterize(mean, logvar, noise, numbers[1:])
    return [mean.new_empty(0) if z is None else z, kl]


def _fake(tensors, constants, plan, numbers, kind) -> list[Tensor]:
    mean = rows(tensors[0])
    z = mean.new_empty(mean.shape if plan[0] or plan[1] else 0)
    return [z, mean.new_empty(mean.shape[0], dtype=reference.compute_dtype(*tensors))]


def _backward(upstream, tensors, constants, outputs, needs, plan, numbers, kind) -> list[Tensor]:
    mean, logvar, noise, seed, prior = _parts(tensors, constants, plan)
    given = iter(upstream)
    by_z = next(given) if needs[0] else None
    by_kl = next(given) if needs[1] else None
    wanted = _every(needs[2:], plan)
    if runs_triton(tensors):
        from . import _parts_triton

        by_z = None if by_z is None or not by_z.numel() else rows(by_z)
        gradients = _parts_triton.sample_gradients(
            mean, logvar, noise, seed, prior, by_z, by_kl, wanted, numbers
        )
    else:
        noise = noise if seed is None else normal(seed, mean.shape)
        gradients = _closed_form(mean, logvar, noise, prior, by_z, by_kl, numbers)
    chosen = [gradient for gradient, want in zip(gradients, wanted, strict=True) if want]
    like = [tensor for tensor, needed in zip(tensors, needs[2:], strict=True) if needed]
    return [gradient.to(t.dtype).view(t.shape) for gradient, t in zip(chosen, like, strict=True)]


def _backward_fake(upstream, tensors, constants, outputs, needs, plan, numbers, kind) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, needed in zip(tensors, needs[2:], strict=True) if needed]


_GAUSSIAN = FusedOperator(
    "gaussian",
    forward=_forward,
    fake=_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    differentiable=2,
)


def _every(needs: Sequence[bool], plan: Sequence[int]) -> list[bool]:
    """Marks for mean, logvar, noise, prior mean and prior logvar."""
    noise = [needs[2]] if plan[0] else [False]
    return [*needs[:2], *noise, *(needs[-2:] if plan[2] else [False, False])]


def _known(prior, numbers) -> tuple[Tensor | float, Tensor | float]:
    return (0.0, numbers[0]) if prior[0] is None else prior


def _closed_form(mean, logvar, noise, prior, by_z, by_kl, numbers) -> list[Tensor | None]:
    dtype = reference.compute_dtype(mean, logvar)
    centre, spread = (part if isinstance(part, float) else part.to(dtype) for part in _known(prior, numbers))
    mean, whole = mean.to(dtype), logvar.to(dtype)
    logvar = whole.clamp(*numbers[1:])
    # Memory of its own for each: autograd adds to gradients in place, and so do optimizers and clipping.
    to_mean, to_logvar, to_noise, to_centre, to_spread = (torch.zeros_like(mean) for _ in range(5))
    if by_z is not None and by_z.numel():
        to_mean = by_z.reshape(mean.shape).to(dtype, copy=True)
        to_noise = to_mean * (0.5 * logvar).exp_()
        to_logvar = 0.5 * to_noise * noise
    if by_kl is not None:
        by_kl = by_kl.to(dtype)[:, None]
        inverse = math.exp(-spread) if isinstance(spread, float) else (-spread).exp()
        pull, widen = (mean - centre) * by_kl * inverse, (logvar - spread).expm1_().mul_(0.5 * by_kl)
        to_centre, to_spread = -pull, -widen - 0.5 * pull * (mean - centre)
        to_mean, to_logvar = to_mean + pull, to_logvar + widen
    to_logvar = to_logvar.masked_fill((whole < numbers[1]) | (whole > numbers[2]), 0.0)
    return [to_mean, to_logvar, to_noise, to_centre, to_spread]
