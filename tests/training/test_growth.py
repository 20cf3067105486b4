"""Schedules as functions of images seen: the published FFHQ values."""

import math

import pytest

from sivae_fast.config import load_config
from sivae_fast.growth import Schedule, Stage
from sivae_fast.systems import make_schedule
from tests.training.conftest import ROOT

EPOCH = 60_000


@pytest.fixture
def ffhq() -> Schedule:
    return make_schedule(load_config(ROOT / "launch" / "configs" / "ffhq256.yaml"))


@pytest.mark.parametrize(
    "epoch, lod, beta_neg, rate, batch",
    [
        (0, 0, 2048, 0.0015, 512),
        (15.99, 0, 2048, 0.0015, 512),
        (16, 1, 2048, 0.0015, 256),
        (32, 2, 2048, 0.0015, 128),
        (48, 3, 1024, 0.0015, 64),
        (64, 4, 512, 0.0015, 32),
        (96, 6, 512, 0.002, 32),
        (299, 6, 512, 0.002, 32),
    ],
)
def test_published_values_change_exactly_at_the_switch(ffhq, epoch, lod, beta_neg, rate, batch):
    stage = ffhq.at(int(epoch * EPOCH))
    assert (stage.lod, stage.beta_neg, stage.learning_rate, stage.batch) == (lod, beta_neg, rate, batch)


def test_first_half_of_a_level_is_faded_in(ffhq):
    assert ffhq.at(0).blend == 1.0
    assert ffhq.at(16 * EPOCH).blend == 0.0
    assert ffhq.at(18 * EPOCH).blend == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
    assert ffhq.at(20 * EPOCH).blend == pytest.approx(0.5)
    assert ffhq.at(24 * EPOCH).blend == 1.0
    assert ffhq.at(31 * EPOCH).blend == 1.0


def test_drops_multiply_the_rate():
    schedule = Schedule(batch=4, learning_rate=1e-3, drops=(100, 200))
    assert [schedule.learning_rate(n) for n in (0, 99, 100, 250)] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5])
    halved = Schedule(batch=4, learning_rate=1.0, drops=(200, 100), drop_factor=0.5)
    assert [halved.learning_rate(n) for n in (99, 150, 200)] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    "batch, micro_batch, world, pieces",
    [
        (12, None, 1, 1),
        (12, 12, 1, 1),
        (12, 5, 1, 3),
        (12, 4, 1, 3),
        (12, 5, 2, 2),
        (7, 6, 1, 7),
        (6, 1, 3, 2),
    ],
)
def test_pieces_are_the_fewest_equal_ones(batch, micro_batch, world, pieces):
    assert Stage(0, 1.0, batch, 1e-3, None, micro_batch).pieces(world) == pieces


def test_stages_are_the_levels_that_are_trained_with_their_own_values():
    values = {"batch": [8, 4, 2], "learning_rate": [1.0, 2.0, 3.0], "micro_batch": [8, 2, 1]}
    growing = Schedule(levels=3, images_per_level=10, beta_neg=[3, 2, 1], **values)
    assert growing.stages() == [
        Stage(0, 1.0, 8, 1.0, 3, 8),
        Stage(1, 0.0, 4, 2.0, 2, 2),
        Stage(2, 0.0, 2, 3.0, 1, 1),
    ]
    assert growing.lod(10**6) == 2 and growing.batch(10) == 4
    assert Schedule(levels=3, **values).stages() == [Stage(2, 1.0, 2, 3.0, None, 1)]
    assert Schedule(levels=2, images_per_level=10, fade=0, **values).at(10) == Stage(1, 1.0, 4, 2.0, None, 2)
    with pytest.raises(ValueError, match=r"optim\.learning_rate has 2 values, a model of one size"):
        Schedule(batch=4, learning_rate=[1e-3, 1e-4])


@pytest.mark.parametrize(
    "key", ["train.batch", "train.micro_batch", "optim.learning_rate", "objective.beta_neg"]
)
def test_too_few_values_name_the_key(key):
    values = {"batch": 4, "learning_rate": 1e-3, key.partition(".")[2]: [4, 4]}
    with pytest.raises(ValueError, match=rf"{key} has 2 values, the model has 3 levels of detail"):
        Schedule(levels=3, images_per_level=10, **values)
