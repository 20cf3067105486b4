"""How far a published checkpoint was trained: its level, and where the run that goes on from it begins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sivae_fast.checkpoint import CheckpointError, load, load_newest
from sivae_fast.config import ConfigError, make_config
from sivae_fast.convert import convert, start_run
from sivae_fast.models.mlp import MLPModel
from sivae_fast.models.pointnet import PointNetModel
from sivae_fast.models.residual import ResidualModel
from sivae_fast.models.style import StyleModel
from sivae_fast.published import read_published
from tests.published_files import half, style_content, trained_to, write
from tests.test_image_configs import RESIDUAL, STYLE

torch.set_num_threads(1)
SMALL = {"resolution": 32, "start_channels": 4, "max_channels": 16, "latent_size": 8}


def low(tmp_path: Path, name: str, level: int, epochs: int) -> tuple[StyleModel, Path]:
    model = trained_to(level, **SMALL)
    return model, write(tmp_path / name, style_content(model, half(model), epochs=epochs))


@pytest.mark.parametrize("name", ["model_tmp_lod1", "model_tmp_intermediate_lod1", "unnamed"])
@torch.no_grad()
def test_levels_that_were_not_trained_are_left_out_of_a_snapshot(tmp_path, caplog, name):
    model, source = low(tmp_path, f"{name}.pth", 1, 19)
    with caplog.at_level("INFO", "sivae_fast"):
        back = load(convert(source, tmp_path / "a.safetensors", raw=True))
    assert "training had reached level 1 of 3" in caplog.text and "raw weights, 8x8" in caplog.text
    assert (back.lod, back.config.model.resolution, back.config.model.start_channels) == (1, 8, 16)
    model.eval().set_level(1, 1.0)
    x, z = torch.rand(2, 3, 8, 8), torch.randn(2, 8)
    assert torch.equal(back.encode(x).mean, model.encode(x).mean)
    assert torch.equal(back.decode(z, noise="bump"), model.decode(z, noise="bump"))
    averaged = load(convert(source, tmp_path / "b.safetensors"))
    assert torch.equal(averaged.decoder.const, model.decoder.const / 2)


def test_a_file_of_4x4_images_can_only_be_trained_on(tmp_path):
    source = low(tmp_path, "model_tmp_lod0.pth", 0, 9)[1]
    with pytest.raises(
        CheckpointError, match=r"model_tmp_lod0\.pth: only its 4x4 level was trained.*--config"
    ):
        convert(source, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model_tmp_lod2.pth", "says level 2, but nothing above level 1 was trained"),
        ("model_tmp_lod6.pth", "says level 6, the model's last is 3"),
        ("ffhq_fid_17.55_epoch_270.pth", "says epoch 270, its content epoch 19"),
    ],
)
def test_a_name_that_contradicts_its_file_is_refused(tmp_path, name, message):
    source = low(tmp_path, name, 1, 19)[1]
    with pytest.raises(CheckpointError, match=re.escape(f"{name}: its name {message}")):
        read_published(source)


def test_a_name_may_say_a_lower_level_than_the_weights(tmp_path):
    source = low(tmp_path, "model_tmp_lod1.pth", 3, 19)[1]
    assert read_published(source).level == 1


def test_a_file_that_was_not_trained_at_all_has_the_level_of_its_name_or_none(tmp_path):
    assert read_published(low(tmp_path, "model_tmp_lod1.pth", -1, 0)[1]).level == 1
    unnamed = read_published(low(tmp_path, "unnamed.pth", -1, -1)[1])
    assert unnamed.level is None and unnamed.epoch == 0 and "nothing says which level" in unnamed.notes[-1]


def grown(tmp_path: Path, images_per_level: int, **values):
    growth = {"images_per_level": images_per_level}
    run = {"folder": str(tmp_path)}
    return make_config({"model": {"kind": "style", **SMALL}, "growth": growth, "run": run, **values})


@pytest.mark.parametrize(
    ("name", "level", "epochs", "images_per_level", "start"),
    [
        ("ffhq_fid_17.55_epoch_270.pth", 3, 270, 960_000, 270 * 60_000),
        ("celebahq_fid_18.63_epoch_230.pth", 3, 230, 960_000, 230 * 28_992),
        ("model_tmp_lod1.pth", 1, 19, 960_000, 19 * 60_000),
        ("model_tmp_lod2.pth", 2, 90, 869_760, 90 * 28_992),
        ("model_tmp_lod2.pth", 2, 90, 1000, 2500),  # of another schedule: where the level is faded in
        ("model_tmp_lod0.pth", 0, 9, 1000, 0),
        ("model_tmp_lod0.pth", 0, 16, 960_000, 960_000),  # the last epoch of its level
        ("model_tmp_intermediate_lod1.pth", 1, 16, 960_000, 960_000),  # the first of its
    ],
)
def test_a_run_starts_after_the_images_that_the_file_has_seen(
    tmp_path, caplog, name, level, epochs, images_per_level, start
):
    source = low(tmp_path, name, level, epochs)[1]
    with caplog.at_level("INFO", "sivae_fast"):
        folder = start_run(source, grown(tmp_path, images_per_level))
    state = load_newest(folder / "checkpoints")[1]
    assert (state["images"], state["lod"]) == (start, level)
    assert f"assumed: {start:,} images seen" in caplog.text


def test_a_schedule_of_another_level_is_refused_unless_images_are_given(tmp_path, caplog):
    source = low(tmp_path, "model_tmp_lod1.pth", 1, 40)[1]
    for images_per_level, images, level in ((960_000, "2,400,000", 2), (0, "0", 3)):
        config = grown(tmp_path, images_per_level)
        message = f"lod1.pth had reached level 1, the configuration has level {level} at {images} images"
        with pytest.raises(ConfigError, match=message + ".*, or --images"):
            start_run(source, config)
    folder = start_run(source, grown(tmp_path, 960_000), images=3_000_000)
    assert "the configuration has level 3 at 3,000,000 images" in caplog.text
    state = load_newest(folder / "checkpoints")[1]
    assert (state["images"], state["lod"]) == (3_000_000, 1)  # of the optimizers' state, which is forgotten


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("cifar10_soft_intro_betas_1.0_256_1.0_model_epoch_219_iter_344000.pth", 219 * 50_000),
        ("mine_soft_intro_betas_1.0_256_1.0_model_epoch_219_iter_344000.pth", 0),
    ],
)
def test_runs_of_residual_checkpoints(tmp_path, name, start):
    sizes = {"resolution": 16, "widths": (4, 8), "latent_size": 4}
    source = write(tmp_path / name, {"epoch": 219, "model": ResidualModel(**sizes).state_dict()})
    model = {"kind": "residual", **sizes}
    folder = start_run(source, make_config({"model": model, "run": {"folder": str(tmp_path)}}))
    assert load_newest(folder / "checkpoints")[1]["images"] == start


def test_runs_of_two_dimensional_checkpoints(tmp_path):
    source = write(tmp_path / "d.pth", {"epoch": 5000, "model": MLPModel(width=8).state_dict()})
    values = {"model": {"kind": "mlp", "width": 8}, "data": {"kind": "density"}}
    folder = start_run(source, make_config({**values, "run": {"folder": str(tmp_path)}}))
    assert load_newest(folder / "checkpoints")[1]["images"] == 5000 * 512


@pytest.mark.parametrize(
    "name", ["01618_jsd_0.0175", "chair_01618_jsd_0.0175", "chair_epoch_1618_jsd_0.0175"]
)
def test_point_cloud_files_say_their_epoch_in_their_name(tmp_path, name):
    state = PointNetModel(points=20, latent_size=6).state_dict()
    for key, value in state.items():
        if key.startswith("encoder.conv") and value.ndim == 2:
            state[key] = value[:, :, None].clone()
    assert read_published(write(tmp_path / f"{name}.pth", state)).epoch == 1618


def test_names_of_data_sets_say_the_images_of_an_epoch(tmp_path):
    """As the shipped configurations count them."""
    pictures = {name: values.pictures for name, values in RESIDUAL.items()}
    pictures |= {name.removesuffix("256"): values[2] for name, values in STYLE.items()}
    content = {"epoch": 1, "model": ResidualModel(16, widths=(4, 8), latent_size=4).state_dict()}
    for name in pictures.keys() - {"bootstrap-cifar10", "monsters128"}:  # published under other names
        found = read_published(write(tmp_path / f"{name}_soft_intro_epoch_1.pth", content))
        assert (name, found.epoch, found.epoch_images) == (name, 1, pictures[name])


@pytest.mark.parametrize(("said", "fits"), [(218, True), (220, True), (217, False), (221, False)])
def test_a_name_may_be_one_epoch_off_its_content(tmp_path, said, fits):
    """Files are written before and after an epoch is counted; the content knows."""
    content = {"epoch": 219, "model": ResidualModel(16, widths=(4, 8), latent_size=4).state_dict()}
    source = write(tmp_path / f"svhn_epoch_{said}.pth", content)
    if fits:
        assert read_published(source).epoch == 219
    else:
        with pytest.raises(CheckpointError, match=f"its name says epoch {said}, its content epoch 219"):
            read_published(source)
