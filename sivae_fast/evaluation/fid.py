"""How far generated images are from real ones, in the features of a network.

FID (Heusel et al., 2017), KID (Binkowski et al., 2018), precision and recall (Kynkaanniemi et al., 2019),
density and coverage (Naeem et al., 2020). From the same features torch-fidelity has the same first four.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sivae_fast.evaluation.features import Features
from sivae_fast.evaluation.sharing import gather

METRICS = ("fid", "kid", "precision", "recall", "density", "coverage")


class Moments:
    """Mean and covariance of feature vectors, gathered batch by batch in float64."""

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(features, features, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Take in features [B, F]. Raises ValueError where they are not finite."""
        if not features.isfinite().all():
            raise ValueError("features are not finite: the generated images hold NaN or infinity")
        features = features.to(self.mean)
        mean = features.mean(0)
        centred = features - mean
        self._merge(len(features), mean, centred.T @ centred)

    def all_reduce(self) -> None:
        """Together with the other ranks of the default process group; does nothing without one."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        total = torch.tensor([self.count], dtype=torch.float64, device=self.mean.device)
        dist.all_reduce(total)
        mean = self.mean * self.count
        dist.all_reduce(mean)
        mean /= total.clamp(min=1)
        apart = self.mean - mean
        self._scatter += self.count * torch.outer(apart, apart)
        dist.all_reduce(self._scatter)
        self.count, self.mean = int(total.item()), mean

    @property
    def covariance(self) -> Tensor:
        """[F, F], divided by N - 1. Raises ValueError below two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return self._scatter / (self.count - 1)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        apart = mean - self.mean
        self._scatter += scatter + torch.outer(apart, apart) * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total


def frechet_distance(one: Moments, other: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared Frechet distance of two Gaussians."""
    first, second = (moments.covariance.cpu().numpy() for moments in (one, other))
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    # (C1 C2)^(1/2) has the trace of (R C2 R)^(1/2), R = C1^(1/2), which is symmetric and so safe to compute.
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(min=0)).sum()
    apart = (one.mean - other.mean).square().sum().item()
    return float(apart + np.trace(first) + np.trace(second) - 2 * cross)


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> float:
    """KID of features [N, F] and [M, F]: mean over subsets of the unbiased MMD^2, kernel (x.y / F + 1)^3.

    Subsets, estimator and seed are torch-fidelity's (`fake` is its first input). Sets under `size` images are
    taken whole, as they would be drawn.
    """
    real, fake = (part.double().cpu().numpy() for part in (real, fake))
    size = min(size, len(real), len(fake))
    if size < 2:
        raise ValueError(f"KID needs at least 2 images in both sets, got {len(real)} and {len(fake)}")
    random, total = np.random.RandomState(seed), 0.0
    for _ in range(subsets):
        x = fake[random.choice(len(fake), size, replace=False)]
        y = real[random.choice(len(real), size, replace=False)]
        kxx, kyy, kxy = (np.power(a @ b.T / a.shape[1] + 1, 3) for a, b in ((x, x), (y, y), (x, y)))
        within = kxx.sum() - np.trace(kxx) + kyy.sum() - np.trace(kyy)
        total += within / (size * (size - 1)) - 2 * kxy.sum() / size**2
    return float(total / subsets)


def neighbourhoods(real: Tensor, fake: Tensor, block: int = 4096) -> dict[str, float]:
    """Precision, recall, density and coverage of features [N, F] and [M, F].

    A set's balls reach from each of its vectors to its k-th nearest other one; k is 3 for precision and
    recall and 5 for density and coverage, as published.

    precision: share of fakes in some real ball; recall: share of reals in some fake ball; density: number of
    real balls that hold a fake, divided by k; coverage: share of real balls that hold some fake.
    Raises ValueError where a set has no k-th neighbour.
    """
    real, fake = real.double(), fake.double()
    near, far = 3, 5
    check_neighbours(min(len(real), len(fake)), far)
    real_radii, fake_radii = _radii(real, {near, far}, block), _radii(fake, {near}, block)
    in_some, hits, covered = [], [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part in fake.split(block):
        distance = torch.cdist(part, real)
        in_some.append((distance <= real_radii[near]).any(1))
        inside = distance <= real_radii[far]
        hits.append(inside.sum(1))
        covered |= inside.any(0)
    recalled = [(torch.cdist(part, fake) <= fake_radii[near]).any(1) for part in real.split(block)]
    return {
        "precision": torch.cat(in_some).double().mean().item(),
        "recall": torch.cat(recalled).double().mean().item(),
        "density": torch.cat(hits).double().mean().item() / far,
        "coverage": covered.double().mean().item(),
    }


def check_neighbours(images: int, k: int = 5) -> None:
    """Raises ValueError where so many images have no k-th neighbour."""
    if images <= k:
        raise ValueError(f"precision, recall, density and coverage need over {k} images, got {images}")


def compare(
    features: Features, real: Iterable[Tensor], fake: Iterable[Tensor], metrics: Iterable[str] = METRICS
) -> dict[str, float]:
    """The chosen `METRICS` of two streams of uint8 images [B, C, H, W]; each rank brings its own share.

    Every rank gets the result. Raises ValueError for unknown metrics and for empty streams.
    """
    metrics = list(metrics)
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metric {name!r}: must be one of {', '.join(METRICS)}")
    real, fake = (collect(features, images) for images in (real, fake))
    found: dict[str, float] = {}
    if "fid" in metrics:
        found["fid"] = frechet_distance(moments(real), moments(fake))
    if set(metrics) - {"fid"}:
        real, fake = gather(real), gather(fake)
    if "kid" in metrics:
        found["kid"] = kernel_distance(real, fake)
    if set(metrics) - {"fid", "kid"}:
        found |= neighbourhoods(real, fake)
    return {name: found[name] for name in metrics}


def collect(features: Features, batches: Iterable[Tensor]) -> Tensor:
    """Features [N, F] of all images of this rank. Raises ValueError if there is none."""
    found = [features(images) for images in batches]
    if not found:
        raise ValueError("there are no images to measure")
    return torch.cat(found)


def moments(features: Tensor, block: int = 4096) -> Moments:
    """Mean and covariance of the features [N, F] of all ranks."""
    found = Moments(features.shape[1], features.device)
    for part in features.split(block):
        found.update(part)
    found.all_reduce()
    return found


def _radii(features: Tensor, ks: set[int], block: int) -> dict[int, Tensor]:
    nearest = [
        torch.cdist(part, features).topk(max(ks) + 1, largest=False).values for part in features.split(block)
    ]
    nearest = torch.cat(nearest)
    return {k: nearest[:, k] for k in ks}
