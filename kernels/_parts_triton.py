"""Triton kernels of the parts: reparameterized sample with KL, and reconstruction errors.

Image and latent tensors are rows of unit stride. A gradient by one number a sample is read through its
stride, which is 0 where autograd hands over an expanded scalar.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import latent_block, latent_warps, on_device, row_block
from ._math import clamped, element_error, expm1, kl_element, normal, prediction_gradient, target_gradient


@triton.jit
def _prior(prior_mean, prior_logvar, sample, mean_stride, logvar_stride, constant, offsets, inside):
    """Mean and log-variance of the prior at `offsets`; None stands for 0 and for `constant`."""
    centre = tl.zeros(offsets.shape, tl.float32)
    logvar = tl.full(offsets.shape, constant, tl.float32)
    if prior_mean is not None:
        centre = tl.load(prior_mean + sample * mean_stride + offsets, inside, 0.0).to(tl.float32)
    if prior_logvar is not None:
        logvar = tl.load(prior_logvar + sample * logvar_stride + offsets, inside, 0.0).to(tl.float32)
    return centre, logvar


@triton.jit
def _noise(noise, seed, sample, noise_stride, z, offsets, inside):
    """Standard normal numbers: read, or the numbers at (seed, sample * z + offset) of Philox."""
    if noise is not None:
        return tl.load(noise + sample * noise_stride + offsets, inside, 0.0).to(tl.float32)
    else:
        return normal(tl.load(seed), sample * z + offsets)


@triton.jit
def sample_kernel(
    mean, mean_stride, logvar, logvar_stride,  # [B, Z]
    noise, noise_stride,  # [B, Z] or None
    seed,  # [1] int64 or None
    prior_mean, prior_mean_stride, prior_logvar, prior_logvar_stride,  # [B, Z] or None
    sampled,  # [B, Z] contiguous, written, or None
    kl,  # [B] fp32, written
    z, constant, low, high,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a sample."""
    sample = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, z, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < z
        m = tl.load(mean + sample * mean_stride + offsets, inside, 0.0).to(tl.float32)
        v = clamped(tl.load(logvar + sample * logvar_stride + offsets, inside, 0.0).to(tl.float32), low, high)
        centre, spread = _prior(
            prior_mean,
            prior_logvar,
            sample,
            prior_mean_stride,
            prior_logvar_stride,
            constant,
            offsets,
            inside,
        )
        total += tl.where(inside, kl_element(m, v, centre, spread), 0.0)
        if sampled is not None:
            eps = _noise(noise, seed, sample, noise_stride, z, offsets, inside)
            value = m + tl.exp(0.5 * v) * eps
            tl.store(sampled + sample * z + offsets, value.to(sampled.dtype.element_ty), inside)
    tl.store(kl + sample, tl.sum(total, 0))


@triton.jit
def sample_gradient_kernel(
    mean, mean_stride, logvar, logvar_stride, noise, noise_stride, seed,
    prior_mean, prior_mean_stride, prior_logvar, prior_logvar_stride,
    by_sampled, by_sampled_stride,  # [B, Z] or None
    by_kl, by_kl_stride,  # [B] or None
    to_mean, to_logvar, to_noise, to_prior_mean, to_prior_logvar,  # [B, Z] contiguous, written, or None
    z, constant, low, high,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < z
    row = sample * z + offsets
    m = tl.load(mean + sample * mean_stride + offsets, inside, 0.0).to(tl.float32)
    whole = tl.load(logvar + sample * logvar_stride + offsets, inside, 0.0).to(tl.float32)
    v = clamped(whole, low, high)
    g_mean = tl.zeros([BLOCK], tl.float32)
    g_logvar = tl.zeros([BLOCK], tl.float32)
    if by_sampled is not None:
        g = tl.load(by_sampled + sample * by_sampled_stride + offsets, inside, 0.0).to(tl.float32)
        scaled = g * tl.exp(0.5 * v)
        g_mean += g
        g_logvar += 0.5 * scaled * _noise(noise, seed, sample, noise_stride, z, offsets, inside)
        if to_noise is not None:
            tl.store(to_noise + row, scaled.to(to_noise.dtype.element_ty), inside)
    if by_kl is not None:
        g = tl.load(by_kl + sample * by_kl_stride).to(tl.float32)
        centre, spread = _prior(
            prior_mean,
            prior_logvar,
            sample,
            prior_mean_stride,
            prior_logvar_stride,
            constant,
            offsets,
            inside,
        )
        pull = g * (m - centre) * tl.exp(-spread)
        widen = 0.5 * g * expm1(v - spread)
        g_mean += pull
        g_logvar += widen
        if to_prior_mean is not None:
            tl.store(to_prior_mean + row, (-pull).to(to_prior_mean.dtype.element_ty), inside)
        if to_prior_logvar is not None:
            value = -widen - 0.5 * pull * (m - centre)
            tl.store(to_prior_logvar + row, value.to(to_prior_logvar.dtype.element_ty), inside)
    if to_mean is not None:
        tl.store(to_mean + row, g_mean.to(to_mean.dtype.element_ty), inside)
    if to_logvar is not None:
        g_logvar = tl.where((whole < low) | (whole > high), 0.0, g_logvar)
        tl.store(to_logvar + row, g_logvar.to(to_logvar.dtype.element_ty), inside)


@triton.jit
def error_kernel(
    target, target_stride, prediction, prediction_stride,  # [B, N]
    partial,  # [B, chunks] fp32, written
    n, chunks, delta,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    offsets = (program % chunks) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    x = tl.load(target + sample * target_stride + offsets, inside, 0.0).to(tl.float32)
    y = tl.load(prediction + sample * prediction_stride + offsets, inside, 0.0).to(tl.float32)
    error = tl.where(inside, element_error(x, y, KIND, delta), 0.0)
    tl.store(partial + program, tl.sum(error, 0))


@triton.jit
def error_gradient_kernel(
    target, target_stride, prediction, prediction_stride,
    upstream, upstream_stride,  # [B]
    to_target, to_prediction,  # [B, N] contiguous, written, or None
    n, chunks, delta,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    offsets = (program % chunks) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    x = tl.load(target + sample * target_stride + offsets, inside, 0.0).to(tl.float32)
    y = tl.load(prediction + sample * prediction_stride + offsets, inside, 0.0).to(tl.float32)
    g = tl.load(upstream + sample * upstream_stride).to(tl.float32)
    if to_target is not None:
        value = g * target_gradient(x, y, KIND, delta)
        tl.store(to_target + sample * n + offsets, value.to(to_target.dtype.element_ty), inside)
    if to_prediction is not None:
        value = g * prediction_gradient(x, y, KIND, delta)
        tl.store(to_prediction + sample * n + offsets, value.to(to_prediction.dtype.element_ty), inside)


def sample(
    mean: Tensor, logvar: Tensor, noise: Tensor | None, seed: Tensor | None,
    prior: tuple[Tensor | None, Tensor | None], numbers: Sequence[float],
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """(z [B, Z] in mean's dtype, None without noise and seed; KL [B]) of rows."""
    samples, z = mean.shape
    sampled = None
    if noise is not None or seed is not None:
        sampled = torch.empty(mean.shape, dtype=mean.dtype, device=mean.device)
    kl = torch.empty(samples, dtype=torch.float32, device=mean.device)
    with on_device(mean):
        sample_kernel[(samples,)](
            *_strided(mean, logvar, noise), seed, *_strided(*prior), sampled, kl, z, *numbers,
            BLOCK=latent_block(z), num_warps=latent_warps(latent_block(z)),
        )  # fmt: skip
    return sampled, kl


def sample_gradients(
    mean: Tensor, logvar: Tensor, noise: Tensor | None, seed: Tensor | None,
    prior: tuple[Tensor | None, Tensor | None], by_sampled: Tensor | None, by_kl: Tensor | None,
    needs: Sequence[bool], numbers: Sequence[float],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients by mean, logvar, noise, prior mean and prior logvar, where `needs` asks for them."""
    samples, z = mean.shape
    block = latent_block(z)
    tensors = (mean, logvar, noise, *prior)
    # a gradient that no upstream gradient reaches is never written by the kernel
    reached = (True, True, by_sampled is not None, by_kl is not None, by_kl is not None)
    gradients = [_new(t, needed, r) for t, needed, r in zip(tensors, needs, reached, strict=True)]
    with on_device(mean):
        sample_gradient_kernel[(samples, triton.cdiv(z, block))](
            *_strided(mean, logvar, noise), seed, *_strided(*prior), *_strided(by_sampled, by_kl),
            *(g if r else None for g, r in zip(gradients, reached, strict=True)), z, *numbers,
            BLOCK=block, num_warps=latent_warps(block),
        )  # fmt: skip
    return gradients


def errors(target: Tensor, prediction: Tensor, kind: str, delta: float) -> Tensor:
    """Errors [B] of rows [B, N]: partial sums in one launch, added up in a fixed order by another."""
    samples, n = target.shape
    block, warps = row_block(n, kind)
    chunks = triton.cdiv(n, block)
    partial = torch.empty(samples, chunks, dtype=torch.float32, device=target.device)
    with on_device(target):
        error_kernel[(samples * chunks,)](
            *_strided(target, prediction), partial, n, chunks, delta, KIND=kind, BLOCK=block, num_warps=warps
        )
    return partial.sum(1)


def error_gradients(
    target: Tensor, prediction: Tensor, upstream: Tensor, needs: Sequence[bool], kind: str, delta: float
) -> list[Tensor | None]:
    samples, n = target.shape
    block, warps = row_block(n, kind)
    chunks = triton.cdiv(n, block)
    gradients = [_new(t, needed, True) for t, needed in zip((target, prediction), needs, strict=True)]
    with on_device(target):
        error_gradient_kernel[(samples * chunks,)](
            *_strided(target, prediction, upstream), *gradients, n, chunks, delta,
            KIND=kind, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return gradients


def _strided(*tensors: Tensor | None) -> list[Tensor | int | None]:
    """Each tensor and the stride between its rows."""
    flat = []
    for tensor in tensors:
        flat += [None, 0] if tensor is None else [tensor, tensor.stride(0)]
    return flat


def _new(tensor: Tensor | None, needed: bool, written: bool) -> Tensor | None:
    if not needed:
        return None
    make = torch.empty if written else torch.zeros
    return make(tensor.shape, dtype=tensor.dtype, device=tensor.device)
