"""Metrics of image translation: swapped images against their ground truth, and what each code knows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sivae_fast.figures import save_grid

ImageError = Callable[[Tensor, Tensor], Tensor]  # (images, truth) [B, C, R, R] in [0, 1] -> [B]


def mse(images: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of each image: [B, C, R, R] in [0, 1] to [B]."""
    return (images - truth).square().flatten(1).mean(1)


def ssim(images: Tensor, truth: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity of each image: [B, C, R, R] in [0, 1] to [B], 1 where equal (Wang et al., 2004).

    Gaussian window, constants 0.01 and 0.03, means over the places where the window fits, as published.
    Raises ValueError for images smaller than the window.
    """
    if min(images.shape[2:]) < window:
        raise ValueError(
            f"images are {images.shape[2]}x{images.shape[3]}: SSIM needs at least {window}x{window}"
        )
    x = torch.arange(window, dtype=images.dtype, device=images.device) - (window - 1) / 2
    line = (-x.square() / (2 * sigma**2)).exp()
    line = line / line.sum()
    channels = images.shape[1]
    kernel = (line[:, None] * line).expand(channels, 1, window, window)
    blur = lambda image: F.conv2d(image, kernel, groups=channels)
    a, b = blur(images), blur(truth)
    aa, bb, ab = blur(images * images) - a * a, blur(truth * truth) - b * b, blur(images * truth) - a * b
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * a * b + c1) * (2 * ab + c2) / ((a * a + b * b + c1) * (aa + bb + c2))
    return index.flatten(1).mean(1)


def swap_pairs(classes: Tensor, contents: Tensor, among: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pairs of image numbers (class giver, content giver) whose classes and contents differ.

    classes, contents: [n]; among: bool [n], the images to choose from. Every one of them gives its class at
    most once, to a partner drawn from `seed`.
    """
    givers = among.nonzero().flatten()
    order = torch.randperm(len(givers), generator=torch.Generator().manual_seed(seed))
    others = givers[order]
    differ = (classes[givers] != classes[others]) & (contents[givers] != contents[others])
    return givers[differ], others[differ]


def shuffled(truth: Tensor, seed: int = 0) -> Tensor:
    """The ground truths [B, ...] in a wrong order: what an answer that ignores its question scores."""
    shift = 1 + int(torch.randint(len(truth) - 1, (), generator=torch.Generator().manual_seed(seed)))
    return truth.roll(shift, 0)


def probe_accuracy(codes: Tensor, labels: Tensor, test: Tensor) -> float:
    """Accuracy of a linear classifier from codes [n, Z] to labels [n], trained where not `test` [n], scored
    where.

    Logistic regression on standardised codes with a small L2 penalty. A code that holds nothing of a factor
    scores near `chance`; one that holds it plainly scores 1.
    """
    codes, classes = codes.double(), int(labels.max()) + 1
    seen = codes[~test]
    codes = (codes - seen.mean(0)) / seen.std(0).clamp(min=1e-8)
    weight = torch.zeros(codes.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(codes[~test] @ weight + bias, labels[~test]) + 1e-3 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    guess = (codes[test] @ weight + bias).argmax(1)
    return (guess == labels[test]).double().mean().item()


def chance(labels: Tensor, test: Tensor) -> float:
    """Accuracy of always answering the most frequent label of the training images."""
    return (labels[test] == labels[~test].bincount().argmax()).double().mean().item()


def draw_translations(
    path: str | os.PathLike,
    content_images: Tensor,
    class_images: Tensor,
    translate: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Writes the grid of the paper: content images on top, class images at the left, in each cell the class
    of its row with the content of its column. Images [n, C, R, R] in [0, 1]; translate(class_of, content_of)
    likewise.
    """
    rows: list[Tensor | Sequence[Tensor]] = [torch.cat([torch.ones_like(content_images[:1]), content_images])]
    for image in class_images:
        cells = translate(image.expand(len(content_images), -1, -1, -1), content_images)
        rows.append(torch.cat([image[None], cells]))
    save_grid(path, rows, (0.0, 1.0), smallest=96)
