"""The image set of the quickstart: painted mountain lakes, made in seconds, the same on every machine."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from sivae_fast.data.parallel import cores, locked, ordered, progress_bar
from sivae_fast.data.prepare import prepare

COUNT = 2000
WIDTH, HEIGHT = 128, 96
#: Pixels are computed this many times finer and averaged.
FINE = 2

# One row a time of day, dawn to night: sky above, sky at the horizon, light, far mountains, near hills.
_PALETTE = np.array(
    [
        [[0.45, 0.55, 0.85], [1.00, 0.76, 0.66], [1.00, 0.86, 0.72], [0.55, 0.50, 0.70], [0.25, 0.33, 0.38]],
        [[0.22, 0.52, 0.90], [0.78, 0.92, 0.98], [1.00, 0.98, 0.86], [0.45, 0.55, 0.70], [0.24, 0.48, 0.26]],
        [[0.36, 0.62, 0.84], [1.00, 0.88, 0.62], [1.00, 0.90, 0.58], [0.58, 0.52, 0.60], [0.45, 0.45, 0.18]],
        [[0.38, 0.26, 0.58], [1.00, 0.58, 0.34], [1.00, 0.74, 0.36], [0.48, 0.26, 0.46], [0.26, 0.16, 0.24]],
        [[0.16, 0.12, 0.40], [0.86, 0.40, 0.56], [1.00, 0.66, 0.60], [0.32, 0.20, 0.46], [0.14, 0.11, 0.24]],
        [[0.04, 0.07, 0.22], [0.24, 0.40, 0.58], [0.94, 0.96, 1.00], [0.14, 0.22, 0.38], [0.05, 0.10, 0.17]],
    ]
)


def ensure_quickstart(
    folder: str | os.PathLike, resolution: int = 32, *, count: int = COUNT, progress: bool = True
) -> Path:
    """The path of the prepared quickstart set below `folder`, made at the first call by one process.

    The pictures are JPEG files in `folder`/pictures, prepared like anybody's at `resolution`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prepared = folder / f"quickstart-{resolution}.zip"
    with locked(folder):
        if not prepared.exists():
            pictures = folder / "pictures"
            if not pictures.exists():
                _paint_all(pictures, count, progress)
            prepare(pictures, prepared, resolution=resolution, progress=progress)
    return prepared


def _paint_all(dest: Path, count: int, progress: bool) -> None:
    unfinished = dest.with_name(dest.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    with progress_bar(count, "paint", progress) as bar:
        for index, data in ordered(_jpeg, ((k, k) for k in range(count)), count, cores()):
            file = unfinished / f"{index // 500:02d}" / f"lake-{index:04d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            bar.update()
    unfinished.rename(dest)


def _jpeg(index: int) -> bytes:
    buffer = io.BytesIO()
    paint(index).save(buffer, "jpeg", quality=92, subsampling=0)
    return buffer.getvalue()


def paint(index: int) -> Image.Image:
    """Picture `index` of the series: RGB, WIDTH x HEIGHT, a function of the index alone."""
    rng = np.random.Generator(np.random.Philox(key=index))
    y, x = np.mgrid[0 : HEIGHT * FINE, 0 : WIDTH * FINE] / (HEIGHT * FINE)
    above, horizon, light, far, near = _colours(rng.random() * 6)
    shore = rng.uniform(0.62, 0.72)
    sun = np.array([rng.uniform(0.35, 1.0), rng.uniform(0.15, 0.45)])
    canvas = above + (horizon - above) * _smooth(y / shore)[..., None]
    distance = np.hypot(x - sun[0], y - sun[1])
    canvas += (light - canvas) * (0.55 * np.exp(-distance * 6))[..., None]
    canvas += (light - canvas) * _smooth((0.065 - distance) / 0.01 + 0.5)[..., None]
    for depth, base in enumerate((0.50, 0.58)):
        ridge = base - _mountains(x[0], rng, 0.26 - 0.1 * depth)
        colour = far + (near - far) * depth * 0.6
        lit = colour + (light - colour) * 0.35 * np.clip(1 - 3 * np.abs(y - ridge), 0, 1)[..., None]
        canvas = np.where((y > ridge)[..., None], lit, canvas)
    return _finish(canvas, y, shore, near)


def _finish(canvas, y, shore, near):
    rows = np.arange(len(canvas))
    line = int(shore * len(canvas))
    mirrored = canvas[np.clip(2 * line - rows, 0, line)]
    water = (y > shore)[..., None]
    canvas = np.where(water, mirrored * 0.82 + near * 0.12, canvas)
    pixels = canvas.reshape(HEIGHT, FINE, WIDTH, FINE, 3).mean((1, 3))
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def _colours(hour):
    k = int(hour) % 6
    return _PALETTE[k] + (_PALETTE[(k + 1) % 6] - _PALETTE[k]) * (hour - int(hour))


def _smooth(t):
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _mountains(x, rng, height):
    tents = [
        rng.uniform(0.3, 1) * height - rng.uniform(0.5, 1.1) * np.abs(x - c)
        for c in rng.uniform(-0.1, 1.43, 6)
    ]
    return np.maximum(np.max(tents, 0), 0)
