"""Trains point clouds on the made solids and follows the test JSD over every snapshot.

    python bench/pointclouds.py [RUN]

Trains launch/configs/pointclouds_small.yaml on one thread, or takes a run folder that is there. Writes
pointclouds.json (with MMD and coverage of the last snapshot), pointclouds.png (rows of real, reconstruction,
sample) and pointclouds.gif (from one class to another) under bench/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from measure import machine
from torch import Tensor

from sivae_fast.checkpoint import load
from sivae_fast.config import load_config
from sivae_fast.data.pointclouds import load_clouds
from sivae_fast.evaluation.pointcloud import (
    chamfer_distances,
    jsd,
    mmd_and_coverage,
    occupancy,
    sampling_jsd,
)
from sivae_fast.evaluation.pointcloud_figures import animate, draw_clouds
from sivae_fast.files import write_text
from sivae_fast.systems import make_model
from sivae_fast.training.loop import train

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
CONFIG = ROOT / "launch" / "configs" / "pointclouds_small.yaml"
DRAWS = 3  # sets of samples of one estimate, as published


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: the committed results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.process_time()
    run = options.run or train(load_config(CONFIG, ["engine.kind=torch", "run.new=true"]))
    seconds = None if options.run else time.process_time() - start
    snapshots = sorted((run / "snapshots").glob("*.safetensors"))
    if not snapshots:
        raise SystemExit(f"error: {run} holds no snapshots")
    with torch.no_grad():
        measure(snapshots, options.out, {**machine("cpu"), "processor_seconds": seconds})


def measure(snapshots: list[Path], out: Path, facts: dict) -> None:
    model = load(snapshots[-1])
    data = model.config.data
    train_set, test = (
        load_clouds(data.path, split, classes=data.classes, points=data.points, resample=data.resample)
        for split in ("train", "test")
    )
    fresh = make_model(model.config).eval()
    curve = [{"images": 0, **estimate(lambda count, draw: sample(fresh, count, draw), test.points)}]
    for path in snapshots:
        model = load(path)
        found = estimate(lambda count, draw, model=model: sample(model, count, draw), test.points)
        curve.append({"images": model.images, **found})
        print(f"{model.images:>8,} images  JSD {found['jsd']:.4f}", flush=True)
    reference = test.points[:: max(1, len(test.points) // 60)]
    result = {
        **facts,
        **{
            name: getattr(model.config, name).model_dump(mode="json")
            for name in ("model", "objective", "train")
        },
        "test_clouds": len(test.points),
        "curve": curve,
        "last": quality(sample(model, len(reference), 9), reference),
        "floor": {
            "jsd_between_halves_of_the_test_clouds": between_halves(test.points),
            "training_clouds_as_samples": {
                **estimate(lambda count, draw: rows(train_set.points, count, draw), test.points),
                **quality(rows(train_set.points, len(reference), 9), reference),
            },
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "pointclouds.json", json.dumps(result, indent=1) + "\n")
    real = rows(test.points, 6, 0)
    rec = model.decode(model.encode(real).mean)
    draw_clouds(out / "pointclouds.png", [real, rec, sample(model, 6, 0)])
    animate(out / "pointclouds.gif", between_classes(model, test))
    print(json.dumps({key: result[key] for key in ("last", "floor")}, indent=1))


def estimate(sample, reference: Tensor) -> dict[str, float]:
    """The published estimate, a mean over sets of samples, and how far the sets are apart."""
    values = [
        sampling_jsd(lambda count, _, draw=draw: sample(count, draw), reference, draws=1)
        for draw in range(DRAWS)
    ]
    return {"jsd": statistics.mean(values), "range_over_draws": max(values) - min(values)}


def between_halves(clouds: Tensor, times: int = 10) -> dict[str, float]:
    """JSD of one random half of the clouds to the other: what chance alone makes at that size."""
    values = []
    for seed in range(times):
        first, second = rows(clouds, len(clouds), seed).chunk(2)
        values.append(jsd(occupancy(first), occupancy(second)))
    return {"mean": statistics.mean(values), "standard_deviation": statistics.stdev(values)}


def sample(model, count: int, draw: int) -> Tensor:
    noise = torch.randn(count, model.latent_size, generator=torch.Generator().manual_seed(draw))
    return model.generate(model.prior_std * noise)


def rows(clouds: Tensor, count: int, draw: int) -> Tensor:
    """`count` clouds drawn without repetition where there are enough."""
    generator = torch.Generator().manual_seed(draw)
    order = torch.cat(
        [torch.randperm(len(clouds), generator=generator) for _ in range(1 + count // len(clouds))]
    )
    return clouds[order[:count]]


def quality(samples: Tensor, reference: Tensor) -> dict[str, float]:
    mmd, coverage = mmd_and_coverage(chamfer_distances(samples, reference))
    return {"mmd_chamfer": mmd, "coverage_chamfer": coverage, "clouds": len(reference)}


def between_classes(model, clouds, frames: int = 24) -> Tensor:
    """The straight line between the posterior means of a cloud of the first and one of the second class."""
    ends = [clouds.points[clouds.labels == label][:1] for label in (0, 1)]
    first, last = (model.encode(end).mean for end in ends)
    return model.decode(torch.lerp(first, last, torch.linspace(0, 1, frames)[:, None]))


if __name__ == "__main__":
    main()
