"""A phase on the CPU: the definition against the formulas written out, the operator against the
definition."""

import copy
import math

import pytest
import torch

from sivae_fast.kernels import closed_form, reference
from sivae_fast.kernels.introspective import phase
from sivae_fast.kernels.reference import RECONSTRUCTIONS, Member, Source
from tests.kernels.losses import (
    MEMBERS,
    SOFT,
    SOFT_MEMBERS,
    chain,
    close,
    distinct,
    exact,
    leaves,
    mapped,
    soft,
    table,
)


def unit(sources, kind):
    """Sources whose values suit a cross-entropy."""
    if kind == "bce":
        return mapped(sources, lambda t: t.sigmoid() if t.shape[1:] == sources[0].target.shape[1:] else t)
    if kind == "bce_logits":
        return [s._replace(target=torch.rand_like(s.target)) for s in sources]
    return sources


def through(sources, members, rows, **options):
    """The operator as a function of its distinct tensors, for gradcheck."""
    tensors = distinct(sources)
    places = [
        [None if t is None else next(i for i, d in enumerate(tensors) if d is t) for t in s] for s in sources
    ]

    def loss(*given):
        rebuilt = [Source(*(None if i is None else given[i] for i in places_of)) for places_of in places]
        return phase(rebuilt, members, table(rows), **options)[0]

    return loss, [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize(("members", "rows"), MEMBERS.values(), ids=MEMBERS)
def test_gradients_of_every_member(members, rows):
    sources = chain((3, 2, 2), 3)[: len(members)]
    loss, tensors = through(sources, members, rows, prior_std=0.7, bounds=(-1.0, 1.0))
    assert torch.autograd.gradcheck(loss, tensors)


@pytest.mark.parametrize(("members", "rows"), MEMBERS.values(), ids=MEMBERS)
def test_options_of_the_definition(members, rows):
    """Prior, bounds and Huber's delta, as the operator has them."""
    sources = leaves(chain((3, 2, 2), 3)[: len(members)])
    options = {"reconstruction": "huber", "huber_delta": 0.3, "prior_std": 0.7, "bounds": (-0.4, 0.5)}
    loss, statistics = phase(sources, members, table(rows), **options)
    want, want_statistics, want_gradients = exact(sources, members, table(rows), **options)
    assert not want_statistics.requires_grad
    close(loss, want, 1e-6)
    close(statistics, want_statistics, 1e-6)
    for got, expected in zip(torch.autograd.grad(loss, distinct(sources)), want_gradients, strict=True):
        close(got, expected, 4e-6)


def test_gradients_of_images_that_several_pairs_share_in_any_order():
    real, rec, fake = chain((3, 4), 2)
    again = Source(fake.target, real.prediction)  # one prediction of two pairs
    for sources in ([rec, real, again], [again, rec, real]):
        loss, tensors = through(
            sources, (Member.LINEAR,) * 3, [[0.1, 0, 0, 0], [0.2, 0, 0, 0], [0.4, 0, 0, 0]]
        )
        assert torch.autograd.gradcheck(loss, tensors)


@pytest.mark.parametrize("kind", RECONSTRUCTIONS)
def test_gradients_of_every_error(kind):
    loss, tensors = through(
        unit(chain((2, 5), 2), kind), SOFT_MEMBERS, SOFT, reconstruction=kind, huber_delta=0.6
    )
    assert torch.autograd.gradcheck(loss, tensors)


def test_gradients_of_given_errors():
    real, rec, _ = chain((3, 4), 2)
    sources = [
        Source(error=torch.rand(3), mean=real.mean, logvar=real.logvar),
        rec,
        Source(error=torch.rand(3)),
    ]
    loss, tensors = through(sources, SOFT_MEMBERS, SOFT)
    assert torch.autograd.gradcheck(loss, tensors)


MIXED = (Member.LINEAR, Member.LINEAR, Member.EXPONENTIAL)


@pytest.mark.parametrize(
    "members", [(Member.LINEAR,) * 3, MIXED, SOFT_MEMBERS], ids=["linear", "mixed", "soft"]
)
@pytest.mark.parametrize("parts", ["pe", "kp", "kke", "ppp", "kkk", "eee"])
def test_parts_that_are_missing_count_as_zero(poisoned, parts, members):
    """Not as what the memory of the statistics held before. p: images, k: a posterior, e: errors."""
    part = {
        "p": lambda s: Source(s.target, s.prediction),
        "k": lambda s: Source(mean=s.mean, logvar=s.logvar),
        "e": lambda s: Source(error=s.target.square().sum(1)),
    }
    sources = leaves([part[kind](s) for kind, s in zip(parts, chain((3, 4), 2), strict=False)])
    members, rows = members[: len(parts)], table([*SOFT[1:], SOFT[1]][: len(parts)])
    rows[2:, [member == Member.LINEAR for member in members]] = 0
    loss, statistics = phase(sources, members, rows)
    want, want_statistics, want_gradients = exact(sources, members, rows)
    close(loss, want, 1e-6)
    close(statistics, want_statistics, 1e-6)
    for got, expected in zip(torch.autograd.grad(loss, distinct(sources)), want_gradients, strict=True):
        close(got, expected, 4e-6)


def test_exponents_above_zero_count_as_zero():
    sources = leaves([Source(error=torch.tensor([-9.0, 1.0, -3.0]))])
    rows = table([[1.0, 0, 0.25, 0.5]])
    loss, _ = phase(sources, [Member.EXPONENTIAL], rows)
    want, _, (want_gradient,) = exact(sources, [Member.EXPONENTIAL], rows)
    assert want.item() == pytest.approx(0.25 * (2 + math.exp(-0.5)) / 3)
    assert want_gradient.tolist() == pytest.approx([-0.125 / 3, -0.125 / 3 * math.exp(-0.5), -0.125 / 3])
    close(loss, want, 1e-6)
    close(*torch.autograd.grad(loss, distinct(sources)), want_gradient, 1e-6)


@pytest.mark.parametrize("size", [(5,), (70_000,)], ids=["short rows", "long rows"])
@pytest.mark.parametrize("kind", RECONSTRUCTIONS)
def test_operator_against_definition(kind, size):
    sources = leaves(unit(chain((2, *size), 3), kind))
    loss, statistics = phase(sources, SOFT_MEMBERS, table(soft(size[0])), reconstruction=kind)
    want, want_statistics, want_gradients = exact(
        sources, SOFT_MEMBERS, table(soft(size[0])), reconstruction=kind
    )
    close(loss, want, 1e-6)
    close(statistics, want_statistics, 1e-6)
    gradients = torch.autograd.grad(loss, distinct(sources))
    for got, expected in zip(gradients, want_gradients, strict=True):
        close(got, expected, 4e-6)


def test_definition_against_formulas_written_out():
    """Soft-IntroVAE's encoder phase as published: scale, 1/4 + 1/4, exponent -2 scale (...)."""
    real, rec, fake = mapped(chain((4, 3, 5, 5), 6), torch.Tensor.double)
    scale, beta_rec, beta_kl, beta_neg = 0.01, 0.7, 0.9, 3.0
    sse = lambda s: ((s.target - s.prediction) ** 2).sum((1, 2, 3))
    kl = lambda s: 0.5 * (s.mean**2 + s.logvar.exp() - 1 - s.logvar).sum(1)
    elbo = lambda s: torch.exp(-2 * scale * (beta_rec * sse(s) + beta_neg * kl(s)))
    want = scale * (beta_rec * sse(real).mean() + beta_kl * kl(real).mean())
    want = want + 0.25 * (elbo(rec).mean() + elbo(fake).mean())
    rows = [[scale * beta_rec, scale * beta_kl, 0, 0], *[[beta_rec, beta_neg, 0.25, 2 * scale]] * 2]
    for function in (reference.phase, phase):
        loss, statistics = function([real, rec, fake], SOFT_MEMBERS, table(rows))
        torch.testing.assert_close(loss, want, rtol=1e-13, atol=0)
        for column, source in enumerate((real, rec, fake)):
            torch.testing.assert_close(statistics[0, column], sse(source))
            torch.testing.assert_close(statistics[1, column], kl(source))
        torch.testing.assert_close(statistics[2, 1], elbo(rec))


def test_slopes_of_the_members():
    """dPhi/du = -p q exp(-q u) for the exponential; -p below the margin and 0 above it for the hinge."""
    u = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True)
    for member, want in (
        (Member.EXPONENTIAL, -0.5 * 2 * (-2 * u).exp()),
        (Member.HINGE, torch.tensor([-0.5, 0.0])),
    ):
        loss, _ = phase([Source(error=u)], [member], table([[1.0, 0.0, 0.5, 2.0]]))
        torch.testing.assert_close(torch.autograd.grad(loss * 2, u)[0], want.detach().double())


def test_channels_last_gradients_keep_their_order():
    sources = leaves(
        mapped(
            chain((2, 3, 4, 4), 2),
            lambda t: t if t.dim() < 4 else t.contiguous(memory_format=torch.channels_last),
        )
    )
    loss, _ = phase(sources, SOFT_MEMBERS, table(SOFT))
    loss.backward()
    assert sources[1].prediction.grad.is_contiguous(memory_format=torch.channels_last)


def test_second_derivatives_are_refused():
    sources = leaves(chain((2, 4), 2))
    loss, _ = phase(sources, SOFT_MEMBERS, table(SOFT))
    (gradient,) = torch.autograd.grad(loss, sources[0].prediction, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


def test_twice_is_the_same_and_needs_the_graph():
    sources = leaves(chain((2, 4), 2))
    loss, _ = phase(sources, SOFT_MEMBERS, table(SOFT))
    tensors = distinct(sources)
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, tensors)))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, tensors)


def operator_arguments(dtype, needs_grad):
    real, rec, fake = mapped(chain((2, 3, 4, 4), 5), lambda t: t.to(dtype))
    images = [real.target, real.prediction, rec.prediction, fake.target, fake.prediction]
    latents = [real.mean, rec.mean, fake.mean, real.logvar, rec.logvar, fake.logvar]
    tensors = [t.detach().requires_grad_(needs_grad) for t in (*images, *latents)]
    plan = [5, 3, 0, 0, 1, 0, -1, 1, 1, 2, 1, -1, 1, 3, 4, 2, -1]
    return tensors, [table(SOFT)], plan, [1.0, 1.0, float("-inf"), float("inf")], "sse"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_operators_pass_opcheck(dtype):
    arguments = operator_arguments(dtype, True)
    torch.library.opcheck(torch.ops.sivae_fast.phase.default, arguments)
    tensors, *rest = operator_arguments(dtype, False)
    outputs = list(torch.ops.sivae_fast.phase(tensors, *rest)[1:])
    needs = [True, False, True, True, False, True, *[True] * 6]
    upstream = torch.ones((), dtype=outputs[0].dtype)
    backward = ([upstream], tensors, rest[0], outputs, needs, *rest[1:])
    torch.library.opcheck(torch.ops.sivae_fast.phase_backward.default, backward)


GOOD = chain((2, 3, 4), 5)
X, MEAN = GOOD[0].target, GOOD[0].mean
WRONG = {
    "no pair": ((X, None, MEAN, MEAN), ValueError, "rec has target, mean, logvar: target and prediction"),
    "no part": ((), ValueError, "rec has no part"),
    "pair and error": ((X, X, None, None, X[:, 0, 0]), ValueError, "error in place of the pair"),
    "integers": ((X.int(), X), TypeError, "target of rec is torch.int32, must be float16"),
    "not a tensor": ((X, [1.0]), TypeError, "prediction of rec is a list"),
    "shape": (
        (X, X[:, :2]),
        ValueError,
        r"prediction of rec has shape \[2, 2, 4\], target of real \[2, 3, 4\]",
    ),
    "batch": ((None, None, MEAN[:1], MEAN), ValueError, r"mean of rec has shape \[1, 5\]"),
    "error": ((None, None, MEAN, MEAN, X), ValueError, r"error of rec has shape \[2, 3, 4\], must be \[B\]"),
    "device": ((X.to("meta"), X), ValueError, "target of rec is on meta, target of real on cpu"),
}


@pytest.mark.parametrize(("parts", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_sources(parts, error, message):
    with pytest.raises(error, match=message):
        phase([GOOD[0], Source(*parts)], SOFT_MEMBERS[:2], table(SOFT[:2]), names=["real", "rec"])


@pytest.mark.parametrize("shape", [(4, 3), (2, 4), (4,)])
def test_weights_of_another_size(shape):
    with pytest.raises(ValueError, match=r"weights has shape \[.*\], must be \[4, 2\]"):
        phase(GOOD[:2], SOFT_MEMBERS[:2], torch.ones(shape))


def test_empty_batch():
    with pytest.raises(
        ValueError, match=r"target of real has shape \[0, 3, 4\], must be \[B, ...\] with no dim"
    ):
        phase(mapped(GOOD, lambda t: t[:0]), SOFT_MEMBERS, table(SOFT), names=["real", "rec", "fake"])


def test_what_is_kept_with_weights_is_not_taken_for_a_copy_that_changed_as_often():
    weights = torch.rand(4, 3, dtype=torch.float64)
    for _ in range(5):
        weights.mul_(2)
    closed_form._columns(weights, torch.float64)
    twin = copy.deepcopy(weights)
    while twin._version < weights._version:
        twin.add_(1)
    assert twin._version == weights._version
    torch.testing.assert_close(torch.cat(closed_form._columns(twin, torch.float64), 1).T, twin)


def test_what_is_kept_with_weights_follows_their_changes_and_the_dtype():
    weights = torch.rand(4, 3, dtype=torch.float64)
    kept = lambda dtype: torch.cat(closed_form._columns(weights, dtype), 1).T
    for dtype in (torch.float64, torch.float32):
        torch.testing.assert_close(kept(dtype), weights.to(dtype))
    weights.mul_(2)
    torch.testing.assert_close(kept(torch.float32), weights.float())


def test_long_rows_in_half_precision_are_computed_in_float32():
    half = mapped(chain((2, 70_000), 3), torch.Tensor.bfloat16)
    found = [phase(s, SOFT_MEMBERS, table(soft(70_000)))[1] for s in (half, mapped(half, torch.Tensor.float))]
    torch.testing.assert_close(*found)


def test_a_backward_pass_that_cannot_tell_is_asked_once(monkeypatch):
    """`torch.autograd.grad` raises for its leaves: nine times of that made a small loss slow."""
    asked, ask = [], torch._C._will_engine_execute_node
    monkeypatch.setattr(torch._C, "_will_engine_execute_node", lambda node: asked.append(node) or ask(node))
    sources = leaves(chain((2, 3), 2))
    loss, _ = phase(sources, SOFT_MEMBERS, table(SOFT))
    gradients = torch.autograd.grad(loss, distinct(sources))
    assert len(asked) == 1
    loss, _ = phase(sources, SOFT_MEMBERS, table(SOFT))
    loss.backward()
    assert len(asked) == 1 + len(gradients)
    for tensor, gradient in zip(distinct(sources), gradients, strict=True):
        assert torch.equal(tensor.grad, gradient)
