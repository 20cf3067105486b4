"""Networks whose features image metrics compare: Inception from a local file, and a random stand-in."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"

KINDS = ("inception", "inception-train", "random")


class Features(NamedTuple):
    """A feature network and what has to be said about it beside every number it gives."""

    name: str
    network: nn.Module  # uint8 [B, 3, H, W] -> float [B, F]
    comparable: bool  # with the numbers of other models

    def __call__(self, images: Tensor) -> Tensor:
        """Features [B, F] float32 of uint8 images [B, 1 or 3, H, W]; grey is three equal channels."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"images must be uint8 [B, 1 or 3, H, W], got {images.dtype} {list(images.shape)}"
            )
        with torch.no_grad():
            return self.network(images.expand(-1, 3, -1, -1)).float()


def load_features(
    kind: str, weights: str | os.PathLike | None = None, device: torch.device | str = "cpu"
) -> Features:
    """The feature network `kind`, on `device`.

    "inception": Inception-v3 as published FIDs use it, that is as pytorch-fid does (2048 features,
        TensorFlow's weights, PyTorch's resizing), with torch-fidelity's layers; `weights` is the file or the
        folder it lies in.
    "inception-train": the same in train mode, each batch normalised by its own statistics, which is what the
        published FID of the residual model is in.
    "random": a small convolutional network with fixed random weights. It tells sets of images apart, needs no
        file and is comparable with nothing but itself.
    Raises ValueError for other kinds and for a damaged file, FileNotFoundError and ImportError saying what to
    get and from where.
    """
    if kind == "random":
        return Features("random network, not comparable", RandomNetwork().to(device).eval(), False)
    if kind not in KINDS:
        raise ValueError(f"features is {kind!r}, must be one of {', '.join(KINDS)}")
    path = _weights_file(weights)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(
            f"Inception features need torch-fidelity and torchvision ({error}): "
            "pip install 'sivae-fast[eval]'; random features need neither"
        ) from error
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
    )
    network = Inception(network).to(device).eval()
    if kind == "inception-train":
        return Features("inception-v3 2048, in train mode", network.train(), False)
    return Features("inception-v3 2048, as pytorch-fid", network, True)


class Inception(nn.Module):
    """torch-fidelity's Inception-v3 on images prepared as pytorch-fid does, uint8 [B, 3, H, W] -> [B, 2048].

    Layers and weights of the two are the same. torch-fidelity's own forward pass resizes as TensorFlow 1 did
    and scales by (x - 128) / 128, so its FIDs are others; Soft-IntroVAE was measured as pytorch-fid does.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        layers = dict(network.named_children())
        layers.pop("fc")  # of the classes; the features are what it would take
        self.layers = nn.Sequential(*layers.values())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(prepared(images)).flatten(1)


def prepared(images: Tensor) -> Tensor:
    """uint8 [B, C, H, W] as pytorch-fid gives it to Inception: float32 [B, C, 299, 299] in [-1, 1].

    Bilinear between the centres of pixels, without smoothing where it shrinks.
    """
    x = F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False)
    return 2 * x - 1


class RandomNetwork(nn.Module):
    """Fixed random convolutions, uint8 [B, 3, H, W] -> [B, 64]: means and deviations of 32 channels.

    Images of any size from 4 pixels on. The same numbers on every machine up to rounding.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for i, (inputs, outputs) in enumerate([(3, 16), (16, 32), (32, 32)]):
            weight = torch.randn(outputs, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
            self.register_buffer(f"weight_{i}", weight)

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(self.weight_0.dtype) / 127.5 - 1
        for weight in (self.weight_0, self.weight_1, self.weight_2):
            x = F.leaky_relu(F.conv2d(x, weight, padding=1, stride=2 if x.shape[-1] >= 8 else 1), 0.2)
        return torch.cat([x.mean(dim=(2, 3)), x.std(dim=(2, 3), correction=0)], dim=1)


def _weights_file(weights: str | os.PathLike | None) -> Path:
    where = "give the file, or the folder it is in, as weights (--weights, in training evaluate.weights)"
    if weights is None:
        raise FileNotFoundError(f"Inception weights are needed: download {URL} and {where}")
    path = Path(weights)
    path = path / WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: download {URL} and {where}")
    check_published(path, URL)
    return path


def check_published(path: Path, url: str) -> None:
    """Raises ValueError where a file is damaged or another one than that of `url`, whose name ends in the
    first 8 digits of its SHA-256, as those of PyTorch's do.

    Loading may execute what is pickled in the file, so it has to be the file that it says it is.
    """
    wanted = Path(url).stem.rpartition("-")[2]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(wanted):
        raise ValueError(
            f"{path} is not the published file (sha256 {digest[:8]}..., not {wanted}...): download {url}"
        )
