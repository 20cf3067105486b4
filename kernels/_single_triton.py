"""A phase in one launch: every input is read once and the gradients are written in the same pass.

As in `_phase_triton`, each program sums a chunk of one sample into slots of its own. Then, with the chunk
still in registers, it waits for the other programs of the sample, adds up the slots in slot order and
writes the gradients of its chunk: 6 instead of 10 bytes a bf16 element and pair, at an upstream gradient of
1.

Why it cannot hang: no program waits for long. Programs take their work by a ticket, in the order in which
they start, so that those of a sample run at the same time where nothing else holds the device. Launches of
several streams can hold it: each has begun a sample, and none has room for the rest of it. So a program
leaves after some looks at the sample's counter and marks there that it did, and the last to arrive, which
never waits, writes what was left. Arrivals and marks are one word: whoever marks after the last arrival
reads it and stays, whoever marks before it is read by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._batch import Batch, Formula
from ._launch import on_device
from ._phase_triton import (
    LaunchShape,
    finish_batch,
    finish_sample,
    load_images,
    new_gradients,
    new_results,
    store_image_gradients,
    store_latent_gradients,
    strided_rows,
    sum_errors,
    sum_kls,
)
from .reference import Member

_OTHERS = 32  # multiprocessors left to kernels of other streams, such as those of NCCL

#: Looks at a counter before a program leaves its chunk to the last one to arrive: chosen, not measured.
LOOKS = 10_000
#: Added to a sample's counter by a program that leaves; below it the counter holds arrivals.
LEFT = tl.constexpr(1 << 16)


@triton.jit
def single_kernel(
    images, image_strides, image_gradients, means, mean_strides, mean_gradients,
    logvars, logvar_strides, logvar_gradients, errors, error_strides, error_gradients,
    weights, partial, kls, shares,  # as in reduce_kernel
    counters,  # [B + 2] int32, zero: those of each sample, samples finished, tickets taken
    statistics, coefficients, loss,
    samples, n, z, chunks,
    prior_logvar, low, high, delta,
    LAYOUT: tl.constexpr,
    SOURCES: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PATIENCE: tl.constexpr,
):  # fmt: skip
    ticket = tl.atomic_add(counters + samples + 1, 1, sem="relaxed")
    sample = (ticket // (chunks + 1)).to(tl.int64)
    chunk = ticket % (chunks + 1)
    offsets = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = (offsets < n) & (chunk < chunks)
    values = load_images(images, image_strides, sample, offsets, inside, "evict_first")
    if chunk < chunks:
        slots = partial + sample * SOURCES * chunks + chunk
        sum_errors(values, inside, slots, chunks, delta, LAYOUT, SOURCES, KIND)
    else:
        sum_kls(
            means, mean_strides, logvars, logvar_strides, sample, kls + sample * SOURCES, z,
            prior_logvar, low, high, LAYOUT, SOURCES, BLOCK_Z,
        )  # fmt: skip
    tl.debug_barrier()  # every thread's stores come before the arrival
    arrived = tl.atomic_add(counters + sample, 1, sem="acq_rel") + 1
    last = arrived % LEFT > chunks
    seen = arrived
    looks = 0
    while (chunk < chunks) & (seen % LEFT <= chunks) & (looks < PATIENCE):
        seen = tl.atomic_add(counters + sample, 0, sem="acquire")
        looks += 1
    if (chunk < chunks) & (seen % LEFT <= chunks):
        seen = tl.atomic_add(counters + sample, LEFT, sem="acq_rel")
    if seen % LEFT > chunks:
        share, by_r, by_k = finish_sample(
            sample, samples, partial, kls, errors, error_strides, weights, coefficients, statistics, chunks,
            last, LAYOUT, SOURCES, SLOTS,
        )  # fmt: skip
        store_image_gradients(
            values, image_gradients, by_r, sample, offsets, inside, n, delta, LAYOUT, SOURCES, KIND
        )
        if last:
            if arrived > LEFT:
                _store_left(
                    images, image_strides, image_gradients, by_r, sample, n, chunks, delta,
                    LAYOUT, SOURCES, KIND, BLOCK,
                )  # fmt: skip
            store_latent_gradients(
                means, mean_strides, mean_gradients, logvars, logvar_strides, logvar_gradients,
                error_gradients, by_r, by_k, sample, z, prior_logvar, low, high, LAYOUT, SOURCES, BLOCK_Z,
            )  # fmt: skip
            tl.store(shares + sample, share)
            tl.debug_barrier()
            if tl.atomic_add(counters + samples, 1, sem="acq_rel") == samples - 1:
                finish_batch(
                    samples, shares, weights, coefficients, statistics, loss, LAYOUT, SOURCES, BLOCK_B
                )


@triton.jit
def _store_left(
    images, image_strides, gradients, slopes, sample, n, chunks, delta,
    LAYOUT: tl.constexpr, SOURCES: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Image gradients of a whole sample: which programs left is not known, and others write the same."""
    for chunk in range(chunks):
        offsets = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < n
        values = load_images(images, image_strides, sample, offsets, inside, "evict_first")
        store_image_gradients(
            values, gradients, slopes, sample, offsets, inside, n, delta, LAYOUT, SOURCES, KIND
        )


@triton.jit
def scale_kernel(gradient, factor, count, BLOCK: tl.constexpr):
    """gradient [count] times `factor`; nothing is touched where the factor is 1."""
    factor = tl.load(factor).to(tl.float32)
    if factor != 1.0:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(gradient + offsets, offsets < count).to(tl.float32) * factor
        tl.store(gradient + offsets, value.to(gradient.dtype.element_ty), offsets < count)


def fits(batch: Batch, formula: Formula) -> bool:
    """Whether the form applies to a batch, and the programs of a sample run at once; NVIDIA only.

    Not for float16, whose gradients vanish before a loss scale is multiplied in, nor for members that wait
    for a mean over the batch.
    """
    if any(tensor.dtype not in (torch.float32, torch.bfloat16) for tensor in batch.tensors):
        return False
    if any(source[0] == Member.BATCH_HINGE for source in batch.sources):
        return False
    if _launch.INTERPRET or torch.version.hip:
        return _launch.INTERPRET
    properties = torch.cuda.get_device_properties(batch.tensors[0].device)
    shape = LaunchShape.of(batch, formula, _gradients(image.requires_grad for image in batch.images))
    return shape.sizes[2] + 1 <= properties.multi_processor_count - _OTHERS


def value_and_gradients(
    batch: Batch, weights: Tensor, needs: Sequence[bool], formula: Formula
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """(loss, statistics, gradients of `batch.tensors` at an upstream gradient of 1) of a phase."""
    shape = LaunchShape.of(batch, formula, _gradients(needs[: len(batch.images)]))
    statistics, coefficients, loss, scratch = new_results(batch, shape)
    counters = torch.zeros(shape.samples + 2, dtype=torch.int32, device=loss.device)
    gradients, parts = new_gradients(batch, needs)
    inputs = []
    for tensors, part in zip(batch[:4], parts, strict=True):
        inputs += [*strided_rows(tensors), part]
    with on_device(loss):
        single_kernel[shape.grid](
            *inputs, weights.to(torch.float32), *scratch, counters, statistics, coefficients, loss,
            shape.samples, *shape.sizes, *formula.numbers,
            **shape.constants(batch, formula), **shape.blocks,
            PATIENCE=2 if _launch.INTERPRET else LOOKS,  # the interpreter runs programs in turn
            num_warps=shape.warps,
        )  # fmt: skip
    return loss, statistics, gradients


def _gradients(needs: Iterable[bool]) -> int | None:
    """How many images get gradients; None for none, since the images are read all the same."""
    return sum(needs) or None


def scale_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies contiguous gradients in place by the 0-dim `factor`, read on the device."""
    for gradient in gradients:
        with on_device(gradient):
            count = gradient.numel()
            scale_kernel[(triton.cdiv(count, 4096),)](gradient, factor, count, BLOCK=4096, num_warps=8)
