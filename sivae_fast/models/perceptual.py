"""Perceptual reconstruction error: distance in the features of a VGG16 whose weights the user gives."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Convolutions of VGG16 up to the last layer compared: widths, "pool" between blocks.
_LAYERS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512)
_COMPARED = (1, 3, 5, 8, 11)  # the second convolution of each block
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PerceptualError(nn.Module):
    """r [B] of target and prediction [B, 1 or 3, H, W] in [0, 1], H and W at least 16:

        r = C H W ( mean |x - y| + sum over five layers of mean |features(x) - features(y)| )

    the layers with equal weights, as in LORD (Gabbay and Hoshen, 2020), whose last two are others (the third
    convolution of block four, the last pooling); the factor brings r to the scale of the errors that are
    summed over pixels. Gradients flow to both images, the network's weights are fixed.

    weights: torchvision's VGG16 state dict (`features.0.weight`, ...), .pth or .safetensors.
    Raises ValueError, naming the file, for a file that cannot be read or holds something else.
    """

    def __init__(self, weights: str | os.PathLike):
        super().__init__()
        state, channels, place = _read(Path(weights)), 3, 0
        self.convolutions = nn.ModuleList()
        for width in _LAYERS:
            if width != "pool":
                self.convolutions.append(_convolution(state, place, channels, width, weights))
                channels = width
            place += 1 if width == "pool" else 2
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, target: Tensor, prediction: Tensor) -> Tensor:
        if self.mean.device != target.device:
            self.to(target.device)  # once: a loss has no other way to learn where the model lives
        error = _distance(target, prediction)
        for x, y in zip(self.features(target), self.features(prediction), strict=True):
            error = error + _distance(x, y)
        return error * target[0].numel()

    def features(self, images: Tensor) -> list[Tensor]:
        """The five feature maps of images [B, 1 or 3, H, W] in [0, 1]."""
        x, found = (images.expand(-1, 3, -1, -1) - self.mean) / self.std, []
        convolutions = enumerate(self.convolutions)
        for layer in _LAYERS:
            if layer == "pool":
                x = F.max_pool2d(x, 2)
                continue
            number, convolution = next(convolutions)
            x = F.relu(convolution(x))
            if number in _COMPARED:
                found.append(x)
        return found


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().float().flatten(1).mean(1)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as VGG16 weights: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}: accepted is a state dict")
    return state


def _convolution(state: dict[str, Tensor], place: int, inputs: int, outputs: int, path) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
    for name, parameter in convolution.named_parameters():
        stored = state.get(f"features.{place}.{name}")
        if stored is None or stored.shape != parameter.shape:
            has = "nothing" if stored is None else list(stored.shape)
            raise ValueError(
                f"{path}: features.{place}.{name} is {has}, VGG16 has {list(parameter.shape)} there"
            )
        parameter.data.copy_(stored)
    return convolution
