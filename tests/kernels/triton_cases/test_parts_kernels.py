"""Kernels of the parts, sample with KL and reconstruction errors, against the definitions in float64."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sivae_fast.kernels import reference
from sivae_fast.kernels.gaussian import gaussian_kl, reparameterize, sample_and_kl
from sivae_fast.kernels.philox import normal
from sivae_fast.kernels.reconstruction import reconstruction_error
from tests.kernels.losses import ROUNDING, close

pytestmark = pytest.mark.usefixtures("poisoned")
QUICK = settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking is too slow in the interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def leaf(*shape, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()


def doubles(*tensors):
    return [tensor.detach().cpu().double().requires_grad_() for tensor in tensors]


def same_gradients(got, tensors, want, exact, upstream, exact_upstream):
    got = torch.autograd.grad(got, tensors, upstream)
    want = torch.autograd.grad(want, exact, exact_upstream)
    for tensor, a, b in zip(tensors, got, want, strict=True):
        assert a.dtype == tensor.dtype
        close(a, b, ROUNDING[tensor.dtype])


@given(
    samples=st.integers(1, 4),
    latents=st.integers(1, 1500),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    prior=st.sampled_from(["standard", "std", "shared", "full"]),
    bounds=st.sampled_from([None, (-0.5, 0.7)]),
    stretched=st.booleans(),
    seed=st.integers(0, 100),
)
@QUICK
def test_sample_and_kl(device, samples, latents, dtype, prior, bounds, stretched, seed):
    mean, logvar, noise = (
        leaf(samples, latents, device=device, dtype=dtype, seed=seed + i) for i in range(3)
    )
    priors, options = [], {"logvar_clamp": bounds}
    if prior in ("shared", "full"):
        shape = (latents,) if prior == "shared" else (samples, latents)
        priors = [leaf(*shape, device=device, seed=seed + i) for i in (3, 4)]
        options |= {"prior_mean": priors[0], "prior_logvar": priors[1]}
    elif prior == "std":
        options["prior_std"] = 0.2
    z, kl = sample_and_kl(mean, logvar, noise, **options)
    assert z.dtype == dtype and kl.dtype == torch.float32
    exact = doubles(mean, logvar, noise, *priors)
    spread = exact[3:] or [0.0, 2 * torch.tensor(options.get("prior_std", 1.0)).double().log()]
    want_z = reference.reparameterize(*exact[:3], bounds)
    want_kl = reference.gaussian_kl(*exact[:2], *spread, bounds)
    close(z, want_z.detach(), ROUNDING[dtype])
    close(kl, want_kl.detach(), 2e-6)
    by_z = leaf(samples, latents, device=device, dtype=dtype, seed=9).detach()
    by_kl = (
        torch.full((1,), 0.7, device=device).expand(samples)
        if stretched
        else torch.rand(samples, device=device)
    )
    upstream, exact_upstream = (by_z, by_kl), [t.cpu().double() for t in (by_z, by_kl)]
    same_gradients(
        (z, kl), [mean, logvar, noise, *priors], (want_z, want_kl), exact, upstream, exact_upstream
    )


def test_one_result_alone(device):
    mean, logvar, noise = (leaf(3, 40, device=device, seed=i) for i in range(3))
    exact = doubles(mean, logvar, noise)
    z, kl = reparameterize(mean, logvar, noise), gaussian_kl(mean, logvar)
    close(z, reference.reparameterize(*exact).detach(), 1e-6)
    close(kl, reference.gaussian_kl(*exact[:2]).detach(), 2e-6)
    ones = torch.ones_like(z)
    same_gradients(
        z, [mean, logvar, noise], reference.reparameterize(*exact), exact, ones, ones.cpu().double()
    )
    same_gradients(
        kl,
        [mean, logvar],
        reference.gaussian_kl(*exact[:2]),
        exact[:2],
        ones[:, 0],
        ones.cpu().double()[:, 0],
    )


def test_noise_of_a_seed(device):
    """The kernel's numbers are those of the definition of Philox, in the forward and the backward pass."""
    mean, logvar = (leaf(3, 700, device=device, seed=i) for i in range(2))
    seed = torch.tensor([2**40 + 12345], device=device)
    z, _ = sample_and_kl(mean, logvar, seed=seed)
    noise = normal(seed.cpu(), mean.shape).to(device)
    expected = reparameterize(mean.detach(), logvar.detach(), noise)
    torch.testing.assert_close(z, expected, rtol=0, atol=2e-5)
    assert torch.equal(sample_and_kl(mean, logvar, seed=seed)[0], z)
    assert not torch.equal(sample_and_kl(mean, logvar, seed=seed + 1)[0], z)
    (by_logvar,) = torch.autograd.grad(z.sum(), logvar)
    torch.testing.assert_close(by_logvar, 0.5 * (expected - mean).detach(), rtol=0, atol=2e-5)


@given(
    samples=st.integers(1, 4),
    elements=st.sampled_from([1, 7, 130, 4551]),
    kind=st.sampled_from(reference.RECONSTRUCTIONS),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16])] * 2),
    stretched=st.booleans(),
    seed=st.integers(0, 100),
)
@QUICK
def test_reconstruction_error(device, samples, elements, kind, dtypes, stretched, seed):
    pair = [leaf(samples, elements, device=device, dtype=dtypes[i], seed=seed + i).detach() for i in range(2)]
    if kind.startswith("bce"):
        pair[0] = pair[0].sigmoid()
    if kind == "bce":
        pair[1] = pair[1].float().sigmoid().clamp(0.01, 0.99).to(dtypes[1])
    for tensor in pair:
        tensor.requires_grad_()
    error = reconstruction_error(*pair, kind, 0.8)
    exact = doubles(*pair)
    want = reference.reconstruction_error(*exact, kind, 0.8)
    close(error, want.detach(), 2e-6)
    upstream = (
        torch.full((1,), -0.7, device=device).expand(samples)
        if stretched
        else torch.rand(samples, device=device)
    )
    same_gradients(error, pair, want, exact, upstream, upstream.cpu().double())


def test_reconstruction_error_of_images_in_any_layout(device):
    x, y = (leaf(2, 3, 8, 6, device=device, seed=i) for i in range(2))
    last = [t.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, y)]
    plain = torch.autograd.grad(reconstruction_error(x, y).sum(), (x, y))
    for pair in (last, [x, last[1]]):
        for got, want in zip(
            torch.autograd.grad(reconstruction_error(*pair).sum(), pair), plain, strict=True
        ):
            torch.testing.assert_close(got, want)
    assert torch.autograd.grad(reconstruction_error(*last).sum(), last[0])[0].is_contiguous(
        memory_format=torch.channels_last
    )


def test_certain_predictions(device):
    """Probabilities of exactly 0 and 1 give errors of at most 100 and finite gradients, as in PyTorch."""
    target = torch.tensor([[0.0, 1.0, 0.0, 1.0]], device=device)
    prediction = torch.tensor([[0.0, 1.0, 1.0, 0.0]], device=device, requires_grad=True)
    error = reconstruction_error(target, prediction, "bce")
    assert error.item() == 200
    (gradient,) = torch.autograd.grad(error.sum(), prediction)
    assert gradient.isfinite().all()
    logits = torch.tensor([[-300.0, 300.0]], device=device)
    assert reconstruction_error(target[:, :2], logits, "bce_logits").item() == 0
