"""When a tick is unsound, and what is advised then; test_faults.py has whole runs."""

import math
import re

import pytest

from sivae_fast.config import make_config
from sivae_fast.training.guard import FEWEST, TICKS, Diverged, Guard


def tick(error: float) -> dict[str, float]:
    return {"rec_real": error, "kl_real": 1.0}


def test_ticks_that_are_long_gone_are_no_part_of_the_median():
    guard = Guard(make_config({"guard": {"spike": 3}}))
    for error in [10.0] * TICKS + [25.0] * (TICKS // 2 + 1):
        guard.check_tick(tick(error), 0, 0)
    guard.check_tick(tick(70.0), 0, 0)


def test_a_spike_is_told_as_soon_as_there_is_a_median():
    guard = Guard(make_config({"guard": {"spike": 3}}))
    for _ in range(FEWEST):
        guard.check_tick(tick(10.0), 0, 0)
    with pytest.raises(Diverged, match="rec_real rose to 31, more than"):
        guard.check_tick(tick(31.0), 0, 0)


def test_the_first_side_whose_step_was_left_out_is_named_where_all_means_are_finite():
    guard = Guard(make_config({}))
    guard.check_finite(tick(1.0), 1, 48)
    with pytest.raises(Diverged, match=r"the gradient of the encoder is not finite at level 1 \(8 pixels\)"):
        guard.check_finite(tick(1.0), 1, 48, ["encoder", "decoder"])
    with pytest.raises(Diverged, match="diverged: rec_real is not finite"):
        guard.check_finite(tick(float("inf")), 1, 48, ["encoder"])


def test_a_planned_checkpoint_has_returns_of_its_own():
    guard = Guard(make_config({"guard": {"rollbacks": 1}}))
    assert guard.may_return() and not guard.may_return()
    guard.saved(64, planned=False)
    assert guard.checkpoint == 64 and not guard.may_return()
    guard.saved(96, planned=True)
    assert guard.may_return() and not guard.may_return()


@pytest.mark.parametrize(
    ("objective", "advice"),
    [
        ({"kind": "soft_introvae"}, "a higher objective.beta_neg (a weaker push"),
        ({"kind": "introvae", "margin": 5}, "a lower objective.beta_neg or objective.margin (a weaker push"),
    ],
)
def test_the_advice_weakens_the_push_against_fakes(objective, advice):
    guard = Guard(make_config({"objective": objective}))
    with pytest.raises(Diverged, match=re.escape(f"What helps, in this order: {advice}")):
        guard.check_finite({**tick(math.nan), "loss_encoder": 1.0}, 0, 48)
