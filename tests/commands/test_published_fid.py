"""The lines of docs/evaluation.md that measure FID as it was published."""

from pathlib import Path

import pytest
import torch

from sivae_fast.evaluation import features as network
from sivae_fast.evaluation import fid

GUIDE = Path(__file__).parents[2] / "docs" / "evaluation.md"


@pytest.fixture
def example(runs, tmp_path, monkeypatch):
    """What the lines define, run on a small model and with features that need no file."""
    (code,) = [part for part in GUIDE.read_text("utf-8").split("```") if "def mirrored" in part]
    code = code.removeprefix("python").replace("50_000", "30")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "00000-ffhq256").symlink_to(runs.style)
    monkeypatch.chdir(tmp_path)
    load = network.load_features
    monkeypatch.setattr(network, "load_features", lambda kind, *where: load("random"))
    scope: dict = {}
    exec(compile(code, str(GUIDE), "exec"), scope)
    return scope


def test_half_of_the_real_images_are_mirrored(example):
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(400, 3, 16, 16)
    torch.manual_seed(0)
    found = torch.cat(list(example["mirrored"](images.split(90))))
    same = (found == images).all(dim=(1, 2, 3))
    assert (found[~same] == images[~same].flip(3)).all()
    assert 0.4 < same.float().mean() < 0.6


def test_generated_images_are_rounded_down(example):
    run = example["run"]
    batches = list(example["rounded_down"](run, 70))
    assert [len(batch) for batch in batches] == [50, 20]  # of which Inception in train mode takes statistics
    found = batches[0]
    rounded = run.sample(70)[:50]
    assert found.shape == rounded.shape and found.dtype == torch.uint8
    less = rounded.int() - found.int()
    assert set(less.unique().tolist()) == {0, 1}
    assert fid.compare(example["features"], [rounded], [found], ["fid"])["fid"] > 0
