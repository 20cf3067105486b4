"""JSD, minimum matching distance and coverage of a point cloud model, as published."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from sivae_fast.evaluation import pointcloud
from sivae_fast.evaluation.sharing import gather, rank, share, summed
from sivae_fast.inference_clouds import CloudInference
from sivae_fast.progress import progress_bar
from sivae_fast.run import append_metric
from sivae_fast.trained import named_set

#: As published: so many sets of samples, each so many times as large as the set of real clouds.
DRAWS, FACTOR = 3, 3
DISTANCES = {"chamfer": pointcloud.chamfer_distances, "emd": pointcloud.emd_distances}
METRICS = ("jsd", *(f"{name}_{distance}" for distance in DISTANCES for name in ("mmd", "coverage")))


def evaluate_clouds(
    run: CloudInference,
    metrics: Sequence[str] | None = None,
    *,
    count: int = 50_000,
    seed: int = 0,
    split: str = "test",
    clouds: Tensor | None = None,
    folder: str | os.PathLike | None = None,
) -> dict[str, dict]:
    """Measures samples of the model against a split of its data (or of those at `run.data_path`).

    metrics: some of `METRICS`; None takes those without the earth mover's distance, which needs POT and is
    exact, and slow. At most `count` clouds, spread evenly, are used. The value is the mean over `DRAWS`
    sets of samples, each `FACTOR` times as large as that of the clouds; the record also has their range.
    split: "test", or "validation", by which published checkpoints were chosen; it is part of the record.
    clouds: those of the split [n, points, 3], where they have been read before.
    folder: a run folder, to whose metric files the records are added.
    Called in every process of a process group, each does its share and all get the result.
    Raises ValueError for other metrics and for a set that is not there, ImportError where POT is missing.
    """
    metrics = METRICS[:3] if metrics is None else list(dict.fromkeys(metrics))
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics are {', '.join(metrics)}, must be some of {', '.join(METRICS)}")
    if count < 1:
        raise ValueError(f"count is {count}, must be at least 1")
    check_packages(metrics)  # before the others are measured
    clouds = run.clouds(split) if clouds is None else clouds
    if len(clouds) > count:
        clouds = clouds[torch.linspace(0, len(clouds) - 1, count).long()]
    sets = [_compare(run, DRAWS * seed + draw, clouds, metrics) for draw in range(DRAWS)]
    about = {f"{split}_clouds": len(clouds), "samples": FACTOR * len(clouds), "draws": DRAWS, "seed": seed}
    about |= named_set(run.data_path)
    records = {}
    for name in metrics:
        values = [found[name] for found in sets]
        spread = {"value": statistics.mean(values), "range_over_draws": max(values) - min(values)}
        records[name] = {**spread, **run.described, **about}
        if folder is not None and rank() == 0:
            append_metric(folder, name, records[name])
    return records


def check_packages(metrics: Sequence[str]) -> None:
    """Raises ImportError, saying how to get it, where one of the metrics needs POT and it is missing."""
    if any(name.endswith("emd") for name in metrics):
        pointcloud.load_pot()


@torch.no_grad()
def _compare(run: CloudInference, seed: int, clouds: Tensor, metrics: Sequence[str]) -> dict[str, float]:
    """The metrics of one set of samples, of which every rank makes its share."""
    latents, reference = run.prior(FACTOR * len(clouds), seed), clouds.to(run.device)
    asked = {name.split("_")[-1] for name in metrics}
    distances = {name: distance for name, distance in DISTANCES.items() if name in asked}
    counts = torch.zeros(pointcloud.CELLS, dtype=torch.int64)
    rows = {name: [torch.empty(0, len(clouds), dtype=torch.float64)] for name in distances}
    start, stop = share(len(latents))
    with progress_bar(stop - start, "samples", run.show) as bar:
        for first in range(start, stop, run.batch):
            samples = run.decode(latents[first : min(first + run.batch, stop)])
            if "jsd" in metrics:
                counts += pointcloud.occupancy(samples)
            for name, distance in distances.items():
                rows[name].append(distance(samples.to(run.device), reference).double().cpu())
            bar.update(len(samples))
    found = {}
    if "jsd" in metrics:
        counts = summed(counts.to(run.device)).cpu()
        found["jsd"] = pointcloud.jsd(pointcloud.occupancy(clouds), counts)
    for name, parts in rows.items():
        table = gather(torch.cat(parts).to(run.device)).cpu()
        found[f"mmd_{name}"], found[f"coverage_{name}"] = pointcloud.mmd_and_coverage(table)
    return found
