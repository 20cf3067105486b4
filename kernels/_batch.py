"""How the tensors of a phase are laid out for the backends: rows, and which source uses which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .reference import Source

WIDTH = 5  # numbers a source takes in a layout


class Batch(NamedTuple):
    """The distinct tensors of a phase, images and latents as rows of unit stride.

    layout holds five numbers for each source: its member and the places of its target, prediction, posterior
    and error in the lists below; -1 for a part it does not have.
    """

    images: list[Tensor]  # [B, N]
    means: list[Tensor]  # [B, Z]
    logvars: list[Tensor]  # [B, Z]
    errors: list[Tensor]  # [B]
    layout: tuple[int, ...]

    @property
    def sources(self) -> list[tuple[int, int, int, int, int]]:
        return [self.layout[i : i + WIDTH] for i in range(0, len(self.layout), WIDTH)]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.images, *self.means, *self.logvars, *self.errors]


class Formula(NamedTuple):
    """What is computed of a batch, apart from the weights."""

    kind: str  # one of reference.RECONSTRUCTIONS
    delta: float  # of the Huber error
    prior_logvar: float
    low: float  # bounds of the log-variance
    high: float

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        """As the Triton kernels take them."""
        return self.prior_logvar, self.low, self.high, self.delta

    @property
    def bounded(self) -> bool:
        return math.isfinite(self.low) or math.isfinite(self.high)

    @classmethod
    def of(cls, kind: str, delta: float, prior_std: float, low: float, high: float) -> Formula:
        return cls(kind, delta, 2 * math.log(prior_std), low, high)


def pack(sources: Sequence[Source], members: Sequence[int]):
    """(images, means, logvars, errors, layout) of a phase; a tensor that two pairs share is listed once."""
    images, means, logvars, errors, layout = [], [], [], [], []

    def place_of(image: Tensor) -> int:
        for i, known in enumerate(images):
            if known is image:
                return i
        images.append(image)
        return len(images) - 1

    for source, member in zip(sources, members, strict=True):
        target = prediction = posterior = error = -1
        if source.target is not None:
            target, prediction = place_of(source.target), place_of(source.prediction)
        if source.mean is not None:
            posterior = len(means)
            means.append(source.mean)
            logvars.append(source.logvar)
        if source.error is not None:
            error = len(errors)
            errors.append(source.error)
        layout += [int(member), target, prediction, posterior, error]
    return images, means, logvars, errors, layout


def channels_last(images: Sequence[Tensor]) -> bool:
    """Whether all images lie in channels-last order, so that their rows are read in memory order."""
    if all(image.is_contiguous() for image in images):
        return False
    return all(image.dim() > 2 and image[0].movedim(0, -1).is_contiguous() for image in images)


def image_rows(images: Sequence[Tensor]) -> list[Tensor]:
    """Images [B, ...] as [B, N], all in one order of elements; copied only where their layouts differ."""
    if all(map(Tensor.is_contiguous, images)):
        return [image if image.dim() == 2 else image.view(image.shape[0], -1) for image in images]
    if channels_last(images):
        images = [image.movedim(1, -1) for image in images]
    return [rows(image) for image in images]


def rows(tensor: Tensor) -> Tensor:
    """[B, ...] as [B, N] of unit stride within a row; any stride between rows."""
    if tensor.dim() == 2 and tensor.is_contiguous():
        return tensor
    flat = tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[0], -1)
    return flat if flat.shape[1] == 1 or flat.stride(1) == 1 else flat.contiguous()


def image_like(row_gradient: Tensor, image: Tensor, last: bool) -> Tensor:
    """Rows [B, N] in the shape of `image`; `last`: the rows are in channels-last order."""
    if not last:
        return row_gradient if row_gradient.shape == image.shape else row_gradient.view(image.shape)
    return row_gradient.view(image.movedim(1, -1).shape).movedim(-1, 1)
