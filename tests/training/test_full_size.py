"""The full model on photographs at 256x256: slow on a CPU, but it runs."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sivae_fast.data.prepare import prepare
from tests.training.conftest import ROOT, environment


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_iterations_at_256(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "photographs").mkdir()
    for i in range(6):
        small = random.integers(0, 255, (6, 7, 3), dtype=np.uint8)
        Image.fromarray(small).resize((340, 290), Image.Resampling.BICUBIC).save(
            tmp_path / "photographs" / f"{i}.jpg"
        )
    prepare(tmp_path / "photographs", tmp_path / "set.zip", resolution=256, progress=False)
    settings = {
        "data.path": tmp_path / "set.zip",
        "growth.images_per_level": 0,
        "train.images": 4,
        "train.batch": 2,
        "train.warmup_images": 0,
        "run.tick": 2,
        "engine.kind": "torch",
    }
    command = [
        sys.executable,
        str(ROOT / "launch/train.py"),
        "--config",
        str(ROOT / "launch/configs/ffhq256.yaml"),
    ]
    done = subprocess.run(
        [*command, *(f"{k}={v}" for k, v in settings.items())],
        cwd=tmp_path,
        env={**environment(), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (tmp_path / "runs").iterdir()
    ticks = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert [tick["images"] for tick in ticks] == [2, 4]
    assert all(np.isfinite(tick["loss_encoder"]) and tick["lod"] == 6 for tick in ticks)
    assert (run / "samples" / "0000000004.png").is_file()
