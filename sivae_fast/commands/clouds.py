"""sample, reconstruct, interpolate: pictures and files of a trained point cloud model."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sivae_fast.commands.arguments import check_pause, named, only_own, positive
from sivae_fast.commands.pictures import SPACES, between
from sivae_fast.data.ply import write_ply
from sivae_fast.evaluation.mitsuba import write_scene
from sivae_fast.evaluation.pointcloud_figures import animate, draw_clouds
from sivae_fast.files import filling, write_bytes
from sivae_fast.inference_clouds import CloudInference
from sivae_fast.kernels.chamfer import chamfer
from sivae_fast.progress import progress_bar

#: What holds one cloud, and what holds many; a name without an ending is a folder of .ply files.
SINGLE, MANY = (".ply", ".xml"), (".png", ".npy")


def sample(
    run: CloudInference,
    out: str | os.PathLike,
    *,
    count: int | None = None,
    seed: int = 0,
    truncation: float = 1.0,
    noise: str = "sample",
    mixing: bool = False,
    columns: int | None = None,
) -> Path:
    """Samples of the prior, as the name `out` says: .png is a grid of pictures, .npy an array
    [count, points, 3], .ply one cloud, .xml one cloud as a scene of Mitsuba 3, a folder holds `count` .ply
    files; one that holds other files is refused.

    count: None is 1 for what holds one cloud, else 64. truncation, noise and mixing are for style models.
    """
    out = named(out, *MANY, *SINGLE, folder=True)
    _without_styles(run, truncation=truncation, noise=noise, mixing=mixing)
    count = (1 if out.suffix in SINGLE else 64) if count is None else count
    positive(count=count, columns=1 if columns is None else columns)
    _check_folder(out, count)
    clouds = run.sample(count, seed)
    if out.suffix == ".png":
        _draw(run, out, clouds.split(columns or math.ceil(math.sqrt(count))))
    else:
        _write(out, clouds)
    return out


def reconstruct(
    run: CloudInference,
    out: str | os.PathLike,
    files: Sequence[str | os.PathLike] = (),
    *,
    count: int | None = None,
    columns: int = 8,
    resize: bool = False,
    seed: int = 0,
    noise: str = "sample",
) -> dict[str, float]:
    """Reconstructions, from the posterior mean, of clouds in files, at most the first `count` of all where it
    is given; without files, of `count` test clouds drawn from `seed`.

    noise is for style models. A .png shows the clouds above their reconstructions; other names as of
    `sample`, without the clouds.
    Returns the mean over the clouds of the Chamfer distance, summed over the points as in training.
    """
    out = named(out, *MANY, *SINGLE, folder=True)
    _without_styles(run, noise=noise)
    positive(count=1 if count is None else count, columns=columns)
    if files:
        clouds = run.read(files, resize)[:count]
    else:
        clouds = run.own_clouds(count or (1 if out.suffix in SINGLE else 16), seed)
    _check_folder(out, len(clouds))
    rec = run.reconstruct(clouds)
    if out.suffix == ".png":
        pairs = zip(clouds.split(columns), rec.split(columns), strict=True)
        _draw(run, out, [row for pair in pairs for row in pair])
    else:
        _write(out, rec)
    return {"chamfer": chamfer(clouds, rec).mean().item()}


def interpolate(
    run: CloudInference,
    out: str | os.PathLike,
    files: Sequence[str | os.PathLike] = (),
    *,
    steps: int = 7,
    space: str = "z",
    seed: int = 0,
    resize: bool = False,
    milliseconds: int = 60,
) -> Path:
    """Clouds between clouds, on straight lines between their posterior means.

    .png: two clouds give a row of `steps` clouds from one to the other, four the grid between them.
    .gif, .mp4: through two or more clouds and back, `steps` from one to the next, both of them counted, while
    the camera goes round. .npy: the same without the way back, an array [frames, points, 3].
    Without files, samples take their place (four in a grid, five otherwise).
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}, must be at least 2")
    if space not in SPACES:
        raise ValueError(f"space is {space!r}, must be one of {', '.join(SPACES)}")
    run.style_options("space", space, "z")
    out = named(out, ".png", ".gif", ".mp4", ".npy")
    check_pause(milliseconds, out)
    grid = out.suffix == ".png"
    ends = run.encode(run.read(files, resize)) if files else run.prior(4 if grid else 5, seed)
    if grid and len(ends) not in (2, 4):
        raise ValueError(f"a grid lies between 2 or 4 clouds, got {len(ends)}")
    if len(ends) < 2:
        raise ValueError(f"{out} goes from one cloud to another: give 2 or more, got 1")
    clouds = run.decode(between(ends, steps) if grid else along(ends, steps))
    if grid:
        _draw(run, out, clouds.split(steps))
    elif out.suffix == ".npy":
        _write(out, clouds)
    else:
        with _drawing(run, len(clouds)) as bar:
            animate(out, clouds, milliseconds=milliseconds, drawn=bar.update)
    return out


def along(ends: Tensor, steps: int) -> Tensor:
    """[(n - 1)(steps - 1) + 1, ...] on the lines from each of n ends to the next, `steps` from end to end."""
    last = len(ends) - 1
    place = torch.linspace(0, last, last * (steps - 1) + 1)
    before = place.long().clamp(max=last - 1)
    share = (place - before).view(-1, *[1] * (ends.ndim - 1))
    return torch.lerp(ends[before], ends[before + 1], share)


def _without_styles(run: CloudInference, **options) -> None:
    for name, value in options.items():
        run.style_options(name, value, {"truncation": 1.0, "noise": "sample", "mixing": False}[name])


def _draw(run: CloudInference, out: Path, rows: Sequence[Tensor]) -> None:
    with _drawing(run, sum(map(len, rows))) as bar:
        draw_clouds(out, rows, drawn=bar.update)


def _drawing(run: CloudInference, count: int):
    """A progress bar, where there are so many: drawing takes longer than the model does."""
    return progress_bar(count, "draw", run.show and count > run.batch)


def _check_folder(out: Path, count: int) -> None:
    if not out.suffix:
        only_own(out, count, ".ply")


def _write(out: Path, clouds: Tensor) -> None:
    if out.suffix in SINGLE and len(clouds) != 1:
        raise ValueError(f"{out} holds one cloud, got {len(clouds)}: give a folder or a .npy name for more")
    points = clouds.numpy()
    if out.suffix == ".npy":
        file = io.BytesIO()
        np.save(file, points)
        write_bytes(out, file.getvalue())
    elif out.suffix == ".ply":
        write_ply(out, points[0])
    elif out.suffix == ".xml":
        write_scene(out, clouds[0])
    else:
        with filling(out) as folder:
            for number, cloud in enumerate(points):
                write_ply(folder / f"{number:06d}.ply", cloud)
