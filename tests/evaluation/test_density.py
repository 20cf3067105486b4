"""gnELBO, KL and JSD against closed forms and against the data sampler as its own model."""

import math

import pytest
import torch

from sivae_fast.data.densities import Density
from sivae_fast.evaluation import density as ev
from sivae_fast.models.mlp import MLPModel


def uniform(half_range):
    return torch.full((100, 100), 1 / (2 * half_range) ** 2, dtype=torch.float64)


def first_half(half_range):
    q = 2 * uniform(half_range)
    q[50:] = 0
    return q


def one_bin(half_range, i, j):
    q = torch.zeros(100, 100, dtype=torch.float64)
    q[i, j] = 1 / (2 * half_range / 100) ** 2
    return q


@pytest.mark.parametrize(
    ("half_range", "kl_pq", "kl_qp", "jsd"), [(2, 89.9077, 4.33217, 22.2115), (4, 21.3939, 1.08304, 5.28210)]
)
def test_whole_square_against_half_of_it(half_range, kl_pq, kl_qp, jsd):
    p, q = uniform(half_range), first_half(half_range)
    assert ev.kl_published(p, q) == pytest.approx(kl_pq, rel=1e-5)
    assert ev.kl_published(q, p) == pytest.approx(kl_qp, rel=1e-5)
    assert ev.jsd_published(p, q) == ev.jsd_published(q, p) == pytest.approx(jsd, rel=1e-5)


@pytest.mark.parametrize(("half_range", "kl", "jsd"), [(2, 241.714, 116.524), (4, 58.2620, 28.0479)])
def test_two_different_bins(half_range, kl, jsd):
    p, q = one_bin(half_range, 3, 4), one_bin(half_range, 70, 9)
    assert ev.kl_published(p, q) == pytest.approx(kl, rel=1e-5)
    assert ev.jsd_published(p, q) == pytest.approx(jsd, rel=1e-5)
    assert ev.jsd_mass(p, q, half_range) == pytest.approx(math.log(2), rel=1e-9)


@pytest.mark.parametrize(("half_range", "factor"), [(2, 6.25), (4, 1.5625)])
def test_paper_units_are_a_multiple_of_nats(half_range, factor):
    p, q = first_half(half_range), uniform(half_range)
    assert ev.kl_mass(p, q, half_range) == pytest.approx(math.log(2), rel=1e-9)
    assert ev.kl_published(p, q) == pytest.approx(factor * math.log(2), rel=1e-9)


def test_constant_energy_scores_one_over_the_number_of_points():
    score = ev.grid_normalised_elbo(torch.full((1024, 1024), 0.3), torch.full((12800,), 0.3))
    assert score == pytest.approx(9.4217e-7, rel=1e-4)


def test_infinite_energies_make_no_perfect_score():
    grid = torch.tensor([[1.0, math.inf], [2.0, 3.0]])
    assert math.isnan(ev.grid_normalised_elbo(grid, torch.ones(2)))
    assert math.isnan(ev.grid_normalised_elbo(torch.ones(2, 2), torch.tensor([1.0, math.inf])))


def test_histogram_drops_points_outside_before_normalising():
    inside, edge, outside = [0.5, -0.5], [2.0, 2.0], [2.1, 0.0]
    h = ev.histogram(torch.tensor([inside, inside, inside, edge, outside]), 2.0)
    assert h.sum().item() * 0.0016 == pytest.approx(1)
    assert h[62, 37].item() * 0.0016 == pytest.approx(0.75)
    assert h[99, 99].item() * 0.0016 == pytest.approx(0.25)
    with pytest.raises(ValueError, match="none of the 1 points"):
        ev.histogram(torch.tensor([outside]), 2.0)


FLOORS = [
    ("8gaussians", 0.643, 0.096, 0.291, 0.059),
    ("2spirals", 6.755, 0.199, 3.110, 0.075),
    ("checkerboard", 17.321, 0.330, 8.134, 0.135),
    ("rings", 7.889, 0.276, 3.630, 0.109),
]


@pytest.mark.parametrize(("name", "kl", "kl_std", "jsd", "jsd_std"), FLOORS)
def test_the_data_itself_scores_the_floor(name, kl, kl_std, jsd, jsd_std):
    data = Density(name)
    runs = [ev.divergences(data.sample, data.sample, data.half_range, seed) for seed in range(5)]
    # Two means over 5 seeds each: 3 standard errors of their difference.
    spread = 3 * math.sqrt(2 / 5)
    assert abs(sum(r["kl"] for r in runs) / 5 - kl) < spread * kl_std
    assert abs(sum(r["jsd"] for r in runs) / 5 - jsd) < spread * jsd_std


def test_energy_is_error_through_the_mean_plus_kl():
    model = MLPModel(width=8, hidden_layers=2)
    x = torch.randn(5, 2)
    mean, logvar = model.encode(x)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    expected = (x - model.decode(mean)).pow(2).sum(1) + kl
    torch.testing.assert_close(ev.energy(model, x), expected)


def test_grid_index_order_is_x_then_y():
    model = MLPModel(width=8, hidden_layers=2)
    grid = ev.energy_grid(model, 4.0, points=9)
    torch.testing.assert_close(grid[8, 2], ev.energy(model, torch.tensor([[4.0, -2.0]]))[0])


def test_evaluation_is_repeatable_and_complete():
    model, data = MLPModel(width=8, hidden_layers=2), Density("rings")
    scores = ev.evaluate_density(model, data.sample, data.half_range)
    assert scores == ev.evaluate_density(model, data.sample, data.half_range)
    assert set(scores) == {"gnelbo", "kl", "jsd", "kl_nats", "jsd_nats"}
    assert all(math.isfinite(v) and v > 0 for v in scores.values())
    assert scores["kl"] > 30  # an untrained model is far from the rings


def test_the_protocol_is_the_published_one(monkeypatch):
    """12,800 data points for gnELBO, a grid of 1024 x 1024, 5,000 points a histogram, each its own."""
    assert ev.GRID == 1024
    monkeypatch.setattr(ev, "energy_grid", None)  # a grid that is given is not computed again
    asked, data = [], Density("rings")

    def sample(count, seed):
        asked.append((count, seed))
        return data.sample(count, seed)

    model = MLPModel(width=8, hidden_layers=2)
    one, other = (
        ev.evaluate_density(model, sample, data.half_range, seed, grid=torch.ones(2, 2)) for seed in (0, 1)
    )
    assert [count for count, _ in asked] == 2 * ([128] * 100 + [5000] * 2)
    assert len(set(asked)) == len(asked)
    assert all(one[name] != other[name] for name in one)


def test_divergences_are_from_the_data_to_the_model_and_each_has_its_own_points():
    def points(*places):
        return torch.tensor(places).repeat(2500 // len(places) * 2, 1)

    here, there = (0.5, 0.5), (-0.5, 0.5)
    data = lambda count, seed: points(here)
    model = lambda count, seed: points(here, there) if seed == 1 else points(there)
    scores = ev.divergences(data, model, 2.0)
    assert scores["kl_nats"] == pytest.approx(math.log(2)) == scores["kl"] / 6.25
    assert scores["jsd_nats"] == pytest.approx(math.log(2)) and scores["jsd"] == pytest.approx(116.524)


def test_samples_are_those_of_the_prior_and_follow_the_seed():
    model = MLPModel(width=8, hidden_layers=2)
    model.prior_std, model.generate = 0.2, lambda z: z
    samples = ev.prior_samples(model, 4000, seed=1)
    assert samples.std().item() == pytest.approx(0.2, rel=0.05)
    assert torch.equal(samples, ev.prior_samples(model, 4000, seed=1))
    assert not torch.equal(samples, ev.prior_samples(model, 4000, seed=2))
