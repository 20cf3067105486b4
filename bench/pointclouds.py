"""Follows a point cloud run: test JSD of every snapshot, then MMD, coverage and pictures of the last one.

    python launch/train.py --config launch/configs/pointclouds_small.yaml
    python bench/pointclouds.py runs/00000-pointclouds_small

Writes pointclouds.json, pointclouds.png (rows of real, reconstruction, sample) and pointclouds.gif (from one
class to another) under bench/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
from torch import Tensor

from sivae_fast.checkpoint import load
from sivae_fast.data.pointclouds import load_clouds
from sivae_fast.evaluation.pointcloud import chamfer_distances, mmd_and_coverage, sampling_jsd
from sivae_fast.evaluation.pointcloud_figures import animate, draw_clouds
from sivae_fast.files import write_text

RESULTS = Path(__file__).parent / "results"


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    snapshots = sorted((options.run / "snapshots").glob("*.safetensors"))
    if not snapshots:
        raise SystemExit(f"error: {options.run} holds no snapshots")
    model = load(snapshots[-1])
    data = model.config.data
    test = load_clouds(data.path, "test", classes=data.classes, points=data.points, resample=data.resample)
    train = load_clouds(data.path, "train", classes=data.classes, points=data.points, resample=data.resample)
    curve = [{"images": 0, "jsd": untrained_jsd(model, test.points)}]
    for path in snapshots:
        model = load(path)
        jsd = sampling_jsd(lambda count, draw, model=model: sample(model, count, draw), test.points)
        curve.append({"images": model.images, "jsd": jsd})
        print(f"{model.images:>8,} images  JSD {jsd:.4f}", flush=True)
    reference = test.points[:: max(1, len(test.points) // 60)]
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "objective": model.config.objective.model_dump(mode="json"),
        "test_clouds": len(test.points),
        "points": data.points,
        "curve": curve,
        "last": quality(sample(model, len(reference), 9), reference),
        "floor": {
            "jsd": sampling_jsd(lambda count, draw: rows(train.points, count, draw), test.points),
            **quality(rows(train.points, len(reference), 9), reference),
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "pointclouds.json", json.dumps(result, indent=1) + "\n")
    real = rows(test.points, 6, 0)
    rec = model.decode(model.encode(real).mean)
    draw_clouds(options.out / "pointclouds.png", [real, rec, sample(model, 6, 0)])
    animate(options.out / "pointclouds.gif", between_classes(model, test))
    print(json.dumps({key: result[key] for key in ("last", "floor")}, indent=1))


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


def untrained_jsd(model, reference: Tensor) -> float:
    """JSD of the same networks before training: what the curve starts from."""
    from sivae_fast.systems import make_model

    fresh = make_model(model.config).eval()
    return sampling_jsd(lambda count, draw: sample(fresh, count, draw), reference, draws=1)


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
