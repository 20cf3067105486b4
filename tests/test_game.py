"""The theory of Soft-IntroVAE on a finite alphabet: predicted optimum, played game, Nash equilibrium."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import game

# Per row of game.TABLE: the maximiser, KL(data, p), H(p), and whether p^3 <= p_data for every atom.
EXPECTED = [
    ((0.5000, 0.3000, 0.2000), 0.0000, 1.0297, True),
    ((0.5185, 0.2938, 0.1876), 0.0008, 1.0144, True),
    ((0.5543, 0.2795, 0.1662), 0.0067, 0.9817, True),
    ((0.6412, 0.2335, 0.1253), 0.0443, 0.8848, True),
    ((0.8195, 0.1176, 0.0630), 0.2652, 0.5889, False),
    ((0.7467, 0.2079, 0.0454), 0.0578, 0.6850, True),
    ((0.4619, 0.3468, 0.1913), 0.0126, 1.0404, True),
    ((0.7217, 0.1803, 0.0980), 0.2302, 0.7719, True),
    ((1 / 3, 1 / 3, 1 / 3), 0.0000, 1.0986, True),
    ((0.5848, 0.2076, 0.2076), 0.1283, 0.9665, True),
]
ROWS = list(zip(game.TABLE, EXPECTED, strict=True))


def as_tensor(p):
    return torch.tensor(p, dtype=torch.float64)


def sorted_down(p):
    return p.sort(descending=True).values


@pytest.mark.parametrize(("row", "expected"), ROWS)
def test_predicted_optimum(row, expected):
    (p_data, gamma), (maximiser, kl, entropy, bounded) = row, expected
    data, p = as_tensor(p_data), game.optimum(p_data, gamma)
    torch.testing.assert_close(sorted_down(p), as_tensor(maximiser), atol=1.1e-4, rtol=0)
    assert (data * (data / p).log()).sum().item() == pytest.approx(kl, abs=1e-4)
    assert -(p * p.log()).sum().item() == pytest.approx(entropy, abs=1.1e-4)
    assert bool((p**3 <= data).all()) == bounded
    slope = data / p + gamma * (p.log() + 1)  # equal in every direction of the simplex
    torch.testing.assert_close(slope, slope.mean().expand(3), atol=1e-6, rtol=0)


def test_entropy_falls_with_gamma():
    entropies = [-(p * p.log()).sum() for p in (game.optimum((0.5, 0.3, 0.2), g / 20) for g in range(21))]
    assert all(a > b for a, b in itertools.pairwise(entropies))


def test_gamma_one_does_not_preserve_uniform_data_and_smaller_gamma_does():
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    p = game.optimum((1 / 3,) * 3, 1.0)
    assert game.gain(uniform, uniform, 1.0).item() == pytest.approx(-2.19722, abs=1e-5)
    assert game.gain(p, uniform, 1.0).item() == pytest.approx(-2.19341, abs=1e-5)
    torch.testing.assert_close(game.optimum((1 / 3,) * 3, 0.9), uniform, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def played():
    return game.play_table(seed=0)


@pytest.mark.parametrize("index", [i for i, row in enumerate(EXPECTED) if row[3]])
def test_the_game_reaches_the_predicted_optimum(played, index):
    result, p_data = played
    p = sorted_down(result.path[-1, index])
    torch.testing.assert_close(p, as_tensor(EXPECTED[index][0]), atol=0.005, rtol=0)
    assert abs(game.posterior_gap(result.encoder, result.decoder, p_data)[index]) < 1e-5


def test_where_the_condition_fails_the_encoder_stops_the_decoder_short(played):
    result, p_data = played
    p = result.path[-1, 4]
    torch.testing.assert_close(p, as_tensor((0.796, 0.135, 0.069)), atol=0.004, rtol=0)
    assert 1e-3 < game.posterior_gap(result.encoder, result.decoder, p_data)[4] < 1e-2


def equilibrium(p_data, gamma, seed):
    """Logits of a random decoder whose marginal is the optimum, and of its posterior."""
    p = game.optimum(p_data, gamma)
    joint = torch.rand(game.LATENTS, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for _ in range(500):  # scale rows and columns until z is uniform and x has distribution p
        joint = joint / joint.sum(1, keepdim=True) / game.LATENTS
        joint = joint / joint.sum(0) * p
    return joint.t().log()[None], joint.log()[None]


def gains_after_perturbing(p_data, gamma, seed):
    """The two players' gains at the equilibrium, and for 600 random changes of each one's table alone."""
    encoder, decoder = equilibrium(p_data, gamma, seed)
    data, weight = as_tensor(p_data)[None], as_tensor([gamma])
    size = torch.logspace(-3, 0.5, 600, dtype=torch.float64)[:, None, None]
    noise = torch.Generator().manual_seed(seed + 1)
    shift = lambda table: (
        table + size * torch.randn(600, *table.shape[1:], generator=noise, dtype=torch.float64)
    )
    encoder_gains = game.encoder_gain(shift(encoder), decoder, data)
    decoder_gains = game.decoder_gain(encoder, shift(decoder), data, weight)
    at = game.encoder_gain(encoder, decoder, data), game.decoder_gain(encoder, decoder, data, weight)
    return encoder_gains - at[0], decoder_gains - at[1]


@pytest.mark.parametrize("index", [i for i, row in enumerate(EXPECTED) if row[3]])
def test_nash_no_player_gains_by_moving_alone(index):
    encoder_change, decoder_change = gains_after_perturbing(*game.TABLE[index], seed=index)
    assert encoder_change.max() < 1e-9 and decoder_change.max() < 1e-9
    assert encoder_change.min() < -1e-2 and decoder_change.min() < -1e-2


def test_no_nash_where_the_condition_fails():
    encoder_change, _ = gains_after_perturbing(*game.TABLE[4], seed=4)
    assert encoder_change.max() > 1e-4
