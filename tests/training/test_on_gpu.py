"""Whole runs on a GPU, as the command makes them."""

import json
import math

import pytest

from sivae_fast.config import make_config
from sivae_fast.training.loop import train

MODEL = {
    "resolution": 8, "start_channels": 8, "max_channels": 16, "latent_size": 16, "mapping_layers": 2
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16"},
        *({"precision": "bf16", name: True} for name in ("graphs", "compile", "recompute")),
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_a_style_model_grows_to_the_end(options, image_folder, tmp_path):
    """Each level is faded in, and entered as a VAE or not; pictures, averages and checkpoints are made."""
    config = make_config(
        {
            "model": MODEL,
            "objective": {"beta_neg": 16.0, "scale": 0.01},
            "data": {"path": str(image_folder), "loader": "torch"},
            "growth": {"images_per_level": 320},
            "train": {"images": 640, "batch": 16, "warmup_images": 64, **options},
            "engine": {"kind": "torch"},
            "run": {"folder": str(tmp_path), "tick": 160, "samples": 320, "checkpoint": 320},
        }
    )
    folder = train(config)
    ticks = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert [tick["images"] for tick in ticks] == [160, 320, 480, 640]
    assert {tick["lod"] for tick in ticks} == {0, 1} and any(0 < tick["blend"] < 1 for tick in ticks)
    assert all(math.isfinite(tick["loss_encoder"]) for tick in ticks)
    assert list((folder / "samples").glob("*.png")) and list((folder / "snapshots").iterdir())
