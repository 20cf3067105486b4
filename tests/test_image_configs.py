"""The configurations of the residual model are the published sizes."""

from pathlib import Path

import pytest
import torch

from sivae_fast.config import load_config
from sivae_fast.models.residual import SIZES
from sivae_fast.systems import make_model, make_objective

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
