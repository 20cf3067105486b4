"""Sample with KL and reconstruction errors on the CPU: definitions, gradients, the operators' contract."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from sivae_fast.kernels import reference
from sivae_fast.kernels.gaussian import gaussian_kl, reparameterize, sample_and_kl
from sivae_fast.kernels.introspective import phase
from sivae_fast.kernels.philox import _bits, normal
from sivae_fast.kernels.reconstruction import reconstruction_error
from sivae_fast.kernels.reference import Member, Source


def doubles(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def test_kl_is_that_of_the_distributions():
    mean, logvar, m, v = doubles((3, 6), (3, 6), (6,), (6,))
    q, p = Normal(mean, (0.5 * logvar).exp()), Normal(m, (0.5 * v).exp())
    torch.testing.assert_close(
        gaussian_kl(mean, logvar, prior_mean=m, prior_logvar=v), kl_divergence(q, p).sum(1)
    )
    narrow = Normal(torch.zeros(6).double(), 0.2)
    torch.testing.assert_close(gaussian_kl(mean, logvar, prior_std=0.2), kl_divergence(q, narrow).sum(1))


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_kl_near_the_prior(size):
    """exp(t) - 1 - t = t^2/2 + t^3/6 + ... of a small t, where exp(t), 1 and t cancel."""
    mean, logvar = (size * torch.randn(2, 4096, 32, generator=torch.Generator().manual_seed(0))).unbind()
    t = logvar.double()
    want = 0.5 * (mean.double().square() + t * t * (1 + t / 3 * (1 + t / 4 * (1 + t / 5))) / 2).sum(1)
    for kl in (gaussian_kl(mean, logvar), sample_and_kl(mean, logvar, mean)[1]):
        assert kl.dtype == torch.float32 and (kl >= 0).all()
        torch.testing.assert_close(kl.double(), want, rtol=1e-5, atol=0)
    means = torch.zeros(4096, 32)
    assert (reference.gaussian_kl(means, logvar) >= 0).all()
    objective = phase(
        [Source(mean=means, logvar=logvar)], [Member.LINEAR], torch.tensor([[0.0], [1], [0], [0]])
    )
    assert (objective[1][1] >= 0).all()


def test_known_kl():
    """Values that an independent implementation printed in double precision."""

    def fill(t, *shape):
        j = torch.arange(torch.Size(shape).numel())
        return (2 * ((7919 * j + 104729 * t + 13) % 1009).double() / 1008 - 1).view(shape)

    kl = gaussian_kl(fill(3, 2, 16), fill(4, 2, 16))
    torch.testing.assert_close(
        kl, torch.tensor([4.19906758323, 4.14953369873], dtype=torch.float64), rtol=1e-11, atol=0
    )
    error = reconstruction_error(fill(5, 2, 3, 4, 4), fill(6, 2, 3, 4, 4))
    torch.testing.assert_close(error, torch.full((2,), 31.731473608, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("bounds", [None, (-0.5, 0.5)])
def test_gradients_of_sample_and_kl(bounds):
    tensors = doubles(*[(3, 4)] * 3, (4,), (3, 4))
    both = lambda mean, logvar, noise, m, v: sample_and_kl(
        mean, logvar, noise, prior_mean=m, prior_logvar=v, logvar_clamp=bounds
    )
    assert torch.autograd.gradcheck(both, tensors)
    assert torch.autograd.gradcheck(lambda m, v: gaussian_kl(m, v, prior_std=0.3), tensors[:2])
    seeded = lambda m, v: sample_and_kl(m, v, seed=torch.tensor([5]), logvar_clamp=bounds)
    assert torch.autograd.gradcheck(seeded, tensors[:2])
    assert torch.autograd.gradcheck(lambda *t: reparameterize(*t, logvar_clamp=bounds), tensors[:3])


def test_bounds_hold_for_every_kind_of_noise():
    mean, logvar, noise = doubles(*[(3, 4)] * 3)
    for given in ({"noise": noise}, {"seed": torch.tensor([5])}):
        bounded = reparameterize(mean, logvar, **given, logvar_clamp=(-0.5, 0.5))
        assert torch.equal(bounded, reparameterize(mean, logvar.clamp(-0.5, 0.5), **given))
        z, kl = sample_and_kl(mean, logvar, **given, logvar_clamp=(-0.5, 0.5))
        assert torch.equal(z, bounded) and torch.equal(kl, gaussian_kl(mean, logvar.clamp(-0.5, 0.5)))
    assert torch.equal(gaussian_kl(mean, logvar, logvar_clamp=(-0.5, 0.5)), kl)


@pytest.mark.parametrize("definition", [True, False])
def test_gradients_on_a_bound_are_those_inside(definition):
    kl = reference.gaussian_kl if definition else gaussian_kl
    mean, logvar = torch.zeros(2, 3), torch.tensor([[-0.5, 0.0, 0.5], [-0.6, 0.1, 0.6]]).requires_grad_()
    found = kl(mean, logvar, bounds=(-0.5, 0.5)) if definition else kl(mean, logvar, logvar_clamp=(-0.5, 0.5))
    (gradient,) = torch.autograd.grad(found.sum(), logvar)
    inside = 0.5 * logvar.detach().expm1()
    inside[1, [0, 2]] = 0
    torch.testing.assert_close(gradient, inside)


@pytest.mark.parametrize("error", [reference.reconstruction_error, reconstruction_error])
def test_the_gradient_of_logits_of_zero(error):
    """A decoder whose last layer starts at zero gives no others."""
    y, x = torch.zeros(2, 3, requires_grad=True), torch.rand(2, 3)
    (gradient,) = torch.autograd.grad(error(x, y, kind="bce_logits").sum(), y)
    torch.testing.assert_close(gradient, 0.5 - x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_share_memory_with_nothing(dtype):
    """Two passes add up in place, and what is done to a gradient is done to it alone."""
    shapes = (3, 6), (3, 6), (3, 6), (3, 6)
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in doubles(*shapes)]
    mean, logvar, prior_mean, prior_logvar = leaves
    noise = torch.ones(3, 6, dtype=dtype)
    z, kl = sample_and_kl(mean, logvar, noise, prior_mean=prior_mean, prior_logvar=prior_logvar)
    want = torch.autograd.grad(z.sum() + kl.sum(), leaves, retain_graph=True)
    upstream = torch.ones_like(z)
    z.backward(upstream, retain_graph=True)
    kl.sum().backward()
    for leaf, gradient in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)
    assert (upstream == 1).all()


@pytest.mark.parametrize("kind", reference.RECONSTRUCTIONS)
def test_gradients_of_errors(kind):
    generator = torch.Generator().manual_seed(1)
    pair = [torch.rand(3, 2, 2, generator=generator).double().requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *t: reconstruction_error(*t, kind, 0.3), pair)


@pytest.mark.parametrize("kind", reference.RECONSTRUCTIONS)
def test_gradients_of_one_argument_alone(kind):
    x, y = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    error = lambda x, y: reconstruction_error(x, y, kind, 0.3)
    assert torch.autograd.gradcheck(error, (x.clone().requires_grad_(), y))
    assert torch.autograd.gradcheck(error, (x, y.clone().requires_grad_()))


@pytest.mark.parametrize("layouts", [(True, True), (True, False), (False, True)], ids=str)
def test_gradients_of_channels_last_images(layouts):
    pair = doubles((2, 3, 4, 5), (2, 3, 4, 5))
    laid = [
        t.detach().contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        for t, last in zip(pair, layouts, strict=True)
    ]
    laid = [t.requires_grad_() for t in laid]
    found, want = (
        torch.autograd.grad(reconstruction_error(*p, "l1").square().sum(), p) for p in (laid, pair)
    )
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["bce", "bce_logits"])
def test_targets_that_are_no_probabilities_give_no_gradients_either(kind):
    x, y = torch.tensor([[0.5, 1.5]], requires_grad=True), torch.tensor([[0.5, 0.5]], requires_grad=True)
    error = reconstruction_error(x, y, kind)
    for gradient in torch.autograd.grad(error.sum(), (x, y)):
        assert gradient.isnan().tolist() == [[False, True]] and error.isnan()


def test_errors_are_those_of_pytorch():
    x, y = torch.rand(2, 4, 3, 5).unbind()
    known = {
        "sse": F.mse_loss(y, x, reduction="none"),
        "l1": F.l1_loss(y, x, reduction="none"),
        "huber": F.huber_loss(y, x, reduction="none", delta=0.4),
        "bce": F.binary_cross_entropy(y, x, reduction="none"),
        "bce_logits": F.binary_cross_entropy_with_logits(y, x, reduction="none"),
    }
    for kind, errors in known.items():
        torch.testing.assert_close(reconstruction_error(x, y, kind, 0.4), errors.flatten(1).sum(1))


def test_certain_probabilities_are_those_of_pytorch():
    x = torch.tensor([[0.0, 1.0, 1.0, 0.5]])
    y = torch.tensor([[0.0, 1.0, 0.0, 1.0]], requires_grad=True)
    errors, known = reconstruction_error(x, y, "bce"), F.binary_cross_entropy(y, x, reduction="sum")
    torch.testing.assert_close(errors.sum(), known)
    (got,) = torch.autograd.grad(errors.sum(), y)
    (want,) = torch.autograd.grad(known, y)
    torch.testing.assert_close(got, want)


def test_philox_against_its_published_vectors():
    """Known answers of Philox 4x32-10: counter and key of zeros, and of ones (Random123, kat_vectors)."""
    first, second = _bits(torch.tensor(0), torch.tensor([0]))
    assert (first.item(), second.item()) == (0x6627E8D5, 0xE169C58D)


def test_philox_is_standard_normal():
    numbers = normal(torch.tensor([42]), torch.Size([200_000])).double()
    assert abs(numbers.mean()) < 0.01 and abs(numbers.std() - 1) < 0.01
    quantiles = numbers.quantile(torch.tensor([0.025, 0.5, 0.975]).double())
    torch.testing.assert_close(quantiles, torch.tensor([-1.96, 0.0, 1.96]).double(), rtol=0, atol=0.03)
    assert abs((numbers[1:] * numbers[:-1]).mean()) < 0.01


def test_dtypes_and_shapes():
    mean, logvar = torch.randn(2, 4, 3, 2).to(torch.bfloat16).unbind()
    z, kl = sample_and_kl(mean, logvar, torch.randn(4, 3, 2))
    assert z.dtype == torch.bfloat16 and z.shape == mean.shape
    assert kl.dtype == torch.float32 and kl.shape == (4,)
    assert reconstruction_error(mean, mean.float()).dtype == torch.float32


@pytest.mark.parametrize("name", ["gaussian", "reconstruction_error"])
def test_operators_pass_opcheck(name):
    forward, backward = (getattr(torch.ops.sivae_fast, n).default for n in (name, f"{name}_backward"))
    if name == "gaussian":
        tensors, plan, numbers, kind = doubles(*[(3, 4)] * 5), [1, 0, 1], [0.0, -9.0, 9.0], ""
        upstream, needs = doubles((3, 4), (3,)), [True] * 7
    else:
        tensors, plan, numbers, kind = doubles(*[(3, 2, 4)] * 2), [0], [1.0], "sse"
        upstream, needs = doubles((3,)), [True] * 3
    torch.library.opcheck(forward, (tensors, [], plan, numbers, kind))
    half = [tensor.detach().bfloat16() for tensor in tensors]
    torch.library.opcheck(forward, (half, [], plan, numbers, kind), test_utils="test_faketensor")
    plain = [t.detach() for t in tensors]
    upstream = [t.detach() for t in upstream]
    torch.library.opcheck(backward, (upstream, plain, [], [], needs, plan, numbers, kind))


def test_second_derivatives_are_refused():
    mean, logvar = doubles((2, 3), (2, 3))
    (gradient,) = torch.autograd.grad(gaussian_kl(mean, logvar).sum(), mean, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


def dual(function, mean):
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(mean, mean))


TRANSFORMS = {
    "jvp": lambda f, mean: torch.func.jvp(f, (mean,), (mean,)),
    "dual numbers": dual,
    "vmap": lambda f, mean: torch.func.vmap(f)(mean[None]),
    **{
        n: lambda f, mean, n=n: getattr(torch.func, n)(f)(mean)
        for n in ("grad", "jacfwd", "jacrev", "hessian")
    },
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_are_refused(transform):
    """Zeros for tangents, for one, would be a wrong answer without a word."""
    mean, other = torch.randn(2, 4, 3).unbind()
    weights = torch.tensor([[1.0], [1], [0], [0]])
    for function in (
        lambda m: gaussian_kl(m, other).sum(),
        lambda m: sample_and_kl(m, other, other)[1].sum(),
        lambda m: reconstruction_error(m, other).sum(),
        lambda m: phase([Source(mean=m, logvar=other)], [Member.LINEAR], weights)[0],
    ):
        with pytest.raises(RuntimeError, match=r"the fused operators know backward\(\) .* alone"):
            transform(function, mean)


MEAN = torch.zeros(2, 3)
WRONG = {
    "no noise": (lambda: sample_and_kl(MEAN, MEAN), ValueError, "noise and seed: exactly one"),
    "both": (lambda: sample_and_kl(MEAN, MEAN, MEAN, seed=torch.tensor([1])), ValueError, "exactly one"),
    "both of a sample": (
        lambda: reparameterize(MEAN, MEAN, MEAN, seed=torch.tensor([1])),
        ValueError,
        "noise and seed: exactly one",
    ),
    "noise": (lambda: sample_and_kl(MEAN, MEAN, MEAN[:, :1]), ValueError, r"noise has shape \[2, 1\], mean"),
    "seed": (lambda: sample_and_kl(MEAN, MEAN, seed=MEAN), ValueError, "must be one int64 number on cpu"),
    "number": (lambda: sample_and_kl(MEAN, MEAN, seed=1), TypeError, "seed is 1, must be a tensor"),
    "seed of two": (
        lambda: sample_and_kl(MEAN, MEAN, seed=torch.tensor([1, 2])),
        ValueError,
        r"of shape \[2\] on cpu, must be one int64",
    ),
    "seed type": (
        lambda: sample_and_kl(MEAN, MEAN, seed=torch.tensor([1], dtype=torch.int32)),
        ValueError,
        r"seed is torch.int32 of shape \[1\] on cpu, must be one int64",
    ),
    "prior": (lambda: gaussian_kl(MEAN, MEAN, prior_mean=MEAN), ValueError, "give both or none"),
    "two priors": (
        lambda: gaussian_kl(MEAN, MEAN, prior_mean=MEAN, prior_logvar=MEAN, prior_std=2.0),
        ValueError,
        "prior_std is 2.0, must be left out",
    ),
    "prior type": (
        lambda: gaussian_kl(MEAN, MEAN, prior_mean=1, prior_logvar=2),
        TypeError,
        "prior_mean must be",
    ),
    "prior shape": (
        lambda: gaussian_kl(MEAN, MEAN, prior_mean=MEAN, prior_logvar=torch.zeros(2)),
        ValueError,
        r"prior_logvar has shape \[2\], must broadcast against mean, \[2, 3\]",
    ),
    "prior of more dimensions": (
        lambda: gaussian_kl(MEAN, MEAN, prior_mean=MEAN[None], prior_logvar=MEAN),
        ValueError,
        r"prior_mean has shape \[1, 2, 3\], must broadcast",
    ),
    "prior_std": (
        lambda: gaussian_kl(MEAN, MEAN, prior_std=-1.0),
        ValueError,
        "prior_std is -1.0, must be pos",
    ),
    "prior_std tensor": (
        lambda: gaussian_kl(MEAN, MEAN, prior_std=torch.tensor(2.0)),
        ValueError,
        r"prior_std is tensor\(2.\), must be a finite number: float\(prior_std\)",
    ),
    "clamp": (
        lambda: gaussian_kl(MEAN, MEAN, logvar_clamp=3),
        ValueError,
        r"logvar_clamp is 3, must be \(low",
    ),
    "clamp of a sample": (
        lambda: reparameterize(MEAN, MEAN, MEAN, logvar_clamp=(2, 1)),
        ValueError,
        r"logvar_clamp is \(2, 1\), must be \(low",
    ),
    "kind": (
        lambda: reconstruction_error(MEAN, MEAN, "mse"),
        ValueError,
        "kind is 'mse', must be one of sse, l1",
    ),
    "delta": (
        lambda: reconstruction_error(MEAN, MEAN, "huber", 0.0),
        ValueError,
        "huber_delta is 0.0, must be",
    ),
    "delta tensor": (
        lambda: reconstruction_error(MEAN, MEAN, "huber", torch.tensor(1.0)),
        ValueError,
        r"huber_delta is tensor\(1.\), must be a finite number",
    ),
    "integers": (lambda: reconstruction_error(MEAN.int(), MEAN), TypeError, "target is torch.int32, must be"),
    "shapes": (lambda: reconstruction_error(MEAN, MEAN[:1]), ValueError, r"prediction has shape \[1, 3\]"),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
