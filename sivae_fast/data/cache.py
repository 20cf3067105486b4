"""Decoded images kept in memory, so that a set which fits is read and decoded once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sivae_fast.data.archive import ImageSet
from sivae_fast.data.parallel import local_ranks

#: Where a container sees the limits of its memory.
GROUP = Path("/sys/fs/cgroup")


class Cache:
    """All images of a set as uint8 on `device`, filled while they are asked for.

    A rank asks for its part of each epoch only. Whatever share of a request is held already is used to decode
    images that are not, so every rank holds the whole set after as many epochs as there are ranks, and
    decodes each image once.
    """

    def __init__(self, images: ImageSet, device: torch.device):
        side = images.resolution
        shape = (len(images), side, side, images.channels)
        self._pixels = torch.empty(shape, dtype=torch.uint8, device=device)
        self._held = np.zeros(len(images), bool)

    def stream(self, requests: Iterable[np.ndarray], decoder) -> Iterator[Tensor]:
        """The images of each array of indices [n]: uint8 [n, R, R, C] on the device."""
        waiting: deque[tuple[np.ndarray, np.ndarray]] = deque()
        requests = iter(requests)
        for decoded in decoder.stream(self._missing(requests, waiting)):
            indices, missing = waiting.popleft()
            self._pixels[self._on_device(missing)] = decoded.to(self._pixels.device, non_blocking=True)
            self._held[missing] = True
            yield self._pixels[self._on_device(indices)]
        for indices in requests:
            yield self._pixels[self._on_device(indices)]

    def _missing(self, requests: Iterator[np.ndarray], waiting: deque) -> Iterator[np.ndarray]:
        """What to decode while each request is served, until everything is held; never nothing."""
        asked = self._held.copy()
        while not asked.all():
            indices = next(requests)
            missing = np.unique(indices[~asked[indices]])
            asked[missing] = True
            if spare := len(indices) - len(missing):
                others = np.flatnonzero(~asked)[:spare]
                asked[others] = True
                missing = np.concatenate([missing, others])
            waiting.append((indices, missing))
            yield missing

    def _on_device(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(indices).to(self._pixels.device, non_blocking=True)


def fits(images: ImageSet, device: torch.device, limit: float | None) -> bool:
    """Whether the decoded set takes at most `limit` GiB on `device`.

    None stands for 40 % of what is free on a GPU, and on a CPU for a quarter of the memory that is available
    to this process, shared by the ranks of the machine.
    """
    needed = len(images) * images.resolution**2 * images.channels
    if limit is not None:
        return needed <= limit * 2**30
    if device.type == "cuda":
        return needed <= 0.4 * torch.cuda.mem_get_info(device)[0]
    return needed <= 0.25 * available_memory() / local_ranks()


def available_memory() -> int:
    """Bytes of host memory that can be taken without swapping, within the limit of a container."""
    numbers = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        kilobytes = dict(line.split(":") for line in meminfo.read_text().splitlines())
        numbers = [int(kilobytes["MemAvailable"].split()[0]) * 1024]
    limit = GROUP / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        kinds = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        # Files that were read count as used, but give way.
        files = int(kinds["active_file"]) + int(kinds["inactive_file"])
        numbers.append(int(most) - int((GROUP / "memory.current").read_text()) + files)
    return max(0, min(numbers))
