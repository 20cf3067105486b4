"""Published checkpoints become snapshots and runs of ours; hostile and broken ones become clear errors."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sivae_fast.checkpoint import CheckpointError, load, load_newest, part
from sivae_fast.config import ConfigError, make_config
from sivae_fast.convert import convert, start_run
from sivae_fast.inference_clouds import CloudInference
from sivae_fast.models.mlp import MLPModel
from sivae_fast.models.pointnet import PointNetModel
from sivae_fast.models.residual import ResidualModel
from sivae_fast.models.style import StyleModel
from sivae_fast.models.style_names import from_published, to_published
from sivae_fast.published import read_published
from sivae_fast.training.loop import train
from tests.models.published_fill import filled, sequence
from tests.published_files import half, style_content, style_optimizer, write

torch.set_num_threads(1)
CONTAINERS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def filled_style(**sizes) -> StyleModel:
    model = StyleModel(
        **{"resolution": 128, "start_channels": 8, "max_channels": 16, "latent_size": 16, **sizes}
    )
    networks = to_published(model.state_dict())
    model.load_state_dict(from_published({name: filled(state) for name, state in networks.items()}))
    return model.eval()


@CONTAINERS
@torch.no_grad()
def test_style_checkpoints_give_the_published_outputs(tmp_path, zipped):
    model = filled_style()
    model.dlatent_avg.copy_(torch.arange(16))
    source = write(tmp_path / "ffhq.pth", style_content(model, half(model)), zipped=zipped, cuda=True)
    assert b"cuda:0" in source.read_bytes() and b"RunningMeanTorch" in source.read_bytes()

    raw = load(convert(source, tmp_path / "raw.safetensors", raw=True))
    mean, logvar = raw.encode(sequence(1, 2, 3, 128, 128).float())
    image = raw.decode(mean, noise="bump")
    # The published networks in float64 gave these.
    expected = [9.82309600203, 1.06581119533, 7.83589386557, 136716.185046, -0.813766821661]
    actual = [mean.sum(), mean[1, 3], logvar.sum(), image.square().sum(), image[1, 2, 3, 1]]
    assert [value.item() for value in actual] == pytest.approx(expected, rel=1e-4)

    averaged = load(convert(source, tmp_path / "averaged.safetensors"))
    assert torch.equal(averaged.decoder.const, model.decoder.const / 2)
    assert torch.equal(averaged.dlatent_avg, model.dlatent_avg)
    assert averaged.config.model.resolution == 128 and averaged.config.data.value_range == "symmetric"


def test_a_style_file_says_what_was_found_and_skipped(tmp_path, caplog):
    model = filled_style(resolution=16)
    source = write(tmp_path / "model_tmp_lod2.pth", style_content(model, half(model)))
    with caplog.at_level("INFO", "sivae_fast"):
        convert(source, tmp_path / "a.safetensors")
    assert "style model, 16x16, epoch 270" in caplog.text
    assert "no style average of its own" in caplog.text and "record of its losses" in caplog.text
    assert "wrote the averaged weights" in caplog.text
    content = style_content(model)
    del content["models"]["dlatent_avg"]
    found = read_published(write(tmp_path / "raw.pth", content, tracked=False))
    assert not found.weights["dlatent_avg"].any()
    assert found.averaged is None and "raw weights are all there is" in found.notes[0]
    assert not any("style average" in note for note in found.notes)


def test_averaged_copies_have_a_style_average_of_their_own_and_may_be_alone(tmp_path):
    model = filled_style(resolution=16)
    content = style_content(model, half(model))
    content["models"]["dlatent_avg_s"] = {"buff": torch.arange(16.0).repeat(6, 1)}
    both = read_published(write(tmp_path / "both.pth", content))
    assert torch.equal(both.averaged["dlatent_avg"], torch.arange(16.0)) and len(both.notes) == 1
    assert torch.equal(both.weights["dlatent_avg"], model.dlatent_avg)
    copy = content["models"]["generator_s"]
    content["models"]["generator_s"] = {**copy, "const": "const"}
    with pytest.raises(CheckpointError, match=r"spoilt\.pth: decoder\.const is a str, no tensor"):
        read_published(write(tmp_path / "spoilt.pth", content))
    content["models"]["generator_s"] = copy
    content["models"] = {name: state for name, state in content["models"].items() if name.endswith("_s")}
    alone = read_published(write(tmp_path / "alone.pth", content))
    assert alone.notes[0] == "averaged copies (*_s) alone" and alone.weights.keys() == both.weights.keys()
    for name, value in alone.weights.items():
        assert torch.equal(value, both.averaged[name]) and torch.equal(alone.averaged[name], value)


@pytest.mark.parametrize(
    "sizes",
    [
        {"resolution": 8, "start_channels": 4, "latent_size": 6, "mapping_layers": 1},
        {"resolution": 64, "start_channels": 4, "max_channels": 9, "latent_size": 5, "channels": 1},
        {"resolution": 1024, "start_channels": 2, "max_channels": 4, "latent_size": 4},
    ],
)
def test_style_architectures_are_recognised(tmp_path, sizes):
    model = filled_style(**sizes)
    source = write(tmp_path / "a.pth", style_content(model))
    back = load(convert(source, tmp_path / "a.safetensors"))
    own = model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in back.state_dict().items())


@CONTAINERS
@pytest.mark.parametrize(
    "sizes",
    [
        {"resolution": 16, "widths": (8, 12), "latent_size": 4},
        {"resolution": 28, "channels": 1, "widths": (4, 8), "latent_size": 3},
        {"resolution": 32, "widths": (4, 8, 8, 8), "latent_size": 4, "lagged_decoder": True},
    ],
    ids=["residual", "28 pixels", "bootstrap"],
)
@torch.no_grad()
def test_residual_checkpoints(tmp_path, sizes, zipped):
    model = ResidualModel(**sizes).eval()
    for value in model.state_dict().values():
        value.copy_(torch.rand_like(value, dtype=torch.float32) + 0.5)
    content = {"epoch": 219, "model": model.state_dict()}
    back = load(convert(write(tmp_path / "c.pth", content, zipped=zipped), tmp_path / "c.safetensors"))
    assert back.config.model.widths == sizes["widths"] and back.config.data.value_range == "unit"
    x = torch.rand(2, sizes.get("channels", 3), sizes["resolution"], sizes["resolution"])
    assert torch.equal(back.encode(x).mean, model.encode(x).mean)
    z = torch.randn(2, sizes["latent_size"])
    assert torch.equal(back.decode(z), model.decode(z))
    assert torch.equal(back.decode_fake(z), model.decode_fake(z))


@pytest.mark.parametrize("lagged", [False, True])
def test_models_with_a_condition_are_refused_by_its_size(tmp_path, lagged):
    model = ResidualModel(resolution=16, widths=(4, 8), latent_size=4, lagged_decoder=lagged)
    state = model.state_dict()
    for name in state:  # the published option: ten numbers beside the features and beside the latent
        if name in ("encoder.fc.weight", "decoder.fc.0.weight", "target_decoder.fc.0.weight"):
            state[name] = torch.cat([state[name], torch.zeros(len(state[name]), 10)], dim=1)
    source = write(tmp_path / "c.pth", {"epoch": 3, "model": state})
    with pytest.raises(
        CheckpointError, match=r"c\.pth: a model with a condition: .* takes 10 numbers .* the 4 of"
    ):
        read_published(source)
    state["encoder.fc.weight"] = state["encoder.fc.weight"][:, :-1]
    state["decoder.fc.0.weight"] = state["decoder.fc.0.weight"][:, :4]
    with pytest.raises(CheckpointError, match=r"encoder\.fc\.weight is \[8, 137\], which does not fit"):
        read_published(write(tmp_path / "d.pth", {"epoch": 3, "model": state}))


@torch.no_grad()
def test_two_dimensional_checkpoints(tmp_path):
    model = MLPModel(width=8)
    content = {"epoch": 30_000, "model": {**model.state_dict(), "decoder.loggamma": torch.tensor(0.0)}}
    back = load(convert(write(tmp_path / "d.pth", content), tmp_path / "d.safetensors"))
    x = torch.randn(3, 2)
    assert torch.equal(back.encode(x).logvar, model.encode(x).logvar)


def published_clouds(model: PointNetModel) -> dict[str, torch.Tensor]:
    state = dict(model.state_dict())
    for name, value in state.items():
        if name.startswith("encoder.conv") and value.ndim == 2:
            state[name] = value[:, :, None].clone()
    return state


@torch.no_grad()
def test_point_cloud_checkpoints(tmp_path):
    model = PointNetModel(points=20, latent_size=6).eval()
    source = write(tmp_path / "01618_jsd_0.0175.pth", published_clouds(model))
    (tmp_path / "config.json").write_text(json.dumps({"prior_std": 0.3, "z_size": 6}))
    back = load(convert(source, tmp_path / "p.safetensors"))
    assert back.prior_std == 0.3 and back.config.model.points == 20
    assert back.config.objective.reconstruction == "chamfer"
    with pytest.raises(ValueError, match=r"samples_2048 does not exist: give data=PATH"):
        CloudInference.load(tmp_path / "p.safetensors", device="cpu").clouds("test")
    x = torch.randn(2, 20, 3)
    assert torch.equal(back.encode(x).mean, model.encode(x).mean)


def test_settings_beside_point_clouds_may_be_missing_but_not_broken(tmp_path):
    source = write(tmp_path / "1.pth", published_clouds(PointNetModel(points=20, latent_size=6)))
    assert "prior_std is taken as 0.2" in read_published(source).notes[0]
    settings = tmp_path / "config.json"
    settings.write_text("{}")
    found = read_published(source)
    assert found.settings["model"]["prior_std"] == 0.2 and not found.notes and not found.optimizers
    settings.write_text("{")
    with pytest.raises(CheckpointError, match=r"1\.pth: not whole \(JSONDecodeError"):
        read_published(source)


def test_adam_of_point_clouds_is_taken_over(tmp_path):
    model = PointNetModel(points=20, latent_size=6)
    write(tmp_path / "00050.pth", published_clouds(model))
    optimizers = {}
    for side in ("encoder", "decoder"):
        adam = torch.optim.Adam(getattr(model, side).parameters(), lr=0.0)
        for step in range(3):
            for i, parameter in enumerate(getattr(model, side).parameters()):
                parameter.grad = torch.full_like(parameter, float(i + step))
            adam.step()
        optimizers[side] = adam.state_dict()
        for entry in optimizers[side]["state"].values():
            if entry["exp_avg"].ndim == 2 and side == "encoder":
                entry.update({key: entry[key][:, :, None] for key in ("exp_avg", "exp_avg_sq")})
        write(tmp_path / f"00050_optim_{side[0]}.pth", optimizers[side])
    run = {"folder": str(tmp_path / "runs")}
    settings = {"model": {"kind": "pointnet", "points": 20, "latent_size": 6}, "run": run}
    data = {"data": {"kind": "pointclouds", "points": 20}, "objective": {"reconstruction": "chamfer"}}
    folder = start_run(tmp_path / "00050.pth", make_config({**settings, **data}))
    tensors, state = load_newest(folder / "checkpoints")
    assert state["steps"] == {"encoder": 3, "decoder": 3}
    names = [name for name, _ in model.named_parameters() if name.startswith("decoder")]
    for i, name in enumerate(names):
        expected = optimizers["decoder"]["state"][i]["exp_avg"]
        assert torch.equal(tensors[f"decoder/exp_avg/{name}"], expected)
    with pytest.raises(CheckpointError, match="state of an optimizer"):
        read_published(tmp_path / "00050_optim_e.pth")


def alae(model: StyleModel) -> dict:
    content = style_content(model, half(model))
    for key in ("mapping_tl", "mapping_tl_s"):
        network = content["models"][key]
        content["models"][key] = {name.replace(".fc", ""): value for name, value in network.items()}
    return content


def test_alae_is_refused_for_use_and_starts_a_run(tmp_path):
    model = filled_style(resolution=16)
    source = write(tmp_path / "alae.pth", alae(model))
    with pytest.raises(CheckpointError, match="mapping_tl is another function in ALAE"):
        convert(source, tmp_path / "a.safetensors")
    folder = start_run(source, make_config({"model": tiny_sizes(16), "run": {"folder": str(tmp_path)}}))
    weights = part(load_newest(folder / "checkpoints")[0], "model")
    assert torch.equal(weights["mapping_fl.layers.0.weight"], model.mapping_fl.layers[0].weight)
    assert not torch.equal(weights["mapping_tl.layers.0.weight"], model.mapping_tl.layers[0].weight)


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path):
    source = write(tmp_path / "00050.pth", published_clouds(PointNetModel(points=20, latent_size=6)))
    settings = {
        "model": {"kind": "pointnet", "points": 20, "latent_size": 6},
        "run": {"folder": "/proc/runs"},
    }
    settings |= {"data": {"kind": "pointclouds", "points": 20}, "objective": {"reconstruction": "chamfer"}}
    with pytest.raises(OSError, match=r"^run\.folder=/proc/runs: No such file or directory$"):
        start_run(source, make_config(settings))


def tiny_sizes(resolution: int) -> dict:
    sizes = {"start_channels": 8, "max_channels": 16, "latent_size": 16}
    return {"kind": "style", "resolution": resolution, **sizes}


@pytest.fixture
def training(tmp_path, monkeypatch):
    """Settings of a style training of 8 x 16 images, as values of a config."""
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(32):
        colours = random.integers(0, 255, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((8, 8)).save(folder / f"{i:02d}.png")
    monkeypatch.chdir(tmp_path)
    return {
        "model": {**tiny_sizes(8), "mapping_layers": 2},
        "objective": {"beta_neg": 16.0, "scale": 0.01},
        "data": {"path": str(folder), "loader": "torch", "workers": 1},
        "growth": {"images_per_level": 64},
        "train": {"images": 176, "batch": 16},
        "optim": {"betas": (0.0, 0.99), "published_eps": True, "learning_rate": 0.002},
        "engine": {"kind": "torch"},
        "run": {"tick": 16, "samples": 1000, "folder": "runs"},
    }


def with_run(settings: dict, name: str, **train_settings):
    run, length = {**settings["run"], "name": name}, {**settings["train"], **train_settings}
    return make_config({**settings, "run": run, "train": length})


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    return {line["images"]: line["loss_encoder"] for line in lines}


def test_training_goes_on_as_if_it_had_never_left(tmp_path, training):
    """Weights, averages, second moments and step counts, out to the published layout and back, bit by bit."""
    folder = train(with_run(training, "first", images=128))
    tensors, state = load_newest(folder / "checkpoints")
    model = StyleModel(**{k: v for k, v in training["model"].items() if k != "kind"})
    model.load_state_dict(part(tensors, "model"))
    optimizers = {
        side: style_optimizer(model, side, part(tensors, f"{side}/exp_avg_sq"), state["steps"][side])
        for side in ("encoder", "decoder")
    }
    source = write(tmp_path / "a.pth", style_content(model, part(tensors, "average"), optimizers))
    config = with_run(training, "second")
    second = start_run(source, config, images=128)
    assert train(config) == second
    stayed = losses(train(with_run(training, "first")))
    assert losses(second) == {images: loss for images, loss in stayed.items() if images > 128}
    (ours, _), (theirs, _) = load_newest(second / "checkpoints"), load_newest(folder / "checkpoints")
    for name in theirs:  # the published optimizer has no first moment: with beta1 = 0 it has no effect
        assert torch.equal(ours[name], theirs[name]) or "/exp_avg/" in name, name


def test_training_goes_on_without_an_optimizer(tmp_path, training):
    torch.manual_seed(0)
    model = StyleModel(**{k: v for k, v in training["model"].items() if k != "kind"})
    training["train"] |= {"batch": 32, "warmup_images": 1000}
    training["optim"] |= {"learning_rate": 0.01}
    config = with_run(training, "tuned", images=96 + 3 * 32)
    folder = start_run(write(tmp_path / "a.pth", style_content(model)), config)
    assert load_newest(folder / "checkpoints")[1]["images"] == 96  # where the last level is faded in
    train(config)
    reconstruction = [json.loads(line)["rec_real"] for line in (folder / "stats.jsonl").open()]
    assert len(reconstruction) == 3 and all(map(math.isfinite, reconstruction))
    assert reconstruction[0] > reconstruction[1] > reconstruction[2]


def test_a_configuration_of_another_model_is_named(tmp_path):
    source = write(tmp_path / "a.pth", style_content(filled_style(resolution=16)))
    config = make_config({"model": tiny_sizes(32), "run": {"folder": str(tmp_path)}})
    with pytest.raises(ConfigError, match=r"another model .*model\.resolution=16"):
        start_run(source, config)
    with pytest.raises(ConfigError, match=r"another model .*model\.kind=style"):
        start_run(
            source,
            make_config(
                {"model": {"kind": "mlp"}, "data": {"kind": "density"}, "run": {"folder": str(tmp_path)}}
            ),
        )


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@CONTAINERS
@pytest.mark.parametrize("place", ["whole", "models", "tensor"])
def test_code_in_a_file_is_not_run(tmp_path, place, zipped):
    trap, model = tmp_path / "ran", filled_style(resolution=8)
    content = style_content(model)
    if place == "models":
        content["models"]["generator"] = Hostile(trap)
    elif place == "tensor":
        content["models"]["generator"]["const"] = Hostile(trap)
    source = tmp_path / "bad.pth"
    torch.save(Hostile(trap) if place == "whole" else content, source, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"bad\.pth is refused, nothing in it was run: .*mkdir"):
        convert(source, tmp_path / "a.safetensors")
    assert not trap.exists() and not (tmp_path / "a.safetensors").exists()
    torch.load(source, weights_only=False)
    assert trap.exists(), "the trap would not have worked"


def test_a_plain_pickle_is_refused(tmp_path):
    source, trap = tmp_path / "bad.pth", tmp_path / "ran"
    for protocol in (2, 4):
        source.write_bytes(pickle.dumps({"models": Hostile(trap)}, protocol=protocol))
        with pytest.raises(CheckpointError, match=r"refused|cannot be read"):
            read_published(source)
    assert not trap.exists()


@CONTAINERS
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_truncated_files_are_named(tmp_path, share, zipped):
    source = write(tmp_path / "cut.pth", style_content(filled_style(resolution=8)), zipped=zipped)
    whole = source.read_bytes()
    source.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"cut\.pth (cannot be read|is refused)"):
        convert(source, tmp_path / "a.safetensors")


def changed(model: StyleModel, how: str) -> dict:
    content = style_content(model)
    models = content["models"]
    if how == "swapped":
        models["generator"], models["discriminator"] = models["discriminator"], models["generator"]
    elif how == "half":
        models["generator"]["const"] = models["generator"]["const"][:, :8]
    elif how == "lost tensor":
        del models["generator"]["decode_block.0.conv_2.weight"]
    elif how == "lost network":
        del models["mapping_fl"]
    elif how == "extra tensor":
        models["discriminator"]["encode_block.0.conv_3.weight"] = torch.zeros(1)
    elif how == "no tensors":
        content["models"] = {name: {} for name in models}
    elif how == "text":
        models["generator"]["const"] = "const"
    return content


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("swapped", r"models\.discriminator has no encode_block\.0\.conv_1\.weight: it is not the encoder"),
        ("half", r"decoder\.const is \[1, 8, 4, 4\], the model's is \[1, 16, 4, 4\]"),
        ("lost tensor", r"decoder\.blocks\.0\.conv_2\.weight is missing"),
        ("lost network", r"models\.mapping_fl is absent"),
        ("extra tensor", r"encoder\.blocks\.0\.conv_3\.weight is unknown"),
        ("no tensors", r"models\.discriminator has no"),
        ("text", r"decoder\.const is a str, no tensor"),
    ],
)
def test_broken_style_files_are_explained(tmp_path, how, message):
    source = write(tmp_path / "odd.pth", changed(filled_style(resolution=16), how))
    with pytest.raises(CheckpointError, match=r"odd\.pth.*" + message):
        convert(source, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


#: Of a point cloud model, but for the axes of its weights.
FLAT = {"encoder.conv.0.weight": torch.zeros(3), "decoder.model.8.weight": torch.zeros(60)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "model": {"conv.weight": torch.zeros(2)}}, "model has the keys conv.weight: accepted"),
        ({"epoch": 3, "model": {"encoder.main.0.weight": torch.zeros(2, 3, 5, 5)}}, "not whole"),
        ({"models": 3}, "not whole (TypeError"),
        ({"model": {"encoder.main.0.weight": "text"}}, "not whole (AttributeError"),
        ({**FLAT, "decoder.model.0.weight": torch.zeros(3)}, "not whole (IndexError"),
        ({"state_dict": {}}, "holds the keys state_dict: accepted are"),
        ({}, "holds nothing"),
        ([torch.zeros(2)], "holds a list"),
    ],
)
def test_other_files_are_refused_by_what_they_hold(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth.*" + re.escape(message)):
        read_published(tmp_path / "other.pth")


def test_wrong_paths_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pth does not exist"):
        read_published(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        convert(tmp_path / "none.pth", tmp_path / "folder")


MEASURED = """
import resource, sys, time
from sivae_fast.config import make_config
from sivae_fast.convert import convert, start_run
source, dest, kind = sys.argv[1:]
if kind == "snapshot":
    convert(source, dest)
else:
    start_run(source, make_config({"model": {"kind": "style"}, "run": {"folder": dest}}))
print(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@CONTAINERS
def test_full_size_converts_in_seconds_and_in_two_gigabytes(tmp_path, zipped):
    model = StyleModel()
    moments = half(model)
    optimizers = {side: style_optimizer(model, side, moments, 100) for side in ("encoder", "decoder")}
    source = write(tmp_path / "ffhq.pth", style_content(model, half(model), optimizers), zipped=zipped)
    assert source.stat().st_size > 640e6
    for kind, dest in [("snapshot", tmp_path / "a.safetensors"), ("run", tmp_path / "runs")]:
        command = [sys.executable, "-c", MEASURED, str(source), str(dest), kind]
        printed = subprocess.run(command, capture_output=True, check=True).stdout
        # Processor seconds, which other processes on the machine do not stretch.
        seconds, memory = map(float, printed.split())
        print(f"{kind}: {seconds:.1f} s, {memory / 1e9:.2f} GB")
        assert seconds < 20 and memory < 2e9
