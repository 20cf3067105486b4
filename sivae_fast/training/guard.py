"""Whether training is still sound, and the way back where it is not.

A tick is unsound where a mean is not finite, or where the reconstruction error or the KL of real data is
more than `guard.spike` times its median over the ticks before. Training then stops with advice or, with
`guard.rollbacks`, goes back to the last checkpoint and leaves out the images after it: data and random
numbers are taken at position images + skipped, so that what follows depends on the checkpoint alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import median

from sivae_fast.config import Config
from sivae_fast.systems import levels
from sivae_fast.training.meter import first_not_finite

logger = logging.getLogger("sivae_fast")

WATCHED = ("rec_real", "kl_real")  # never negative, and there for every objective
TICKS = 10  # of the running median
FEWEST = 3  # ticks before a spike can be told


class Diverged(RuntimeError):
    """A loss became NaN or infinite, or rose suddenly; the message names the term and what to try."""


class Guard:
    """The judge of ticks. `skipped`: images of the endless sequence that were left out so far; `checkpoint`:
    those seen at the newest checkpoint, None before the first."""

    def __init__(self, config: Config):
        self._config = config
        self.skipped = 0
        self.checkpoint: int | None = None
        self._returns = 0  # to the same checkpoint
        self._ticks: list[dict[str, float]] = []

    def check_finite(
        self, values: dict[str, float], lod: int, images: int, left_out: Sequence[str] = ()
    ) -> None:
        """Raises Diverged where one of the means is not finite, or the gradient of a side whose step was left
        out for that."""
        wrong = first_not_finite(values) or (f"the gradient of the {left_out[0]}" if left_out else None)
        if wrong:
            raise Diverged(self._advice(f"{wrong} is not finite", values, lod, images))

    def check_tick(self, values: dict[str, float], lod: int, images: int) -> None:
        """Raises Diverged where a whole tick is a spike; else it becomes part of the median."""
        spike = self._config.guard.spike
        for name in WATCHED if spike and len(self._ticks) >= FEWEST else ():
            usual = median(tick[name] for tick in self._ticks)
            if values[name] > spike * usual:
                rise = f"{name} rose to {values[name]:.4g}, more than guard.spike={spike} times {usual:.4g}"
                raise Diverged(self._advice(rise, values, lod, images))
        self._ticks = [*self._ticks, {name: values[name] for name in WATCHED}][-TICKS:]

    def new_level(self) -> None:
        """Errors of another resolution are of another size."""
        self._ticks = []

    def saved(self, images: int, planned: bool) -> None:
        """A checkpoint was written: the next trouble has its own returns to it where it was planned."""
        self.checkpoint = images
        if planned:
            self._returns = 0

    def may_return(self) -> bool:
        """Counts one return; False where `guard.rollbacks` of them did not help."""
        self._returns += 1
        return self._returns <= self._config.guard.rollbacks

    def state(self) -> dict:
        return {"skipped": self.skipped, "ticks": self._ticks}

    def restore(self, state: dict) -> None:
        self.skipped, self._ticks = state["skipped"], state["ticks"]

    def _advice(self, what: str, values: dict[str, float], lod: int, images: int) -> str:
        """The first sentence says what happened, the others what to do."""
        grows = levels(self._config) > 1
        where = f"at level {lod} ({4 << lod} pixels), " * grows + f"after {images:,} images"
        back = "There is no checkpoint yet"
        if self.checkpoint is not None:
            back = f"The checkpoint at {self.checkpoint:,} images is from before: guard.rollbacks=N goes "
            back += "back to such a one by itself and leaves the images since out"
        if "loss_encoder" not in values:  # encoder and decoder have not played against each other yet
            return (
                f"training diverged: {what} {where}, as a plain VAE. What helps is a lower "
                f"optim.learning_rate; objective.beta_neg plays no part there. {back}"
            )
        objective = self._config.objective
        weaker = "a higher objective.beta_neg"
        rest = "; beta_rec = beta_kl = 1 with beta_neg near the latent size to start from"
        if objective.kind == "introvae":  # its beta_neg multiplies a hinge
            weaker, rest = "a lower objective.beta_neg or objective.margin", ""
        return (
            f"training diverged: {what} {where} (beta_neg {objective.beta_neg}). What helps, in this order: "
            f"{weaker} (a weaker push against fakes); a longer train.warmup_images; a lower "
            f"optim.learning_rate{rest}. {back}"
        )
