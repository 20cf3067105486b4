"""What bench/densities.py writes about the cells that are there."""

import json
import statistics
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import densities


def test_the_table_of_the_page_is_that_of_the_results():
    page = densities.PAGE.read_text(encoding="utf-8")
    found = json.loads((densities.RESULTS / "densities.json").read_text())
    assert densities.filled(page, found) == page


def test_several_seeds_become_mean_and_deviation(monkeypatch, tmp_path):
    """And every cell's record is counted, no other density's."""
    monkeypatch.setattr(densities, "RESULTS", tmp_path)
    monkeypatch.setattr(densities, "floors", lambda: {name: {"kl": 0.5} for name in densities.DENSITIES})
    (tmp_path / "densities").mkdir()
    values = {0: 1.0, 1: 2.0, 2: 4.5}
    for seed, value in values.items():
        scores = {key: value * (1e-8 if key == "gnelbo" else 1) for key in densities.SCORES}
        record = {**scores, "commit": f"c{seed % 2}"}
        (tmp_path / "densities" / f"rings-vae-{seed}.json").write_text(json.dumps(record))
    found = densities.collect(tmp_path / "densities.json")
    (row,) = (row for row in found["rows"] if row["model"] == "VAE")
    assert (row["density"], row["seeds"], row["commits"]) == ("rings", 3, ["c0", "c1"])
    assert row["scores"]["kl"] == 2.5
    assert row["deviations"]["kl"] == pytest.approx(statistics.stdev(values.values()))
    lines = densities.table(found).splitlines()
    assert "| rings | VAE | 3 | 2.500 ± 1.803 | 2.500 ± 1.803 |" in " ".join(lines)
    assert json.loads((tmp_path / "densities.json").read_text()) == found
