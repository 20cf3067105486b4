"""The step profile accounts for the whole iteration of the real trainer."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.training.conftest import TINY

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("step_profile")
    for name in ("step_profile", "measure"):
        sys.modules.pop(name, None)


def test_parts_add_up_and_are_counted(bench, image_folder, monkeypatch, tmp_path):
    settings = [f"{key}={value}" for key, value in {**TINY, "data.path": image_folder}.items()]
    arguments = ["--iterations", "4", "--out", str(tmp_path), *settings]
    monkeypatch.setattr(sys, "argv", ["step_profile.py", *arguments])
    monkeypatch.setattr(bench, "limits", lambda device: {"flops": 1e11, "bytes": 1e10})
    threads = torch.get_num_threads()
    try:
        bench.main()
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "step-profile-cpu.json").read_text())
    rows = {row["part"]: row for row in found["rows"]}
    assert list(rows) == bench.PARTS and found["level"] == 1
    whole = sum(row["seconds"] for row in rows.values())
    assert 0.5 * found["iteration_seconds"] < whole < 3 * found["iteration_seconds"]
    for side in bench.SIDES:
        forward, backward = rows[f"{side} forward"], rows[f"{side} backward"]
        assert backward["gflop"] > forward["gflop"] > 0 and forward["mib"] > 0
        assert rows[f"{side} loss"]["gflop"] == 0
    assert (tmp_path / "step-profile-cpu.png").stat().st_size > 1000


def test_nested_sections_count_once(bench):
    ticks = iter(range(100))
    clock = bench.Clock(lambda: {"seconds": next(ticks)})
    with clock.section("outer"), clock.section("inner"):
        pass
    assert clock.found["outer"]["seconds"] == 2 and clock.found["inner"]["seconds"] == 1
