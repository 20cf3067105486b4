"""Endless samples from two-dimensional densities, the first experiment of the Soft-IntroVAE paper."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sivae_fast.draws import Draws, Rows, Stream

Draw = Callable[[Stream, int], Tensor]


def _eight_gaussians(stream: Stream, images: int) -> Tensor:
    mode = (8 * stream.uniform(len(stream.rows))).floor()
    return _around_eight_modes(mode, stream)


def _sequential_eight_gaussians(stream: Stream, images: int) -> Tensor:
    batch_number = images // len(stream.rows)
    mode = torch.full((len(stream.rows),), float(batch_number // 100 % 8), device=stream.device)
    return _around_eight_modes(mode, stream)


def _around_eight_modes(mode: Tensor, stream: Stream) -> Tensor:
    # 1.414, not sqrt(2): the published constant, which puts the modes at radius 1.41443.
    return (2 * _on_circle(mode * (math.pi / 4)) + 0.02 * stream.normal(len(mode), 2)) / 1.414


def _twenty_five_gaussians(stream: Stream, images: int) -> Tensor:
    centre = 2 * (5 * stream.uniform(len(stream.rows), 2)).floor() - 4
    return 2 * (centre + 0.05 * stream.normal(len(centre), 2)) / 2.828


def _two_spirals(stream: Stream, images: int) -> Tensor:
    total = len(stream.rows)
    if total % 2:
        raise ValueError(f"2spirals fills one arm with each half of a batch: {total} must be even")
    u = stream.uniform(total, 3)[: total // 2]
    t = 3 * math.pi * u[:, 0].sqrt()
    arm = torch.stack((-t * t.cos() + 0.5 * u[:, 1], t * t.sin() + 0.5 * u[:, 2]), 1) / 3
    return torch.cat((arm, -arm)) + 0.1 * stream.normal(total, 2)


def _checkerboard(stream: Stream, images: int) -> Tensor:
    u = stream.uniform(len(stream.rows), 3)
    x = 4 * u[:, 0] - 2
    y = u[:, 1] - 2 * (u[:, 2] < 0.5).float() + x.floor().remainder(2)
    return 2 * torch.stack((x, y), 1)


def _rings(stream: Stream, images: int) -> Tensor:
    total = len(stream.rows)
    if total < 4:
        raise ValueError(f"rings places a quarter of a batch on each circle: {total} must be at least 4")
    quarter = total // 4
    index = (total * stream.uniform(total)).floor().clamp(max=total - 1)
    ring = (index / quarter).floor().clamp(max=3)
    points_on_ring = quarter + (total - 4 * quarter) * (ring == 3)
    angle = 2 * math.pi * (index - ring * quarter) / points_on_ring
    return (3 - 0.75 * ring)[:, None] * _on_circle(angle) + 0.08 * stream.normal(total, 2)


def _on_circle(angle: Tensor) -> Tensor:
    return torch.stack((angle.cos(), angle.sin()), 1)


class _Spec(NamedTuple):
    draw: Draw
    half_range: float  # the square [-half_range, half_range]^2 on which figures and metrics look


_DENSITIES = {
    "8gaussians": _Spec(_eight_gaussians, 2.0),
    "2spirals": _Spec(_two_spirals, 4.0),
    "checkerboard": _Spec(_checkerboard, 4.0),
    "rings": _Spec(_rings, 4.0),
    "25gaussians": _Spec(_twenty_five_gaussians, 4.0),
    "sequential8gaussians": _Spec(_sequential_eight_gaussians, 2.0),
}
NAMES = tuple(_DENSITIES)


class Density:
    """Points [B, 2], fp32, drawn afresh for every batch from the density called `name` (one of `NAMES`).

    `8gaussians`            8 modes of standard deviation 0.0141 on a circle of radius 1.414
    `2spirals`              two arms, one in each half of the batch; needs an even batch
    `checkerboard`          8 cells of side 2 inside [-4, 4]^2, uniform
    `rings`                 circles of radius 3, 2.25, 1.5, 0.75 with noise 0.08; as many angles as B/4
    `25gaussians`           a 5 x 5 grid of modes of standard deviation 0.035 at spacing 1.414
    `sequential8gaussians`  as `8gaussians`, one mode at a time, the next after every 100 batches

    The constructions and constants are those of the published experiments (Soft-IntroVAE, 2D densities).
    Raises ValueError for an unknown name and for batch sizes that a density cannot fill.
    """

    input_shape = (2,)
    #: An epoch is a nominal notion for endless data; this one makes the published run 153.6 epochs.
    nominal_length = 100_000

    def __init__(self, name: str):
        key = name.lower()
        if key not in _DENSITIES:
            near = difflib.get_close_matches(key, NAMES, n=1, cutoff=0)[0]
            raise ValueError(f"unknown density {name!r}: did you mean {near!r}? There are {', '.join(NAMES)}")
        self.name = key
        self._draw, self.half_range = _DENSITIES[key]

    def __len__(self) -> int:
        return self.nominal_length

    def checksum(self) -> str:
        return self.name

    def batches(self, start: int, batch_at: Callable[[int], int], rank: int, world: int) -> Iterator[Rows]:
        """This rank's rows of every global batch; the points themselves are drawn by `to_input`."""
        self.sample(batch_at(start))  # a batch size that cannot be filled is refused before training starts
        return self._endless_rows(start, batch_at, rank, world)

    def to_input(self, batch: Rows, draws: Draws, lod: int = 0, blend: float = 1.0) -> Tensor:
        """Points [len(batch), 2] of the global batch that `draws` stands at, on its device."""
        # The global batch is drawn whole: a mirrored arm or a ring's angle depends on rows of other ranks.
        whole = draws.over(Rows.all(batch.total))
        return self._draw(whole.stream("data"), draws.images)[batch.start : batch.stop]

    def sample(self, count: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
        """`count` points [count, 2] drawn as one batch."""
        rows = Rows.all(count)
        return self.to_input(rows, Draws(seed, 0, rows, device))

    def fixed(self, count: int) -> Tensor:
        """The same `count` points in every run."""
        return self.sample(4 * math.ceil(count / 4))[:count]

    def close(self) -> None:
        pass

    @staticmethod
    def _endless_rows(start: int, batch_at: Callable[[int], int], rank: int, world: int) -> Iterator[Rows]:
        while True:
            size = batch_at(start)
            yield Rows.all(size).part(rank, world)
            start += size
