"""Image translation: whose codes are swapped, what each code knows, and the grid of the paper."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sivae_fast.figures import save_grid


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
