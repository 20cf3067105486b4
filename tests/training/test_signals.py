"""What signals do to a run."""

import signal
from datetime import timedelta
from types import SimpleNamespace

import pytest
from torch.distributed import ReduceOp

from sivae_fast.training import signals
from sivae_fast.training.signals import Stopper


@pytest.fixture
def now(monkeypatch):
    clock = {"now": 100.0}
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock["now"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    yield clock
    signal.signal(signal.SIGINT, before)


def test_the_terminal_and_the_launcher_together_are_one_request(now):
    with Stopper(world=1, timeout=60) as stopper:
        assert not stopper.asked(1)
        signal.raise_signal(signal.SIGINT)
        now["now"] += 2
        signal.raise_signal(signal.SIGTERM)
        assert stopper.asked(2)


def test_a_later_signal_ends_the_process_at_once(now):
    with Stopper(world=1, timeout=60) as stopper:
        signal.raise_signal(signal.SIGINT)
        now["now"] += 3
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stopper.asked(1)


@pytest.mark.parametrize(("signalled", "told"), [(False, False), (False, True), (True, False)])
def test_ranks_stop_at_the_same_look(now, monkeypatch, signalled, told):
    """told: whether the other rank has received a signal."""
    looks = []

    def all_reduce(flag, op, group):
        looks.append((op, group))
        flag.clamp_(min=int(told))

    group = ("gloo", timedelta(seconds=60))
    ranks = {"new_group": lambda backend, timeout: (backend, timeout), "all_reduce": all_reduce}
    monkeypatch.setattr(signals, "dist", SimpleNamespace(ReduceOp=ReduceOp, **ranks))
    with Stopper(world=2, timeout=60) as stopper:
        if signalled:
            signal.raise_signal(signal.SIGTERM)
        asked = [stopper.asked(iteration) for iteration in range(1, signals.EVERY + 1)]
    assert asked == [False] * (signals.EVERY - 1) + [signalled or told]
    assert looks == [(ReduceOp.MAX, group)]


def test_handlers_are_those_of_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with Stopper(world=1, timeout=60):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
