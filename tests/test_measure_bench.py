"""What the benches measure with."""

import importlib
import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("measure")
    sys.modules.pop("measure", None)


def test_commit_is_that_of_the_repository_or_of_the_environment(measure, monkeypatch):
    monkeypatch.setenv("SIVAE_COMMIT", "from outside")
    assert measure.commit() not in ("from outside", "unknown", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=""))  # no repository
    assert measure.commit() == "from outside"


def test_a_machine_without_git_is_described(measure, monkeypatch):
    def missing(command, **_):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", missing)
    monkeypatch.delenv("SIVAE_COMMIT", raising=False)
    assert measure.machine("cpu")["commit"] == "unknown"
    monkeypatch.setenv("SIVAE_COMMIT", "1234567")
    assert measure.machine("cpu")["commit"] == "1234567"


def test_driver_and_clocks_are_those_of_the_device_in_use(measure, monkeypatch):
    asked = []

    def answer(command, **_):
        asked.append(command)
        return SimpleNamespace(stdout="580.1, 345 MHz, 1980 MHz, 700.00 W\n")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12-34"))
    monkeypatch.setattr(subprocess, "run", answer)
    assert measure.driver() == {
        "driver": "580.1",
        "clock_before": "345 MHz",
        "clock_limit": "1980 MHz",
        "power_limit": "700.00 W",
    }
    assert asked[0][-2:] == ["-i", "GPU-12-34"]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=""))
    assert measure.driver() == {}


def test_waiting_and_annotations_are_no_launches(measure):
    device, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(name=name, device_type=kind, is_user_annotation=annotation)
        for name, kind, annotation in (
            ("aten::add", host, False),
            ("add_kernel", device, False),
            ("Memset (Device)", device, False),
            ("Optimizer.step#Adam.step", device, True),
            ("Context Sync", device, False),
            ("Stream Wait Event", device, False),
        )
    ]
    assert [event.name for event in measure.on_device(events)] == ["add_kernel", "Memset (Device)"]


@pytest.mark.parametrize("count", [1, 7, 30])
def test_python_waits_for_the_gpu_after_twenty_calls_at_the_earliest(measure, monkeypatch, count):
    done = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    assert measure.wall([lambda: done.append("call")] * count, "cuda", 0.0) > 0
    waits = [i for i, what in enumerate(done) if what == "wait"]
    assert len(waits) > 1 and all(b - a > 20 for a, b in itertools.pairwise(waits))


def test_rounds_tell_their_spread(measure):
    values = iter([3.0, 1.0, 2.0])
    found = measure.rounds({"a": lambda: next(values)}, 3)["a"]
    assert found == (2.0, 1.0, 3.0)
    assert found.row("wall_ms") == {"wall_ms": 2e3, "wall_ms_least": 1e3, "wall_ms_most": 3e3}
