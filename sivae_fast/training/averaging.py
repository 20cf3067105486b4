"""Averages: of weights over training, for the copy that is used afterwards, and of buffers over ranks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from sivae_fast.contract import Model


class Average:
    """Exponential moving average of all parameters, with a half-life in images seen.

    It starts as a copy of the model, so that it is usable from the first image on; buffers (the style
    average, running statistics) are copied when the averaged model is asked for.
    """

    def __init__(self, model: Model, half_life: float):
        if half_life <= 0:
            raise ValueError(f"average.half_life is {half_life}, must be a positive number of images")
        self.half_life = half_life
        self._source = model
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        self._pairs = list(zip(self._model.parameters(), model.parameters(), strict=True))

    @torch.no_grad()
    def update(self, images: int) -> None:
        """Moves the average after an iteration of `images` images: weight 0.5^(images / half_life) stays."""
        weight = 1 - 0.5 ** (images / self.half_life)
        averaged, current = zip(*self._pairs, strict=True)
        torch._foreach_lerp_(list(averaged), list(current), weight)

    @torch.no_grad()
    def model(self) -> Model:
        """The averaged model, in eval mode, at the level of detail of the model in training."""
        for mine, source in zip(self._model.buffers(), self._source.buffers(), strict=True):
            mine.copy_(source)
        return self._model

    def state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._model.named_parameters()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self._model.named_parameters():
            parameter.copy_(state[name])


def own_buffers(model: Model) -> dict[str, Tensor]:
    """The buffers that follow each rank's own rows: the style average, running statistics."""
    kept = model.state_dict()
    return {n: buffer for n, buffer in model.named_buffers() if n in kept and buffer.is_floating_point()}


@torch.no_grad()
def average_buffers(model: Model) -> None:
    """Makes `own_buffers` their means over ranks: they are linear in the rows, so that this is what one rank
    would hold of all rows. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for buffer in own_buffers(model).values():
        dist.all_reduce(buffer)
        buffer /= dist.get_world_size()


@contextlib.contextmanager
def averaged_buffers(model: Model) -> Iterator[None]:
    """Inside, the model has the means over ranks; afterwards each rank has its own again. Collective."""
    before = [(buffer, buffer.clone()) for buffer in own_buffers(model).values()]
    average_buffers(model)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
