"""How close reconstructions are to their images: MSE, PSNR, SSIM and, where it is installed, LPIPS."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sivae_fast.evaluation.features import check_published


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of images [B, C, H, W] in [0, 1], [B]."""
    return (x - y).square().flatten(1).mean(1)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images [B, C, H, W] in [0, 1], [B]; infinite for equal ones."""
    return -10 * mse(x, y).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of images [B, C, H, W] in [0, 1], [B]; 1 for equal ones.

    Wang et al. (2004): Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, mean over the places
    where the window fits.
    Raises ValueError for images smaller than the window.
    """
    window, sigma = SMALLEST["ssim"], 1.5
    if min(x.shape[-2:]) < window:
        raise ValueError(f"SSIM needs images of at least {window} pixels a side, got {list(x.shape[-2:])}")
    channels = x.shape[1]
    line = torch.arange(window, dtype=x.dtype, device=x.device) - (window - 1) / 2
    line = torch.exp(-0.5 * (line / sigma) ** 2)
    line = line / line.sum()

    def smooth(image: Tensor) -> Tensor:
        image = F.conv2d(image, line.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(image, line.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)

    mean_x, mean_y = smooth(x), smooth(y)
    var_x = smooth(x * x) - mean_x**2
    var_y = smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(1)


ALEXNET = "alexnet-owt-7be5be79.pth"

#: Pixels a side that images need: the window of SSIM; what AlexNet's layers leave anything of.
SMALLEST = {"ssim": 11, "lpips": 31}

#: (images, others) [B, C, H, W] in [0, 1] -> [B].
ImageError = Callable[[Tensor, Tensor], Tensor]

METRICS: dict[str, ImageError] = {"mse": mse, "psnr": psnr, "ssim": ssim}


def error_functions(
    names: Iterable[str], weights: str | os.PathLike | None = None, device="cpu"
) -> dict[str, ImageError]:
    """Functions by their names, those of `METRICS` and "lpips"; weights and errors: as of `load_lpips`."""
    return {name: load_lpips(weights, device) if name == "lpips" else METRICS[name] for name in names}


def load_lpips(weights: str | os.PathLike | None = None, device="cpu") -> ImageError:
    """LPIPS (AlexNet, by torchmetrics) as a function of two batches [B, 3, H, W] in [0, 1] -> [B].

    weights: the folder that holds `checkpoints/alexnet-owt-7be5be79.pth`, torch's hub folder unless given.
    Raises ImportError, FileNotFoundError and, for a damaged file, ValueError saying what to get and from
    where; the function raises ValueError for images below `SMALLEST`.
    """
    folder = str(weights or torch.hub.get_dir())
    path = Path(folder) / "checkpoints" / ALEXNET
    url = f"https://download.pytorch.org/models/{ALEXNET}"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: LPIPS needs AlexNet, download {url} to there")
    check_published(path, url)
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    except ImportError as error:
        raise ImportError(
            f"LPIPS needs torchmetrics and torchvision ({error}): pip install 'sivae-fast[eval]'"
        ) from error
    before = torch.hub.get_dir()
    torch.hub.set_dir(folder)
    try:
        network = LearnedPerceptualImagePatchSimilarity("alex").net.to(device).eval()
    finally:
        torch.hub.set_dir(before)

    @torch.no_grad()
    def distance(x: Tensor, y: Tensor) -> Tensor:
        if min(x.shape[-2:]) < SMALLEST["lpips"]:
            raise ValueError(
                f"LPIPS needs images of at least {SMALLEST['lpips']} pixels a side, got {list(x.shape[-2:])}"
            )
        return network(2 * x - 1, 2 * y - 1).flatten()

    return distance
