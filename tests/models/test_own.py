"""A model of the user's own class goes through training and commands, or is refused by what is wrong."""

import json

import pytest
import torch
from PIL import Image

from sivae_fast import cli
from sivae_fast.checkpoint import load
from sivae_fast.config import ConfigError, make_config
from sivae_fast.systems import make_model
from sivae_fast.training.agreement import data_facts, program_facts, run_facts
from sivae_fast.training.loop import train
from sivae_fast.training.starting import check_start

MODEL = """
from torch import nn
from layers import flat
from sivae_fast import Model, Posterior

class Mine(Model):
    def __init__(self, resolution, channels, latent_size=3):
        super().__init__()
        self.latent_size = latent_size
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(flat(channels, resolution), 2 * latent_size))
        self.decoder = nn.Sequential(
            nn.Linear(latent_size, flat(channels, resolution)),
            nn.Unflatten(1, (channels, resolution, resolution)),
        )

    def encode(self, x):
        return Posterior(*self.encoder(x).chunk(2, dim=1))

    def decode(self, z, stream=None):
        return self.decoder(z)

    def encoder_modules(self):
        return [self.encoder]

    def decoder_modules(self):
        return [self.decoder]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MODEL)
    (tmp_path / "layers.py").write_text(
        "def flat(channels, resolution):\n    return channels * resolution**2\n"
    )
    return tmp_path


def config(source: str = "mine.py:Mine", **sections):
    model = {"kind": "own", "source": source, "resolution": 16, **sections.pop("model", {})}
    values: dict = {"model": model, "data": {"kind": "factors"}, "engine": {"kind": "torch"}}
    values["train"] = {"images": 64, "batch": 16, "warmup_images": 32, **sections.pop("train", {})}
    return make_config({**values, **sections})


def test_it_trains_resumes_and_is_used(here, capsys, caplog):
    """Stopped within the game and gone on with, it is the run that was not stopped."""
    (here / "set").mkdir()
    for i in range(40):
        Image.new("RGB", (16, 16), (6 * i, 100, 250 - 6 * i)).save(here / "set" / f"{i}.png")
    common = {
        "model": {"settings": {"latent_size": 5}},
        "data": {"kind": "images", "path": "set", "loader": "torch"},
        "evaluate": {"every": 32, "metrics": ["mse"], "images": 30},
    }
    whole = train(config(run={"name": "whole", "tick": 32}, **common))
    train(config(run={"name": "parts", "tick": 32}, train={"images": 48}, **common))
    parts = train(config(run={"name": "parts", "tick": 32}, **common))
    one, two = load(whole), load(parts)
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert one.latent_size == 5 and one.resolution == 16 and type(one).__name__ == "Mine"
    assert len((parts / "metric-mse.jsonl").read_text().splitlines()) == 3  # at 32, 48 and 64 images
    assert (parts / "samples" / "0000000064.png").is_file()
    for command in (
        ["sample", str(parts), "--out", "s.png", "--count", "4"],
        ["reconstruct", str(parts), "--out", "r.png", "--count", "4"],
        ["interpolate", str(parts), "s.png", "r.png", "--resize", "--out", "i.png"],
        ["report", str(parts)],
        ["export", str(parts), "exported", "--format", "torch"],
        ["card", str(parts), "--out", "card.md"],
    ):
        assert cli.main(command) == 0, command
    assert (here / "s.png").is_file() and (here / "exported" / "decoder.pt2").is_file()
    assert "image model of its own class" in (here / "card.md").read_text()
    capsys.readouterr()
    arguments = ["--metrics", "fid", "mse", "--features", "random", "--count", "60"]
    snapshot = next((whole / "snapshots").iterdir())
    assert cli.main(["evaluate", str(snapshot), *arguments]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"fid", "mse"}


def test_the_file_belongs_to_what_ranks_and_checkpoints_compare(here):
    facts = program_facts(config(), "torch", 0)
    changed = f"{MODEL}\n# another version\n"
    (here / "mine.py").write_text(changed)
    after = program_facts(config(), "torch", 0)
    assert [key for key in facts if facts[key] != after[key]] == ["source file of model.source"]
    data = type("Data", (), {"__len__": lambda self: 3, "checksum": lambda self: "abc"})()
    first = run_facts(config(), data)
    (here / "mine.py").write_text(MODEL)
    assert first != run_facts(config(), data) and data_facts(data).items() <= first.items()


def test_a_changed_file_is_read_again(here):
    assert make_model(config()).latent_size == 3
    (here / "mine.py").write_text(MODEL.replace("latent_size=3", "latent_size=4"))
    assert make_model(config()).latent_size == 4


def test_snapshots_name_the_file_without_its_folder(here):
    folder = train(config(source=str(here / "mine.py:Mine"), train={"images": 16}))
    (snapshot,) = (folder / "snapshots").iterdir()
    copied = here / "elsewhere.safetensors"
    snapshot.rename(copied)
    assert load(copied).config.model.source == "mine.py:Mine"
    (here / "mine.py").unlink()
    with pytest.raises(ConfigError, match=r"^model\.source=mine\.py:Mine: there is no such file in "):
        load(copied)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("mine.py", r"source=mine\.py: must be FILE\.py:CLASS"),
        ("mine:Mine", r"source=mine:Mine: must be FILE\.py:CLASS"),
        ("other.py:Mine", r"source=other\.py:Mine: there is no such file in "),
        ("mine.py:Other", r"mine\.py has no subclass of sivae_fast\.Model called Other"),
        ("mine.py:flat", r"mine\.py has no subclass of sivae_fast\.Model called flat"),
        ("broken.py:Mine", r"broken\.py cannot be imported \(ZeroDivisionError: division by zero\)"),
    ],
)
def test_what_is_no_class_is_refused(here, source, message):
    (here / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=message):
        check_start(config(source=source))


def test_arguments_that_the_class_does_not_take_are_refused(here):
    with pytest.raises(
        ConfigError, match=r"cannot be made from model\.settings=\{'depth': 3\} \(TypeError: .*depth"
    ):
        make_model(config(model={"settings": {"depth": 3}}))


#: What a subclass changes, and what is said of it.
WORSE = {
    "def encode(self, x): return Posterior(*self.encoder(x).split((2, 4), 1))": r"\[2, 2\], \[2, 4\] for",
    "def encode(self, x): return 5": r"gives int, must give sivae_fast\.Posterior\(mean, logvar\)",
    "def encode(self, x): return self.encoder(x).chunk(2, 1)": r"gives tuple, must give sivae_fast",
    "def encode(self, x): raise KeyError('a')": r"encode\(x\) fails \(KeyError: 'a'\)",
    "def decode(self, z): return self.decoder(z)": r"decode\(z, stream\) fails \(TypeError: .*positional",
    "def decode(self, z, stream=None): return self.decoder(z)[:, :2]": r"must give \[2, 3, 16, 16\]",
    "def generate(self, z): return self.decoder(z)": r"generate\(z, stream\) fails \(TypeError: .*positional",
    "decoder_modules = Model.decoder_modules": r"the class needs decoder_modules\(\)",
    "def decoder_modules(self): return []": r"decoder_modules\(\) has no parameters",
    "def decoder_modules(self): return [self]": r"both of .* has encoder\.1\.weight, one must",
    "def encoder_modules(self): return [nn.Linear(2, 2)]": r"that are not the model's: .*ModuleList",
    "def encoder_modules(self): return [self.encoder[1].requires_grad_(False)]": r"which is frozen",
    "latent_size = property(lambda self: 0, lambda *_: None)": r"latent_size is 0, must be a positive",
    "random_encoder = True": r"encode\(x, stream\) fails \(TypeError: .*positional",
    "prior_std = 0.2": r"prior_std is 0\.2, must be 1\.0",
    "further_fakes = ('swap',)": r"further_fakes is \('swap',\), must be \(\)",
    "resolution = (16, 16)": r"resolution is \(16, 16\), must be 16",
    "def __init__(self, **k): super().__init__(**k); self.encoder.append(nn.BatchNorm1d(6))": (
        r"it has batch norm: the class needs uses_batch_statistics = True"
    ),
    "def __init__(self, **k): super().__init__(**k); self.more = nn.Linear(2, 2)": r"neither .* more\.weight",
    "def __init__(self, **k): super().__init__(**k); self.again = self.decoder[0]": (
        r"decoder\.0\.weight and again\.weight share their numbers"
    ),
    "def get_extra_state(self): return {}\n    def set_extra_state(self, state): pass": (
        r"its state dict has _extra_state, which is no tensor"
    ),
}


@pytest.mark.parametrize(("body", "message"), WORSE.items())
def test_what_training_would_stumble_over_is_said_before(here, body, message):
    (here / "mine.py").write_text(f"{MODEL}\nclass Worse(Mine):\n    {body}\n")
    with pytest.raises(ConfigError, match=rf"^model\.source=mine\.py:Worse: .*{message}"):
        make_model(config(source="mine.py:Worse"))


def test_batch_norm_that_is_said_and_frozen_parameters_are_taken(here):
    (here / "mine.py").write_text(
        f"{MODEL}\nclass Normed(Mine):\n    uses_batch_statistics = True\n"
        "    def __init__(self, **sizes):\n        super().__init__(**sizes)\n"
        "        self.encoder.append(nn.BatchNorm1d(6))\n"
        "        self.fixed = nn.Linear(2, 2).requires_grad_(False)\n"
    )
    model = make_model(config(source="mine.py:Normed"))
    assert model.training and model.encoder[2].running_mean.eq(0).all()
    train(config(source="mine.py:Normed"))


def test_it_grows_not_and_needs_images(here):
    with pytest.raises(ConfigError, match=r"growth\.images_per_level=8 needs model\.kind=style"):
        config(growth={"images_per_level": 8})
    with pytest.raises(ConfigError, match=r"data\.kind=density does not fit model\.kind=own"):
        config(data={"kind": "density"})


def test_settings_are_those_of_the_files(here):
    """Keys of mappings are texts and lists are lists, whether the model is made for training or loaded."""
    (here / "mine.py").write_text(
        MODEL
        + """
class Chosen(Mine):
    def __init__(self, sizes, **more):
        super().__init__(latent_size=sizes["16"][0] + len(sizes["16"] + [1]), **more)
"""
    )
    folder = train(
        config("mine.py:Chosen", model={"settings": {"sizes": {16: [2, 3]}}}, train={"images": 16})
    )
    assert load(folder).latent_size == 5


def test_a_dry_run_takes_models_that_ask_for_numbers(here):
    body = "super().__init__(**k); self.rates = [x.item() for x in torch.linspace(0, 1, 3)]"
    (here / "mine.py").write_text(
        f"{MODEL}\nimport torch\nclass Rates(Mine):\n    def __init__(self, **k): {body}\n"
    )
    check_start(config("mine.py:Rates"))


def test_files_of_the_same_name_are_two(here):
    (here / "b").mkdir()
    (here / "b" / "mine.py").write_text(MODEL.replace("latent_size=3", "latent_size=7"))
    assert [make_model(config(f"{folder}mine.py:Mine")).latent_size for folder in ("", "b/", "")] == [3, 7, 3]


def test_draws_come_from_the_stream(here):
    (here / "mine.py").write_text(
        MODEL
        + """
class Noisy(Mine):
    def decode(self, z, stream=None):
        x = self.decoder(z)
        return x + 0.1 * stream.normal(*x.shape)
"""
    )
    model = make_model(config("mine.py:Noisy"))
    assert torch.equal(model.sample(2, seed=3), model.sample(2, seed=3))
    train(config("mine.py:Noisy", train={"images": 48}))


def test_rows_may_influence_each_other_without_batch_norm(here):
    (here / "mine.py").write_text(f"{MODEL}\nclass Rows(Mine):\n    uses_batch_statistics = True\n")
    folder = train(config("mine.py:Rows", train={"images": 16}))
    assert cli.main(["reconstruct", str(folder), "--out", "r.png", "--count", "4"]) == 0
    assert cli.main(["card", str(folder), "--out", "card.md"]) == 0
    card = (here / "card.md").read_text()
    assert "batch norm" not in card and "`mine.py:Rows` has to be in the folder" in card
