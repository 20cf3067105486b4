"""The perceptual error, with random weights in the published layout."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from sivae_fast.models.perceptual import PerceptualError

#: (index among torchvision's `features`, inputs, outputs); the names and shapes of its VGG16 state dict.
CONVOLUTIONS = [
    (0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256),
    (17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512),
]  # fmt: skip


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    found = {}
    for index, inputs, outputs in CONVOLUTIONS:
        found[f"features.{index}.weight"] = torch.randn(outputs, inputs, 3, 3) / (9 * inputs / 2) ** 0.5
        found[f"features.{index}.bias"] = torch.randn(outputs) / 10
    return found


@pytest.fixture(scope="module")
def error(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vgg16.safetensors"
    save_file(state, path)
    return PerceptualError(path)


def features(state, x):
    """Outputs of the ReLU after conv1_2, 2_2, 3_2, 4_2 and 5_2, from torchvision's list of layers."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    x = (x - mean) / std
    found = []
    for index in range(30):
        if f"features.{index}.weight" in state:
            x = F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1)
        elif index in (4, 9, 16, 23):
            x = F.max_pool2d(x, 2)
        else:
            x = x.relu()
            if index in (3, 8, 13, 20, 27):
                found.append(x)
    return found


def test_value(state, error):
    x, y = torch.rand(2, 2, 3, 16, 16)
    pairs = [(x, y), *zip(features(state, x), features(state, y), strict=True)]
    want = 3 * 16 * 16 * sum((a - b).abs().flatten(1).mean(1) for a, b in pairs)
    torch.testing.assert_close(error(x, y), want, rtol=1e-4, atol=1e-3)
    assert error(x, x).tolist() == [0, 0]


def test_gradients_reach_images_alone(error):
    y = torch.rand(1, 1, 16, 16, requires_grad=True)
    error(torch.rand(1, 1, 16, 16), y).sum().backward()
    assert y.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in error.parameters())


def test_bad_weights(state, tmp_path):
    with pytest.raises(ValueError, match=r"none\.pth: cannot be read"):
        PerceptualError(tmp_path / "none.pth")
    torch.save({**state, "features.5.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match=r"features\.5\.weight is \[1\], VGG16 has \[128, 64, 3, 3\]"):
        PerceptualError(tmp_path / "vgg.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        PerceptualError(tmp_path / "list.pth")
