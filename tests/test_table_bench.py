"""What the table of the README says of results."""

import importlib
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("table")
    sys.modules.pop("table", None)


def test_a_step_is_compared_within_its_precision(table):
    seconds = {
        "plain": 1.0,
        "plain, TF32": 0.8,
        "minimal": 0.5,
        "minimal, graphs": 0.4,
        "plain, compiled, bf16": 0.3,
        "minimal, bf16, graphs": 0.1,
    }
    best = {name: {"seconds_an_image": value} for name, value in seconds.items()}
    assert table._step({"best": best, "device": "GPU"}) == (
        "minimal, graphs: **0.40** of the time of the plain published trainer, "
        "**0.50** of the time of the same with TF32 (400 ms an image, GPU); "
        "minimal, bf16, graphs: **0.33** of the time of the plain published trainer, compiled, in bf16 "
        "(100 ms an image, GPU)"
    )
