"""Small untrained models in run folders, and the image sets they would have been trained on."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sivae_fast.checkpoint import save_snapshot
from sivae_fast.config import make_config
from sivae_fast.systems import make_model

STYLE = {
    "kind": "style",
    "resolution": 16,
    "start_channels": 4,
    "max_channels": 8,
    "latent_size": 8,
    "mapping_layers": 2,
}
POINTNET = {"kind": "pointnet", "points": 20, "latent_size": 4}
TWO_ENCODER = {"kind": "two_encoder", "resolution": 16, "class_size": 4, "content_size": 4, "width": 4}
RESIDUAL = {"kind": "residual", "resolution": 16, "channels": 1, "widths": [4, 8], "latent_size": 4}


def write_images(folder, count, channels, side=16, seed=0, dark=1.0):
    folder.mkdir()
    random = np.random.default_rng(seed)
    for i in range(count):
        small = (random.random((4, 4, channels)) * 255 * dark).astype(np.uint8)
        pixels = small.repeat(side // 4, 0).repeat(side // 4, 1)
        Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels).save(folder / f"{i:03d}.png")
    return folder


def write_clouds(path, count=60, points=20, seed=0):
    """Clouds of points on spheres, ellipsoids and discs of radius 0.5 at most."""
    points = np.random.default_rng(seed).normal(size=(count, points, 3))
    points /= 2 * np.linalg.norm(points, axis=2, keepdims=True)
    np.save(path, (points * np.linspace(0, 1, count)[:, None, None] ** [0, 0, 1]).astype(np.float32))
    return path


def write_videos(root, frames=20):
    """KTH: people in front of the camera; what they do in a frame is unknown."""
    random = np.random.default_rng(0)
    for person in range(3):
        folder = root / f"person{person:02}_handwaving_d4_frames"
        folder.mkdir(parents=True)
        for i in range(frames):
            frame = random.integers(40 * person, 40 * person + 100, (12, 16), dtype=np.uint8)
            Image.fromarray(frame).save(folder / f"{i:03}.png")
    return root


def write_run(folder, data, model, value_range="symmetric", images=1000, weights="averaged", **sections):
    if not isinstance(data, dict):
        data = {"path": str(data), "value_range": value_range}
    config = make_config({"model": model, "data": data, **sections})
    (folder / "snapshots").mkdir(parents=True)
    (folder / "samples").mkdir()
    (folder / "run.json").write_text(json.dumps({"name": folder.name, "config_hash": ""}))
    (folder / "config.yaml").write_text(config.to_yaml())
    model = make_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    path = folder / "snapshots" / f"{images:010d}.safetensors"
    save_snapshot(path, model, config, images, weights=weights)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    colour = write_images(root / "colour", 24, 3)
    grey = write_images(root / "grey", 24, 1)
    clouds = write_clouds(root / "clouds.npy")
    growth = {"images_per_level": 1000, "fade": 0.5}
    return SimpleNamespace(
        colour=colour,
        grey=grey,
        dark=write_images(root / "dark", 12, 1, seed=1, dark=0.3),
        style=write_run(root / "00000-style", colour, STYLE),
        growing=write_run(root / "00001-growing", colour, STYLE, images=1500, growth=growth),
        residual=write_run(root / "00002-residual", grey, RESIDUAL, "unit"),
        clouds=write_run(
            root / "00004-clouds",
            {"kind": "pointclouds", "path": str(clouds), "points": 20},
            POINTNET,
            objective={"reconstruction": "chamfer"},
        ),
        translation=write_run(root / "00005-translation", {"kind": "factors"}, TWO_ENCODER),
        videos=write_run(
            root / "00006-videos",
            {"kind": "factors", "path": str(write_videos(root / "kth"))},
            {**TWO_ENCODER, "channels": 1},
        ),
        density=write_run_of_points(root / "00003-density"),
    )


def write_run_of_points(folder):
    config = make_config({"model": {"kind": "mlp"}, "data": {"kind": "density", "name": "8gaussians"}})
    path = folder / "snapshots" / "0000000001.safetensors"
    save_snapshot(path, make_model(config), config, 1, weights="averaged")
    return folder
