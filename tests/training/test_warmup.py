"""What becomes of Adam's moments where the warm-up as a VAE ends and the game begins."""

import pytest
import torch

from sivae_fast.checkpoint import load_newest, part
from sivae_fast.config import make_config
from sivae_fast.training import recorder
from sivae_fast.training.loop import train


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(images, name, ...) trains a small network for points in the plane, 8 at a time, or goes on with it;
    gives tensors and state of its checkpoint."""
    monkeypatch.setattr(recorder, "save_picture", lambda config, path, *about: path.touch())

    def trained(images: int, name: str, warmup: int = 64, **sections):
        values = {
            "model": {"kind": "mlp", "width": 8, "hidden_layers": 1},
            "data": {"kind": "density"},
            "train": {"images": images, "batch": 8, "warmup_images": warmup},
            "engine": {"kind": "torch"},
            "run": {"folder": str(tmp_path / "runs"), "name": name},
        }
        return load_newest(train(make_config({**values, **sections})) / "checkpoints")

    return trained


@pytest.mark.parametrize(
    "kind, clear, steps", [("soft_introvae", True, 4), ("soft_introvae", False, 12), ("vae", True, 12)]
)
def test_moments_end_with_the_warmup(run, kind, clear, steps):
    """A VAE has no game, so its moments stay."""
    _, state = run(96, "one", objective={"kind": kind}, optim={"clear_after_warmup": clear})
    assert state["steps"] == {"encoder": steps, "decoder": steps}


@pytest.mark.parametrize("stop", [56, 64, 72])
def test_a_run_stopped_around_the_end_of_the_warmup_goes_on_as_one_that_was_not(run, stop):
    wanted, _ = run(96, "whole")
    _, state = run(stop, "stopped")
    assert state["as_vae"] == (stop <= 64)
    found, state = run(96, "stopped")
    assert state["steps"] == {"encoder": 4, "decoder": 4}
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_moments_of_the_warmup_would_hold_the_game_back(run):
    """The game's losses are `scale` times the warm-up's: a step divides by the root of what is left of the
    squared gradients of the warm-up."""
    moved = {}
    for clear in (True, False):
        weights = []
        for images in (1200, 1280):
            tensors, _ = run(
                images,
                f"clear-{clear}",
                objective={"scale": 1e-4, "beta_neg": 1.0},
                optim={"clear_after_warmup": clear},
                warmup=800,
            )
            weights.append(part(tensors, "model"))
        before, after = weights
        moved[clear] = sum((after[name] - value).abs().sum() for name, value in before.items())
    assert 0 < moved[False] < moved[True] / 100


def test_moments_end_with_the_warmup_under_deepspeed_too(launch):
    """One iteration of warm-up and two of the game."""
    launch(train__images=48, run__name="torch")
    launch(ranks=2, train__images=48, run__name="deepspeed", engine__kind="deepspeed", engine__zero=1)
    (wanted, state), (found, other) = (
        load_newest(next((launch.folder / "runs").glob(f"*-{name}")) / "checkpoints")
        for name in ("torch", "deepspeed")
    )
    assert state["steps"] == other["steps"] == {"encoder": 2, "decoder": 2}
    for name in part(wanted, "model"):
        if "decoder.blocks.0.bias_1" not in name:  # its gradient is rounding alone
            torch.testing.assert_close(found[f"model/{name}"], wanted[f"model/{name}"], rtol=1e-3, atol=1e-5)


def test_only_runs_that_are_trained_otherwise_are_others_than_before():
    """Runs of versions without the option are found again where it changes nothing."""

    def identity(warmup: int, **optim) -> str:
        return make_config({"train": {"warmup_images": warmup}, "optim": optim}).identity()

    before = identity(0)
    assert before == identity(0, clear_after_warmup=False)
    assert identity(8) != identity(8, clear_after_warmup=False)
