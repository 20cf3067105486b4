"""sample: the figure of a trained model of points in the plane, and the density that it is compared with."""

from __future__ import annotations

import os
from pathlib import Path

from sivae_fast.commands.arguments import named
from sivae_fast.contract import Model
from sivae_fast.data.densities import NAMES, Density
from sivae_fast.evaluation.density import energy_grid, prior_samples
from sivae_fast.trained import check_kind

GRID = 256  # points of an axis, as in the figures of training
#: Options of other models, and their values where they are not given.
OTHERS = {"batch": 64, "batch_norm": None, "count": None}


def check_unused(*, precision: str = "fp32", **options) -> None:
    """Raises ValueError for the first option that a model of points in the plane has no use for."""
    if precision != "fp32":
        raise ValueError(f"precision is {precision!r}, must be fp32 for models of points in the plane")
    for name, value in options.items():
        if value != OTHERS[name]:
            raise ValueError(f"{name} is {value}: models of points in the plane have no use for it")


def density_of(model: Model, data: str | None = None) -> Density:
    """The density of a model of `load`, or the one called `data`.

    Raises ValueError for a name that is none, and for a converted model without one: its file does not say.
    """
    if data is None and "source" in model.facts:
        raise ValueError(
            "the density is needed, and a converted checkpoint does not say which it was trained on: give "
            f"data=NAME (--data NAME), one of {', '.join(NAMES)}"
        )
    return Density(data or model.config.data.name)


def sample(model: Model, out: str | os.PathLike, *, data: str | None = None, seed: int = 0) -> Path:
    """The figure that training draws, a .png: 1024 points of the data, as many samples, and exp(ELBO).

    model: of `load`. data: name of the density, needed where the model does not know its own.
    Raises ValueError for a model of another kind and as `density_of` does.
    """
    from sivae_fast.evaluation.density_figures import POINTS, Learned, draw_model

    out = named(out, ".png")
    check_kind(model.config, ("mlp",))
    density = density_of(model, data)
    samples = prior_samples(model, POINTS, seed).cpu()
    grid = energy_grid(model, density.half_range, GRID).cpu()
    draw_model(out, lambda count, _: density.sample(count, seed), density.half_range, Learned(samples, grid))
    return out
