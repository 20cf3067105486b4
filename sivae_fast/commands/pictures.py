"""sample, reconstruct, interpolate, mix: picture files of a trained image model."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sivae_fast.commands.arguments import check_pause, named, only_own, positive
from sivae_fast.evaluation import reconstruction
from sivae_fast.figures import save_animation, save_grid, save_image
from sivae_fast.files import filling
from sivae_fast.inference import Inference
from sivae_fast.trained import check_kind

SPACES = ("z", "w")

#: Style layers as the StyleGAN papers name them: 4x4 and 8x8, 16x16 and 32x32, the rest.
LAYERS = {"coarse": (0, 4), "middle": (4, 8), "fine": (8, None)}


def sample(
    run: Inference,
    out: str | os.PathLike,
    *,
    count: int = 64,
    seed: int = 0,
    truncation: float = 1.0,
    noise: str = "sample",
    mixing: bool = False,
    columns: int | None = None,
) -> Path:
    """Samples of the prior: one grid where `out` ends in .png, `count` single files in the folder `out` where
    it has no ending. The folder gets all of them or, after an error, none; one that holds other files is
    refused.

    truncation below 1 pulls the coarse styles towards the average one; noise and mixing as of
    `Inference.decoded` (style models).
    """
    positive(count=count, columns=1 if columns is None else columns)
    out = named(out, ".png", folder=True)
    style = {"truncation": truncation, "noise": noise, "mixing": mixing}
    if out.suffix == ".png":
        save_grid(out, _rows(run.sample(count, seed, **style), columns))
        return out
    only_own(out, count, ".png")
    with filling(out) as folder:
        batches = run.decoded(run.prior(count, seed), seed, **style)
        for number, image in enumerate(itertools.chain.from_iterable(batches)):
            save_image(folder / f"{number:06d}.png", image)
    return out


def reconstruct(
    run: Inference,
    out: str | os.PathLike,
    pictures: Sequence[str | os.PathLike] = (),
    *,
    count: int = 16,
    columns: int = 8,
    resize: bool = False,
    seed: int = 0,
    noise: str = "sample",
) -> dict[str, float]:
    """A grid of images above their reconstructions, from the posterior mean; by default of `own_images`.

    noise: as of `Inference.decoded` (style models). Returns the mean MSE, PSNR and (from 11 pixels on) SSIM
    of pixels in [0, 1].
    """
    positive(count=count, columns=columns)
    out = named(out, ".png")
    images = run.read(pictures, count, resize) if pictures else run.own_images(count, seed)
    rec = run.reconstruct(images, seed, noise=noise)
    images = run.to_pixels(run.to_input(images))  # what the model saw: growing models, at their level
    pairs = [rows for pair in zip(images.split(columns), rec.split(columns), strict=True) for rows in pair]
    save_grid(out, pairs)
    x, y = images.float() / 255, rec.float() / 255
    smallest = reconstruction.SMALLEST
    fits = {name: f for name, f in reconstruction.METRICS.items() if x.shape[-1] >= smallest.get(name, 1)}
    return {name: metric(x, y).mean().item() for name, metric in fits.items()}


def interpolate(
    run: Inference,
    out: str | os.PathLike,
    pictures: Sequence[str | os.PathLike] = (),
    *,
    steps: int = 7,
    space: str = "z",
    seed: int = 0,
    resize: bool = False,
    milliseconds: int = 60,
) -> Path:
    """Images between pictures, by their posterior means: a .png grid, an animated .gif or a film, .mp4.

    .png: two pictures give a row of `steps` images from one to the other, four the grid between them.
    .gif, .mp4: two or more pictures, or those of a folder, are visited in turn and back to the first, `steps`
    images apart.
    Without pictures, samples take their place (four in a grid, five in an animation).
    space: "z" draws straight lines between latents; "w" between styles (style models), as published.
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}, must be at least 2")
    if space not in SPACES:
        raise ValueError(f"space is {space!r}, must be one of {', '.join(SPACES)}")
    run.style_options("space", space, "z")
    out = named(out, ".png", ".gif", ".mp4")
    check_pause(milliseconds, out)
    moving = out.suffix != ".png"
    ends = _ends(run, pictures, moving, seed, resize)
    if space == "w":
        ends = run.styles(ends)
    decode = functools.partial(run.decode, encoded=bool(pictures))
    show = run.from_styles if space == "w" else decode
    if moving:
        save_animation(out, show(_round_trip(ends, steps), seed), milliseconds=milliseconds)
    else:
        save_grid(out, show(between(ends, steps), seed).split(steps))
    return out


def mix(
    run: Inference,
    out: str | os.PathLike,
    *,
    layers: str | Sequence[str] = "coarse",
    sources: Sequence[str | os.PathLike] = (),
    destinations: Sequence[str | os.PathLike] = (),
    count: int = 6,
    seed: int = 0,
    resize: bool = False,
) -> Path:
    """A style mixing grid: a row is one destination with the `layers` of each column's source.

    The first row shows the sources, the first column the destinations. Style models only.
    layers: "coarse", "middle", "fine", or a range such as "2-5" of the layers that the model has, from 0 on:
    one for all rows, or one for each destination, as in the published figure.
    Pictures enter by their posterior mean; samples take their place where none are given.
    """
    check_kind(run.config, ("style",))
    positive(count=count)
    out = named(out, ".png")
    named_layers = [layers] if isinstance(layers, str) else layers
    spans = [_layers(text, 2 * (run.model.lod + 1)) for text in named_layers]

    def styles_of(pictures, part):
        z = run.encode(run.read(pictures, count, resize)) if pictures else run.prior(2 * count, seed)
        return run.styles(z if pictures else z.chunk(2)[part])

    source, destination = styles_of(sources, 0), styles_of(destinations, 1)
    if len(spans) not in (1, len(destination)):
        raise ValueError(
            f"layers are {', '.join(named_layers)}: one is needed for all, or one for each of the "
            f"{len(destination)} destinations"
        )
    spans = spans * len(destination) if len(spans) == 1 else spans
    mixed = destination[:, None].repeat(1, len(source), 1, 1)
    for row, (start, stop) in zip(mixed, spans, strict=True):
        row[:, start:stop] = source[:, start:stop]
    blank = torch.full((1, *run.from_styles(source[:1], seed).shape[1:]), 255, dtype=torch.uint8)
    rows = [torch.cat([blank, run.from_styles(source, seed)])]
    for own, row in zip(run.from_styles(destination, seed), mixed, strict=True):
        rows.append(torch.cat([own[None], run.from_styles(row, seed)]))
    save_grid(out, rows)
    return out


def _ends(run: Inference, pictures, moving: bool, seed: int, resize: bool) -> Tensor:
    if not pictures:
        return run.prior(5 if moving else 4, seed)
    images = run.read(pictures, None if moving else 4, resize)
    if moving and len(images) < 2:
        raise ValueError("an animation goes from one picture to another: give 2 or more, got 1")
    if not moving and len(images) not in (2, 4):
        raise ValueError(f"a grid lies between 2 or 4 pictures, got {len(images)}")
    return run.encode(images)


def between(ends: Tensor, steps: int) -> Tensor:
    """[steps, ...] on the line between two ends, [steps * steps, ...] between four corners, row by row."""
    share = torch.linspace(0, 1, steps).view(-1, *[1] * (ends.ndim - 1))
    if len(ends) == 2:
        return torch.lerp(ends[:1], ends[1:], share)
    left, right = torch.lerp(ends[:1], ends[2:3], share), torch.lerp(ends[1:2], ends[3:], share)
    return torch.lerp(left[:, None], right[:, None], share[None]).flatten(0, 1)


def _round_trip(ends: Tensor, steps: int) -> Tensor:
    share = (torch.arange(steps) / steps).view(-1, *[1] * (ends.ndim - 1))
    following = ends.roll(-1, 0)
    return torch.cat([torch.lerp(a[None], b[None], share) for a, b in zip(ends, following, strict=True)])


def _layers(text: str, available: int) -> tuple[int, int]:
    start, stop = LAYERS.get(text, (None, None))
    if text not in LAYERS:
        first, dash, last = text.partition("-")
        if not (dash and first.isdigit() and last.isdigit()):
            raise ValueError(f"layers is {text!r}, must be one of {', '.join(LAYERS)} or a range such as 2-5")
        start, stop = int(first), int(last) + 1
    elif stop is None or stop > available:
        stop = available
    if not start < stop <= available:
        raise ValueError(f"layers is {text!r}: this model has layers 0 to {available - 1}")
    return start, stop


def _rows(images: Tensor, columns: int | None) -> Sequence[Tensor]:
    return images.split(columns or math.ceil(math.sqrt(len(images))))
