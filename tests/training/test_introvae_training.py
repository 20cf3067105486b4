"""IntroVAE on images: the published settings train the residual model, and fakes are pushed to the margin."""

import json
import math
import re
import shlex

import numpy as np
import pytest
from PIL import Image

from sivae_fast.config import load_config, make_config
from sivae_fast.training.loop import train
from tests.training.conftest import ROOT

GUIDE = (ROOT / "docs" / "training.md").read_text().split("## IntroVAE\n")[1].split("\n## ")[0]
#: What the guide's table says, row by row: settings by key.
PUBLISHED = [
    dict(zip(("margin", "beta_rec", "beta_kl", "beta_neg"), map(float, row), strict=True))
    for row in re.findall(r"\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", GUIDE)
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Smooth colour pictures of 16x16 pixels."""
    folder = tmp_path_factory.mktemp("smooth")
    for i in range(128):
        coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def ticks(folder, pictures, images: int, objective: dict, **model) -> list[dict]:
    size = {"kind": "residual", "resolution": 16, "widths": [8, 16], "latent_size": 16}
    run = train(
        make_config(
            {
                "model": {**size, **model},
                "objective": {"kind": "introvae", **objective},
                "data": {"path": str(pictures), "value_range": "unit", "loader": "torch"},
                "train": {"images": images, "batch": 16},
                "optim": {"learning_rate": 1e-3},
                "engine": {"kind": "torch"},
                "run": {"folder": str(folder), "tick": images // 4, "samples": 10**9, "checkpoint": 10**9},
            }
        )
    )
    return [json.loads(line) for line in (run / "stats.jsonl").open()]


def test_the_guide_has_the_published_settings():
    assert len(PUBLISHED) == 7
    assert {row["margin"] for row in PUBLISHED} == {10, 100, 120, 500, 1000}


@pytest.mark.parametrize("settings", PUBLISHED, ids=lambda row: f"{row['margin']:g}-{row['beta_rec']}")
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_both_phases_train_with_published_settings(tmp_path, pictures, settings, norm):
    found = ticks(tmp_path, pictures, 64, settings, norm=norm)
    for name in ("loss_encoder", "loss_decoder", "rec_real", "kl_real", "kl_rec", "kl_fake"):
        assert all(math.isfinite(tick[name]) for tick in found), name
    # Nothing but the hinges pushes fakes away: at the first tick they are far below the margin.
    first = found[0]
    assert first["kl_fake"] < settings["margin"]
    assert first["loss_encoder"] == pytest.approx(
        settings["beta_rec"] * first["rec_real"]
        + settings["beta_kl"] * first["kl_real"]
        + settings["beta_kl"]
        * settings["beta_neg"]
        * (settings["margin"] - (first["kl_rec"] + first["kl_fake"]) / 2),
        rel=1e-4,
    )


@pytest.mark.parametrize(("margin", "hinge"), [(5.0, "batch"), (10.0, "batch"), (10.0, "sample")])
def test_fakes_approach_the_margin_and_real_images_stay_below(tmp_path, pictures, margin, hinge):
    settings = {"margin": margin, "beta_rec": 1.0, "beta_neg": 0.5, "hinge": hinge}
    first, *_, last = ticks(tmp_path, pictures, 2400, settings)
    for name in ("kl_rec", "kl_fake"):
        assert last[name] == pytest.approx(margin, rel=0.4)
        assert last["kl_real"] < last[name]
    assert last["rec_real"] < first["rec_real"]


def test_the_commands_of_the_guide_are_accepted():
    commands = re.findall(r"```\n(.*?)```", GUIDE, re.DOTALL)
    words = [shlex.split(line) for text in commands for line in text.replace("\\\n", "").splitlines()]
    assert words
    for _, script, option, path, *overrides in words:
        assert (script, option) == ("launch/train.py", "--config")
        config = load_config(ROOT / path, overrides)
        settings = {key: getattr(config.objective, key) for key in PUBLISHED[0]}
        assert config.objective.kind == "introvae" and settings in PUBLISHED
