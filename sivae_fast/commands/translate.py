"""translate: a grid of images with the class of one and the content of another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sivae_fast.commands.arguments import named, positive
from sivae_fast.evaluation.translation import draw_translations
from sivae_fast.inference import Inference
from sivae_fast.trained import check_kind


def translate(
    run: Inference,
    out: str | os.PathLike,
    *,
    classes: Sequence[str | os.PathLike] = (),
    contents: Sequence[str | os.PathLike] = (),
    count: int = 5,
    seed: int = 0,
    resize: bool = False,
) -> Path:
    """The grid of the paper: in each cell the class of the image at its left with the content of that above.

    classes, contents: picture files, or folders of which the first `count` are taken; where none are given,
    `count` test images of the run's data, drawn from `seed`. resize: accept pictures of another size.
    Raises ValueError for models other than two_encoder, otherwise as `Inference.read` and `own_images`.
    """
    check_kind(run.config, ("two_encoder",))
    positive(count=count)
    out = named(out, ".png")
    own = run.own_images(2 * count, seed) if not (classes and contents) else None
    class_images = run.read(classes, count, resize) if classes else own[::2]
    content_images = run.read(contents, count, resize) if contents else own[1::2]
    if not (len(class_images) and len(content_images)):
        raise ValueError("the run's data have fewer than two test images: give --classes and --contents")

    def swapped(class_of: Tensor, content_of: Tensor) -> Tensor:
        codes = (run.encode((255 * images).round().to(torch.uint8)) for images in (class_of, content_of))
        return run.decode(run.model.swap(*codes)).float() / 255

    draw_translations(out, content_images.float() / 255, class_images.float() / 255, swapped)
    return out
