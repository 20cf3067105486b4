"""The examples of the guides run as they stand."""

import re
from pathlib import Path

import pytest
import yaml

from sivae_fast.config import make_config
from sivae_fast.training.loop import train

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "plug-in.md"


def examples(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


EXAMPLES = examples(GUIDE)


def test_there_are_five_examples():
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number, capsys):
    scope: dict = {}
    exec(compile(EXAMPLES[number], f"{GUIDE.name}, example {number + 1}", "exec"), scope)
    if number == 0:
        assert "kl_fake" in capsys.readouterr().out


def test_the_first_page_has_the_losses_ready_to_run():
    (example,) = (text for text in examples(ROOT / "README.md") if "SoftIntroVAE" in text)
    scope: dict = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert set(scope["statistics"]) >= {"rec_real", "kl_real", "kl_rec", "exp_elbo_fake"}


def test_the_model_of_the_guide_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_model.py").write_text(EXAMPLES[-1], encoding="utf-8")
    (settings,) = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    values = yaml.safe_load(settings)
    assert values["model"]["kind"] == "own" and values["data"]["path"] == "quickstart"
    values["data"] = {"kind": "factors"}  # made at once
    values["train"] |= {"images": 96, "warmup_images": 32}
    folder = train(make_config({**values, "engine": {"kind": "torch"}}))
    assert (folder / "snapshots" / "0000000096.safetensors").is_file()
