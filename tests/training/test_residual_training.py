"""The residual model in the one loop: its variants resume exactly, and the copy lags by epochs."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sivae_fast
from sivae_fast import systems
from sivae_fast.config import make_config
from sivae_fast.draws import Draws, Rows
from sivae_fast.models.residual import ResidualModel
from sivae_fast.objectives import SoftIntroVAE
from sivae_fast.systems import make_objective
from sivae_fast.training.loop import train
from sivae_fast.training.step import Step

SMALL = {"resolution": 8, "channels": 1, "widths": [4, 8], "latent_size": 4}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grey")
    random = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(folder / f"{i}.png")
    return folder


def configuration(folder, pictures, images, tick=8, **model):
    data = {"path": str(pictures), "value_range": "unit", "flip": False, "loader": "torch"}
    return make_config(
        {
            "model": {"kind": "residual", **SMALL, **model},
            "objective": {"beta_neg": 16.0},
            "data": data,
            "train": {"images": images, "batch": 8, "warmup_images": 8},
            "engine": {"kind": "torch"},
            "run": {"folder": str(folder), "tick": tick, "checkpoint": 8, "samples": 1000},
        }
    )


def losses(run):
    ticks = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    timing = ("time", "_seconds", "_per_second", "memory")
    return [{k: v for k, v in tick.items() if not any(t in k for t in timing)} for tick in ticks]


@pytest.mark.parametrize(
    "model", [{"lagged_decoder": True}, {"augment": True}, {"augment": True, "norm": "group"}], ids=str
)
def test_stopped_and_resumed_is_the_same_as_never_stopped(tmp_path, pictures, model):
    train(configuration(tmp_path / "two", pictures, 40, **model))
    resumed = train(configuration(tmp_path / "two", pictures, 72, **model))
    straight = train(configuration(tmp_path / "one", pictures, 72, **model))
    assert losses(resumed) == losses(straight)
    one, two = (sivae_fast.load(run, averaged=False).state_dict() for run in (straight, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_lagged_decoder_is_the_decoder_of_the_last_epoch(tmp_path, pictures):
    """24 pictures are three batches of 8: copies are taken at 24 and at 48 images, or at 24 alone."""
    decoder, target = {}, {}
    for images in (40, 48, 56):
        for lag in (1, 2):
            folder = tmp_path / f"{images}-{lag}"
            run = train(configuration(folder, pictures, images, lagged_decoder=True, lag_epochs=lag))
            state = sivae_fast.load(run, averaged=False).state_dict()
            decoder[images, lag] = state["decoder.fc.0.weight"]
            target[images, lag] = state["target_decoder.fc.0.weight"]
    assert torch.equal(target[40, 1], target[40, 2])
    assert torch.equal(target[48, 1], decoder[48, 1]) and torch.equal(target[56, 1], target[48, 1])
    assert not torch.equal(target[48, 1], target[40, 1]) and not torch.equal(decoder[56, 1], target[56, 1])
    assert torch.equal(target[56, 2], target[40, 2])


def test_the_bootstrap_variant_keeps_its_term(tmp_path, pictures):
    """Without gamma_r the lagged decoder would serve the encoder alone."""
    weights = {
        lagged: make_objective(configuration(tmp_path, pictures, 8, lagged_decoder=lagged), (1, 8, 8)).gamma_r
        for lagged in (True, False)
    }
    assert weights == {True: 1.0, False: 0.0}


def test_pictures_of_a_run_are_made_with_the_statistics_of_their_batch(tmp_path, pictures, monkeypatch):
    config = configuration(tmp_path, pictures, 8)
    model = systems.make_model(config).eval()
    real = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = []
    monkeypatch.setattr(systems, "save_grid", lambda path, rows, value_range: drawn.extend(rows))
    systems.save_picture(config, tmp_path / "a.png", model, SimpleNamespace(fixed=lambda count: real))
    assert not model.training and model.encoder.main[1].num_batches_tracked == 0
    with torch.no_grad():
        assert not torch.allclose(drawn[1], model.decode(model.encode(real).mean))
        assert torch.equal(drawn[1], model.train().decode(model.encode(real).mean))


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_both_schedules_give_the_augmented_encoder_the_same_draws(norm):
    torch.manual_seed(0)
    model = ResidualModel(**SMALL, norm=norm, augment=True).double().train()
    x = torch.rand(6, 1, 8, 8, dtype=torch.float64)
    updates = []
    for schedule in ("published", "minimal"):
        twin = copy.deepcopy(model)
        objective = SoftIntroVAE(beta_rec=1.0, beta_kl=1.0, beta_neg=16.0, scale=1 / 64, gamma_r=0.0)
        step = Step(twin, objective, schedule=schedule)
        draws = Draws(0, 0, Rows.all(len(x)))
        loss, shared = step.encoder_phase(x, draws)
        loss.loss.backward()
        decoder_loss = step.decoder_phase(x, draws, shared)
        decoder_loss.loss.backward()
        updates.append([p.grad for p in twin.parameters()] + [loss.loss, decoder_loss.loss])
    for one, other in zip(*updates, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)
