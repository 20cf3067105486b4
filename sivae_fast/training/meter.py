"""Statistics of training: summed on the device, read back once a tick."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

LOSSES = ("loss_encoder", "loss_decoder", "loss_vae")


class Meter:
    """Means over the images of a tick, on all ranks.

    Nothing is copied to the host until `totals`; the sums can be saved and restored, so that a run that is
    interrupted within a tick still reports what an uninterrupted one does. They are added up in place: a
    captured graph goes on adding to the same memory.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, values: dict[str, Tensor], count: int) -> None:
        """Adds per-sample values [count], or means over `count` samples (0-dim)."""
        self._know(values)
        table = torch.stack([value.expand(count) for value in values.values()])
        sums = table.sum(1, dtype=torch.float64)
        torch._foreach_add_([self._sums[name] for name in values], [*sums.unbind()])
        torch._foreach_add_([self._counts[name] for name in values], count)

    def totals(self) -> dict[str, tuple[float, int]]:
        """(sum, count) by name over all ranks; a collective call that waits for the device."""
        if not self._sums:
            return {}
        table = self._table()
        if dist.is_initialized():
            dist.all_reduce(table)
        return {name: (total, count) for name, (total, count) in self._named(table).items() if count}

    def of_ranks(self) -> list[dict[str, tuple[float, int]]]:
        """(sum, count) by name of each rank; a collective call that waits for the device."""
        if not self._sums:
            return []
        table = self._table()
        tables = [table]
        if dist.is_initialized():
            tables = [torch.empty_like(table) for _ in range(dist.get_world_size())]
            dist.all_gather(tables, table)
        return [self._named(table) for table in tables]

    def restore(self, sums: dict[str, tuple[float, int]]) -> None:
        """Starts from (sum, count) by name, the same names on every rank: `totals` adds up the ranks."""
        self._know(sums)
        self.clear()
        for name, (total, count) in sums.items():
            self._sums[name].fill_(total)
            self._counts[name].fill_(count)

    def _table(self) -> Tensor:
        """Sums and counts [2, names], in the order of the sorted names."""
        names = sorted(self._sums)
        return torch.stack([torch.stack([kind[n] for n in names]) for kind in (self._sums, self._counts)])

    def _named(self, table: Tensor) -> dict[str, tuple[float, int]]:
        rows = zip(sorted(self._sums), *table.tolist(), strict=True)
        return {name: (total, int(count)) for name, total, count in rows}

    def clear(self) -> None:
        for value in (*self._sums.values(), *self._counts.values()):
            value.zero_()

    def _know(self, names: Iterable[str]) -> None:
        for name in names:
            for kind in (self._sums, self._counts):
                if name not in kind:
                    kind[name] = torch.zeros((), dtype=torch.float64, device=self.device)


def means(totals: dict[str, tuple[float, int]]) -> dict[str, float]:
    return {name: value / count for name, (value, count) in totals.items()}


def first_not_finite(values: dict[str, float]) -> str | None:
    """Name of the term to blame for a NaN or an infinity, or None.

    Terms of the real batch come before those of fakes, which follow from them, and losses come last.
    """
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    return min(wrong, key=lambda name: (name in LOSSES, "real" not in name, name)) if wrong else None
