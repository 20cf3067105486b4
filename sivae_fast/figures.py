"""Image tensors to PNG, GIF and MP4 files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from sivae_fast.files import atomic

GAP = 2


def to_uint8(
    images: Tensor, value_range: tuple[float, float] = (-1.0, 1.0), *, round_down: bool = False
) -> Tensor:
    """[..., H, W] floats in `value_range` to uint8 on the CPU, rounded and clipped; uint8 passes as it is.

    Not-a-number becomes the lowest value. round_down: rounded down, not to the nearest.
    """
    images = images.detach()
    if images.dtype == torch.uint8:
        return images.cpu()
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    low, high = value_range
    if not high > low:
        raise ValueError(f"value_range must rise, got {value_range}")
    scaled = (images.float() - low) * (255 / (high - low))
    scaled = scaled.floor_() if round_down else scaled.round_()
    return torch.nan_to_num(scaled, nan=0.0).clamp_(0, 255).to(torch.uint8).cpu()


def grid(
    rows: Sequence[Tensor], value_range: tuple[float, float] = (-1.0, 1.0), smallest: int = 64, gap: int = GAP
) -> Tensor:
    """One picture [3, H, W] uint8 of rows of images [N, C, h, w] (C is 1 or 3), on white.

    All cells take the size of the largest image; where that is under `smallest` pixels they are enlarged by a
    whole factor, nearest neighbour, so that a 4x4 level can be looked at.
    """
    if not rows:
        raise ValueError("a grid needs at least one row of images")
    cells = [_colour(to_uint8(row, value_range)) for row in rows]
    height = max(row.shape[2] for row in cells)
    width = max(row.shape[3] for row in cells)
    factor = max(1, -(-smallest // max(height, width)))
    height, width = height * factor, width * factor
    columns = max(len(row) for row in cells)
    picture = torch.full(
        (3, len(cells) * (height + gap) + gap, columns * (width + gap) + gap), 255, dtype=torch.uint8
    )
    for r, row in enumerate(cells):
        top = gap + r * (height + gap)
        for c, image in enumerate(F.interpolate(row, (height, width), mode="nearest")):
            left = gap + c * (width + gap)
            picture[:, top : top + height, left : left + width] = image
    return picture


def _colour(row: Tensor) -> Tensor:
    if row.ndim != 4 or row.shape[1] not in (1, 3) or not len(row):
        raise ValueError(f"a row of images is [N, 1 or 3, H, W] with N >= 1, got {list(row.shape)}")
    return row.expand(-1, 3, -1, -1)


def save_grid(
    path: str | os.PathLike,
    rows: Sequence[Tensor],
    value_range: tuple[float, float] = (-1.0, 1.0),
    smallest: int = 64,
) -> None:
    """Write `grid(rows)` as PNG, atomically. Training: rows are real, reconstruction, sample."""
    save_image(path, grid(rows, value_range, smallest))


def save_image(
    path: str | os.PathLike, image: Tensor, value_range: tuple[float, float] = (-1.0, 1.0)
) -> None:
    """Write one image [1 or 3, H, W] as PNG, atomically."""
    with atomic(path) as file:
        _picture(to_uint8(image, value_range)).save(file, format="PNG")


def save_animation(
    path: str | os.PathLike,
    frames: Sequence[Tensor],
    value_range: tuple[float, float] = (-1.0, 1.0),
    milliseconds: int = 60,
) -> None:
    """Write images [1 or 3, H, W] of one size as an endless GIF or, under a name ending in .mp4, as H.264.

    Atomically. A film's images are enlarged as in a grid, to even sides. ImportError says what films need.
    """
    if not len(frames):
        raise ValueError("an animation needs at least one frame")
    pictures = [to_uint8(frame, value_range) for frame in frames]
    if str(path).endswith(".mp4"):
        _save_film(path, pictures, milliseconds)
        return
    first, *rest = map(_picture, pictures)
    with atomic(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)


def _save_film(path: str | os.PathLike, frames: Sequence[Tensor], milliseconds: int) -> None:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"{path}: films need PyAV ({error}): pip install 'sivae-fast[video]'; a .gif does not"
        ) from error
    pictures = [grid([frame[None]], gap=0) for frame in frames]
    height, width = (side - side % 2 for side in pictures[0].shape[1:])
    with atomic(path) as file, av.open(file, "w", format="mp4") as film:
        stream = film.add_stream("libx264", rate=Fraction(1000, milliseconds))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures:
            pixels = picture[:, :height, :width].permute(1, 2, 0).contiguous().numpy()
            film.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        film.mux(stream.encode())


def _picture(image: Tensor):
    from PIL import Image

    return Image.fromarray(_colour(image[None])[0].permute(1, 2, 0).contiguous().numpy())
