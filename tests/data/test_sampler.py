"""The training sequence is a pure function of seed and images seen."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sivae_fast.data.sampler import Sampler, permutation


@given(st.integers(1, 300), st.integers(0, 2**40), st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(size, seed, epoch):
    order = Sampler(size, seed).indices(epoch * size, (epoch + 1) * size)
    assert np.array_equal(np.sort(order), np.arange(size))


def test_seeds_and_epochs_have_their_own_orders():
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_never_changes_between_versions():
    assert Sampler(10, 0).indices(0, 20).tolist() == GOLDEN_10


GOLDEN_10 = [0, 8, 9, 3, 7, 5, 1, 2, 6, 4, 3, 7, 4, 2, 9, 8, 1, 6, 5, 0]


@given(st.integers(1, 40), st.integers(0, 500), st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_any_cut_of_the_sequence_reads_the_same(size, start, lengths):
    sampler = Sampler(size, 3)
    ends = start + np.cumsum(lengths)
    pieces = [sampler.indices(int(e - n), int(e)) for e, n in zip(ends, lengths, strict=True)]
    assert np.array_equal(np.concatenate(pieces), sampler.indices(start, int(ends[-1])))
    assert len(sampler.indices(start, start)) == 0


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_hold_consecutive_pieces_of_the_global_batch(world):
    sampler = Sampler(17, 1)
    batch_at = lambda n: 6 if n < 20 else 12
    ranks = [islice(sampler.requests(4, batch_at, r, world), 5) for r in range(world)]
    joined = [np.concatenate(rows) for rows in zip(*ranks, strict=True)]
    assert [len(b) for b in joined] == [6, 6, 6, 12, 12]
    assert np.array_equal(np.concatenate(joined), sampler.indices(4, 4 + 42))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_item_once_an_epoch_over_the_ranks(world):
    seen = np.zeros(24, int)
    for rank in range(world):
        for rows in islice(Sampler(24, 9).requests(0, lambda n: 6, rank, world), 4):
            np.add.at(seen, rows, 1)
    assert (seen == 1).all()


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Sampler(0)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        Sampler(3, -1)
    for batch in (7, 0):
        with pytest.raises(ValueError, match=f"batch of {batch} does not divide over 2 ranks"):
            next(Sampler(3).requests(0, lambda n, batch=batch: batch, 0, 2))
    with pytest.raises(ValueError, match=r"rank must lie in 0 \.\.\. 1, got 2"):
        next(Sampler(3).requests(0, lambda n: 2, 2, 2))
