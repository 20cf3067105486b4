import math

import pytest
import torch
from PIL import Image

from sivae_fast.contract import Model, Posterior
from sivae_fast.evaluation.likelihood import (
    SCORES,
    auroc,
    log_likelihood,
    save_histogram,
    score_batches,
    scores,
)
from sivae_fast.models.residual import ResidualModel

WEIGHT = torch.tensor([[1.0, 0.5], [0.0, 2.0], [-1.0, 0.3]], dtype=torch.float64)
POINT = torch.tensor([[0.7, -1.2, 0.4]], dtype=torch.float64)
EXACT = -4.8155540


class Linear(Model):
    """p(x|z) = N(W z, I), p(z) = N(0, I), with the diagonal of the exact posterior covariance as q."""

    latent_size = 2

    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.covariance = torch.linalg.inv(weight.T @ weight + torch.eye(2, dtype=weight.dtype))
        self.calls = []

    def encode(self, x):
        mean = x @ self.weight @ self.covariance
        return Posterior(mean, self.covariance.diagonal().log().expand_as(mean))

    def decode(self, z, stream=None):
        self.calls.append(len(z))
        return z @ self.weight.T


def rotated():
    """The same model in the basis where the posterior covariance is diagonal: q is then exact."""
    _, basis = torch.linalg.eigh(Linear(WEIGHT).covariance)
    return Linear(WEIGHT @ basis)


def test_closed_form_of_the_linear_gaussian_model():
    covariance = WEIGHT @ WEIGHT.T + torch.eye(3, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(torch.zeros(3).double(), covariance).log_prob(POINT)
    assert exact.item() == pytest.approx(EXACT, abs=5e-8)


@pytest.mark.parametrize("samples", [1, 5, 50])
def test_the_exact_posterior_as_proposal_gives_the_exact_value_with_every_draw(samples):
    assert log_likelihood(rotated(), POINT, samples).item() == pytest.approx(EXACT, abs=5e-8)


@pytest.mark.parametrize("proposal", ["posterior", "published"])
def test_other_proposals_bound_it_from_below_and_rise_with_the_number_of_draws(proposal):
    model = Linear(WEIGHT)
    x = POINT.expand(4000, 3)
    generator = torch.Generator().manual_seed(0)
    found = [
        log_likelihood(model, x, samples, proposal=proposal, generator=generator, rows=40_000)
        for samples in (1, 5, 50)
    ]
    means = [values.mean().item() for values in found]
    error = found[2].std().item() / math.sqrt(len(x))
    assert means[0] < means[1] < means[2] <= EXACT + 3 * error
    # The estimate is log of a mean of weights of mean 1: it lies Var / (2 S) below, to first order.
    gap = (found[0] - EXACT).exp().var().item() / (2 * 50)
    assert means[2] == pytest.approx(EXACT - gap, abs=3 * error) and error < 2e-3


def test_the_diagonal_proposal_gives_the_known_means():
    x = POINT.expand(400, 3)
    generator = torch.Generator().manual_seed(1)
    for samples, known in [(1, -4.8191), (5, -4.8164), (50, -4.8159), (1000, -4.8156)]:
        values = log_likelihood(Linear(WEIGHT), x, samples, generator=generator)
        error = values.std().item() / math.sqrt(len(values))
        assert values.mean().item() == pytest.approx(known, abs=max(5 * error, 1e-4))


class Scalar(Model):
    """x = z + noise of variance 0.3 in pixels of [-1, 1], z ~ N(0, 0.5^2)."""

    latent_size, prior_std = 1, 0.5

    def encode(self, x):
        v = 0.3 * 4.0  # the likelihood's variance in the units of x, whose range is 2 wide
        gain = 0.25 / (0.25 + v)
        return Posterior(gain * x, torch.full_like(x, math.log(gain * v)))

    def decode(self, z, stream=None):
        return z


def test_prior_deviation_variance_and_value_range_change_the_model_they_should():
    # x = z + noise of variance v, z ~ N(0, s^2): log p(x) = log N(x; 0, s^2 + v), in units of the range.
    x = torch.tensor([[0.8]], dtype=torch.float64)
    found = log_likelihood(Scalar(), x, 3, variance=0.3, value_range=(-1.0, 1.0))
    total = 0.25 / 4 + 0.3
    expected = -0.5 * (0.4**2 / total + math.log(2 * math.pi * total))
    assert found.item() == pytest.approx(expected, abs=1e-10)


def test_every_option_reaches_every_score():
    model, x = Scalar(), torch.tensor([[0.8], [-0.3]], dtype=torch.float64)
    options = {"variance": 0.7, "proposal": "published", "value_range": (-1.0, 1.0)}
    found = scores(model, x, 3, weight=2.0, generator=torch.Generator().manual_seed(4), **options)
    generator = torch.Generator().manual_seed(4)
    torch.testing.assert_close(
        found["log_likelihood"], -log_likelihood(model, x, 3, generator=generator, **options)
    )
    q = model.encode(x)
    rec = q.mean + (q.logvar / 2).exp() * torch.randn(2, 1, generator=generator, dtype=torch.float64)
    again = model.encode(rec)
    prior = Posterior(torch.zeros_like(q.mean), torch.full_like(q.logvar, 2 * math.log(0.5)))
    error, kl = ((rec - x) / 2).square().sum(1), divergence(q, prior)
    wanted = {
        "elbo": 2 * error + kl,
        "kl": kl,
        "reconstruction": error,
        "symmetric_kl": divergence(q, again) + divergence(again, q),
    }
    for name, want in wanted.items():
        torch.testing.assert_close(found[name], want)
    default = [log_likelihood(model, x, *s, generator=torch.Generator().manual_seed(1)) for s in ((), (5,))]
    assert torch.equal(*default)


def test_the_noise_of_a_decoder_follows_the_generator():
    class Noisy(Scalar):
        def decode(self, z, stream):
            return z + stream.normal(*z.shape, dtype=z.dtype)

    x = torch.tensor([[0.8]], dtype=torch.float64)
    one, same, other = (
        log_likelihood(Noisy(), x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_draws_are_decoded_in_batches_and_none_is_left_out():
    model = Linear(WEIGHT)
    log_likelihood(model, POINT.expand(10, 3), 7, rows=32)
    assert model.calls == [30, 30, 10]


def divergence(q, p=None):
    p = p or Posterior(torch.zeros_like(q.mean), torch.zeros_like(q.logvar))
    normal = lambda posterior: torch.distributions.Normal(posterior.mean, (0.5 * posterior.logvar).exp())
    return torch.distributions.kl_divergence(normal(q), normal(p)).sum(1)


def test_scores_are_what_their_names_say_and_repeat_for_a_seed():
    torch.manual_seed(0)
    model = ResidualModel(8, 1, (8, 16), 4).eval()
    x = torch.rand(6, 1, 8, 8)
    first, again = (score_batches(model, [x[:3], x[3:]], seed=3, samples=2) for _ in range(2))
    for name in SCORES:
        assert first[name].shape == (6,) and torch.equal(first[name], again[name])
    torch.testing.assert_close(first["elbo"], first["kl"] + first["reconstruction"])
    heavy = score_batches(model, [x[:3], x[3:]], seed=3, samples=2, weight=3.0)
    torch.testing.assert_close(heavy["elbo"], first["kl"] + 3 * first["reconstruction"])
    torch.testing.assert_close(first["kl"], divergence(Posterior(*(p.double() for p in model.encode(x)))))
    assert (
        first["log_likelihood"] > 32 * math.log(2 * math.pi)
    ).all()  # -log p is at least its constant here
    assert (first["symmetric_kl"] >= 0).all()
    other = score_batches(model, [x[:3], x[3:]], seed=4, samples=2)
    assert not torch.equal(first["reconstruction"], other["reconstruction"])
    with pytest.raises(ValueError, match="no images"):
        score_batches(model, [])


def test_auroc():
    own, other = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.5, 3.0])
    assert auroc(own, other) == pytest.approx(5 / 6)
    assert auroc(other, own) == pytest.approx(1 / 6)
    with pytest.raises(ValueError, match="1 of 5 scores are not finite"):
        auroc(own, torch.tensor([float("nan"), 1.0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"variance": 0.0}, "variance is 0.0"),
        ({"variance": math.inf}, "variance is inf"),
        ({"proposal": "q"}, "proposal is 'q', must be one of posterior, published"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        log_likelihood(Linear(WEIGHT), POINT, **options)


def test_bad_options_reach_scores_too():
    with pytest.raises(ValueError, match="variance"):
        scores(Linear(WEIGHT), POINT, variance=-1.0)


def test_histogram_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    sets = {"train": torch.randn(500), "test": torch.randn(100), "other": torch.randn(100) - 5}
    save_histogram(tmp_path / "h.png", sets, "made numbers")
    assert Image.open(tmp_path / "h.png").size == (770, 440)


@pytest.mark.filterwarnings("error")
def test_a_histogram_has_the_scores_at_its_ends(tmp_path):
    # Between neighbours in single precision, whose rounding would leave all of them out.
    sets = {name: torch.tensor([value], dtype=torch.float64) for name, value in (("a", 0.1), ("b", 2904.2))}
    save_histogram(tmp_path / "h.png", sets, "one image each")
    save_histogram(tmp_path / "i.png", {"a": sets["b"], "b": sets["b"]}, "equal ones")
