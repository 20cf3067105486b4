"""gnELBO, KL and JSD of a model of a two-dimensional density, as published and in plain units."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sivae_fast.contract import Model

#: `sample(count, seed)` gives points [count, 2].
Sampler = Callable[[int, int], Tensor]

GRID = 1024  # points an axis, end points included
BINS = 100  # of the histograms, an axis
_EPS = 1e-14  # added to densities inside logarithms
_CHUNK = 16384
_POINTS = 5000  # a histogram
_DATA_BATCHES, _DATA_BATCH = 100, 128


@torch.no_grad()
def energy(model: Model, x: Tensor) -> Tensor:
    """Negative ELBO [N] of points [N, 2]: squared error through the posterior mean plus KL, both of weight 1.

    exp(-energy) is the model's unnormalised density, whatever betas it was trained with.
    """
    energies = []
    for part in x.split(_CHUNK):
        mean, logvar = model.encode(part)
        error = (part - model.decode(mean)).square().sum(1)
        energies.append(error + 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1))
    return torch.cat(energies)


def energy_grid(model: Model, half_range: float, points: int = GRID) -> Tensor:
    """`energy` on a grid [points, points] over [-half_range, half_range]^2; the first index is x."""
    device = next(model.parameters()).device
    axis = torch.linspace(-half_range, half_range, points, device=device)
    return energy(model, torch.cartesian_prod(axis, axis)).view(points, points)


def grid_normalised_elbo(grid: Tensor, data: Tensor) -> float:
    """gnELBO of energies on a grid and of energies of data points: mean(data) / (sum(grid) + sum(data)).

    Built from the negative ELBO, so lower is better; a constant energy scores one over the number of points.
    NaN where an energy is infinite: an infinite sum would make the best of all scores, 0.
    """
    grid, data = grid.double(), data.double()
    total = (grid.sum() + data.sum()).item()
    return data.mean().item() / total if math.isfinite(total) else math.nan


def histogram(points: Tensor, half_range: float) -> Tensor:
    """Density [100, 100] (fp64, integrates to 1) of points [N, 2]; points outside the square are dropped.

    Raises ValueError when no point lies inside.
    """
    bounds = [-half_range, half_range] * 2
    counts = torch.histogramdd(points.detach().double().cpu(), bins=[BINS, BINS], range=bounds).hist
    if counts.sum() == 0:
        raise ValueError(f"none of the {len(points)} points lies in [-{half_range}, {half_range}]^2")
    return counts / counts.sum() / _bin_area(half_range)


def kl_published(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of two histograms as the paper computes it: over rows, not weighted by the bin area.

    It is 1 / (100 x bin area) times the KL of the bin masses: 6.25 for half-range 2, 1.5625 for 4.
    """
    return (_divergence(p, q).sum() / BINS).item()


def jsd_published(p: Tensor, q: Tensor) -> float:
    """The paper's JSD of two histograms: the *reversed* form, the mean of KL(m || p) and KL(m || q).

    m is the mixture of both. In the units of `kl_published`; symmetric, but not bounded by log 2.
    """
    m = (p + q) / 2
    return ((_divergence(m, p) + _divergence(m, q)).sum() / 2 / BINS).item()


def kl_mass(p: Tensor, q: Tensor, half_range: float) -> float:
    """KL(p || q) of the bin masses of two histograms, in nats."""
    return _divergence(p, q).sum().item() * _bin_area(half_range)


def jsd_mass(p: Tensor, q: Tensor, half_range: float) -> float:
    """The Jensen-Shannon divergence of the bin masses of two histograms, in nats, between 0 and log 2."""
    m = (p + q) / 2
    return (kl_mass(p, m, half_range) + kl_mass(q, m, half_range)) / 2


def divergences(data: Sampler, model: Sampler, half_range: float, seed: int = 0) -> dict[str, float]:
    """`kl`, `jsd` (the paper's units) and `kl_nats`, `jsd_nats` between two samplers.

    5,000 points a histogram. As published, KL and JSD each draw their own points.
    """

    def pair(seed: int) -> tuple[Tensor, Tensor]:
        # Even seeds for data, odd for the model: a sampler compared with itself must not repeat its points.
        return (
            histogram(data(_POINTS, 2 * seed), half_range),
            histogram(model(_POINTS, 2 * seed + 1), half_range),
        )

    for_kl, for_jsd = pair(2 * seed), pair(2 * seed + 1)
    return {
        "kl": kl_published(*for_kl),
        "jsd": jsd_published(*for_jsd),
        "kl_nats": kl_mass(*for_kl, half_range),
        "jsd_nats": jsd_mass(*for_jsd, half_range),
    }


@torch.no_grad()
def prior_samples(model: Model, count: int, seed: int = 0) -> Tensor:
    """`count` decoded draws from the prior."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    z = model.prior_std * torch.randn(count, model.latent_size, generator=generator, device=device)
    return model.generate(z)


def evaluate_density(
    model: Model, data: Sampler, half_range: float, seed: int = 0, grid: Tensor | None = None
) -> dict[str, float]:
    """`gnelbo` and the four `divergences` of a trained model; lower is better for all of them.

    `data(count, seed)` draws points of the true density, on any device. `grid` is
    `energy_grid(model, half_range)` where the caller has it already. The protocol is the published one:
    1024 x 1024 grid points and 12,800 data points for gnELBO, two pairs of 5,000 points for KL and JSD.
    The model is put in eval mode.
    """
    model.eval()
    device = next(model.parameters()).device
    first = seed * _DATA_BATCHES
    points = torch.cat([data(_DATA_BATCH, first + i) for i in range(_DATA_BATCHES)]).to(device)
    grid = energy_grid(model, half_range) if grid is None else grid
    scores = divergences(data, lambda count, seed: prior_samples(model, count, seed), half_range, seed)
    return {"gnelbo": grid_normalised_elbo(grid, energy(model, points)), **scores}


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    return torch.xlogy(p, p) - p * (q + _EPS).log()


def _bin_area(half_range: float) -> float:
    return (2 * half_range / BINS) ** 2
