"""Random changes of training images beyond mirroring, on the device, each image with its own numbers.

The recipe of the Digital Monsters pictures of Soft-IntroVAE (Daniel and Tamar, CVPR 2021) is mirroring,
`shift` 5/128 with white borders and `hue` 0.5.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shift_pixels(batch: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Pixels moved by whole numbers (integer tensors [B]); what comes in at the border is 255.

    `batch` is [B, H, W, C], the result has its type.
    """
    height, width = batch.shape[1:3]
    rows = torch.arange(height, device=batch.device) - down[:, None]
    columns = torch.arange(width, device=batch.device) - right[:, None]
    each = torch.arange(len(batch), device=batch.device)[:, None, None]
    moved = batch[each, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    return torch.where(inside[..., None], moved, 255)


def shift_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Colours [B, 3, H, W] in [0, 1] with their hue turned by `turn` [B] of a full circle.

    Saturation and value of the HSV colour model stay (A. R. Smith, "Color gamut transform pairs", 1978).
    """
    value, brightest = x.max(1)
    chroma = value - x.min(1).values
    red, green, blue = x.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1)
    sector = torch.stack(((green - blue) / safe, (blue - red) / safe + 2, (red - green) / safe + 4), 1)
    hue = sector.gather(1, brightest[:, None])[:, 0] + 6 * turn[:, None, None]
    channels = []
    for offset in (5, 3, 1):
        k = (offset + hue) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)
