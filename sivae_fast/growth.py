"""Everything that changes while training, as functions of images seen alone."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """What holds at one moment of training."""

    lod: int
    blend: float
    batch: int
    learning_rate: float
    beta_neg: float | None
    micro_batch: int | None = None

    def pieces(self, world: int) -> int:
        """Micro-batches of one of `world` ranks: the fewest equal ones of at most `micro_batch` images."""
        local = self.batch // world
        most = self.micro_batch or local
        return next(n for n in range(1, local + 1) if local % n == 0 and local // n <= most)


class Schedule:
    """Level, fade, batch, learning rate and beta_neg at `n` images seen.

    levels: number of levels of detail; 1 for models of one size.
    images_per_level: images from one level switch to the next; level i starts at the first batch boundary
        at or after i * images_per_level.
    fade: fraction of a level over which it is faded in, by (1 - cos(pi f)) / 2; the first level is not faded.
    batch, micro_batch, learning_rate, beta_neg: one value, or one a level.
    drops: image counts at which the learning rate is multiplied by `drop_factor`.
    """

    def __init__(
        self,
        *,
        levels: int = 1,
        images_per_level: int = 0,
        fade: float = 0.5,
        batch: int | Sequence[int],
        learning_rate: float | Sequence[float],
        beta_neg: float | Sequence[float] | None = None,
        drops: Sequence[int] = (),
        drop_factor: float = 0.1,
        micro_batch: int | Sequence[int] | None = None,
    ):
        self.levels, self.images_per_level, self.fade = levels, images_per_level, fade
        self.drops, self.drop_factor = sorted(drops), drop_factor
        self._batch = _per_level("train.batch", batch, levels)
        self._micro_batch = _per_level("train.micro_batch", micro_batch, levels)
        self._rate = _per_level("optim.learning_rate", learning_rate, levels)
        self._beta_neg = _per_level("objective.beta_neg", beta_neg, levels)

    def lod(self, images: int) -> int:
        if not self.images_per_level:
            return self.levels - 1
        return min(self.levels - 1, images // self.images_per_level)

    def blend(self, images: int) -> float:
        lod = self.lod(images)
        if lod == 0 or not self.images_per_level or not self.fade:
            return 1.0
        share = (images - lod * self.images_per_level) / (self.fade * self.images_per_level)
        return 1.0 if share >= 1 else (1 - math.cos(math.pi * share)) / 2

    def faded_in(self, lod: int) -> int:
        """Images after which a level is faded in; 0 for the first one, and where nothing grows."""
        return math.ceil(self.images_per_level * (lod + self.fade)) if lod else 0

    def batch(self, images: int) -> int:
        """Size of the global batch that starts at `images`."""
        return self._batch[self.lod(images)]

    def learning_rate(self, images: int) -> float:
        return self._rate[self.lod(images)] * self.drop_factor ** bisect_right(self.drops, images)

    def at(self, images: int) -> Stage:
        lod = self.lod(images)
        return Stage(
            lod,
            self.blend(images),
            self._batch[lod],
            self.learning_rate(images),
            self._beta_neg[lod],
            self._micro_batch[lod],
        )

    def stages(self) -> list[Stage]:
        """The first moment of every level that is trained."""
        return [self.at(lod * self.images_per_level) for lod in range(self.lod(0), self.levels)]


def _per_level(name: str, value, levels: int) -> list:
    if not isinstance(value, (list, tuple)):
        return [value] * levels
    if len(value) < levels:
        raise ValueError(f"{name} has {len(value)} values, the model has {levels} levels of detail")
    if levels == 1 and len(value) > 1:
        raise ValueError(f"{name} has {len(value)} values, a model of one size takes one")
    return list(value[:levels])
