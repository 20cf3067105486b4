"""Random numbers: functions of (seed, images, name), the same rows on any number of ranks."""

import pytest
import torch

from sivae_fast.draws import Draws, Joined, Rows, Stream, stream_seed


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
    for kind in ("normal", "uniform"):
        both = getattr(joined, kind)(4, 3, dtype=torch.float64)
        alone = [getattr(stream, kind)(2, 3, dtype=torch.float64) for stream in (a, b)]
        assert torch.equal(both, torch.cat(alone))
    assert joined.shared_normal(1, 2, dtype=torch.float64).dtype == torch.float64
    assert joined.device == a.device


def test_wrong_numbers_of_rows_are_refused():
    with pytest.raises(ValueError, match="asked for 3 rows, this pass has 4"):
        Draws(0, 0, Rows.all(4)).stream("a").normal(3, 2)
    with pytest.raises(ValueError, match="5 rows do not divide into 2"):
        Rows.all(5).part(0, 2)
    streams = [Draws(0, 0, Rows.all(4)).stream(name) for name in "ab"]
    with pytest.raises(ValueError, match="asked for 4 rows, the joined passes have others"):
        Joined(*streams).normal(4, 2)


def test_numbers_never_change_between_versions():
    """A run that goes on under a later version draws what it would have drawn."""
    assert stream_seed(3, 640, "rec") == 3029118472668706548
    stream = Draws(3, 640, Rows.all(4)).stream("rec")
    assert [stream.integer(1, 6) for _ in range(10)] == [1, 4, 6, 4, 1, 6, 3, 5, 2, 4]
    assert stream.normal(4, 1)[:2, 0].tolist() == pytest.approx([0.0925498, -0.3092450], rel=1e-5)


def test_pieces_of_pieces_are_rows_of_the_same_global_batch():
    assert Rows.all(8).part(1, 2).part(1, 2) == Rows(6, 8, 8)
    draws = Draws(1, 0, Rows.all(8).part(1, 2).part(1, 2))
    whole = draws.over(Rows.all(8)).stream("a").normal(8, 3)
    assert torch.equal(draws.stream("a").normal(2, 3), whole[6:])
    asked = Draws(1, 0, Rows.all(8), "meta", lambda name, rows: (name, rows)).over(Rows(2, 4, 8))
    assert asked.stream("a") == ("a", Rows(2, 4, 8)) and asked.device == "meta"


def test_kinds_of_draws():
    stream = Stream(1, Rows.all(1000))
    uniform, normal, shared = stream.uniform(1000, 1), stream.normal(1000, 1), stream.shared_normal(1, 1000)
    assert 0 <= uniform.min() < 0.01 and 0.99 < uniform.max() < 1
    assert all(draw.min() < -2 and draw.max() > 2 for draw in (normal, shared))
    assert not any(stream.coin(0.0) for _ in range(50)) and all(stream.coin(1.0) for _ in range(50))
    assert sum(stream.coin(0.2) for _ in range(1000)) == pytest.approx(200, abs=50)
    index = stream.index(1, 2)
    assert index.dtype == torch.int64 and index.ndim == 0
    assert stream.normal(1000, 2, dtype=torch.float64).dtype == torch.float64


def test_a_stream_goes_on_from_draw_to_draw():
    """The noise maps of a network are draws of one stream, and none repeats another."""
    stream = Stream(1, Rows.all(2))
    kinds = 2 * [stream.normal, stream.shared_normal]
    assert len({draw(2, 1)[0].item() for draw in kinds}) == 4
    assert not torch.equal(stream.uniform(2, 3), stream.uniform(2, 3))


def test_a_restarted_stream_is_a_new_one():
    """As captured graphs use them: host and device draws start over from the new seed."""
    drawn = lambda stream: (stream.integer(0, 10**9), stream.normal(2, 1)[0].item())
    stream = Stream(1, Rows.all(2))
    first = drawn(stream)
    stream.restart(2)
    again = drawn(stream)
    assert again == drawn(Stream(2, Rows.all(2))) and not set(again) & set(first)
