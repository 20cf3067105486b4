"""Between stored pixels (uint8 NHWC) and what a model sees (float NCHW, channels last), on the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sivae_fast.data import augment
from sivae_fast.draws import Draws


def to_input(
    batch: Tensor,
    draws: Draws | None,
    *,
    resolution: int | None = None,
    blend: float | Tensor = 1.0,
    flip: bool = True,
    signed: bool = True,
    shift: float = 0.0,
    hue: float = 0.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """A batch as the model sees it: float32 [B, C, r, r] in channels-last memory.

    `batch` is uint8 [B, R, R, C]. Each image is mirrored with probability 1/2 where `flip` (draws named
    "data"), brought to `resolution` r = R / 2^k by exact 2x2 means, and mapped to [-1, 1] (x / 127.5 - 1)
    where `signed`, else to [0, 1]. While a level is faded in, the result is blend * x + (1 - blend) *
    nearest2(mean2(x)); `blend` may be a tensor, 0-dim, on the device. Before all that, each image moves by
    up to `shift` of its side both ways (whole pixels, white borders) and turns its hue by up to `hue` of the
    circle, each with its own uniform numbers (draws named "data/augment"). `draws` None leaves out what is
    random. The device is that of `draws` unless given.
    """
    if device is None:
        device = batch.device if draws is None else draws.device
    batch = batch.to(device, non_blocking=True)
    augmented = draws is not None and (shift > 0 or hue > 0)
    if augmented:
        numbers = 2 * draws.stream("data/augment").uniform(len(batch), 3) - 1
        down, right = (numbers[:, :2] * shift * batch.shape[1]).round().long().unbind(1)
        batch = augment.shift_pixels(batch, down, right)
    x = batch.permute(0, 3, 1, 2).float()
    if augmented and hue > 0:
        x = augment.shift_hue(x / 255, hue * numbers[:, 2]) * 255
    size = x.shape[-1]
    if resolution is not None and resolution != size:
        factor, rest = divmod(size, resolution)
        if rest or factor & (factor - 1):
            raise ValueError(f"resolution {resolution} is no halving of the images' {size}")
        # Sums of up to 256x256 bytes and divisions by powers of four are exact in float32.
        x = F.avg_pool2d(x, factor)
    if flip and draws is not None:
        mirrored = draws.stream("data").uniform(x.shape[0]) < 0.5
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    x = x / 127.5 - 1 if signed else x / 255
    if isinstance(blend, Tensor) or blend < 1:
        coarse = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="nearest")
        x = torch.lerp(coarse, x, blend)
    return x.contiguous(memory_format=torch.channels_last)
