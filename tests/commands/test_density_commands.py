"""The commands for models of points in the plane, which know their density or are told which."""

import pytest
from PIL import Image

from sivae_fast.checkpoint import load, save_snapshot
from sivae_fast.cli import main
from sivae_fast.commands.densities import density_of


@pytest.fixture
def converted(runs, tmp_path):
    model = load(runs.density)
    save_snapshot(tmp_path / "model.safetensors", model, model.config, 1, source="model.pth")
    return tmp_path / "model.safetensors"


def test_a_converted_model_is_told_its_density(runs, converted):
    assert density_of(load(runs.density)).name == "8gaussians"
    assert density_of(load(runs.density), "rings").name == "rings"
    assert density_of(load(converted), "rings").name == "rings"
    with pytest.raises(
        ValueError, match=r"the density is needed, .* give data=NAME \(--data NAME\), one of 8g"
    ):
        density_of(load(converted))


def test_evaluate_measures_the_density_of_that_name(converted, monkeypatch, capsys):
    seen = []
    found = lambda model, sample, half_range, seed: seen.append(half_range) or {"kl": 1.0}
    monkeypatch.setattr("sivae_fast.evaluation.density.evaluate_density", found)
    assert main(["evaluate", str(converted), "--device", "cpu"]) == 1
    assert "the density is needed" in capsys.readouterr().err
    assert main(["evaluate", str(converted), "--device", "cpu", "--data", "rings"]) == 0
    assert seen == [4.0] and '"density": "rings"' in capsys.readouterr().out
    assert main(["evaluate", str(converted), "--device", "cpu", "--data", "ring"]) == 1
    assert "did you mean 'rings'" in capsys.readouterr().err


def test_sample_draws_the_figure_of_training(converted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sivae_fast.commands.densities.GRID", 16)
    out = str(tmp_path / "figure.png")
    command = ["sample", str(converted), "--device", "cpu", "--out", out]
    assert main(command) == 1
    assert "the density is needed" in capsys.readouterr().err
    assert main([*command, "--data", "rings"]) == 0
    assert Image.open(out).size == (1080, 360)
    assert main([*command, "--data", "rings", "--count", "3"]) == 1
    assert "error: --count is 3: the figure of a density" in capsys.readouterr().err


def test_options_of_other_models_are_refused(runs, tmp_path, capsys):
    options = [["--batch", "0"], ["--batch-norm", "running"]]
    for command in (["evaluate"], ["sample", "--out", str(tmp_path / "figure.png")]):
        for option, value in [*options, *([["--count", "10"]] if command == ["evaluate"] else [])]:
            assert main([*command, str(runs.density), "--device", "cpu", option, value]) == 1
            assert f"error: {option} is {value}: models of points in the plane" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
