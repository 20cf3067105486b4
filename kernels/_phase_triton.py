"""Triton kernels of a phase: one launch reduces every batch, one launch writes every gradient.

Sources, members and rows of weights are those of `reference.phase`. Image tensors are rows [B, N] of stride
(row, 1); a tensor that two sources share (rec, in x -> rec -> rec_rec) is one entry and is read once.

The grid is one program a chunk of a sample's images and one program a sample for its posteriors. Each
stores its partial sums in slots of its own and raises the sample's counter; the last to arrive adds the
slots in slot order, so that results are the same bits in every run. The last sample to finish adds up the
batch in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._batch import Batch, Formula
from ._launch import latent_block, on_device, power_of_2, row_block
from ._math import (
    BATCH_HINGE,
    LINEAR,
    clamped,
    element_error,
    expm1,
    kl_element,
    member_slope,
    member_statistic,
    prediction_gradient,
    target_gradient,
)

# A source in LAYOUT: its member and the places of target, prediction, posterior and error; -1 for none.
MEMBER, TARGET, PREDICTION, POSTERIOR, ERROR = (tl.constexpr(i) for i in range(5))
WIDTH = tl.constexpr(5)


@triton.jit
def row_of(tensors, strides, PLACE: tl.constexpr, sample):
    return tensors[PLACE] + sample * strides[PLACE]


@triton.jit
def load_images(images, strides, sample, offsets, inside, POLICY: tl.constexpr):
    values = ()
    for i in tl.static_range(len(images)):
        row = images[i] + sample * strides[i]
        value = tl.load(row + offsets, inside, 0.0, eviction_policy=POLICY).to(tl.float32)
        values = values + (value,)  # noqa: RUF005
    return values


@triton.jit
def sum_errors(
    values, inside, slots, chunks, delta, LAYOUT: tl.constexpr, SOURCES: tl.constexpr, KIND: tl.constexpr
):
    for s in tl.static_range(SOURCES):
        if LAYOUT[WIDTH * s + TARGET] >= 0:
            x, y = values[LAYOUT[WIDTH * s + TARGET]], values[LAYOUT[WIDTH * s + PREDICTION]]
            error = element_error(x, y, KIND, delta)
            tl.store(slots + s * chunks, tl.sum(tl.where(inside, error, 0.0), 0))


@triton.jit
def _sum_kl(means, logvars, z, prior_logvar, low, high, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, z, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < z
        mean = tl.load(means + offsets, inside, 0.0).to(tl.float32)
        logvar = clamped(tl.load(logvars + offsets, inside, 0.0).to(tl.float32), low, high)
        total += tl.where(inside, kl_element(mean, logvar, 0.0, prior_logvar), 0.0)
    return tl.sum(total, 0)


@triton.jit
def sum_kls(
    means, mean_strides, logvars, logvar_strides, sample, kls, z, prior_logvar, low, high,
    LAYOUT: tl.constexpr, SOURCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """KL of every source of one sample, to kls[source]."""
    for s in tl.static_range(SOURCES):
        if LAYOUT[WIDTH * s + POSTERIOR] >= 0:
            mean = row_of(means, mean_strides, LAYOUT[WIDTH * s + POSTERIOR], sample)
            logvar = row_of(logvars, logvar_strides, LAYOUT[WIDTH * s + POSTERIOR], sample)
            tl.store(kls + s, _sum_kl(mean, logvar, z, prior_logvar, low, high, BLOCK))


@triton.jit
def finish_sample(
    sample, samples, partial, kls, errors, error_strides, weights, coefficients, statistics, chunks, first,
    LAYOUT: tl.constexpr, SOURCES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """(share of the loss before the mean, derivatives of the loss by each r, and by each k) of one sample.

    Statistics and coefficients are stored where `first` is true.
    """
    slots = tl.arange(0, SLOTS)
    share = 0.0
    by_r = ()
    by_k = ()
    for s in tl.static_range(SOURCES):
        r = 0.0
        k = 0.0
        if LAYOUT[WIDTH * s + TARGET] >= 0:
            row = partial + (sample * SOURCES + s) * chunks
            r = tl.sum(tl.load(row + slots, slots < chunks, 0.0, cache_modifier=".cg"), 0)
        if LAYOUT[WIDTH * s + ERROR] >= 0:
            stride = error_strides[LAYOUT[WIDTH * s + ERROR]]
            r = tl.load(errors[LAYOUT[WIDTH * s + ERROR]] + sample * stride).to(tl.float32)
        if LAYOUT[WIDTH * s + POSTERIOR] >= 0:
            k = tl.load(kls + sample * SOURCES + s, cache_modifier=".cg")
        a = tl.load(weights + s)
        b = tl.load(weights + SOURCES + s)
        p = tl.load(weights + 2 * SOURCES + s)
        q = tl.load(weights + 3 * SOURCES + s)
        u = a * r + b * k
        statistic = member_statistic(u, q, LAYOUT[WIDTH * s + MEMBER])
        slope = member_slope(u, statistic, p, q, LAYOUT[WIDTH * s + MEMBER]) / samples
        if LAYOUT[WIDTH * s + MEMBER] == LINEAR:
            share += u
        elif LAYOUT[WIDTH * s + MEMBER] != BATCH_HINGE:
            share += p * statistic
        place = s * samples + sample
        tl.store(statistics + place, r, first)
        tl.store(statistics + SOURCES * samples + place, k, first)
        tl.store(statistics + 2 * SOURCES * samples + place, statistic, first)
        tl.store(coefficients + place, a * slope, first)
        tl.store(coefficients + SOURCES * samples + place, b * slope, first)
        by_r = by_r + (a * slope,)  # noqa: RUF005
        by_k = by_k + (b * slope,)  # noqa: RUF005
    return share, by_r, by_k


@triton.jit
def finish_batch(
    samples, shares, weights, coefficients, statistics, loss,
    LAYOUT: tl.constexpr, SOURCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss, and the members that hang on a mean over the batch."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, samples, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        total += tl.load(shares + rows, rows < samples, 0.0, cache_modifier=".cg")
    value = tl.sum(total, 0) / samples
    for s in tl.static_range(SOURCES):
        if LAYOUT[WIDTH * s + MEMBER] == BATCH_HINGE:
            a = tl.load(weights + s)
            b = tl.load(weights + SOURCES + s)
            p = tl.load(weights + 2 * SOURCES + s)
            q = tl.load(weights + 3 * SOURCES + s)
            total = tl.zeros([BLOCK], tl.float32)
            for start in range(0, samples, BLOCK):
                rows = start + tl.arange(0, BLOCK)
                inside = rows < samples
                r = tl.load(statistics + s * samples + rows, inside, 0.0, cache_modifier=".cg")
                k = tl.load(statistics + (SOURCES + s) * samples + rows, inside, 0.0, cache_modifier=".cg")
                total += a * r + b * k
            u = tl.sum(total, 0) / samples
            value += p * member_statistic(u, q, BATCH_HINGE)
            slope = member_slope(u, 0.0, p, q, BATCH_HINGE) / samples
            for start in range(0, samples, BLOCK):
                rows = start + tl.arange(0, BLOCK)
                same = tl.full([BLOCK], slope, tl.float32)
                tl.store(coefficients + s * samples + rows, a * same, rows < samples)
                tl.store(coefficients + (SOURCES + s) * samples + rows, b * same, rows < samples)
    tl.store(loss, value)


@triton.jit
def reduce_kernel(
    images,  # tuple of [B, N], rows of stride (image_strides[i], 1)
    image_strides,
    means,  # tuple of [B, Z], rows of stride (mean_strides[i], 1)
    mean_strides,
    logvars,  # tuple of [B, Z]
    logvar_strides,
    errors,  # tuple of [B]
    error_strides,
    weights,  # [4, sources] fp32
    partial,  # [B, sources, chunks] fp32, scratch
    kls,  # [B, sources] fp32, scratch
    shares,  # [B] fp32, scratch
    counters,  # [B + 1] int32, zero
    statistics,  # [3, sources, B] fp32, written
    coefficients,  # [2, sources, B] fp32, written: derivative of the loss by r and by k
    loss,  # 0-dim fp32, written
    samples, n, z, chunks,
    prior_logvar, low, high, delta,
    LAYOUT: tl.constexpr,
    SOURCES: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // (chunks + 1)).to(tl.int64)
    chunk = program % (chunks + 1)
    if chunk < chunks:
        offsets = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < n
        values = load_images(images, image_strides, sample, offsets, inside, "evict_last")
        slots = partial + sample * SOURCES * chunks + chunk
        sum_errors(values, inside, slots, chunks, delta, LAYOUT, SOURCES, KIND)
    else:
        sum_kls(
            means, mean_strides, logvars, logvar_strides, sample, kls + sample * SOURCES, z,
            prior_logvar, low, high, LAYOUT, SOURCES, BLOCK_Z,
        )  # fmt: skip
    tl.debug_barrier()  # every thread's stores come before the arrival
    if tl.atomic_add(counters + sample, 1, sem="acq_rel") == chunks:
        share, _, _ = finish_sample(
            sample, samples, partial, kls, errors, error_strides, weights, coefficients, statistics, chunks,
            True, LAYOUT, SOURCES, SLOTS,
        )  # fmt: skip
        tl.store(shares + sample, share)
        tl.debug_barrier()
        if tl.atomic_add(counters + samples, 1, sem="acq_rel") == samples - 1:
            finish_batch(samples, shares, weights, coefficients, statistics, loss, LAYOUT, SOURCES, BLOCK_B)


@triton.jit
def store_image_gradients(
    values, gradients, slopes, sample, offsets, inside, n, delta,
    LAYOUT: tl.constexpr, SOURCES: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    for i in tl.static_range(len(values)):
        if gradients[i] is not None:
            total = tl.zeros_like(values[i])
            for s in tl.static_range(SOURCES):
                if LAYOUT[WIDTH * s + TARGET] >= 0:
                    x, y = values[LAYOUT[WIDTH * s + TARGET]], values[LAYOUT[WIDTH * s + PREDICTION]]
                    if LAYOUT[WIDTH * s + TARGET] == i:
                        total += slopes[s] * target_gradient(x, y, KIND, delta)
                    if LAYOUT[WIDTH * s + PREDICTION] == i:
                        total += slopes[s] * prediction_gradient(x, y, KIND, delta)
            row = gradients[i] + sample * n
            tl.store(row + offsets, total.to(gradients[i].dtype.element_ty), inside)


@triton.jit
def _store_mean_gradient(means, gradient, slope, z, prior_logvar, BLOCK: tl.constexpr):
    for start in range(0, z, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mean = tl.load(means + offsets, offsets < z, 0.0).to(tl.float32)
        value = slope * mean * tl.exp(-prior_logvar)
        tl.store(gradient + offsets, value.to(gradient.dtype.element_ty), offsets < z)


@triton.jit
def _store_logvar_gradient(logvars, gradient, slope, z, prior_logvar, low, high, BLOCK: tl.constexpr):
    for start in range(0, z, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        logvar = tl.load(logvars + offsets, offsets < z, 0.0).to(tl.float32)
        value = 0.5 * slope * expm1(clamped(logvar, low, high) - prior_logvar)
        value = tl.where((logvar < low) | (logvar > high), 0.0, value)
        tl.store(gradient + offsets, value.to(gradient.dtype.element_ty), offsets < z)


@triton.jit
def store_latent_gradients(
    means, mean_strides, mean_gradients, logvars, logvar_strides, logvar_gradients, error_gradients,
    by_r, by_k, sample, z, prior_logvar, low, high,
    LAYOUT: tl.constexpr, SOURCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of posteriors and of given errors of one sample."""
    for s in tl.static_range(SOURCES):
        if LAYOUT[WIDTH * s + POSTERIOR] >= 0:
            if mean_gradients[LAYOUT[WIDTH * s + POSTERIOR]] is not None:
                mean = row_of(means, mean_strides, LAYOUT[WIDTH * s + POSTERIOR], sample)
                gradient = mean_gradients[LAYOUT[WIDTH * s + POSTERIOR]] + sample * z
                _store_mean_gradient(mean, gradient, by_k[s], z, prior_logvar, BLOCK)
            if logvar_gradients[LAYOUT[WIDTH * s + POSTERIOR]] is not None:
                logvar = row_of(logvars, logvar_strides, LAYOUT[WIDTH * s + POSTERIOR], sample)
                gradient = logvar_gradients[LAYOUT[WIDTH * s + POSTERIOR]] + sample * z
                _store_logvar_gradient(logvar, gradient, by_k[s], z, prior_logvar, low, high, BLOCK)
        if LAYOUT[WIDTH * s + ERROR] >= 0:  # noqa: SIM102
            if error_gradients[LAYOUT[WIDTH * s + ERROR]] is not None:
                gradient = error_gradients[LAYOUT[WIDTH * s + ERROR]]
                tl.store(gradient + sample, by_r[s].to(gradient.dtype.element_ty))


@triton.jit
def apply_kernel(
    images,
    image_strides,
    image_gradients,  # tuple of [B, N] contiguous, written; None for a tensor without gradient
    means,
    mean_strides,
    mean_gradients,  # tuple of [B, Z] contiguous or None, written
    logvars,
    logvar_strides,
    logvar_gradients,
    error_gradients,  # tuple of [B] or None, written
    coefficients,  # [2, sources, B] fp32
    upstream,  # gradient by the loss; one number a sample where upstream_stride is not 0
    upstream_stride,
    samples, n, z, chunks,
    prior_logvar, low, high, delta,
    LAYOUT: tl.constexpr,
    SOURCES: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // (chunks + 1)).to(tl.int64)
    chunk = program % (chunks + 1)
    factor = tl.load(upstream + sample * upstream_stride).to(tl.float32)
    if chunk < chunks:
        slopes = ()
        for s in tl.static_range(SOURCES):
            slopes = slopes + (factor * tl.load(coefficients + s * samples + sample),)  # noqa: RUF005
        offsets = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < n
        values = load_images(images, image_strides, sample, offsets, inside, "evict_first")
        store_image_gradients(
            values, image_gradients, slopes, sample, offsets, inside, n, delta, LAYOUT, SOURCES, KIND
        )
    else:
        by_r = ()
        by_k = ()
        for s in tl.static_range(SOURCES):
            place = coefficients + s * samples + sample
            by_r = by_r + (factor * tl.load(place),)  # noqa: RUF005
            by_k = by_k + (factor * tl.load(place + SOURCES * samples),)  # noqa: RUF005
        store_latent_gradients(
            means, mean_strides, mean_gradients, logvars, logvar_strides, logvar_gradients, error_gradients,
            by_r, by_k, sample, z, prior_logvar, low, high, LAYOUT, SOURCES, BLOCK_Z,
        )  # fmt: skip


def reduce(batch: Batch, weights: Tensor, formula: Formula) -> tuple[Tensor, Tensor, Tensor]:
    """As `closed_form.reduce`, in one launch and one that clears the counters; also what `apply` takes."""
    shape = LaunchShape.of(batch, formula)
    statistics, coefficients, loss, scratch = new_results(batch, shape)
    counters = torch.zeros(shape.samples + 1, dtype=torch.int32, device=loss.device)
    with on_device(loss):
        reduce_kernel[shape.grid](
            *strided_rows(batch.images), *strided_rows(batch.means), *strided_rows(batch.logvars),
            *strided_rows(batch.errors), weights.to(torch.float32), *scratch, counters,
            statistics, coefficients, loss, shape.samples, *shape.sizes, *formula.numbers,
            **shape.constants(batch, formula), **shape.blocks, num_warps=shape.warps,
        )  # fmt: skip
    return loss, statistics, coefficients


def apply(
    batch: Batch, coefficients: Tensor, upstream: Tensor, needs: Sequence[bool], formula: Formula
) -> list[Tensor]:
    """As `closed_form.apply` with the coefficients of `reduce`, in one launch."""
    shape = LaunchShape.of(batch, formula, sum(needs[: len(batch.images)]))
    gradients, (images, means, logvars, errors) = new_gradients(batch, needs)
    stride = upstream.stride(0) if upstream.dim() else 0
    with on_device(coefficients):
        apply_kernel[shape.grid](
            *strided_rows(batch.images), images, *strided_rows(batch.means), means,
            *strided_rows(batch.logvars), logvars, errors, coefficients, upstream, stride,
            shape.samples, *shape.sizes, *formula.numbers,
            **shape.constants(batch, formula), num_warps=shape.warps,
        )  # fmt: skip
    return [gradient for gradient in gradients if gradient is not None]


class LaunchShape(NamedTuple):
    """The grid of a launch: `chunks` programs for the images of a sample and one for the rest of it."""

    samples: int
    sources: int
    sizes: tuple[int, int, int]  # N, Z, chunks
    block: int
    warps: int

    @classmethod
    def of(cls, batch: Batch, formula: Formula, gradients: int | None = None) -> LaunchShape:
        """gradients: number of images that get one; None where the images are read for their errors."""
        n = batch.images[0].shape[1] if batch.images and gradients != 0 else 0
        z = batch.means[0].shape[1] if batch.means else 0
        # a fifth gradient beside five images would spill
        block, warps = row_block(n, formula.kind, most=4096 if (gradients or 0) <= 4 else 2048)
        samples = len((batch.images or batch.means or batch.errors)[0])
        return cls(samples, len(batch.sources), (n, z, -(-n // block)), block, warps)

    @property
    def grid(self) -> tuple[int]:
        return (self.samples * (self.sizes[2] + 1),)

    @property
    def blocks(self) -> dict[str, int]:
        return {"SLOTS": power_of_2(self.sizes[2]), "BLOCK_B": latent_block(self.samples)}

    def constants(self, batch: Batch, formula: Formula) -> dict[str, object]:
        return {
            "LAYOUT": batch.layout,
            "SOURCES": self.sources,
            "KIND": formula.kind,
            "BLOCK": self.block,
            "BLOCK_Z": latent_block(self.sizes[1]),
        }


def new_results(batch: Batch, shape: LaunchShape) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Uninitialised statistics, coefficients, loss, and scratch: partial sums, KLs, shares of the loss."""
    device = (batch.images or batch.means or batch.errors)[0].device
    new = lambda *size: torch.empty(size, dtype=torch.float32, device=device)
    samples, sources, chunks = shape.samples, shape.sources, shape.sizes[2]
    scratch = new(samples, sources, chunks), new(samples, sources), new(samples)
    return new(3, sources, samples), new(2, sources, samples), new(), scratch


def new_gradients(batch: Batch, needs: Sequence[bool]):
    """Uninitialised gradients of `batch.tensors`, None where not needed: in one list, and list by list."""
    gradients = [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) if needed else None
        for tensor, needed in zip(batch.tensors, needs, strict=True)
    ]
    parts, start = [], 0
    for tensors in batch[:4]:
        parts.append(tuple(gradients[start : start + len(tensors)]))
        start += len(tensors)
    return gradients, parts


def strided_rows(tensors: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Tensors and the strides between their rows."""
    return tuple(tensors), tuple(tensor.stride(0) for tensor in tensors)
