"""The two-dimensional experiment through the one loop: configs, objectives, stop and resume, bad values."""

import json
from pathlib import Path

import pytest
import torch

from launch.train import main
from sivae_fast.checkpoint import load
from sivae_fast.config import ConfigError, load_config
from sivae_fast.data.densities import Density
from sivae_fast.evaluation.density import divergences, evaluate_density, prior_samples
from sivae_fast.training.loop import train

CONFIGS = Path(__file__).parents[2] / "launch" / "configs"
SMALL = ["model.width=16", "train.batch=64", "train.warmup_images=256", "optim.drops=[]"]
PUBLISHED = {  # beta_rec, beta_kl, beta_neg
    "8gaussians": (0.2, 0.3, 0.9),
    "2spirals": (0.2, 0.5, 1.0),
    "checkerboard": (0.2, 0.1, 0.2),
    "rings": (0.2, 0.2, 1.0),
}


def config(folder, *overrides, density="rings", images=640):
    intervals = ["run.tick=128", "run.samples=100000", "run.checkpoint=100000"]
    places = [f"run.folder={folder}", f"train.images={images}"]
    return load_config(CONFIGS / f"density-{density}.yaml", [*SMALL, *intervals, *places, *overrides])


def ticks(run):
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("density", PUBLISHED)
def test_configs_hold_the_published_run(density):
    found = load_config(CONFIGS / f"density-{density}.yaml")
    assert (found.objective.beta_rec, found.objective.beta_kl, found.objective.beta_neg) == PUBLISHED[density]
    assert (found.data.name, found.train.batch, found.train.images) == (density, 512, 30_000 * 512)
    assert (found.train.warmup_images, found.optim.drops) == (2_000 * 512, (10_000 * 512, 15_000 * 512))
    assert (found.optim.learning_rate, found.optim.betas) == (2e-4, (0.9, 0.999))
    assert (found.model.width, found.model.latent_size, found.model.hidden_layers) == (256, 2, 4)


@pytest.mark.parametrize("objective", ["vae", "introvae", "soft_introvae"])
def test_each_objective_trains_by_its_own_keys(tmp_path, objective):
    margin = ["objective.margin=4"] if objective == "introvae" else []
    run = train(config(tmp_path, f"objective.kind={objective}", *margin))
    last = ticks(run)[-1]
    assert last["images"] == 640
    assert ("loss_vae" in last) == (objective == "vae") and ("kl_fake" in last) == (objective != "vae")
    model, data = load(run), Density("rings")
    assert model.images == 640
    assert evaluate_density(model, data.sample, data.half_range)["kl"] > 0


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = train(config(tmp_path / "whole"))
    train(config(tmp_path / "parts", images=320))
    parts = train(config(tmp_path / "parts"))
    first, second = load(whole).state_dict(), load(parts).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [tick["images"] for tick in ticks(parts)][-1] == 640


def test_a_vae_learns_where_the_data_are(tmp_path):
    settings = ["objective.kind=vae", "objective.beta_rec=0.8", "objective.beta_kl=0.05", "model.width=32"]
    short = ["optim.learning_rate=0.003", "train.batch=256", "train.warmup_images=0", "run.tick=10000"]
    data, found = Density("rings"), []
    for images in (256, 256 * 200):
        model = load(train(config(tmp_path, *settings, *short, images=images)))
        samples = lambda count, seed, model=model: prior_samples(model, count, seed)
        found.append(divergences(data.sample, samples, data.half_range)["kl_nats"])
    assert found[1] < found[0] - 5


def test_bfloat16_follows_float32(tmp_path):
    """Ticks of 50 iterations of both phases, from the same weights and noise."""
    short = ["model.width=32", "train.batch=256", "train.warmup_images=12800", "run.tick=12800"]
    full, half = (
        ticks(train(config(tmp_path / name, *short, f"train.precision={name}", images=256 * 200)))
        for name in ("fp32", "bf16")
    )
    assert len(full) == 4 and full != half
    for a, b in zip(full, half, strict=True):
        for name in ("rec_real", "kl_real", "loss_encoder", "loss_decoder", "exp_elbo_fake"):
            assert name not in a or b[name] == pytest.approx(a[name], rel=0.03), name


@pytest.mark.parametrize("multiplies", [True, False])
def test_the_precision_is_that_of_the_processor(tmp_path, monkeypatch, multiplies):
    """The configurations ask for bfloat16 where there are instructions for it."""
    asked = "bf16" if multiplies else "fp32"
    explicit = load(train(config(tmp_path / "explicit", f"train.precision={asked}"))).state_dict()
    monkeypatch.setattr("sivae_fast.training.device.multiplies_bf16", lambda: multiplies)
    found = load(train(config(tmp_path / "auto"))).state_dict()
    assert all(torch.equal(found[name], explicit[name]) for name in explicit)
    resumed = train(config(tmp_path / "auto", images=704))
    assert len(ticks(resumed)) > 5, "another run"
    assert f"train.precision=auto: {asked}" in (resumed / "log.txt").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.name=ring", "unknown density 'ring': did you mean 'rings'"),
        (
            "train.batch=3",
            "train.batch=3: rings places a quarter of a batch on each circle: 3 must be at least 4",
        ),
        ("objective.beta_rec=-1", "objective.beta_rec=-1: input should be greater than or equal to 0"),
    ],
)
def test_bad_values_are_one_clear_error(tmp_path, capsys, override, message):
    places = [f"run.folder={tmp_path}", "train.images=64"]
    assert main(["--config", str(CONFIGS / "density-rings.yaml"), *SMALL, *places, override]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_spirals_need_an_even_batch(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.batch=63: 2spirals .* 63 must be even"):
        train(config(tmp_path, "train.batch=63", density="2spirals"))
    assert not list(tmp_path.iterdir())
