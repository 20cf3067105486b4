"""JSD, minimum matching distance and coverage of a point cloud model, as published."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sivae_fast.data.parallel import progress_bar
from sivae_fast.evaluation import pointcloud
from sivae_fast.inference_clouds import CloudInference
from sivae_fast.run import append_metric

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
    folder: str | os.PathLike | None = None,
) -> dict[str, dict]:
    """Measures samples of the model against the test clouds of its data (or of `run.data_path`).

    metrics: some of `METRICS`; None takes those without the earth mover's distance, which needs POT and is
    exact, and slow. At most `count` test clouds, spread evenly, are used. The value is the mean over `DRAWS`
    sets of samples, each `FACTOR` times as large as that of the clouds; the record also has their range.
    folder: a run folder, to whose metric files the records are added.
    Raises ValueError for other metrics and for a set that is not there, ImportError where POT is missing.
    """
    metrics = METRICS[:3] if metrics is None else list(dict.fromkeys(metrics))
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics are {', '.join(metrics)}, must be some of {', '.join(METRICS)}")
    if count < 1:
        raise ValueError(f"count is {count}, must be at least 1")
    if any(name.endswith("emd") for name in metrics):
        pointcloud.load_pot()  # says what is missing before the others are measured
    clouds = run.clouds("test")
    if len(clouds) > count:
        clouds = clouds[torch.linspace(0, len(clouds) - 1, count).long()]
    seeds = [DRAWS * seed + draw for draw in range(DRAWS)]
    sets = [_compare(run, run.sample(FACTOR * len(clouds), each), clouds, metrics) for each in seeds]
    about = {"test_clouds": len(clouds), "samples": FACTOR * len(clouds), "draws": DRAWS, "seed": seed}
    records = {}
    for name in metrics:
        values = [found[name] for found in sets]
        spread = {"value": statistics.mean(values), "range_over_draws": max(values) - min(values)}
        records[name] = {**spread, **run.described, **about}
        if folder is not None:
            append_metric(folder, name, records[name])
    return records


def _compare(
    run: CloudInference, samples: Tensor, clouds: Tensor, metrics: Sequence[str]
) -> dict[str, float]:
    found = {}
    if "jsd" in metrics:
        found["jsd"] = pointcloud.jsd(pointcloud.occupancy(clouds), pointcloud.occupancy(samples))
    for name, distance in DISTANCES.items():
        if {f"mmd_{name}", f"coverage_{name}"} & set(metrics):
            table = _distances(run, distance, samples, clouds, name)
            found[f"mmd_{name}"], found[f"coverage_{name}"] = pointcloud.mmd_and_coverage(table)
    return found


@torch.no_grad()
def _distances(
    run: CloudInference, distance: Callable, samples: Tensor, clouds: Tensor, title: str
) -> Tensor:
    rows, clouds = [], clouds.to(run.device)
    with progress_bar(len(samples), title, run.show) as bar:
        for part in samples.split(run.batch):
            rows.append(distance(part.to(run.device), clouds).cpu())
            bar.update(len(part))
    return torch.cat(rows)
