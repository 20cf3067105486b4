"""Random numbers: functions of (seed, images, name), the same rows on any number of ranks."""

import pytest
import torch

from sivae_fast.draws import Draws, Joined, Rows


def test_ranks_draw_their_rows_of_the_global_batch():
    whole = Draws(3, 640, Rows.all(8)).stream("rec").normal(8, 2, 3)
    for rank in range(4):
        rows = Rows.all(8).part(rank, 4)
        mine = Draws(3, 640, rows).stream("rec").normal(2, 2, 3)
        assert torch.equal(mine, whole[2 * rank : 2 * rank + 2])


@pytest.mark.parametrize("seed, images, name", [(4, 640, "rec"), (3, 641, "rec"), (3, 640, "fake")])
def test_every_part_of_the_key_matters(seed, images, name):
    one = Draws(3, 640, Rows.all(8)).stream("rec").normal(8, 2)
    assert not torch.equal(one, Draws(seed, images, Rows.all(8)).stream(name).normal(8, 2))


def test_streams_do_not_depend_on_other_draws():
    draws = Draws(0, 0, Rows.all(4))
    alone = draws.stream("a").normal(4, 2)
    draws.stream("b").normal(4, 100)
    assert torch.equal(draws.stream("a").normal(4, 2), alone)


def test_joined_streams_give_what_each_gives_alone():
    draws = Draws(0, 0, Rows(2, 4, 8))
    joined = Joined(draws.stream("a"), draws.stream("b"))
    a, b = draws.stream("a"), draws.stream("b")
    shared = joined.shared_normal(1, 1, 4, 4)
    assert torch.equal(shared[:2], a.shared_normal(1, 1, 4, 4).expand(2, 1, 4, 4))
    assert torch.equal(shared[2:], b.shared_normal(1, 1, 4, 4).expand(2, 1, 4, 4))
    both = joined.normal(4, 3)
    assert torch.equal(both, torch.cat([a.normal(2, 3), b.normal(2, 3)]))


def test_wrong_numbers_of_rows_are_refused():
    with pytest.raises(ValueError, match="asked for 3 rows, this pass has 4"):
        Draws(0, 0, Rows.all(4)).stream("a").normal(3, 2)
    with pytest.raises(ValueError, match="5 rows do not divide into 2"):
        Rows.all(5).part(0, 2)
