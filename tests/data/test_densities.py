"""The two-dimensional data: shapes, statistics, ranks, errors."""

import itertools

import pytest
import torch

from sivae_fast.data.densities import NAMES, Density
from sivae_fast.draws import Draws, Rows

STATISTICS = [  # per-axis standard deviation and extremes of the published samplers
    ("8gaussians", (1.00, 1.00), (1.47, 1.47)),
    ("2spirals", (1.61, 1.58), (3.64, 3.12)),
    ("checkerboard", (2.31, 2.31), (4.00, 4.00)),
    ("rings", (1.45, 1.45), (3.3, 3.3)),
]


@pytest.mark.parametrize(("name", "std", "extreme"), STATISTICS)
def test_moments_and_support(name, std, extreme):
    data = Density(name)
    x = torch.cat([data.sample(512, seed) for seed in range(200)])
    assert x.dtype == torch.float32 and x.shape == (102400, 2)
    torch.testing.assert_close(x.std(0), torch.tensor(std), atol=0.02, rtol=0)
    torch.testing.assert_close(x.mean(0), torch.zeros(2), atol=0.05, rtol=0)
    torch.testing.assert_close(x.abs().amax(0), torch.tensor(extreme), atol=0.15, rtol=0)
    assert x.abs().max() <= data.half_range


def test_eight_modes_of_equal_weight_on_their_circle():
    x = Density("8gaussians").sample(80000)
    angle = torch.atan2(x[:, 1], x[:, 0])
    mode = (angle / (torch.pi / 4)).round()
    counts = torch.bincount(mode.long() % 8, minlength=8)
    assert (counts.float() / 10000 - 1).abs().max() < 0.05
    centre = 1.41443 * torch.stack(((mode * torch.pi / 4).cos(), (mode * torch.pi / 4).sin()), 1)
    torch.testing.assert_close((x - centre).std(0), torch.full((2,), 0.014144), atol=2e-4, rtol=0)


def test_checkerboard_fills_eight_cells_evenly():
    x = Density("checkerboard").sample(80000)
    column, row = ((x + 4) / 2).floor().clamp(0, 3).long().unbind(1)
    counts = torch.bincount(4 * column + row, minlength=16).view(4, 4)
    filled = counts > 0
    assert filled.sum() == 8
    assert not torch.equal(filled[0], filled[1]) and torch.equal(filled[0], filled[2])
    assert (counts[filled] / 10000.0 - 1).abs().max() < 0.05


def test_rings_have_a_quarter_of_the_batch_each_and_as_many_angles():
    x = Density("rings").sample(64, seed=3)
    radius = x.norm(dim=1)
    assert ((radius / 0.75).round().unique() == torch.tensor([1.0, 2.0, 3.0, 4.0])).all()
    rings = Density("rings")
    many = torch.cat([rings.sample(64, seed) for seed in range(400)])
    shares = torch.bincount((many.norm(dim=1) / 0.75).round().long(), minlength=5)[1:] / len(many)
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.02, rtol=0)
    outer = many[many.norm(dim=1) > 2.8]
    sixteenth = torch.atan2(outer[:, 1], outer[:, 0]) / (2 * torch.pi / 16)
    assert (sixteenth - sixteenth.round()).abs().mean() < 0.1  # 0.25 if the angles were continuous


def test_rings_put_the_remainder_on_the_innermost_circle():
    rings = Density("rings")
    many = torch.cat([rings.sample(7, seed) for seed in range(3000)])
    shares = torch.bincount((many.norm(dim=1) / 0.75).round().long(), minlength=5)[1:5] / len(many)
    torch.testing.assert_close(shares, torch.tensor([4.0, 1.0, 1.0, 1.0]) / 7, atol=0.02, rtol=0)


def test_second_half_of_spirals_mirrors_the_first():
    x = Density("2spirals").sample(4000)
    # The same arm, mirrored; only the noise of 0.1 a coordinate differs.
    residual = x[:2000] + x[2000:]
    assert residual.std().item() == pytest.approx(0.1 * 2**0.5, rel=0.05)
    assert residual.abs().max() < 0.8


def test_sequential_modes_advance_every_hundred_batches():
    data, rows = Density("sequential8gaussians"), Rows.all(32)
    for batch, mode in ((0, 0), (99, 0), (100, 1), (799, 7), (800, 0)):
        x = data.to_input(rows, Draws(0, 32 * batch, rows))
        angle = torch.tensor(mode * torch.pi / 4)
        centre = 1.41443 * torch.stack((angle.cos(), angle.sin()))
        assert (x - centre).abs().max() < 0.1


def test_twenty_five_modes():
    x = Density("25gaussians").sample(10000)
    index = (x / 1.4144).round()
    assert len(index.unique(dim=0)) == 25
    assert (x - 2 * 2 * index / 2.828).std().item() == pytest.approx(0.1 / 2.828, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_ranks_together_see_what_one_rank_sees(name):
    data = Density(name)

    def points(rank, world):
        stream = data.batches(1024, lambda n: 16, rank, world)
        parts = []
        for i, rows in enumerate(itertools.islice(stream, 3)):
            parts.append(data.to_input(rows, Draws(7, 1024 + 16 * i, rows)))
        return torch.stack(parts)

    alone = points(0, 1)
    assert alone.shape == (3, 16, 2)
    assert torch.equal(torch.cat([points(rank, 4) for rank in range(4)], dim=1), alone)
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize("name", NAMES)
def test_fixed_points_are_the_same_every_time(name):
    assert Density(name).fixed(9).shape == (9, 2)
    assert torch.equal(Density(name).fixed(9), Density(name).fixed(9))


def test_batch_size_may_change_on_the_way():
    rows = Density("rings").batches(0, lambda n: 8 if n < 16 else 12, 1, 2)
    assert list(itertools.islice(rows, 3)) == [Rows(4, 8, 8), Rows(4, 8, 8), Rows(6, 12, 12)]


def test_names_are_checked_and_the_nearest_is_offered():
    assert Density("8Gaussians").name == "8gaussians"
    with pytest.raises(ValueError, match="unknown density 'spiral': did you mean '2spirals'"):
        Density("spiral")


def test_batches_that_cannot_be_filled_are_refused_before_the_first():
    with pytest.raises(ValueError, match="511 must be even"):
        Density("2spirals").batches(0, lambda n: 511, 0, 1)
    with pytest.raises(ValueError, match="3 must be at least 4"):
        Density("rings").batches(0, lambda n: 3, 0, 1)
