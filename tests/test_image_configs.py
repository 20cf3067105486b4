"""The configurations of images have the published sizes and values."""

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from sivae_fast.config import ConfigError, load_config
from sivae_fast.data import dali, pixels
from sivae_fast.draws import Draws, Rows
from sivae_fast.evaluation.batchnorm import batch_norms
from sivae_fast.models.residual import SIZES
from sivae_fast.systems import make_data, make_model, make_objective, make_schedule

CONFIGS = Path(__file__).parent.parent / "launch" / "configs"


class Values(NamedTuple):
    """Of a residual model; epochs and the pictures of one give train.images."""

    beta_kl: float
    beta_rec: float
    beta_neg: float
    latent_size: int
    batch: int
    epochs: int
    pictures: int
    flip: bool


# As published, but for what the comment beside says.
RESIDUAL = {
    "cifar10": Values(1, 1, 256, 128, 32, 250, 50_000, False),
    "bootstrap-cifar10": Values(1, 1, 256, 128, 32, 250, 50_000, False),
    "svhn": Values(1, 1, 256, 128, 32, 250, 73_257, False),
    "mnist": Values(1, 1, 128, 32, 128, 200, 60_000, False),  # beta_neg was 256, and 128 later
    "fmnist": Values(1, 1, 256, 32, 128, 200, 60_000, False),
    "monsters128": Values(0.2, 0.2, 256, 128, 16, 400, 4_000, True),
    "celeb256": Values(1, 0.5, 1024, 256, 8, 250, 162_770, True),  # the other source has 0.5 and 1
    "celeb128": Values(1, 0.5, 1024, 256, 8, 250, 162_770, True),  # not published: as celeb256
    "celeb1024": Values(1, 0.5, 1024, 256, 4, 250, 29_000, True),  # the same
}
# beta_rec, epochs at one level, pictures, learning rate of the last level
STYLE = {"ffhq256": (0.1, 16, 60_000, 0.002), "celebahq256": (0.05, 30, 28_992, 0.0015)}


@pytest.mark.parametrize("name", RESIDUAL)
def test_residual_models_train_with_the_published_values(name):
    config, values = load_config(CONFIGS / f"{name}.yaml"), RESIDUAL[name]
    objective, train, optim = config.objective, config.train, config.optim
    found = (objective.beta_kl, objective.beta_rec, objective.beta_neg, config.model.latent_size, train.batch)
    assert found == values[:5]
    assert train.images == values.epochs * values.pictures
    assert config.data.flip is values.flip
    assert (objective.kind, objective.reconstruction, objective.alpha) == ("soft_introvae", "sse", 2)
    assert objective.scale is None and config.average.half_life is None and train.warmup_images == 0
    assert (optim.learning_rate, optim.betas, optim.eps) == (2e-4, (0.9, 0.999), 1e-8)
    assert not optim.published_eps and optim.drop_factor == 0.1
    # The rate falls at epoch 350, which most end before.
    drops = (350 * values.pictures,) if values.epochs > 350 else ()
    assert optim.drops == drops


@pytest.mark.parametrize("name", STYLE)
def test_style_models_train_with_the_published_values(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    beta_rec, epochs, pictures, last_rate = STYLE[name]
    model, objective, train, optim = config.model, config.objective, config.train, config.optim
    assert (model.resolution, model.start_channels, model.max_channels) == (256, 64, 512)
    assert (model.latent_size, model.mapping_layers, model.style_mixing) == (512, 8, 0.9)
    assert (objective.beta_kl, objective.beta_rec, objective.scale) == (0.2, beta_rec, 5e-6)
    assert (config.data.flip, config.data.value_range) == (True, "symmetric")
    assert (config.growth.images_per_level, config.growth.fade) == (epochs * pictures, 0.5)
    assert (train.images, train.warmup_images) == (300 * pictures, pictures)
    assert (optim.betas, optim.eps, optim.published_eps, optim.drops) == ((0, 0.99), 1e-8, True, ())
    assert config.average.half_life == 10_000
    schedule = make_schedule(config)
    stages = schedule.stages()
    assert [stage.beta_neg for stage in stages] == [2048, 2048, 2048, 1024, 512, 512, 512]
    assert [stage.batch for stage in stages] == [512, 256, 128, 64, 32, 32, 32]
    assert [stage.learning_rate for stage in stages] == [0.0015] * 6 + [last_rate]


@pytest.mark.parametrize("name", SIZES)
def test_configuration_has_the_published_size_and_trains_pixels_in_zero_to_one(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    settings = config.model.model_dump()
    assert {key: settings[key] for key in SIZES[name]} == SIZES[name]
    assert config.data.value_range == "unit" and config.average.half_life is None
    with torch.device("meta"):
        assert make_model(config).norm == "batch"
    shape = (settings["channels"], settings["resolution"], settings["resolution"])
    objective = make_objective(config, shape)
    assert objective.scale == pytest.approx(1 / torch.Size(shape).numel())
    assert config.train.images >= 200 * 4000


@pytest.mark.parametrize("name", SIZES)
def test_group_norm_is_one_key_away(name):
    with torch.device("meta"):
        model = make_model(load_config(CONFIGS / f"{name}.yaml", ["model.norm=group"]))
    assert not batch_norms(model) and not model.uses_batch_statistics


@pytest.mark.parametrize(
    "loader",
    [
        pytest.param("dali", marks=pytest.mark.skipif(dali.trouble() is not None, reason="no DALI")),
        "torch",
    ],
)
def test_the_monsters_are_moved_and_recoloured_by_both_loaders(tmp_path, loader):
    random = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(random.integers(0, 256, (128, 128, 3), np.uint8)).save(tmp_path / f"{i}.png")
    overrides = [f"data.path={tmp_path}", f"data.loader={loader}"]
    data = make_data(load_config(CONFIGS / "monsters128.yaml", overrides), torch.device("cpu"))
    batch, draws = next(data.batches(0, lambda images: 4)), Draws(0, 0, Rows.all(4))
    found = data.to_input(batch, draws, 0, 1.0)
    data.close()
    assert torch.equal(found, pixels.to_input(batch, draws, signed=False, shift=5 / 128, hue=0.5))
    assert not torch.equal(found, pixels.to_input(batch, draws, signed=False))


def test_every_setting_of_images_reaches_the_loader(monkeypatch):
    given = {}

    def loader(path, **options):
        given.update(options, path=str(path))
        return SimpleNamespace(input_shape=(3, 128, 128))

    monkeypatch.setattr("sivae_fast.data.loader.ImageLoader", loader)
    data = {
        "path": "x",
        "loader": "torch",
        "workers": 3,
        "cache_gib": 0.5,
        "flip": True,
        "shift": 0.1,
        "hue": 0.2,
    }
    settings = [*(f"data.{name}={value}" for name, value in data.items()), "train.seed=7"]
    for value_range, signed in (("symmetric", True), ("unit", False)):
        config = load_config(CONFIGS / "monsters128.yaml", [*settings, f"data.value_range={value_range}"])
        make_data(config, torch.device("cpu"))
        device = torch.device("cpu")
        assert given == {**data, "seed": 7, "signed": signed, "grows": False, "device": device}


@pytest.mark.parametrize("setting", ["data.shift=0.6", "data.hue=-0.1", "data.shift=.nan", "data.hue=true"])
def test_augmentations_out_of_range_are_named(setting):
    key = setting.partition("=")[0]
    with pytest.raises(ConfigError, match=key):
        load_config(CONFIGS / "monsters128.yaml", ["data.path=x", setting])
