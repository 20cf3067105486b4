"""Stopping on request: SIGTERM or Ctrl-C ends training after the iteration, on every rank alike."""

from __future__ import annotations

import signal
import time
from datetime import timedelta

import torch
import torch.distributed as dist

EVERY = 4  # iterations between looks at the other ranks
TOGETHER = (
    2.0  # seconds: on Ctrl-C a launcher adds its SIGTERM to the terminal's SIGINT, which is one request
)


class Stopper:
    """`asked` is true, on all ranks at the same iteration, once any rank received SIGTERM or SIGINT.

    A second signal, two seconds later or more, ends the process at once.
    """

    def __init__(self, world: int, timeout: int):
        self._world = world
        self._received, self._since = False, 0.0
        self._before = {}
        # On the CPU, so that asking never waits for the GPU.
        limit = timedelta(seconds=timeout)
        self._group = dist.new_group(backend="gloo", timeout=limit) if world > 1 else None

    def __enter__(self) -> Stopper:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self, iteration: int) -> bool:
        """Collective every few iterations; call it once after each iteration with its number."""
        if self._group is None:
            return self._received
        if iteration % EVERY:
            return False
        flag = torch.tensor([int(self._received)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def _receive(self, number, frame) -> None:
        if not self._received:
            self._received, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > TOGETHER:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
