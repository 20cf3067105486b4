"""Point clouds and image translation train through the same loop as everything else."""

import json

import numpy as np
import pytest
import torch

from sivae_fast.checkpoint import load
from sivae_fast.config import ConfigError, make_config
from sivae_fast.training.loop import train

COMMON = {
    "train": {"images": 48, "batch": 8, "warmup_images": 16},
    "engine": {"kind": "torch"},
    "average": {"half_life": 16},
}


@pytest.fixture
def point_clouds(tmp_path):
    generator = np.random.default_rng(0)
    clouds = generator.normal(size=(24, 20, 3)).astype(np.float32)
    np.save(tmp_path / "clouds.npy", clouds / np.linalg.norm(clouds, axis=2, keepdims=True) / 2)
    return {
        "model": {"kind": "pointnet", "points": 20, "latent_size": 4},
        "objective": {"reconstruction": "chamfer", "beta_rec": 20.0},
        "data": {"kind": "pointclouds", "path": str(tmp_path / "clouds.npy"), "points": 20},
    }


@pytest.fixture
def translation():
    return {
        "model": {"kind": "two_encoder", "resolution": 16, "class_size": 4, "content_size": 4, "width": 4},
        "data": {"kind": "factors"},
    }


def run(folder, settings, **overrides):
    config = {**COMMON, **settings, "run": {"folder": str(folder), "tick": 8, **overrides}}
    train(make_config(config))
    return next(folder.glob("00000-*"))


@pytest.mark.parametrize("system", ["point_clouds", "translation"])
def test_trains_and_leaves_a_model(system, request, tmp_path):
    folder = run(tmp_path / "runs", request.getfixturevalue(system))
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert lines[-1]["images"] == 48 and "kl_fake" in lines[-1] and "kl_fake" not in lines[1]
    assert lines[-1]["rec_real"] < lines[0]["rec_real"]
    assert len(list((folder / "samples").glob("*.png"))) == 2
    model = load(folder)
    z = torch.zeros(2, model.latent_size)
    assert model.decode(z).shape[0] == 2 and model.images == 48


@pytest.mark.parametrize("system", ["point_clouds", "translation"])
def test_trains_in_bf16(system, request, tmp_path):
    settings = request.getfixturevalue(system)
    settings["train"] = {**COMMON["train"], "precision": "bf16"}
    folder = run(tmp_path / "runs", settings)
    last = json.loads((folder / "stats.jsonl").read_text().splitlines()[-1])
    assert last["images"] == 48 and 0 < last["rec_real"] < 1e4 and last["kl_fake"] > 0


def test_swapped_pairs_are_a_third_kind_of_fake(translation, tmp_path):
    translation["model"]["swapped_fakes"] = True
    folder = run(tmp_path / "runs", translation)
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert lines[-1]["kl_swap"] > 0 and "kl_swap" not in lines[1]
    assert load(folder).images == 48
    translation["train"] = {"images": 9, "batch": 3}
    with pytest.raises(
        ConfigError, match=r"train\.batch=3 .* model\.swapped_fakes=true needs an even number"
    ):
        run(tmp_path / "odd", translation)


def test_perceptual_error_needs_its_weights(translation, tmp_path):
    translation["objective"] = {"reconstruction": "perceptual"}
    with pytest.raises(ConfigError, match="perceptual needs the file of VGG16's weights"):
        make_config(translation)
    translation["objective"]["perceptual_weights"] = str(tmp_path / "none.pth")
    with pytest.raises(ConfigError, match=r"perceptual_weights=.*none\.pth: cannot be read as VGG16 weights"):
        run(tmp_path / "runs", translation)
    assert not (tmp_path / "runs").exists()


def test_wrong_combinations_are_named(point_clouds, translation, tmp_path):
    point_clouds["data"]["points"] = 30
    with pytest.raises(ConfigError, match=r"data\.points=30 and model\.points=20"):
        run(tmp_path, point_clouds)
    translation["model"]["channels"] = 1
    with pytest.raises(ConfigError, match=r"model\.channels=1: the images .* have 3"):
        run(tmp_path, translation)
