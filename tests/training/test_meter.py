"""Sums of a tick, and the term that is blamed where they are not finite."""

import math
from types import SimpleNamespace

import pytest
import torch

from sivae_fast.training import meter
from sivae_fast.training.meter import Meter, first_not_finite, means


@pytest.fixture
def sums():
    return Meter(torch.device("cpu"))


def test_samples_and_means_over_samples_add_up(sums):
    assert sums.totals() == {} and sums.of_ranks() == []
    sums.add({"rec_real": torch.tensor([2.0**24, 1.0, 1.0, 1.0]), "kl_real": torch.tensor(3.0)}, 4)
    sums.add({"rec_real": torch.tensor(5.0)}, 2)
    # No float32 holds the sum.
    assert sums.totals() == {"rec_real": (2**24 + 13, 6), "kl_real": (12.0, 4)}
    assert means(sums.totals())["kl_real"] == 3.0
    sums.clear()
    assert sums.totals() == {}
    sums.add({"kl_real": torch.tensor([1.0, 4.0])}, 2)
    assert sums.totals() == {"kl_real": (5.0, 2)}


def test_restored_sums_take_the_place_of_others(sums):
    sums.add({"rec_real": torch.tensor([1.0]), "kl_real": torch.tensor([2.0])}, 1)
    sums.restore({"kl_real": (8.0, 3), "loss_vae": (6.0, 3)})
    sums.add({"kl_real": torch.tensor([2.0])}, 1)
    assert sums.totals() == {"kl_real": (10.0, 4), "loss_vae": (6.0, 3)}


def test_totals_are_of_all_ranks(sums, monkeypatch):
    """The other one has three times as much."""

    def all_gather(tables, table):
        for factor, each in zip((1, 3), tables, strict=True):
            each.copy_(factor * table)

    ranks = {"is_initialized": lambda: True, "get_world_size": lambda: 2, "all_gather": all_gather}
    monkeypatch.setattr(meter, "dist", SimpleNamespace(all_reduce=lambda table: table.mul_(4), **ranks))
    sums.add({"kl_real": torch.tensor([1.0, 4.0])}, 2)
    assert sums.totals() == {"kl_real": (20.0, 8)}
    assert sums.of_ranks() == [{"kl_real": (5.0, 2)}, {"kl_real": (15.0, 6)}]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_the_real_batch_is_blamed_before_fakes_and_losses_last(wrong):
    values = {"loss_encoder": wrong, "rec_fake": wrong, "kl_fake": 1.0}
    assert first_not_finite({**values, "rec_real": wrong, "kl_real": 1.0}) == "rec_real"
    assert first_not_finite(values) == "rec_fake"
    assert first_not_finite({"kl_real": 1.0, "loss_encoder": wrong}) == "loss_encoder"
    assert first_not_finite({"kl_real": 1.0}) is None
