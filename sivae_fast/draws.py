"""Random numbers as a function of (seed, images seen, name): no generator state to save.

Every draw is made for the whole global batch and each rank keeps its own rows, so that N ranks draw what
one rank would draw, every row has its own noise, and a resumed run needs nothing but the image counter.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The rows of a global batch that this pass works on: `start <= row < stop` of `total`."""

    start: int
    stop: int
    total: int

    def __len__(self) -> int:
        return self.stop - self.start

    @classmethod
    def all(cls, total: int) -> Rows:
        return cls(0, total, total)

    def part(self, index: int, parts: int) -> Rows:
        """The `index`-th of `parts` equal consecutive pieces of these rows."""
        size, rest = divmod(len(self), parts)
        if rest:
            raise ValueError(f"{len(self)} rows do not divide into {parts} equal parts")
        first = self.start + index * size
        return Rows(first, first + size, self.total)


class Stream:
    """The random numbers of one named draw, taken in a fixed order."""

    def __init__(self, seed: int, rows: Rows, device: torch.device | str = "cpu"):
        self.rows = rows
        self.device = torch.device(device)
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._host = random.Random(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers of `shape`; `shape[0]` is the number of rows of this pass."""
        return self._rows_of(torch.randn, shape, dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform numbers in [0, 1) of `shape`; `shape[0]` is the number of rows of this pass."""
        return self._rows_of(torch.rand, shape, dtype)

    def shared_normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers of `shape`, the same for every row and rank."""
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=dtype)

    def coin(self, probability: float) -> bool:
        """True with `probability`; one host-side draw for the whole global batch."""
        return self._host.random() < probability

    def integer(self, low: int, high: int) -> int:
        """Uniform in low, ..., high (both included); one host-side draw for the whole global batch."""
        return self._host.randint(low, high)

    def _rows_of(self, draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if shape[0] != len(self.rows):
            raise ValueError(f"asked for {shape[0]} rows, this pass has {len(self.rows)}")
        whole = draw(
            (self.rows.total, *shape[1:]), generator=self._generator, device=self.device, dtype=dtype
        )
        return whole[self.rows.start : self.rows.stop]


class Draws:
    """All random numbers of one iteration: `draws.stream("decode/fake").normal(8, 512)`.

    The same (seed, images, name) always gives the same numbers, whatever else was drawn before.
    """

    def __init__(self, seed: int, images: int, rows: Rows, device: torch.device | str = "cpu"):
        self.seed, self.images, self.rows, self.device = seed, images, rows, device

    def stream(self, name: str) -> Stream:
        digest = hashlib.blake2b(f"{self.seed}/{self.images}/{name}".encode(), digest_size=8).digest()
        return Stream(int.from_bytes(digest, "big") >> 1, self.rows, self.device)


class Joined:
    """Several streams side by side, for passes over batches that are joined into one call.

    Row for row it gives what the streams give alone.
    """

    def __init__(self, *streams: Stream):
        self.streams = streams
        self.device = streams[0].device

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._join("normal", shape, dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._join("uniform", shape, dtype)

    def shared_normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """One draw a stream, repeated for its rows: `shape[0]` becomes the number of joined rows."""
        parts = [
            stream.shared_normal(*shape, dtype=dtype).expand(len(stream.rows), *shape[1:])
            for stream in self.streams
        ]
        return torch.cat(parts)

    def _join(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if shape[0] != sum(len(stream.rows) for stream in self.streams):
            raise ValueError(f"asked for {shape[0]} rows, the joined passes have others")
        parts = [getattr(stream, kind)(len(stream.rows), *shape[1:], dtype=dtype) for stream in self.streams]
        return torch.cat(parts)
