"""The out-of-distribution bench: its made sets, its split, and a short run from end to end."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
sys.path.append(str(Path(__file__).parents[1] / "bench"))
import ood


def test_own_images_are_no_training_images_and_sets_repeat():
    sets, again = ood.image_sets(), ood.image_sets()
    assert {name: pictures.shape[1:] for name, pictures in sets.items()} == dict.fromkeys(sets, (8, 8))
    assert len(sets["train"]) == 1297 and len(sets["own"]) == 500
    assert all(np.array_equal(pictures, again[name]) for name, pictures in sets.items())
    trained_on = {picture.tobytes() for picture in sets["train"]}
    assert not any(picture.tobytes() in trained_on for picture in sets["own"])
    turned = sets["digits on their side"]
    assert np.array_equal(np.rot90(turned[3], -1), sets["own"][3])
    assert sets["made blobs"].std() > 20 and sets["made stripes"].std() > 20


def test_table_has_means_and_half_ranges():
    runs = [{"auroc": {"blobs": {"kl": value}}} for value in (0.5, 0.8, 0.9)]
    assert ood.table({"vae": runs}) == {"vae": {"blobs": {"kl": [0.7333, 0.2]}}}


def test_a_short_run_writes_every_number_and_both_histograms(tmp_path, monkeypatch):
    sets = {name: pictures[:40] for name, pictures in ood.image_sets().items()}
    monkeypatch.setattr(ood, "image_sets", lambda: sets)
    monkeypatch.setattr(sys, "argv", ["ood.py", "--images", "512", "--seeds", "1", "--out", str(tmp_path)])
    ood.main()
    found = json.loads((tmp_path / "ood.json").read_text())
    assert found["images_seen"] == 512
    for model in ood.OBJECTIVES:
        (run,) = found["runs"][model]
        assert run["counts"] == dict.fromkeys(sets.keys() - {"train"}, 40)
        assert all(0 <= value <= 1 for scores in run["auroc"].values() for value in scores.values())
        assert (tmp_path / f"ood-{model.replace('_', '-')}.png").stat().st_size > 5000
