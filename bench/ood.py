"""Telling other images from one's own: a VAE beside a Soft-IntroVAE, end to end on small sets.

    python bench/ood.py                 trains both for every seed, writes bench/results/ood.json and
                                        ood-<model>.png
    python bench/ood.py --norm group    the same without batch norm: ood-group.json, ood-group-<model>.png

Own images: scikit-learn's digits, 1,797 real 8x8 pictures of handwriting, split at random into 1,297 to train
on and 500 to compare with. Other images: digits on their side and faint digits (the 500, turned by 90 degrees
and at 0.3 of their contrast), and blobs and stripes, which are made here. Both models have the same networks,
optimizer and number of images seen, of which the Soft-IntroVAE takes the first third as a VAE. The scores are
those of `sivae-fast evaluate --ood`, with batch norm recalibrated; the log-likelihood is taken with the
variance that the weight of errors stands for and with the published one, 1. The published experiments have
CIFAR-10 against SVHN in place of these sets: only signs can be compared.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import machine
from PIL import Image

from sivae_fast.commands.pictures import reconstruct, sample
from sivae_fast.config import Config, make_config
from sivae_fast.files import write_text
from sivae_fast.inference import Inference
from sivae_fast.measure import detect_others
from sivae_fast.training.loop import train

RESULTS = Path(__file__).parent / "results"
TRAINED_ON = 1297
BETA_REC = 16.0  # at 1 the KL outweighs what 64 pixels have to tell, and the best posterior is the prior
VARIANCE = 1 / (2 * BETA_REC)  # of the Gaussian decoder that this weight stands for
OBJECTIVES = {
    "vae": {"kind": "vae", "beta_rec": BETA_REC, "beta_kl": 1.0},
    "soft_introvae": {
        "kind": "soft_introvae",
        "beta_rec": BETA_REC,
        "beta_kl": 1.0,
        "beta_neg": 16.0,
        "scale": 1 / 256,  # at 1 / 64 the push against fakes is spent at the KL that digits have anyway
    },
}
MODEL = {"kind": "residual", "resolution": 8, "channels": 1, "widths": [16, 32], "latent_size": 16}


def image_sets(seed: int = 0) -> dict[str, np.ndarray]:
    """uint8 [N, 8, 8] by name: `train` and `own` are digits that do not overlap."""
    from sklearn.datasets import load_digits

    digits = (load_digits().images * (255 / 16)).round().astype(np.uint8)
    digits = digits[np.random.default_rng(seed).permutation(len(digits))]
    own = digits[TRAINED_ON:]
    return {
        "train": digits[:TRAINED_ON],
        "own": own,
        "digits on their side": np.rot90(own, axes=(1, 2)).copy(),
        "faint digits": (own * 0.3).round().astype(np.uint8),
        "made blobs": made_blobs(len(own), seed),
        "made stripes": made_stripes(len(own), seed),
    }


def made_blobs(count: int, seed: int) -> np.ndarray:
    """uint8 [count, 8, 8]: one soft spot each, anywhere, of any size and brightness."""
    random = np.random.default_rng([seed, 1])
    y, x = np.mgrid[:8, :8]
    centre = random.uniform(1, 6, (2, count, 1, 1))
    size, light = random.uniform(0.8, 3, (count, 1, 1)), random.uniform(0.3, 1, (count, 1, 1))
    spots = light * np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * size**2))
    return (255 * spots).round().astype(np.uint8)


def made_stripes(count: int, seed: int) -> np.ndarray:
    """uint8 [count, 8, 8]: waves of any direction, wavelength and contrast."""
    random = np.random.default_rng([seed, 2])
    y, x = np.mgrid[:8, :8]
    angle, phase = random.uniform(0, 2 * np.pi, (2, count, 1, 1))
    waves, contrast = random.uniform(0.5, 2.5, (count, 1, 1)), random.uniform(0.2, 1, (count, 1, 1))
    along = (x * np.cos(angle) + y * np.sin(angle)) * waves / 8 * 2 * np.pi
    return (127.5 * (1 + contrast * np.sin(along + phase))).round().astype(np.uint8)


def write_sets(folder: Path, sets: dict[str, np.ndarray]) -> dict[str, Path]:
    paths = {}
    for name, pictures in sets.items():
        paths[name] = folder / name.replace(" ", "-")
        paths[name].mkdir(parents=True)
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(paths[name] / f"{i:05d}.png")
    return paths


def configuration(objective: str, data: Path, folder: Path, images: int, seed: int, norm: str) -> Config:
    return make_config(
        {
            "model": {**MODEL, "norm": norm},
            "objective": OBJECTIVES[objective],
            "data": {"path": str(data), "value_range": "unit", "flip": False, "loader": "torch"},
            "train": {"images": images, "batch": 128, "seed": seed, "warmup_images": images // 3},
            "optim": {"learning_rate": 1e-3, "drops": [images * 3 // 4]},
            "engine": {"kind": "torch"},
            "run": {
                "folder": str(folder),
                "name": f"{objective}-{seed}",
                "tick": max(images // 20, 128),
                "samples": images,
                "checkpoint": images,
                "snapshot": images,
            },
        }
    )


def measure(
    objective: str, paths: dict[str, Path], folder: Path, images: int, seed: int, norm: str
) -> tuple[dict, Path]:
    """One model trained and scored: (result, folder with its pictures)."""
    start = time.perf_counter()
    run = train(configuration(objective, paths["train"], folder, images, seed, norm))
    seconds = time.perf_counter() - start
    model = Inference.load(run, device="cpu", show=False)
    others = {name: path for name, path in paths.items() if name not in ("train", "own")}
    options = {"own": paths["own"], "samples": 5, "seed": seed}
    published = detect_others(model, others, run, variance=1.0, **options)["auroc"]
    result = detect_others(model, others, run, variance=VARIANCE, **options)
    for name, scores in result["auroc"].items():
        scores["log_likelihood, variance 1"] = published[name]["log_likelihood"]
    errors = reconstruct(model, run / "reconstructions.png", [paths["own"]], count=32)
    sample(model, run / "drawn.png", count=64)
    return {"training_seconds": round(seconds), "reconstruction_mse": errors["mse"], **result}, run


def table(found: dict[str, list[dict]]) -> dict:
    """Mean and half-range over seeds of every AUROC: {model: {set: {score: [mean, half-range]}}}."""
    summary = {}
    for model, runs in found.items():
        names = runs[0]["auroc"]
        summary[model] = {
            name: {
                score: [
                    round(statistics.mean(values), 4),
                    round((max(values) - min(values)) / 2, 4),
                ]
                for score in names[name]
                if (values := [run["auroc"][name][score] for run in runs])
            }
            for name in names
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=60_000, help="images seen in training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--norm", choices=("batch", "group"), default="batch")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: the committed results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = {"images_seen": options.images, "norm": options.norm, **machine("cpu")}
    found: dict[str, list[dict]] = {name: [] for name in OBJECTIVES}
    stem = "ood" if options.norm == "batch" else f"ood-{options.norm}"
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_sets(Path(folder) / "sets", image_sets())
        for seed in range(options.seeds):
            for name in OBJECTIVES:
                result, run = measure(name, paths, Path(folder) / "runs", options.images, seed, options.norm)
                found[name].append(result)
                if seed == 0:
                    shutil.copy(run / "ood.png", options.out / f"{stem}-{name.replace('_', '-')}.png")
            write(options.out / f"{stem}.json", found, facts)


def write(path: Path, found: dict[str, list[dict]], facts: dict) -> None:
    """The results so far; a run that is interrupted keeps the seeds that are complete."""
    document = {
        "what": "AUROC by score, digits against other sets: mean and half-range over seeds",
        "seeds": len(next(iter(found.values()))),
        **facts,
        "summary": table(found),
        "runs": found,
    }
    write_text(path, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
