"""Batches to try losses on, and what they must give: the formulas written out, in float64."""

import torch

from sivae_fast.kernels import reference
from sivae_fast.kernels.reference import Member, Source

#: a, b, p, q of a Soft-IntroVAE encoder phase whose exponents are of order one.
SOFT = [[1e-3, 2e-3, 0.0, 0.0], [0.2, 0.3, 0.25, 0.02], [0.2, 0.3, 0.25, 0.02]]
SOFT_MEMBERS = (Member.LINEAR, Member.EXPONENTIAL, Member.EXPONENTIAL)


#: members and a, b, p, q of up to three sources
MEMBERS = {
    "VAE": ((Member.LINEAR,), [[0.1, 0.2, 0, 0]]),
    "Soft-IntroVAE": (SOFT_MEMBERS, SOFT),
    "decoder": ((Member.LINEAR,) * 3, [[0.1, 0, 0, 0], [1e-8, 0.3, 0, 0], [1e-8, 0.3, 0, 0]]),
    "linear": ((Member.LINEAR,) * 3, [[0.1, 0.2, 0, 0], [0, -0.4, 0, 0], [0, -0.4, 0, 0]]),
    "hinge": ((Member.LINEAR, Member.HINGE, Member.HINGE), [[0.1, 0.2, 0, 0], *[[0, 1, 0.5, 6.0]] * 2]),
    "batch hinge": ((Member.LINEAR, *[Member.BATCH_HINGE] * 2), [[0.1, 0.2, 0, 0], *[[0, 1, 0.5, 6.0]] * 2]),
    "batch hinge passed": (
        (Member.LINEAR, *[Member.BATCH_HINGE] * 2),
        [[0.1, 0.2, 0, 0], *[[0.1, 1, 0.5, 1.0]] * 2],
    ),
}


def soft(elements):
    """SOFT for samples of many elements: the exponents, and with them their rounding, stay of order one."""
    return [SOFT[0], *([a / max(elements / 50, 1), b, p, q] for a, b, p, q in SOFT[1:])]


def table(rows, device="cpu"):
    return torch.tensor(rows, dtype=torch.float64).t().contiguous().to(device)


def chain(shape, latents, dtype=torch.float32, device="cpu", seed=0):
    """Sources of an encoder phase: x -> rec -> rec_rec and fake -> rec_fake, with posteriors."""
    generator = torch.Generator().manual_seed(seed)
    new = lambda *size: torch.randn(size, generator=generator)
    x, rec, rec_rec, fake, rec_fake = (new(*shape).to(device, dtype) for _ in range(5))
    means, logvars = ([new(shape[0], latents).to(device) for _ in range(3)] for _ in range(2))
    pairs = ((x, rec), (rec, rec_rec), (fake, rec_fake))
    return [Source(*pair, mean, logvar) for pair, mean, logvar in zip(pairs, means, logvars, strict=True)]


def distinct(sources):
    """The tensors of sources, each once."""
    found = []
    for source in sources:
        for tensor in source:
            if tensor is not None and not any(tensor is other for other in found):
                found.append(tensor)
    return found


def mapped(sources, change):
    """Sources with every tensor changed once, so that shared tensors stay shared."""
    known = {id(tensor): change(tensor) for tensor in distinct(sources)}
    return [Source(*(None if t is None else known[id(t)] for t in source)) for source in sources]


def leaves(sources):
    return mapped(
        sources, lambda tensor: tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    )


def exact(sources, members, weights, upstream=1.0, **options):
    """(loss, statistics, gradients by every distinct tensor) of the definition in float64 on the CPU."""
    double = mapped(sources, lambda tensor: tensor.detach().cpu().double().requires_grad_())
    loss, statistics = reference.phase(double, members, weights.cpu().double(), **options)
    gradients = torch.autograd.grad(loss * upstream, distinct(double), allow_unused=True)
    return loss.detach(), statistics, gradients


def close(got, want, relative):
    """`got` differs from float64 `want` by less than `relative` of the largest entry of `want`."""
    got = got.detach().cpu().double()
    assert got.shape == want.shape
    scale = want.abs().max().clamp(min=1e-30)
    error = (got - want).abs().max() / scale
    assert error <= relative, f"relative error {error:.3g} above {relative:g}"


#: relative errors of gradients in the dtype they are rounded to; Triton's interpreter truncates to bfloat16
ROUNDING = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 6e-4}
