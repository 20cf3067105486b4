"""The Chamfer bench measures what is right and gives no row to what is wrong."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("chamfer")
    for name in ("chamfer", "measure"):
        sys.modules.pop(name, None)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_rows_of_right_versions_alone(bench, tmp_path, monkeypatch):
    found = {**bench.versions(), "wrong": lambda x, y: 1.001 * bench.by_cdist(x, y)}
    monkeypatch.setattr(bench, "versions", lambda: found)
    points = ["256", "800"]
    bench.main(
        ["--device", "cpu", "--points", *points, "--batch", "2", "--seconds", "0", "--out", str(tmp_path)]
    )
    rows = json.loads((tmp_path / "chamfer-cpu.json").read_text())["rows"]
    assert {row["version"] for row in rows} >= {"sivae", "cdist", "expansion"} and all(
        row["version"] != "wrong" for row in rows
    )
    added = {(row["version"], row["points"]): row["added_mib"] for row in rows}
    # The matrix of distances and its square are 10 MiB, their gradients as much.
    assert added["cdist", 800] > 16 > 4 > added["sivae", 800]
    table = importlib.import_module("table")
    assert "at 256 / 800 points" in table._chamfer(json.loads((tmp_path / "chamfer-cpu.json").read_text()))
    assert all(row["forward_backward_ms"] > 0 and row["relative_error"] < 1e-4 for row in rows)
