"""Which item stands at which position of the endless training sequence, without state.

Position p belongs to epoch p // size. Each epoch is an exact permutation that depends on (seed, epoch)
alone, so any number of ranks reads the same sequence and a run resumes from nothing but the number of
images seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np

from sivae_fast.draws import Rows


@lru_cache(maxsize=4)
def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `size` items in one epoch: int64 [size], each of 0 ... size - 1 once.

    Made from the raw output of Philox, which NumPy keeps the same in every version (its shuffles it does
    not).
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(size)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order


class Sampler:
    """The training sequence over `size` items.

    Raises ValueError where `size` is not positive or `seed` is negative.
    """

    def __init__(self, size: int, seed: int = 0):
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        self.size, self.seed = size, seed

    def indices(self, start: int, stop: int) -> np.ndarray:
        """The items at positions start <= p < stop: int64 [stop - start]; they may straddle epochs."""
        pieces = []
        while start < stop:
            epoch, offset = divmod(start, self.size)
            count = min(stop - start, self.size - offset)
            pieces.append(permutation(self.size, self.seed, epoch)[offset : offset + count])
            start += count
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def requests(
        self, start: int, batch_at: Callable[[int], int], rank: int = 0, world: int = 1
    ) -> Iterator[np.ndarray]:
        """The items of each batch of this rank, endlessly, from `start` images seen on.

        At n images seen the global batch has batch_at(n) items; rank r of W takes the r-th of W equal
        consecutive pieces of it. Raises ValueError where a batch does not divide into `world` pieces.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie in 0 ... {world - 1}, got {rank}")
        while True:
            batch = batch_at(start)
            if batch < 1 or batch % world:
                raise ValueError(
                    f"a batch of {batch} does not divide over {world} ranks; "
                    f"it must be a positive multiple of {world}"
                )
            rows = Rows.all(batch).part(rank, world)
            yield self.indices(start + rows.start, start + rows.stop)
            start += batch
