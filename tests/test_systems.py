"""What a configuration says reaches the schedule, the data and the pictures of a run."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sivae_fast import systems
from sivae_fast.config import ConfigError, make_config
from sivae_fast.data import factors, pointclouds
from sivae_fast.evaluation.batchnorm import batch_statistics
from sivae_fast.systems import check_batch, make_data, make_model, make_objective, make_schedule, save_picture

STYLE = {"kind": "style", "resolution": 16, "start_channels": 4, "max_channels": 8, "latent_size": 8}
RESIDUAL = {"kind": "residual", "resolution": 16, "channels": 1, "widths": [4, 8], "latent_size": 4}
CLOUDS = {"kind": "pointnet", "points": 20, "latent_size": 4}
CHAMFER = {"objective": {"reconstruction": "chamfer"}}
CPU = torch.device("cpu")


def test_every_setting_reaches_the_schedule():
    config = {
        "model": STYLE,
        "growth": {"images_per_level": 100, "fade": 0.25},
        "train": {"batch": [8, 4, 2], "micro_batch": [4, 2, 1]},
        "optim": {"learning_rate": [1.0, 2.0, 3.0], "drops": [100], "drop_factor": 0.5},
        "objective": {"beta_neg": [3.0, 2.0, 1.0]},
    }
    stages = make_schedule(make_config(config)).stages()
    assert [(s.batch, s.micro_batch, s.learning_rate, s.beta_neg) for s in stages] == [
        (8, 4, 1.0, 3.0),
        (4, 2, 1.0, 2.0),
        (2, 1, 1.5, 1.0),
    ]
    assert make_schedule(make_config(config)).blend(125) == 1 > make_schedule(make_config(config)).blend(124)
    config["objective"] = {"kind": "vae"}
    assert make_schedule(make_config(config)).at(0).beta_neg is None


def test_the_bootstrap_variant_has_its_term_unless_told_otherwise():
    lagged = {"model": {**RESIDUAL, "lagged_decoder": True}}
    assert make_objective(make_config(lagged), (1, 16, 16)).gamma_r == 1
    told = make_config({**lagged, "objective": {"gamma_r": 0.0}})
    assert make_objective(told, (1, 16, 16)).gamma_r == 0


def test_every_setting_of_point_clouds_reaches_their_data(monkeypatch):
    given = {}
    monkeypatch.setattr(pointclouds, "load_clouds", lambda path, **options: given.update(options, path=path))
    monkeypatch.setattr(pointclouds, "PointClouds", lambda clouds, **options: given.update(options))
    data = {"path": "x", "classes": ("chair",), "points": 20}
    for flags in ({"resample": True, "rotate": False}, {"resample": False, "rotate": True}):
        settings = {"data": {"kind": "pointclouds", **data, **flags}, "train": {"seed": 7}}
        make_data(make_config({"model": CLOUDS, **CHAMFER, **settings}), CPU)
        assert given == {**data, **flags, "seed": 7, "device": CPU}


def test_every_setting_of_factors_reaches_their_data(monkeypatch):
    given = {}
    loader = lambda images, **about: given.update(about, images=images) or SimpleNamespace(input_shape=[3])
    monkeypatch.setattr(factors, "load_factors", lambda path, resolution: (path, resolution))
    monkeypatch.setattr(factors, "FactorImages", loader)
    model = {"kind": "two_encoder", "resolution": 32}
    make_data(
        make_config({"model": model, "data": {"kind": "factors", "path": "x"}, "train": {"seed": 7}}), CPU
    )
    assert given == {"images": ("x", 32), "seed": 7, "device": CPU}


@pytest.mark.parametrize(("model", "grows"), [(STYLE, True), (RESIDUAL, False)])
def test_images_are_pooled_for_models_that_grow_alone(monkeypatch, model, grows):
    given, shape = {}, (model.get("channels", 3), 16, 16)
    loader = lambda path, **options: given.update(options) or SimpleNamespace(input_shape=shape)
    monkeypatch.setattr("sivae_fast.data.loader.ImageLoader", loader)
    config = {"model": model, "data": {"path": "x"}}
    make_data(make_config(config), CPU)
    assert given["grows"] is grows
    config["model"] = {**model, "channels": 4 - shape[0]}
    with pytest.raises(
        ConfigError, match=f"images are 16x16 with {shape[0]} channels, .* ask for 16x16 with"
    ):
        make_data(make_config(config), CPU)


@pytest.fixture
def saved(monkeypatch):
    found = []
    monkeypatch.setattr(systems, "save_grid", lambda path, rows, bounds: found.append((rows, bounds)))
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value_range", ["unit", "symmetric"])
def test_pictures_are_real_reconstructed_and_drawn(saved, training, value_range):
    """With the statistics of their own batch, and training goes on in the mode it had."""
    config = make_config({"model": RESIDUAL, "data": {"value_range": value_range}})
    model, x = make_model(config).train(training), torch.rand(9, 1, 16, 16)
    data = SimpleNamespace(fixed=lambda count: x[:count])
    for _ in range(2):
        save_picture(config, Path("x.png"), model, data)
        assert all(module.training is training for module in model.modules())
    ((real, rec, fake), bounds), (again, _) = saved
    assert bounds == ((0, 1) if value_range == "unit" else (-1, 1))
    assert torch.equal(real, x[:8]) and fake.shape == rec.shape == real.shape
    assert torch.equal(rec, again[1]) and torch.equal(fake, again[2]) and not torch.equal(rec, fake)
    with torch.no_grad(), batch_statistics(model.eval()):
        torch.testing.assert_close(rec, model.decode(model.encode(real).mean))


def test_pictures_of_a_growing_model_have_its_level(saved):
    """And leave its average style as it is."""
    config = make_config({"model": STYLE})
    model, x = make_model(config).train(), torch.rand(8, 3, 16, 16)
    model.set_level(1, 1.0)
    save_picture(config, Path("x.png"), model, SimpleNamespace(fixed=lambda count: x))
    ((real, rec, fake), _), *_ = saved
    assert torch.equal(real, F.avg_pool2d(x, 2)) and rec.shape == fake.shape == (8, 3, 8, 8)
    assert not model.dlatent_avg.any()


def test_pictures_of_clouds_are_drawn_from_their_own_prior(monkeypatch):
    config = make_config({"model": CLOUDS, "data": {"kind": "pointclouds", "points": 20}, **CHAMFER})
    found = []
    model, x = make_model(config), torch.rand(8, 20, 3)
    model.generate = lambda z, stream: z
    monkeypatch.setattr(
        "sivae_fast.evaluation.pointcloud_figures.draw_clouds", lambda _, rows: found.extend(rows)
    )
    save_picture(config, Path("x.png"), model, SimpleNamespace(fixed=lambda count: x[:count]))
    real, rec, z = found
    assert torch.equal(real, x) and rec.shape == x.shape and 0.1 < z.std() < 0.3


def test_sizes_that_do_not_fit_name_their_key():
    with pytest.raises(ConfigError, match=r"^model\.resolution"):
        make_model(make_config({"model": {**RESIDUAL, "resolution": 18}}))


def test_a_density_that_is_unknown_or_takes_another_batch_names_its_key():
    density = lambda name: make_config({"model": {"kind": "mlp"}, "data": {"kind": "density", "name": name}})
    with pytest.raises(ConfigError, match=r"^data\.name=ring: unknown density"):
        make_data(density("ring"), CPU)
    with pytest.raises(ConfigError, match=r"^train\.batch=63: 2spirals"):
        check_batch(density("2spirals"), 63)
    check_batch(density("2spirals"), 64)
