import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from sivae_fast.evaluation import reconstruction
from sivae_fast.evaluation.reconstruction import ALEXNET, load_lpips, mse, psnr, ssim


def pair(channels=3, size=20):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, channels, size, size, generator=generator, dtype=torch.float64)
    return x, (x + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)


def test_mse_and_psnr_of_a_known_difference():
    x = torch.full((2, 3, 4, 4), 0.5)
    y = x + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(mse(x, y), torch.tensor([1e-2, 1e-4]))
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)
    assert psnr(x, x).isinf().all()


def test_ssim_is_one_for_equal_images_and_the_windowed_formula_otherwise():
    ndimage = pytest.importorskip("scipy.ndimage")
    x, y = pair()
    torch.testing.assert_close(ssim(x, x), torch.ones(2, dtype=torch.float64))

    def smooth(image):
        return ndimage.gaussian_filter(image, 1.5, radius=5)[5:-5, 5:-5]

    maps = []
    for a, b in zip(x[1].numpy(), y[1].numpy(), strict=True):
        mean_a, mean_b = smooth(a), smooth(b)
        var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
        both = smooth(a * b) - mean_a * mean_b
        top = (2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4)
        maps.append(top / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    assert ssim(x, y)[1].item() == pytest.approx(np.mean(maps), rel=1e-10)


def test_ssim_of_flat_images_compares_their_luminance_alone():
    black, grey = torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), 0.5)
    assert ssim(black, grey).tolist() == pytest.approx([1e-4 / (0.25 + 1e-4)] * 2, rel=1e-4)


def test_ssim_falls_with_noise():
    torch.manual_seed(0)
    image = torch.rand(1, 1, 32, 32)
    noise = torch.randn_like(image)
    scores = [ssim(image, image + s * noise).item() for s in (0, 0.1, 0.3, 1)]
    assert scores == sorted(scores, reverse=True) and scores[1] > 0.8 and scores[3] < 0.4


def test_ssim_refuses_images_that_its_window_does_not_fit():
    x, y = pair(size=12)
    assert ssim(x[..., :11], y[..., :11]).shape == (2,)
    for wrong in (slice(8), slice(10)):
        with pytest.raises(ValueError, match="at least 11 pixels a side"):
            ssim(x[..., wrong], y[..., wrong])


def test_missing_lpips_weights_say_where_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"download https://download\.pytorch\.org/models/alexnet"):
        load_lpips(tmp_path)


def alexnet(folder):
    """A file of the name of AlexNet's weights, with other content."""
    path = folder / "checkpoints" / ALEXNET
    path.parent.mkdir()
    path.write_bytes(b"half of it")
    return path


def test_damaged_lpips_weights_are_refused(tmp_path):
    path = alexnet(tmp_path)
    with pytest.raises(
        ValueError, match=rf"{path} is not the published file .*, not 7be5be79\.\.\.\): download"
    ):
        load_lpips(tmp_path)


def test_missing_lpips_package_is_named(tmp_path, monkeypatch):
    alexnet(tmp_path)
    monkeypatch.setattr(reconstruction, "check_published", lambda path, url: None)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    with pytest.raises(ImportError, match=r"needs torchmetrics and torchvision .*'sivae-fast\[eval\]'"):
        load_lpips(tmp_path)


class AlexNet(nn.Module):
    """Its layers that make images smaller, in place of the package and the weights."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 2, 11, 4, 2), nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2))

    def forward(self, x, y):
        return (self.layers(x) - self.layers(y)).square().flatten(1).mean(1)


def lpips_by(network, tmp_path, monkeypatch):
    alexnet(tmp_path)
    monkeypatch.setattr(reconstruction, "check_published", lambda path, url: None)
    package = types.SimpleNamespace(
        LearnedPerceptualImagePatchSimilarity=lambda name: types.SimpleNamespace(net=network)
    )
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", package)
    return load_lpips(tmp_path)


def test_lpips_sees_images_from_minus_one_to_one(tmp_path, monkeypatch):
    class Ends(nn.Module):
        def forward(self, x, y):
            return torch.stack([x.min(), x.max(), y.min(), y.max()])

    before = torch.hub.get_dir()
    x = torch.linspace(0, 1, 31).expand(2, 3, 31, 31)
    assert lpips_by(Ends(), tmp_path, monkeypatch)(x, x / 2).tolist() == [-1, 1, -1, 0]
    assert torch.hub.get_dir() == before


def test_lpips_refuses_images_of_which_its_layers_leave_nothing(tmp_path, monkeypatch):
    lpips = lpips_by(AlexNet(), tmp_path, monkeypatch)
    assert lpips(torch.rand(2, 3, 31, 31), torch.rand(2, 3, 31, 31)).shape == (2,)
    with pytest.raises(ValueError, match=r"LPIPS needs images of at least 31 pixels a side, got \[30, 30\]"):
        lpips(torch.rand(2, 3, 30, 30), torch.rand(2, 3, 30, 30))
