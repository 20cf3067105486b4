"""The objectives: published formulas, weights that change, compilation, errors."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sivae_fast import (
    VAE,
    IntroVAE,
    LinearIntroVAE,
    Posterior,
    SoftIntroVAE,
    Term,
    check_statistics,
    gaussian_kl,
)
from tests.models.published_fill import sequence
from tests.objective_terms import batch, same


def sse(term):
    return (term.target - term.prediction).square().sum((1, 2, 3))


def kl(term):
    mean, logvar = term.posterior
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)


def test_soft_intro_vae():
    real, rec, fake = batch()
    objective = SoftIntroVAE(beta_rec=0.5, beta_kl=0.8, beta_neg=3.0, scale=0.02, gamma_r=0.25)
    elbo = lambda term: torch.exp(-2 * 0.02 * (0.5 * sse(term) + 3 * kl(term))).mean()
    same(objective.vae(real), (0.5 * sse(real) + 0.8 * kl(real)).mean())
    same(
        objective.encoder(real, rec, fake),
        0.02 * (0.5 * sse(real) + 0.8 * kl(real)).mean() + 0.25 * (elbo(rec) + elbo(fake)),
    )
    want = 0.5 * sse(real).mean() + 0.5 * 0.8 * (kl(rec) + kl(fake)).mean()
    alone = [Term(posterior=term.posterior) for term in (rec, fake)]
    same(objective.decoder(Term(real.target, real.prediction), *alone), 0.02 * want)
    want = want + 0.25 * 0.5 * 0.5 * (sse(rec) + sse(fake)).mean()
    same(objective.decoder(Term(real.target, real.prediction), rec=rec, fake=fake), 0.02 * want)
    assert SoftIntroVAE(beta_rec=1, beta_kl=1, beta_neg=1, scale=1).gamma_r == 1e-8


def test_every_option_reaches_the_loss():
    """Huber's delta and the bounds of the log-variance, given at first and changed later."""
    real = batch()[0]
    mean, logvar = real.posterior
    error = torch.nn.functional.huber_loss(real.prediction, real.target, reduction="none", delta=0.3)
    want = (error.sum((1, 2, 3)) + kl(Term(posterior=Posterior(mean, logvar.clamp(-0.2, 0.4))))).mean()
    same(VAE(reconstruction="huber", huber_delta=0.3, logvar_clamp=(-0.2, 0.4)).vae(real), want)
    later = VAE()
    later.reconstruction, later.huber_delta, later.logvar_clamp = "huber", 0.3, (-0.2, 0.4)
    same(later.vae(real), want)
    with pytest.raises(ValueError, match="huber_delta is 0, must be positive"):
        later.huber_delta = 0


def test_golden_values():
    """Computed once in float64 by the published implementation."""
    posterior = Posterior(sequence(3, 2, 16), sequence(4, 2, 16))
    term = Term(sequence(5, 2, 3, 4, 4), sequence(6, 2, 3, 4, 4), posterior)
    objective = SoftIntroVAE(beta_rec=0.1, beta_kl=1.0, beta_neg=512.0, scale=5e-6)
    loss, found = objective.encoder(term, term, term)
    for name, golden in {
        "rec_fake": [31.731473608, 31.731473608],
        "kl_fake": [4.19906758323, 4.14953369873],
        "exp_elbo_fake": [0.97869918, 0.97894742],
        "exp_elbo_rec": [0.97869918, 0.97894742],
    }.items():
        assert found[name].tolist() == pytest.approx(golden, rel=1e-8), name
    exp_elbo = 0.978823300316
    assert found["exp_elbo_fake"].mean().item() == pytest.approx(exp_elbo, rel=1e-11)
    base = 5e-6 * (0.1 * 31.731473608 + (4.19906758323 + 4.14953369873) / 2)
    assert loss.item() == pytest.approx(base + 0.5 * exp_elbo, rel=1e-11)


@pytest.mark.parametrize("hinge", ["sample", "batch"])
def test_intro_vae(hinge):
    real, rec, fake = batch()
    objective = IntroVAE(beta_rec=0.05, beta_kl=0.8, beta_neg=0.5, margin=7.0, hinge=hinge)
    pushed = [kl(term) if hinge == "sample" else kl(term).mean() for term in (rec, fake)]
    hinges = sum((7 - value).clamp(min=0).mean() for value in pushed)
    assert hinges > 0
    base = (0.05 * sse(real) + 0.8 * kl(real)).mean()
    same(objective.vae(real), base)
    same(objective.encoder(real, rec, fake), base + 0.5 * 0.8 * 0.5 * hinges)
    want = 0.05 * sse(real).mean() + 0.5 * 0.8 * (kl(rec) + kl(fake)).mean()
    same(objective.decoder(real, rec, fake), want)


def test_linear_and_vae():
    real, rec, fake = batch()
    objective = LinearIntroVAE(beta_rec=0.3, beta_kl=0.6, beta_neg=0.2)
    base = (0.3 * sse(real) + 0.6 * kl(real)).mean()
    same(objective.encoder(real, rec, fake), base - 0.2 * 0.5 * (kl(rec) + kl(fake)).mean())
    uneven = LinearIntroVAE(beta_rec=0.3, beta_kl=0.6, beta_neg=0.2, fakes={"rec": 0.9, "fake": 0.1})
    want = base - 0.2 * (0.9 * kl(rec) + 0.1 * kl(fake)).mean()
    same(uneven.encoder(real, rec, fake), want)
    same(VAE(beta_rec=0.3, beta_kl=0.6).vae(real), base)
    with pytest.raises(TypeError, match="a VAE has one phase"):
        VAE().encoder(real, rec, fake)


def test_small_alpha_is_the_linear_member():
    """Phi - 1/alpha -> -scale (beta_rec r + beta_neg k) as alpha -> 0."""
    real, rec, fake = batch()
    alpha = 1e-7
    soft = SoftIntroVAE(beta_rec=0.5, beta_kl=0.8, beta_neg=3.0, scale=0.02, alpha=alpha)
    base = 0.02 * (0.5 * sse(real) + 0.8 * kl(real)).mean()
    linear = -0.02 * 0.5 * sum((0.5 * sse(term) + 3 * kl(term)).mean() for term in (rec, fake))
    got = soft.encoder(real, rec, fake).loss - 1 / alpha - base
    torch.testing.assert_close(got, linear, rtol=1e-4, atol=0)


def test_negative_errors_are_refused_by_a_check():
    """The exponent stops at 0: errors below would give another loss than the formula."""
    options = {"beta_rec": 1.0, "beta_kl": 1.0, "beta_neg": 1.0, "scale": 0.01}
    terms = [Term(posterior=term.posterior, error=torch.full((4,), -300.0).double()) for term in batch()]
    loss, statistics = SoftIntroVAE(**options).encoder(*terms)
    assert loss.isfinite() and (statistics["exp_elbo_rec"] == 1).all()
    slightly = [term._replace(error=torch.full((4,), -0.1).double()) for term in terms]
    checked = SoftIntroVAE(**options, check=True)
    with pytest.raises(ValueError, match=r"error of rec holds -300.0: must not be negative .* lower bound"):
        checked.encoder(*terms)
    with pytest.raises(ValueError, match=r"error of rec holds -0\.1"):
        checked.encoder(*slightly)
    same(checked.vae(terms[0]), (kl(terms[0]) - 300).mean())


def test_weights_of_numpy():
    numbers = {"beta_rec": 0.5, "beta_kl": 1, "beta_neg": 3, "scale": 0.25}
    objective = SoftIntroVAE(**{name: np.float32(value) for name, value in numbers.items()})
    objective.beta_kl = np.int64(1)
    same(objective.encoder(*batch()), SoftIntroVAE(**numbers).encoder(*batch()).loss)


def test_shapes_asked_for_on_meta_move_no_weights():
    objective = SoftIntroVAE(beta_rec=0.5, beta_kl=0.8, beta_neg=3.0, scale=0.02)
    want = objective.encoder(*batch()).loss
    shapes = [
        Term(t.target.to("meta"), t.prediction.to("meta"), Posterior(*(p.to("meta") for p in t.posterior)))
        for t in batch()
    ]
    assert objective.encoder(*shapes).loss.device.type == "meta"
    same(objective.encoder(*batch()), want)


def test_any_fake_sources():
    real, rec, fake = batch()
    other = batch(seed=1)[2]
    objective = SoftIntroVAE(
        beta_rec=0.5, beta_kl=0.8, beta_neg=3.0, scale=0.02, fakes={"fake": 0.5, "rec": 0.2, "blend": 0.3}
    )
    elbo = lambda term: torch.exp(-2 * 0.02 * (0.5 * sse(term) + 3 * kl(term))).mean()
    want = 0.02 * (0.5 * sse(real) + 0.8 * kl(real)).mean()
    want = want + 0.5 * (0.2 * elbo(rec) + 0.5 * elbo(fake) + 0.3 * elbo(other))
    same(objective.encoder(real, blend=other, rec=rec, fake=fake), want)
    same(objective.encoder(real, fake, rec, other), want)
    with pytest.raises(TypeError, match="fake sources are 2 by position, must be"):
        objective.encoder(real, fake, rec)


def test_statistics():
    real, rec, fake = batch()
    objective = SoftIntroVAE(beta_rec=0.5, beta_kl=0.8, beta_neg=3.0, scale=0.02)
    statistics = objective.encoder(real, rec, fake).statistics
    assert [*statistics] == [
        *("rec_real", "kl_real"),
        *("rec_rec", "kl_rec", "exp_elbo_rec"),
        *("rec_fake", "kl_fake", "exp_elbo_fake"),
    ]
    torch.testing.assert_close(statistics["kl_rec"], kl(rec).detach())
    torch.testing.assert_close(statistics["rec_fake"], sse(fake).detach())
    assert not any(values.requires_grad for values in statistics.values())
    hinge = IntroVAE(beta_rec=1, beta_kl=1, beta_neg=1, margin=9).encoder(real, rec, fake).statistics
    torch.testing.assert_close(hinge["hinge_fake"], (9 - kl(fake)).clamp(min=0).detach())
    posterior_only = [Term(posterior=term.posterior) for term in (rec, fake)]
    decoder = objective.decoder(Term(error=torch.rand(4)), *posterior_only).statistics
    assert [*decoder] == ["rec_real", "kl_rec", "kl_fake"]


@pytest.mark.parametrize("name", ["beta_rec", "beta_kl", "beta_neg", "scale", "alpha", "gamma_r"])
def test_a_changed_weight_counts(name):
    terms = batch()
    weights = {"beta_rec": 0.5, "beta_kl": 0.8, "beta_neg": 3.0, "scale": 0.02, "alpha": 2.0, "gamma_r": 0.5}
    objective = SoftIntroVAE(**weights)
    setattr(objective, name, 0.7)
    fresh = SoftIntroVAE(**{**weights, name: 0.7})
    assert getattr(objective, name) == 0.7
    for phase in ("encoder", "decoder"):
        same(getattr(objective, phase)(*terms), getattr(fresh, phase)(*terms).loss)
    same(objective.vae(terms[0]), fresh.vae(terms[0]).loss)


def test_a_changed_weight_counts_after_use_in_copies_and_both_dtypes():
    """What is kept of the weights between calls never outlives them."""
    weights = {"beta_rec": 0.5, "beta_kl": 0.8, "scale": 0.02}
    want = {n: SoftIntroVAE(beta_neg=n, **weights).encoder(*batch()).loss for n in (3.0, 5.0, 7.0)}
    objective = SoftIntroVAE(beta_neg=3.0, **weights)
    for value in (5.0, 3.0):
        objective.beta_neg = value
        same(objective.encoder(*batch()), want[value])
        single = [
            Term(t.target.float(), t.prediction.float(), Posterior(*(p.float() for p in t.posterior)))
            for t in batch()
        ]
        assert objective.encoder(*single).loss.item() == pytest.approx(want[value].item(), rel=1e-5)
    twin = copy.deepcopy(objective)
    twin.beta_neg = 7.0
    same(twin.encoder(*batch()), want[7.0])
    same(objective.encoder(*batch()), want[3.0])
    with torch.inference_mode():
        made_there = SoftIntroVAE(beta_neg=5.0, **weights)
        for value in (5.0, 7.0):
            made_there.beta_neg = value
            same(made_there.encoder(*batch()), want[value])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_changed_between_two_uses_counts(dtype):
    """In one dtype, which finds what was kept of the use before; and in a copy that is changed as often."""
    weights = {"beta_rec": 0.5, "beta_kl": 0.8, "scale": 0.02}
    loss = lambda objective: objective.encoder(*batch(dtype=dtype)).loss
    want = {n: loss(SoftIntroVAE(beta_neg=n, **weights)) for n in (3.0, 5.0, 7.0)}
    objective = SoftIntroVAE(beta_neg=3.0, **weights)
    for value in (3.0, 5.0):
        objective.beta_neg = value
        assert torch.equal(loss(objective), want[value])
    objective = SoftIntroVAE(beta_neg=3.0, **weights)
    objective.beta_neg = 5.0
    assert torch.equal(loss(objective), want[5.0])
    twin = copy.deepcopy(objective)
    twin.beta_neg = 7.0
    assert torch.equal(loss(twin), want[7.0]) and torch.equal(loss(objective), want[5.0])
    other = torch.float32 if dtype is torch.float64 else torch.float64
    assert objective.encoder(*batch(dtype=other)).loss.dtype == other


def test_half_precision_modules_keep_exact_weights():
    objective = SoftIntroVAE(beta_rec=0.1, beta_kl=0.3, beta_neg=100.3, scale=1 / 196608)
    before = objective.encoder(*batch()).loss
    same(objective.half().encoder(*batch()), before)


def test_statistics_and_loss_of_half_precision_images_are_float32():
    terms = [
        Term(t.target.bfloat16(), t.prediction.bfloat16(), Posterior(*(p.float() for p in t.posterior)))
        for t in batch()
    ]
    loss, statistics = SoftIntroVAE(beta_rec=0.1, beta_kl=0.3, beta_neg=1.0, scale=0.01).encoder(*terms)
    assert loss.dtype == torch.float32 and all(s.dtype == torch.float32 for s in statistics.values())


OBJECTIVES = {
    "vae": VAE(beta_rec=0.3),
    "soft": SoftIntroVAE(beta_rec=0.5, beta_kl=0.8, beta_neg=3.0, scale=0.02, logvar_clamp=(-4, 4)),
    "hinge": IntroVAE(beta_rec=0.05, beta_kl=1.0, beta_neg=0.5, margin=7.0, hinge="batch"),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_compiles_whole_and_once(objective):
    """torch.compile takes every phase without a graph break; new weights compile nothing anew."""
    torch._dynamo.reset()
    phases = ["encoder", "decoder"] if objective.introspective else ["vae"]

    def losses(terms, eps):
        terms = terms if objective.introspective else terms[:1]
        z = objective.reparameterize(terms[0].posterior, eps)
        return z, [getattr(objective, phase)(*terms) for phase in phases]

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for weight in (0.3, 0.9, 0.2):
        objective.beta_rec = weight
        terms, eps = batch(dtype=torch.float32), torch.randn(4, 6)
        tensors = [t for term in terms for t in (term.target, term.prediction, *term.posterior)]
        results = []
        for function in (losses, compiled):
            with torch._dynamo.config.patch(error_on_recompile=weight != 0.3):
                z, made = function(terms, eps)
            total = z.sum() + sum(loss for loss, _ in made)
            statistics = [value for _, values in made for value in values.values()]
            gradients = torch.autograd.grad(total, tensors, allow_unused=True)
            results.append([total, *statistics, *(g for g in gradients if g is not None)])
        assert len(results[0]) == len(results[1])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-6, atol=1e-6)


def test_compiles_once_for_all_batch_sizes():
    """Once for the first size, once more for any, as plain PyTorch does."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    objective = OBJECTIVES["soft"]

    def total(*terms):
        kl = gaussian_kl(*terms[0].posterior)
        return objective.encoder(*terms).loss + objective.decoder(*terms).loss + kl.sum()

    compiled = torch.compile(total, fullgraph=True, backend=counter)
    for samples in (4, 6, 5, 7):
        terms = batch(samples=samples)
        tensors = [t for term in terms for t in (term.target, term.prediction, *term.posterior)]
        found, want = (torch.autograd.grad(f(*terms), tensors) for f in (compiled, total))
        for got, expected in zip(found, want, strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count == 2


def test_gradients_reach_what_requires_them():
    real, rec, fake = batch()
    frozen = [
        Term(real.target.detach(), real.prediction, real.posterior),
        rec,
        Term(fake.target.detach(), fake.prediction.detach(), fake.posterior),
    ]
    objective = SoftIntroVAE(beta_rec=0.5, beta_kl=0.8, beta_neg=3.0, scale=0.02)
    objective.encoder(*frozen).loss.backward()
    assert real.prediction.grad is not None and rec.prediction.grad is not None
    assert fake.posterior.mean.grad is not None and fake.target.grad is None and real.target.grad is None


def test_reparameterize_keeps_the_clamp():
    objective = SoftIntroVAE(beta_rec=1, beta_kl=1, beta_neg=1, scale=1, logvar_clamp=(-2.0, 2.0))
    mean, logvar = torch.zeros(2, 3), torch.tensor([[-9.0, 0.0, 9.0]] * 2)
    z = objective.reparameterize(Posterior(mean, logvar), torch.ones(2, 3))
    torch.testing.assert_close(z[0].log() * 2, torch.tensor([-2.0, 0.0, 2.0]))


def test_checking_names_batch_and_sample():
    terms = batch()
    with torch.no_grad():
        terms[2].prediction[3, 0, 1, 1] = float("nan")
    options = {"beta_rec": 0.5, "beta_kl": 0.8, "beta_neg": 3.0, "scale": 0.02}
    loss, statistics = SoftIntroVAE(**options).encoder(*terms)
    assert loss.isnan()
    with pytest.raises(FloatingPointError, match=r"kl_real is inf for sample 1 .*'real' \(2 of 3 samples\)"):
        check_statistics({"rec_real": torch.ones(3), "kl_real": torch.tensor([1.0, torch.inf, torch.nan])})
    message = r"rec_fake is nan for sample 3 of the batch 'fake' \(1 of 4 samples\): its target or prediction"
    with pytest.raises(FloatingPointError, match=message):
        check_statistics(statistics)
    with pytest.raises(FloatingPointError, match=message):
        SoftIntroVAE(**options, check=True).encoder(*terms)
    terms = [Term(t.target.sigmoid(), t.prediction, t.posterior) for t in batch()]
    terms[0] = terms[0]._replace(target=terms[0].target + 0.9)
    with pytest.raises(FloatingPointError, match=r"rec_real .* outside"):
        SoftIntroVAE(**options, reconstruction="bce_logits", check=True).encoder(*terms)


def test_wrong_terms_are_named():
    real, rec, fake = batch()
    objective = SoftIntroVAE(beta_rec=1, beta_kl=1, beta_neg=1, scale=1)
    with pytest.raises(ValueError, match=r"prediction of rec has shape \[4, 3, 4, 2\]"):
        objective.encoder(real, rec._replace(prediction=rec.prediction[..., :2]), fake)
    with pytest.raises(TypeError, match=r"target of fake is torch.int64"):
        objective.encoder(real, rec, fake._replace(target=fake.target.long()))
    with pytest.raises(TypeError, match="fake sources are 1 by position, extra, must be rec, fake"):
        objective.encoder(real, rec, extra=fake)


def test_a_term_without_what_its_phase_needs_is_refused():
    """Left out, its part of the loss would be 0 without a word."""
    real, rec, fake = batch()
    bare, coded = (lambda t: Term(t.target, t.prediction)), (lambda t: Term(posterior=t.posterior))
    soft = SoftIntroVAE(beta_rec=1, beta_kl=1, beta_neg=1, scale=1)
    intro = IntroVAE(beta_rec=1, beta_kl=1, beta_neg=1, margin=1)
    for call, terms, message in [
        (soft.encoder, (bare(real), rec, fake), "real has no posterior: the encoder phase needs its KL"),
        (soft.encoder, (real, bare(rec), fake), "rec has no posterior: the encoder phase"),
        (soft.encoder, (real, rec, coded(fake)), "fake has no target .*: the encoder phase needs its rec"),
        (intro.encoder, (coded(real), rec, fake), "real has no target .*: the encoder phase"),
        (soft.decoder, (coded(real), rec, fake), "real has no target .*: the decoder phase"),
        (soft.decoder, (real, rec, bare(fake)), "fake has no posterior: the decoder phase"),
        (VAE(beta_rec=1, beta_kl=1).vae, (bare(real),), "real has no posterior: the vae phase"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(*terms)
    for loss in (
        intro.encoder(real, coded(rec), coded(fake)),
        soft.decoder(bare(real), coded(rec), coded(fake)),
    ):
        assert loss.loss.isfinite()
    for wrong in (
        real.posterior.mean,
        torch.distributions.Normal(real.posterior.mean, 1.0),
        (*real.posterior, 1),
    ):
        message = f"posterior of real is a {type(wrong).__name__}, must be Posterior"
        with pytest.raises(TypeError, match=message):
            soft.encoder(Term(real.target, real.prediction, wrong), rec, fake)
    with pytest.raises(TypeError, match="real is a Tensor, must be a Term"):
        soft.encoder(real.target, rec, fake)


def test_losses_need_torch_alone():
    """Importing and using the losses loads neither triton nor any package of the training side."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "deepspeed", "nvidia", "pydantic", "yaml", "safetensors", "PIL"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch
from sivae_fast import *
import sivae_fast
mean, x = torch.zeros(2, 3, requires_grad=True), torch.rand(2, 5)
term = sivae_fast.Term(x, x + 1, sivae_fast.Posterior(mean, mean))
for objective in (sivae_fast.VAE(), sivae_fast.SoftIntroVAE(beta_rec=1, beta_kl=1, beta_neg=1, scale=1)):
    objective.vae(term).loss.backward()
sivae_fast.sample_and_kl(mean, mean, seed=torch.tensor([1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
