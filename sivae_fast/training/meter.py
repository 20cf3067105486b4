"""Statistics of training: summed on the device, read back once a tick."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

LOSSES = ("loss_encoder", "loss_decoder", "loss_vae")


class Meter:
    """Means over the images of a tick, on all ranks.

    Nothing is copied to the host until `read`; the sums can be saved and restored, so that a run that is
    interrupted within a tick still reports what an uninterrupted one does.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor], count: int) -> None:
        """Adds per-sample values [count], or means over `count` samples (0-dim)."""
        for name, value in values.items():
            total = value.detach().double().sum() * (count if value.ndim == 0 else 1)
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + count

    def totals(self) -> dict[str, tuple[float, int]]:
        """(sum, count) by name over all ranks; a collective call that waits for the device."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        table = torch.stack([self._sums[name] for name in names])
        counts = torch.tensor([self._counts[n] for n in names], dtype=torch.float64, device=table.device)
        table = torch.stack([table, counts])
        if dist.is_initialized():
            dist.all_reduce(table)
        sums, counts = table.tolist()
        return {name: (sums[i], int(counts[i])) for i, name in enumerate(names)}

    def restore(self, totals: dict[str, tuple[float, int]], first_rank: bool) -> None:
        """Starts from saved totals; they are given to one rank, since `totals` adds up the ranks."""
        self._sums = {
            name: torch.tensor(value if first_rank else 0.0, dtype=torch.float64, device=self.device)
            for name, (value, _) in totals.items()
        }
        self._counts = {name: count if first_rank else 0 for name, (_, count) in totals.items()}

    def clear(self) -> None:
        self._sums, self._counts = {}, {}


def means(totals: dict[str, tuple[float, int]]) -> dict[str, float]:
    return {name: value / count for name, (value, count) in totals.items()}


def first_not_finite(values: dict[str, float]) -> str | None:
    """Name of the term to blame for a NaN or an infinity, or None.

    Terms of the real batch come before those of fakes, which follow from them, and losses come last.
    """
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    return min(wrong, key=lambda name: (name in LOSSES, "real" not in name, name)) if wrong else None
