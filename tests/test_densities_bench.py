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
    monkeypatch.setattr(densities, "floors", lambda: {name: {"kl": 0.5} for name in densities.DENSITIES})
    (tmp_path / "densities").mkdir()
    values = {0: 1.0, 1: 2.0, 2: 4.5}
    for seed, value in values.items():
        scores = {key: value * (1e-8 if key == "gnelbo" else 1) for key in densities.SCORES}
        record = {**scores, "commit": f"c{seed % 2}"}
        (tmp_path / "densities" / f"rings-vae-{seed}.json").write_text(json.dumps(record))
    found = densities.collect(tmp_path)
    (row,) = (row for row in found["rows"] if row["model"] == "VAE")
    assert (row["density"], row["seeds"], row["commits"]) == ("rings", 3, ["c0", "c1"])
    assert row["scores"]["kl"] == 2.5
    assert row["deviations"]["kl"] == pytest.approx(statistics.stdev(values.values()))
    lines = densities.table(found).splitlines()
    assert "| rings | VAE | 3 | 2.500 ± 1.803 | 2.500 ± 1.803 |" in " ".join(lines)
    assert json.loads((tmp_path / "densities.json").read_text()) == found


def test_another_folder_takes_everything(monkeypatch, tmp_path):
    """Cells that are there are known; neither page nor committed results are touched."""
    committed = [densities.PAGE, *(path for path in densities.RESULTS.rglob("densities*") if path.is_file())]
    before = [path.read_bytes() for path in committed]
    trained, cell = [], densities.Cell("rings", "vae", 0)
    monkeypatch.setattr(densities, "floors", lambda: {name: {"kl": 0.5} for name in densities.DENSITIES})
    monkeypatch.setattr(densities, "draw_overview", lambda path, *_: path.touch())

    def train(cell, runs, out):
        trained.append(str(cell))
        record = {**dict.fromkeys(densities.SCORES, 1.0), "commit": "c"}
        densities.write_text(cell.record(out), json.dumps(record))

    monkeypatch.setattr(densities, "train", train)
    for _ in range(2):
        monkeypatch.setattr(
            sys, "argv", ["densities.py", "--only", "rings/vae/0", "--out", str(tmp_path / "new")]
        )
        densities.main()
    assert trained == [str(cell)]
    names = {path.name for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert names == {f"{cell}.json", "densities.json", "densities.png"}
    assert [path.read_bytes() for path in committed] == before
