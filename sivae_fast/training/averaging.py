"""Averaged weights: the copy of the model that is used after training."""

from __future__ import annotations

import copy

import torch
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
