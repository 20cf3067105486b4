"""Metrics of point cloud models: Jensen-Shannon divergence of occupancy, minimum matching distance, coverage.

All three follow `latent_3d_points` (Achlioptas et al., 2018), for whose tool the published code exports.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from sivae_fast.kernels.chamfer import chamfer

RESOLUTION = 28
CELLS = 10_144
_PAIRS = 1 << 17  # points of one side in flight in the pairwise distances


@functools.cache
def sphere_cells() -> Tensor:
    """Numbers [28^3] of the grid points of [-0.5, 0.5]^3 among the 10,144 in the sphere; -1 outside."""
    points = _grid_points()
    kept = (points.square().sum(1) <= (RESOLUTION - 1) ** 2).nonzero().flatten()
    numbers = torch.full((len(points),), -1)
    numbers[kept] = torch.arange(len(kept))
    return numbers


def _grid_points() -> Tensor:
    """Grid points in units of half a spacing from the centre, exact in integers: [28^3, 3]."""
    axis = 2 * torch.arange(RESOLUTION) - (RESOLUTION - 1)
    return torch.cartesian_prod(axis, axis, axis)


def occupancy(clouds: Tensor) -> Tensor:
    """Number of points of all clouds [n, points, 3] nearest to each cell of the sphere: int64 [10144].

    Points outside of the sphere of radius 0.5 go to its nearest cell. Raises ValueError for another shape and
    for coordinates that are not finite.
    """
    if clouds.dim() != 3 or clouds.shape[2] != 3:
        raise ValueError(f"clouds have shape {list(clouds.shape)}: accepted is [n, points, 3]")
    points = clouds.detach().reshape(-1, 3).double().cpu()
    if not points.isfinite().all():
        raise ValueError("a coordinate is not finite: such clouds have no occupancy")
    nearest = ((points + 0.5) * (RESOLUTION - 1)).round().clamp(0, RESOLUTION - 1).long()
    cells = sphere_cells()[nearest @ torch.tensor([RESOLUTION**2, RESOLUTION, 1])]
    outside = cells < 0
    if outside.any():
        cells[outside] = _nearest_kept(points[outside])
    return torch.bincount(cells, minlength=CELLS)


def _nearest_kept(points: Tensor) -> Tensor:
    kept = _grid_points()[sphere_cells() >= 0].double() / (2 * (RESOLUTION - 1))
    return torch.cat([torch.cdist(part, kept).argmin(1) for part in points.split(1024)])


def jsd(p: Tensor, q: Tensor) -> float:
    """Jensen-Shannon divergence of two vectors of counts, base 2: 0 where equal, 1 where disjoint."""
    p, q = (counts.double() / counts.sum() for counts in (p, q))
    entropy = lambda x: -torch.special.xlogy(x, x).sum()
    nats = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    return (nats / math.log(2)).clamp(0, 1).item()


def sampling_jsd(
    sample: Callable[[int, int], Tensor], reference: Tensor, draws: int = 3, factor: int = 3
) -> float:
    """JSD between reference clouds [n, points, 3] and a model's, as published: mean over `draws` sets of
    samples.

    sample(count, draw): `count` clouds, differently for each draw; asked for factor * n at a time.
    """
    target = occupancy(reference)
    sets = (occupancy(sample(factor * len(reference), draw)) for draw in range(draws))
    return sum(jsd(target, counts) for counts in sets) / draws


def chamfer_distances(samples: Tensor, reference: Tensor) -> Tensor:
    """Chamfer distances with means, samples [s, N, 3] to reference clouds [r, M, 3]: [s, r]."""
    together = max(1, _PAIRS // reference.shape[1])
    rows = []
    for sample in samples:
        parts = reference.split(together)
        rows.append(torch.cat([chamfer(sample.expand(len(p), -1, -1), p, "mean") for p in parts]))
    return torch.stack(rows)


def emd_distances(samples: Tensor, reference: Tensor) -> Tensor:
    """Earth mover's distances divided by the number of points, of every sample to every reference cloud: [s,
    r].

    Exact, by POT (https://pythonot.github.io); raises ImportError where it is missing. [s, N, 3] and [r, N,
    3].
    """
    ot = load_pot()
    weights = [
        torch.full((clouds.shape[1],), 1 / clouds.shape[1]).double().numpy()
        for clouds in (samples, reference)
    ]
    samples, reference = samples.double().cpu(), reference.double().cpu()
    rows = [
        [ot.emd2(*weights, torch.cdist(s, r).numpy(), numItermax=10**7) for r in reference] for s in samples
    ]
    return torch.tensor(rows)


def load_pot():
    """The module of POT. Raises ImportError, saying how to get it, where it is missing."""
    try:
        import ot
    except ImportError as error:
        raise ImportError("the earth mover's distance needs POT: pip install 'sivae-fast[eval]'") from error
    return ot


def mmd_and_coverage(distances: Tensor) -> tuple[float, float]:
    """From distances [samples, reference]: the mean over reference clouds of the distance to the nearest
    sample, and the share of reference clouds that are the nearest one of some sample.
    """
    return distances.amin(0).mean().item(), len(distances.argmin(1).unique()) / distances.shape[1]
