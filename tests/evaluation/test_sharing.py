"""Who does which part of a measure."""

import pytest
import torch

from sivae_fast.evaluation import sharing


@pytest.mark.parametrize(
    ("count", "step", "world"), [(10, 1, 3), (10, 4, 2), (130, 64, 4), (2, 1, 5), (0, 8, 2)]
)
def test_shares_follow_each_other_and_begin_at_whole_steps(monkeypatch, count, step, world):
    ends = [0]
    for rank in range(world):
        monkeypatch.setattr(sharing, "_several", lambda: True)
        monkeypatch.setattr(sharing.dist, "get_world_size", lambda: world)
        monkeypatch.setattr(sharing.dist, "get_rank", lambda rank=rank: rank)
        start, stop = sharing.share(count, step)
        assert start == ends[-1] <= stop and (start % step == 0 or start == count)
        ends.append(stop)
    assert ends[-1] == count


def test_one_process_does_everything():
    rows = torch.rand(3, 2)
    assert sharing.rank() == 0 and sharing.share(7) == sharing.share(7, 4) == (0, 7)
    assert sharing.gather(rows) is rows and sharing.summed(rows) is rows
