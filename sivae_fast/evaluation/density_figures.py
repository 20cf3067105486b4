"""Pictures of two-dimensional densities: the data, samples and exp(ELBO). Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sivae_fast.contract import Model
from sivae_fast.evaluation.density import Sampler, energy_grid, prior_samples
from sivae_fast.files import make_folder

POINTS = 1024  # of a scatter plot


class Learned(NamedTuple):
    """What is drawn of a trained model."""

    samples: Tensor  # [1024, 2]
    energy: Tensor  # [G, G] over [-half_range, half_range]^2, first index x: negative ELBO


class Row(NamedTuple):
    """One density with the models trained on it; a model that is missing leaves its two panels empty."""

    name: str
    half_range: float
    data: Tensor  # [1024, 2]
    learned: Sequence[Learned | None]


@torch.no_grad()
def look_at(model: Model, half_range: float, points: int = 1024) -> Learned:
    """Samples and energy grid of a trained model, on the CPU. points: of the grid, an axis."""
    model.eval()
    return Learned(prior_samples(model, POINTS).cpu(), energy_grid(model, half_range, points).cpu())


def draw_model(path: str | Path, data: Sampler, half_range: float, learned: Learned) -> None:
    """Writes the published figure of one model: data, samples, density side by side (18 x 6 inches)."""
    figure, axes = _panels(1, 3, (18, 6))
    _scatter(axes[0, 0], data(POINTS, 0), half_range, "tab:blue")
    _scatter(axes[0, 1], learned.samples, half_range, "tab:green")
    _density(axes[0, 2], learned.energy)
    _save(figure, path, dpi=60)


def draw_overview(path: str | Path, rows: Sequence[Row], models: Sequence[str]) -> None:
    """Writes one figure of all densities: a row each, data first, then samples and density of every model."""
    columns = 1 + 2 * len(models)
    figure, axes = _panels(len(rows), columns, (2.6 * columns, 2.6 * len(rows) + 0.4))
    for row, line in zip(rows, axes, strict=True):
        _scatter(line[0], row.data, row.half_range, "tab:blue")
        for i, learned in enumerate(row.learned):
            if learned is not None:
                _scatter(line[1 + 2 * i], learned.samples, row.half_range, "tab:green")
                _density(line[2 + 2 * i], learned.energy)
        line[0].text(-0.04, 0.5, row.name, transform=line[0].transAxes, rotation=90, ha="right", va="center")
    titles = ["data", *(f"{model}\n{what}" for model in models for what in ("samples", "density"))]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=12)
    _save(figure, path, dpi=75)


def _panels(rows: int, columns: int, size: tuple[float, float]):
    # The figure class, not pyplot: no global state, no display, safe in any thread.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def _scatter(axis, points: Tensor, half_range: float, colour: str) -> None:
    limits = (-half_range, half_range)
    size = max(8 * (axis.get_window_extent().width / 400) ** 2, 2)  # points look alike in small panels
    axis.scatter(*points.detach().cpu().T, s=size, c=colour, lw=0)
    axis.set(xlim=limits, ylim=limits, aspect="equal")


def _density(axis, energy: Tensor) -> None:
    # Matplotlib's rows are y.
    axis.imshow(torch.exp(-energy).T.numpy(), cmap="jet", origin="lower", interpolation="antialiased", vmin=0)


def _save(figure, path: str | Path, dpi: int) -> None:
    make_folder(Path(path).parent)
    figure.savefig(path, dpi=dpi)
