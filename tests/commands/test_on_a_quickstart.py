"""Every command on a short quickstart, in processes of their own, each within a minute of processor time."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(1800)  # painting and training come first
SHORT = ["train.images=640", "growth.images_per_level=160", "train.warmup_images=320", "run.tick=160"]

COMMANDS = {
    "sample": (["--out", "s.png"], "s.png"),
    "sample folder": (["--out", "single", "--count", "3"], "single/000002.png"),
    "reconstruct": (["--out", "r.png"], "r.png"),
    "reconstruct pictures": (["big.png", "--resize", "--out", "b.png"], "b.png"),
    "interpolate": (["a.png", "b0.png", "--out", "i.png"], "i.png"),
    "interpolate gif": (["a.png", "b0.png", "--out", "i.gif", "--space", "w"], "i.gif"),
    "interpolate mp4": (["a.png", "b0.png", "--out", "i.mp4"], "i.mp4"),
    "mix": (["--out", "m.png"], "m.png"),
    "evaluate errors": (["--metrics", "mse", "psnr", "ssim", "log_likelihood"], "RUN/metric-ssim.jsonl"),
    "evaluate fid": (["--features", "random"], "RUN/metric-fid.jsonl"),
    "evaluate others": (["--ood", "others"], "RUN/ood.png"),
    "report": ([], "RUN/report.html"),
}
REFUSED = {
    "sample": (["runs/none"], "runs/none does not exist"),
    "interpolate": (["RUN", "a.png", "--out", "x.gif"], "give 2 or more, got 1"),
    "reconstruct": (["RUN", "big.png"], "has 48x48 pixels, the model takes 32x32: give resize (--resize)"),
    "reconstruct torn": (["RUN", "torn.png"], "torn.png cannot be used: it is no readable picture"),
    "evaluate": (["RUN"], "Inception weights are needed: download https"),
    "evaluate others": (["RUN", "--ood", "none.zip"], "there is no image set at none.zip"),
    "report": (["others"], "others is not a run folder"),
}


def call(folder, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    done = call(folder, str(ROOT / "launch" / "train.py"), "engine.kind=torch", *SHORT)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "others").mkdir()
    for i in range(30):
        Image.new("RGB", (32, 32), (8 * i, 255 - 8 * i, 90)).save(folder / "others" / f"{i}.png")
    Image.new("RGB", (48, 48), "red").save(folder / "big.png")
    Image.new("RGB", (32, 32), "blue").save(folder / "a.png")
    Image.new("RGB", (32, 32), "green").save(folder / "b0.png")
    (folder / "torn.png").write_bytes((folder / "a.png").read_bytes()[:40])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_works_within_a_minute(place, name):
    arguments, result = COMMANDS[name]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = call(place, "-m", "sivae_fast.cli", name.split()[0], "runs/00000-quickstart", *arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (place / result.replace("RUN", "runs/00000-quickstart")).stat().st_size > 100
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_in_one_line(place, name):
    arguments, message = REFUSED[name]
    arguments = [argument.replace("RUN", "runs/00000-quickstart") for argument in arguments]
    done = call(place, "-m", "sivae_fast.cli", name.split()[0], *arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message in done.stderr and done.stderr.strip().splitlines()[-1].startswith("error: ")
