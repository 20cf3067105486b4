"""The guide's commands for CIFAR-10, one after the other, on a small archive of the published format."""

import re
import shlex
from pathlib import Path

import pytest
from cifar_files import cifar10, write_tar

from launch.train import main as train
from sivae_fast.cli import main as sivae_fast
from sivae_fast.run import read_metrics

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "training.md").read_text().split("## CIFAR-10 from start to end\n")[1]
SCRIPT = re.search(r"```\n(.*?)```", GUIDE, re.DOTALL)[1].replace("\\\n", "")
COMMANDS = [shlex.split(line) for line in SCRIPT.splitlines()]
SHORT = ["model.widths=[4,4,8]", "train.images=32", "train.batch=8", "run.tick=16", "engine.kind=torch"]


def run(words: list[str]) -> int:
    """One command of the guide, with a model, run and measurement as small as can be."""
    program, *arguments = words
    if program == "deepspeed":
        script, option, config, *overrides = arguments
        assert (script, option) == ("launch/train.py", "--config")
        return train(["--config", str(ROOT / config), *overrides, *SHORT])
    assert program == "sivae-fast"
    if "--weights" in arguments:
        place = arguments.index("--weights")
        arguments[place : place + 2] = []
        if "--features" in arguments:
            arguments.remove(arguments[arguments.index("--features") + 1])
            arguments.remove("--features")
        arguments += ["--features", "random", "--count", "8"]
    return sivae_fast(arguments)


@pytest.mark.filterwarnings("ignore")
def test_the_guide_works_from_the_archive_to_the_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    download, *rest = COMMANDS
    assert download[0] == "wget"
    write_tar(tmp_path / Path(download[1]).name, cifar10()[1])
    for words in rest:
        assert run(list(words)) == 0, words
    folder = Path("runs/00000-cifar10")
    assert Path("samples.png").is_file() and list(folder.glob("*.html"))
    records = read_metrics(folder)
    assert {name: len(found) for name, found in records.items()} == {"mse": 1, "psnr": 1, "ssim": 1, "fid": 2}
    usual, published = records["fid"]
    assert "rounded" not in usual and usual["batch_norm"] == "recalibrated"
    assert (published["rounded"], published["batch_norm"]) == ("down", "batch")


def test_the_snapshot_of_the_guide_is_written_after_200_epochs():
    name = re.search(r"snapshots/(\d+)\.safetensors", GUIDE)[1]
    assert int(name) == 200 * 50_000
