"""The pictures of two-dimensional densities."""

import numpy as np
import pytest
import torch

from sivae_fast.data.densities import Density
from sivae_fast.evaluation.density_figures import Learned, Row, draw_model, draw_overview, look_at
from sivae_fast.models.mlp import MLPModel

pytest.importorskip("matplotlib")


def read(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


def corner_learned():
    """Samples at the right end of the x axis, density one only where x and y are positive."""
    energy = torch.full((32, 32), 50.0)
    energy[16:, 16:] = 0
    return Learned(torch.tensor([[1.8, 0.0]]).expand(1024, 2), energy)


def test_three_panels_show_points_and_density_where_they_are(tmp_path):
    draw_model(tmp_path / "new" / "model.png", Density("8gaussians").sample, 2.0, corner_learned())
    picture = read(tmp_path / "new" / "model.png")
    third = picture.shape[1] // 3
    samples, density = picture[:, third : 2 * third], picture[:, 2 * third :]
    drawn = np.argwhere((samples < 0.9).any(2))
    assert drawn[:, 1].mean() > 0.8 * third and abs(drawn[:, 0].mean() / len(samples) - 0.5) < 0.05
    h, w = density.shape[:2]
    assert density[h // 4, 3 * w // 4, 0] > density[h // 4, 3 * w // 4, 2]  # upper right: jet's red
    for y, x in ((h // 4, w // 4), (3 * h // 4, w // 4), (3 * h // 4, 3 * w // 4)):
        assert density[y, x, 2] > density[y, x, 0]  # elsewhere: jet's blue


def test_overview_leaves_missing_models_empty(tmp_path):
    learned = corner_learned()
    rows = [
        Row(name, 2.0, Density(name).sample(1024), [learned, None]) for name in ("8gaussians", "2spirals")
    ]
    draw_overview(tmp_path / "all.png", rows, ["VAE", "Soft-IntroVAE"])
    picture = read(tmp_path / "all.png")
    density, empty = picture[100:, 410:560], picture[100:, 600:]
    assert (density[..., 2] > 0.3).mean() > 0.5 and (density < 0.9).any(2).mean() > 0.5
    assert (empty == 1).all()


def test_look_at_a_model():
    samples, energy = look_at(MLPModel(width=8, hidden_layers=2), 4.0, points=16)
    assert samples.shape == (1024, 2) and energy.shape == (16, 16)
    assert not samples.requires_grad and not energy.requires_grad
