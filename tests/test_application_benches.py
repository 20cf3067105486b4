"""The benches of point clouds and translation, from training to their files, on a few items."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from sivae_fast.data.factors import load_factors

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.chdir(tmp_path)
    yield importlib.import_module
    for name in ("translation", "pointclouds", "measure"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_translation(bench, monkeypatch, tmp_path):
    module = bench("translation")
    monkeypatch.setattr(module, "RUNS", {"vae": ["objective.kind=vae"], "soft_introvae": []})
    tiny = [
        "model.resolution=16",
        "train.images=48",
        "train.batch=16",
        "train.warmup_images=32",
        "optim.drops=[]",
    ]
    module.main(["--out", "found", "--seeds", "0", "--set", *tiny])
    found = json.loads(Path("found/translation.json").read_text())
    assert set(found["runs"]) == {"vae", "soft_introvae"}
    for name, rows in found["runs"].items():
        (row,) = rows.values()
        assert row["processor_seconds"] > 0 and 0 < row["swap"]["mse"] < 0.2 and row["images"] == 48
        assert Image.open(f"found/translation_{name}.png").width > 6 * 96
        assert all(0 < error < 0.2 for pair in row["by_factor"].values() for error in pair.values())
    assert found["baselines"]["truth of another pair"]["mse"] > found["baselines"]["mean image"]["mse"]
    before = found["runs"]
    module.main(["--out", "found", "--only", "soft_introvae", "--seeds", "1", "--set", *tiny])
    found = json.loads(Path("found/translation.json").read_text())
    assert found["runs"]["vae"] == before["vae"]
    values = [found["runs"]["soft_introvae"][seed]["swap"]["mse"] for seed in "01"]
    assert values[0] == before["soft_introvae"]["0"]["swap"]["mse"] != values[1]
    assert found["means"]["soft_introvae"]["swap_mse"] == [sum(values) / 2, min(values), max(values)]
    with pytest.raises(FileNotFoundError, match=r"alexnet.*download"):
        module.main(["--lpips", "nowhere"])


def test_errors_by_factor_of_a_model_that_knows_all(bench):
    module = bench("translation")
    factors = load_factors(None, 8)
    codes = torch.stack([factors.classes, factors.contents], 1)
    model = SimpleNamespace(
        swap=lambda a, b: torch.stack([a[:, 0], b[:, 1]], 1),
        decode=lambda z: module.to_float(factors.images[factors.find(*z.unbind(1))]),
    )
    found = module.by_factor(model, factors, codes, 20)
    assert list(found) == ["shape", "colour", "across", "away"]
    for errors in found.values():
        assert errors["to_the_right"] == 0 < errors["to_the_other"]


@pytest.mark.slow
def test_point_clouds(bench, monkeypatch):
    module = bench("pointclouds")
    tiny = [
        "model.points=32",
        "data.points=32",
        "train.images=32",
        "train.warmup_images=16",
        "run.snapshot=16",
    ]
    load = module.load_config
    monkeypatch.setattr(module, "load_config", lambda path, overrides: load(path, [*overrides, *tiny]))
    module.main(["--out", "found"])
    found = json.loads(Path("found/pointclouds.json").read_text())
    assert [point["images"] for point in found["curve"]] == [0, 16, 32]
    floor = found["floor"]["training_clouds_as_samples"]["jsd"]
    assert 0 < floor < found["curve"][-1]["jsd"] < 1
    assert (
        Image.open("found/pointclouds.gif").n_frames > 20 and Image.open("found/pointclouds.png").width > 900
    )
