"""Point cloud metrics on cases with known values."""

import math
import sys

import pytest
import torch

from sivae_fast.evaluation import pointcloud
from sivae_fast.evaluation.pointcloud import (
    chamfer_distances,
    emd_distances,
    jsd,
    mmd_and_coverage,
    occupancy,
    sampling_jsd,
)


def test_cells():
    cells = pointcloud.sphere_cells()
    assert int((cells >= 0).sum()) == pointcloud.CELLS == 10_144
    assert cells.max() == 10_143


def test_occupancy_is_the_nearest_kept_cell():
    torch.manual_seed(0)
    clouds = torch.randn(3, 200, 3) * 0.3  # many points lie outside of the sphere
    axis = torch.linspace(-0.5, 0.5, 28, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis, axis)
    kept = grid[grid.norm(dim=1) <= 0.5]
    want = torch.bincount(torch.cdist(clouds.reshape(-1, 3).double(), kept).argmin(1), minlength=10_144)
    assert torch.equal(occupancy(clouds), want)


def test_jsd_of_equal_and_disjoint_sets():
    torch.manual_seed(0)
    clouds = torch.rand(4, 50, 3) - 0.5
    assert jsd(occupancy(clouds), occupancy(clouds.flip(0))) == pytest.approx(0, abs=1e-12)
    assert jsd(occupancy(torch.zeros(2, 5, 3)), occupancy(torch.full((3, 5, 3), 0.2))) == 1.0


def test_jsd_value():
    p, q = torch.tensor([1, 1, 0]), torch.tensor([0, 1, 1])
    assert jsd(p, q) == pytest.approx(0.5)
    biased = -(0.125 * math.log2(0.125) + 0.875 * math.log2(0.875)) - 0.5 * 0.8112781244591328
    assert jsd(torch.tensor([1, 3]), torch.tensor([0, 9])) == pytest.approx(biased)


def test_sampling_jsd_asks_for_three_times_three():
    asked = []

    def sample(count, draw):
        asked.append((count, draw))
        return torch.zeros(count, 4, 3) if draw else torch.full((count, 4, 3), 0.3)

    assert sampling_jsd(sample, torch.zeros(5, 4, 3)) == pytest.approx(1 / 3)
    assert asked == [(15, 0), (15, 1), (15, 2)]
    assert sampling_jsd(sample, torch.zeros(5, 4, 3), draws=2) == pytest.approx(1 / 2)


@pytest.mark.parametrize("pairs", [1, 20, 1 << 17])
def test_chamfer_distances(monkeypatch, pairs):
    monkeypatch.setattr(pointcloud, "_PAIRS", pairs)
    torch.manual_seed(0)
    samples, reference = torch.randn(3, 7, 3), torch.randn(4, 9, 3)
    got = chamfer_distances(samples, reference)
    squares = (samples[:, None, :, None] - reference[None, :, None]).square().sum(-1)
    torch.testing.assert_close(got, squares.amin(3).mean(2) + squares.amin(2).mean(2))


def test_emd_distances():
    pytest.importorskip("ot")
    square = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]]])
    clouds = torch.cat([square, square[:, [2, 0, 3, 1]] + torch.tensor([0, 0, 0.5])])
    torch.testing.assert_close(emd_distances(clouds, square), torch.tensor([[0.0], [0.5]]))


def test_emd_distances_are_exact_for_many_points():
    pytest.importorskip("ot")
    optimize = pytest.importorskip("scipy.optimize")
    torch.manual_seed(0)
    one, other = torch.randn(2, 1, 100, 3, dtype=torch.float64)
    lengths = torch.cdist(one[0], other[0])
    best = lengths[optimize.linear_sum_assignment(lengths)].mean().item()
    assert emd_distances(one, other).item() == pytest.approx(best)


def test_missing_pot_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"needs POT: pip install 'sivae-fast\[eval\]'"):
        emd_distances(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))


def test_mmd_and_coverage():
    distances = torch.tensor([[1.0, 2, 3], [5, 1, 9], [4, 0.5, 6], [0.5, 7, 8]])  # of 4 samples to 3
    mmd, coverage = mmd_and_coverage(distances)
    assert mmd == pytest.approx((0.5 + 0.5 + 3) / 3) and coverage == pytest.approx(2 / 3)


def test_bad_input():
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            occupancy(torch.full((1, 2, 3), value))
    with pytest.raises(ValueError, match=r"\[5, 3\]: accepted is \[n, points, 3\]"):
        occupancy(torch.zeros(5, 3))
