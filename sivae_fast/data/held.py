"""Training sets that fit in memory whole."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sivae_fast.data.sampler import Sampler


class Held:
    """Items kept on the device in the form in which `batches` gives them: half of `contract.TrainingData`."""

    def __init__(self, items: Tensor, seed: int = 0, device: torch.device | str = "cpu"):
        self.items = items.to(device)
        self._sampler = Sampler(len(items), seed)

    def __len__(self) -> int:
        return len(self.items)

    def checksum(self) -> str:
        """Of up to 64 items, from the first to the last."""
        rows = torch.linspace(0, len(self) - 1, min(64, len(self))).long()
        sample = self.items[rows.to(self.items.device)].cpu().contiguous()
        return f"{zlib.crc32(sample.numpy().tobytes()):08x}"

    def batches(
        self, start: int, batch_at: Callable[[int], int], rank: int = 0, world: int = 1
    ) -> Iterator[Tensor]:
        """This rank's rows of every batch from `start` images seen on, endless."""
        for indices in self._sampler.requests(start, batch_at, rank, world):
            yield self.items[torch.from_numpy(indices).to(self.items.device, non_blocking=True)]

    def first(self, count: int) -> Tensor:
        """The same `count` items in every run; all of them where there are fewer."""
        chosen = Sampler(len(self)).indices(0, min(count, len(self)))
        return self.items[torch.from_numpy(chosen).to(self.items.device)]

    def close(self) -> None:
        pass
