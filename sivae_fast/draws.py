"""Random numbers as a function of (seed, images seen, name): no generator state to save.

Every draw is made for the whole global batch and each rank keeps its own rows, so that N ranks draw what
one rank would draw, every row has its own noise, and a resumed run needs nothing but the image counter.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
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
        #: None before the first draw on the device
        self.generator: torch.Generator | None = None
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """From here on the numbers of a new stream of `seed`."""
        self._seed, self._host = seed, None
        if self.generator is not None:
            self.generator.manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers of `shape`; `shape[0]` is the number of rows of this pass."""
        return self._rows_of(torch.randn, shape, dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform numbers in [0, 1) of `shape`; `shape[0]` is the number of rows of this pass."""
        return self._rows_of(torch.rand, shape, dtype)

    def shared_normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers of `shape`, the same for every row and rank."""
        return torch.randn(shape, generator=self._on_device(), device=self.device, dtype=dtype)

    def coin(self, probability: float) -> bool:
        """True with `probability`; one host-side draw for the whole global batch."""
        return self._on_host().random() < probability

    def integer(self, low: int, high: int) -> int:
        """Uniform in low, ..., high (both included); one host-side draw for the whole global batch."""
        return self._on_host().randint(low, high)

    def index(self, low: int, high: int) -> Tensor:
        """The number `integer` draws, as int64, 0-dim, on the device: a captured graph can follow it."""
        return torch.full((), self.integer(low, high), device=self.device)

    # Most streams draw on the device alone, some not at all, and seeding takes a while.
    def _on_host(self) -> random.Random:
        if self._host is None:
            self._host = random.Random(self._seed)
        return self._host

    def _on_device(self) -> torch.Generator:
        if self.generator is None:
            self.generator = torch.Generator(self.device).manual_seed(self._seed)
        return self.generator

    def _rows_of(self, draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if shape[0] != len(self.rows):
            raise ValueError(f"asked for {shape[0]} rows, this pass has {len(self.rows)}")
        size = (self.rows.total, *shape[1:])
        whole = draw(size, generator=self._on_device(), device=self.device, dtype=dtype)
        return whole[self.rows.start : self.rows.stop]


def stream_seed(seed: int, images: int, name: str) -> int:
    """The seed of the stream `name` of the iteration at `images`; 63 bits."""
    digest = hashlib.blake2b(f"{seed}/{images}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Draws:
    """All random numbers of one iteration: `draws.stream("decode/fake").normal(8, 512)`.

    The same (seed, images, name) always gives the same numbers, whatever else was drawn before.
    make_stream(name, rows): where streams come from; None makes new ones.
    """

    def __init__(
        self,
        seed: int,
        images: int,
        rows: Rows,
        device: torch.device | str = "cpu",
        make_stream: Callable[[str, Rows], Stream] | None = None,
    ):
        self.seed, self.images, self.rows, self.device = seed, images, rows, device
        self._make_stream = make_stream

    def stream(self, name: str) -> Stream:
        if self._make_stream:
            return self._make_stream(name, self.rows)
        return Stream(stream_seed(self.seed, self.images, name), self.rows, self.device)

    def over(self, rows: Rows) -> Draws:
        """The same draws, seen by other rows of the global batch."""
        return Draws(self.seed, self.images, rows, self.device, self._make_stream)


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
