"""What signals do to a run."""

import signal

import pytest

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
        signal.raise_signal(signal.SIGTERM)
        assert stopper.asked(2)


def test_a_later_signal_ends_the_process_at_once(now):
    with Stopper(world=1, timeout=60) as stopper:
        signal.raise_signal(signal.SIGINT)
        now["now"] += 3
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stopper.asked(1)


def test_handlers_are_those_of_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with Stopper(world=1, timeout=60):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
