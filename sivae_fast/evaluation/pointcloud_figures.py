"""Pictures of point clouds: every point a small shaded ball, standing on its own soft shadow."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sivae_fast.figures import save_animation, save_grid

_LIGHT = F.normalize(torch.tensor([-0.45, 0.75, 0.6]), dim=0)  # to the right, up, towards the viewer
_SMOOTH = 2  # pixels of the drawing for one of the picture, along each axis


def render(
    cloud: Tensor, size: int = 192, radius: float | None = None, azimuth: float = 240, elevation: float = 18
) -> Tensor:
    """A cloud [points, 3] of radius 0.5 as a picture: uint8 [3, size, size] on white.

    The z axis points up. `radius` of a ball is in units of the cloud; angles in degrees, as matplotlib
    counts them. Colours tell the position, as in the figures of the paper.
    """
    cloud = cloud.detach().float().cpu()
    radius = radius or 0.016 * (2048 / len(cloud)) ** 0.25
    side = size * _SMOOTH
    pixels = side / 1.1  # of a unit of length
    right, up, near = camera(azimuth, elevation)
    picture = _shadow(cloud, right, up, side, pixels)
    offset, normal = _ball(max(2, round(radius * pixels)))
    column, row = _pixel(cloud, right, up, side, pixels)
    column, row = column[:, None] + offset[:, 0], row[:, None] - offset[:, 1]
    depth = (cloud @ near)[:, None] + normal[:, 2] * radius
    light = 0.45 + 0.6 * (normal @ _LIGHT).clamp(min=0)
    shade = (colours(cloud)[:, None] * light[None, :, None]).clamp(max=1).flatten(0, 1)
    seen = ((row >= 0) & (row < side) & (column >= 0) & (column < side)).flatten()
    drawn, nearest = _nearest((row * side + column).flatten(), depth.flatten(), seen, side**2)
    picture[drawn] = shade[nearest]
    picture = F.avg_pool2d(picture.T.view(1, 3, side, side), _SMOOTH)[0]
    return (255 * picture).round().to(torch.uint8)


def draw_clouds(
    path: str | os.PathLike,
    rows: Sequence[Tensor],
    size: int = 192,
    drawn: Callable[[], object] = lambda: None,
) -> None:
    """Writes rows of clouds [n, points, 3] each as PNG. Training: rows are real, reconstruction, sample.

    drawn: called after each cloud, for a progress bar.
    """
    pictures = [_render(cloud, size, 240, drawn) for row in rows for cloud in row]
    save_grid(path, torch.stack(pictures).split([len(row) for row in rows]))


def animate(
    path: str | os.PathLike,
    clouds: Tensor,
    size: int = 256,
    turns: float = 0.25,
    milliseconds: int = 60,
    drawn: Callable[[], object] = lambda: None,
) -> None:
    """Writes clouds [frames, points, 3] as a GIF, or an .mp4 film, there and back, while the camera goes
    `turns` around. `milliseconds` of one frame; drawn: as of `draw_clouds`.
    """
    angles = [240 + 360 * turns * i / len(clouds) for i in range(len(clouds))]
    frames = [_render(cloud, size, angle, drawn) for cloud, angle in zip(clouds, angles, strict=True)]
    save_animation(path, frames + frames[::-1], milliseconds=milliseconds)


def _render(cloud: Tensor, size: int, azimuth: float, drawn: Callable[[], object]) -> Tensor:
    picture = render(cloud, size, azimuth=azimuth)
    drawn()
    return picture


def camera(azimuth: float, elevation: float) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors [3] to the right, upwards and towards the viewer; angles in degrees."""
    a, e = math.radians(azimuth), math.radians(elevation)
    near = torch.tensor([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
    right = torch.tensor([-math.sin(a), math.cos(a), 0.0])
    return right, torch.linalg.cross(near, right), near


def _pixel(cloud: Tensor, right: Tensor, up: Tensor, side: int, pixels: float) -> tuple[Tensor, Tensor]:
    """Columns [n] and rows [n] of points."""
    return ((cloud @ right) * pixels + side / 2).round().long(), (
        side / 2 - (cloud @ up) * pixels
    ).round().long()


def _ball(radius: int) -> tuple[Tensor, Tensor]:
    """Pixel offsets [k, 2] (right, up) of a disc and the unit normals [k, 3] of the ball over it."""
    axis = torch.arange(-radius, radius + 1)
    offset = torch.cartesian_prod(axis, axis)
    flat = offset / (radius + 0.5)
    inside = flat.square().sum(1) < 1
    flat = flat[inside]
    return offset[inside], torch.cat([flat, (1 - flat.square().sum(1, keepdim=True)).sqrt()], 1)


def colours(cloud: Tensor) -> Tensor:
    """Soft colours [n, 3] by position."""
    low, high = cloud.amin(0), cloud.amax(0)
    place = (cloud - low) / (high - low).clamp(min=1e-6)
    return 0.3 + 0.62 * place


def _shadow(cloud: Tensor, right: Tensor, up: Tensor, side: int, pixels: float) -> Tensor:
    """White [side^2, 3] with the blurred shadow that the cloud throws straight down."""
    fallen = cloud.clone()
    fallen[:, 2] = cloud[:, 2].amin()
    column, row = (place.clamp(0, side - 1) for place in _pixel(fallen, right, up, side, pixels))
    dark = torch.zeros(side * side).index_add_(0, row * side + column, torch.ones(len(cloud)))
    dark = dark.view(1, 1, side, side)
    width = 2 * (side // 40) + 1
    for _ in range(3):
        dark = F.avg_pool2d(dark, width, 1, width // 2)
    dark = 0.35 * (1 - (-0.5 * dark * side**2 / len(cloud)).exp())
    return (1 - dark).reshape(-1, 1).repeat(1, 3)


def _nearest(pixel: Tensor, depth: Tensor, seen: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """Pixels where something is seen and the entry nearest to the camera at each: int64 [k] both."""
    entry = seen.nonzero().flatten()
    key = (
        (depth[entry].double().clamp(-4, 4) + 4) * 2**24
    ).long() << 32 | entry  # one number orders by depth, then entry
    best = torch.full((pixels,), -1).scatter_reduce_(0, pixel[entry], key, "amax")
    drawn = (best >= 0).nonzero().flatten()
    return drawn, best[drawn] & (2**32 - 1)
