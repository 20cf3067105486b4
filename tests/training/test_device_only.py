"""An iteration of every system on tensors without data.

Whatever reads a value back to the host, or brings in a tensor of another device, fails there as it would
stall or fail on a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch

from sivae_fast.config import load_config
from sivae_fast.systems import make_schedule
from sivae_fast.training.iteration import Iteration

CONFIGS = Path(__file__).parents[2] / "launch" / "configs"
META = torch.device("meta")
WITH_STYLE = "ffhq256"
SHAPES = {
    "cifar10": (3, 32, 32),
    "density-8gaussians": (2,),
    "ffhq256": (3, 256, 256),
    "mnist": (1, 28, 28),
    "monsters128": (3, 128, 128),
    "pointclouds": (2048, 3),
    "quickstart": (3, 32, 32),
    "translation": (3, 64, 64),
}


class NoNumbers:
    """In place of `draws.Stream`, whose generators exist for devices with data only."""

    device = META

    def __init__(self, name, rows):
        self.rows = rows

    def normal(self, *shape, dtype=torch.float32):
        return torch.empty(shape, device=META, dtype=dtype)

    uniform = shared_normal = normal

    def coin(self, probability):
        return True

    def integer(self, low, high):
        return high

    def index(self, low, high):
        return torch.empty((), device=META, dtype=torch.int64)


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """PyTorch has no autocast for the meta device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def iterate_twice(name: str, images: int, overrides: list[str], batch: int = 4) -> Iteration:
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    shape = SHAPES[name]
    iteration = Iteration(config, shape, 0, 1, META)
    iteration.images = images
    schedule = make_schedule(config)
    stage = dataclasses.replace(schedule.at(images), batch=batch, micro_batch=None)
    iteration.model.set_level(stage.lod, stage.blend)
    if schedule.levels > 1:
        shape = (3, 4 << stage.lod, 4 << stage.lod)
    x = torch.empty(batch, *shape, device=META)
    for _ in range(2):  # the second one has the optimizers' state
        iteration.iterate(x, stage, NoNumbers)
        if iteration.average:
            iteration.average.update(batch)
    return iteration


@pytest.mark.parametrize("name", SHAPES)
def test_an_iteration_neither_waits_for_its_device_nor_leaves_it(name):
    iteration = iterate_twice(name, images=10**9, overrides=[])
    with pytest.raises(Exception, match="meta"):
        iteration.meter.totals()  # the one place that reads back


@pytest.mark.parametrize("name", SHAPES)
def test_a_vae_iteration_neither_waits_for_its_device_nor_leaves_it(name):
    iterate_twice(name, images=0, overrides=["train.warmup_images=1000000"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.recompute=true"],
        ["train.schedule=published", "train.fresh_draws=true"],
        ["objective.kind=introvae", "objective.margin=100"],
        ["objective.gamma_r=1"],
        ["average.half_life=null"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_nor_with_other_settings_of_the_style_model(overrides):
    iterate_twice(WITH_STYLE, images=10**9, overrides=overrides)


@pytest.mark.parametrize("images", [0, 1_000_000, 5_800_000])
def test_nor_at_other_levels(images):
    iterate_twice(WITH_STYLE, images=images, overrides=["train.warmup_images=0"])


def test_a_value_that_is_read_back_is_found(monkeypatch):
    from sivae_fast.training.meter import Meter

    monkeypatch.setattr(Meter, "add", lambda self, values, count: [v.mean().item() for v in values.values()])
    with pytest.raises(RuntimeError, match="meta"):
        iterate_twice("density-8gaussians", images=10**9, overrides=[])


def test_a_tensor_of_another_device_is_found(monkeypatch):
    monkeypatch.setattr(NoNumbers, "normal", lambda self, *shape, dtype=None: torch.zeros(shape))
    with pytest.raises(ValueError, match="meta: must be on one device"):
        iterate_twice("density-8gaussians", images=10**9, overrides=[])
