"""One measure on the ranks of a process group: who does which part, and every part on every rank.

Without a process group there is one rank, which does everything.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """The number of this rank."""
    return dist.get_rank() if _several() else 0


def ranks() -> int:
    """How many there are."""
    return dist.get_world_size() if _several() else 1


def share(count: int, step: int = 1) -> tuple[int, int]:
    """First and last + 1 of `count` items that this rank works on; shares begin at multiples of `step`."""
    steps = -(-count // step)
    start, stop = (steps * place // ranks() * step for place in (rank(), rank() + 1))
    return min(start, count), min(stop, count)


def gather(rows: Tensor) -> Tensor:
    """Rows [N, F] of all ranks in their order, as many from each as it has. Collective, on their device."""
    if not _several():
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = int(max(counts))
    padded = rows.new_zeros(most, rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def summed(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks, which takes their place. Collective, on their device."""
    if _several():
        dist.all_reduce(values)
    return values


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
