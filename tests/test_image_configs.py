"""The configurations of the residual model are the published sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sivae_fast.config import ConfigError, load_config
from sivae_fast.data import dali, pixels
from sivae_fast.draws import Draws, Rows
from sivae_fast.evaluation.batchnorm import batch_norms
from sivae_fast.models.residual import SIZES
from sivae_fast.systems import make_data, make_model, make_objective

CONFIGS = Path(__file__).parent.parent / "launch" / "configs"


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


@pytest.mark.parametrize("setting", ["data.shift=0.6", "data.hue=-0.1", "data.shift=.nan", "data.hue=true"])
def test_augmentations_out_of_range_are_named(setting):
    key = setting.partition("=")[0]
    with pytest.raises(ConfigError, match=key):
        load_config(CONFIGS / "monsters128.yaml", ["data.path=x", setting])
