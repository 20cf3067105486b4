"""Hyper-parameters of IntroVAE on the densities, which have never been published: a small grid.

    python bench/density_grid.py     writes bench/results/density_grid.json after every setting; resumable

Small networks (width 64), batch 256, 2,500 iterations of which 300 as a VAE, on two densities that fail in
different ways. The setting with the lowest KL of the samples, in nats, mean of both, wins: the rule of the
follow-up on learned priors. beta_neg = 0.5 is that of the released IntroVAE code.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

import torch

from sivae_fast.config import load_config
from sivae_fast.evaluation.density import divergences, prior_samples
from sivae_fast.files import write_text
from sivae_fast.systems import make_schedule
from sivae_fast.training.loop import Trainer

REPOSITORY = Path(__file__).parents[1]
RESULT = REPOSITORY / "bench" / "results" / "density_grid.json"
DENSITIES = ("8gaussians", "rings")
GRID = {
    "weights": [(0.2, 0.3), (0.8, 0.05), (1.0, 0.5)],  # (beta_rec, beta_kl)
    "margin": [2.0, 4.0, 8.0],
}
SHORT = [
    "model.width=64",
    "train.batch=256",
    "train.images=640000",
    "train.warmup_images=76800",
    "optim.learning_rate=1e-3",
    "optim.drops=[320000,480000]",
]


def score(density: str, weights: tuple[float, float], margin: float) -> float:
    """KL in nats between data and samples after the short schedule; infinite where it diverged."""
    objective = {"kind": "introvae", "beta_rec": weights[0], "beta_kl": weights[1], "beta_neg": 0.5}
    overrides = [f"objective.{key}={value}" for key, value in {**objective, "margin": margin}.items()]
    path = REPOSITORY / f"launch/configs/density-{density}.yaml"
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(path, [*SHORT, *overrides, f"run.folder={folder}"])
        trainer = Trainer(config, make_schedule(config), 0, 1, torch.device("cpu"))
        batches = trainer.data.batches(0, trainer.schedule.batch, 0, 1)
        while trainer.images < config.train.images:
            trainer._advance(batches)
        trainer.close()
    data, model = trainer.data, trainer.model.eval()
    try:
        return divergences(data.sample, lambda n, s: prior_samples(model, n, s), data.half_range)["kl_nats"]
    except (ValueError, RuntimeError):  # no sample inside the square, or not a number
        return float("inf")


def main() -> None:
    found = json.loads(RESULT.read_text())["settings"] if RESULT.exists() else []
    settings = list(itertools.product(GRID["weights"], GRID["margin"]))
    for i, (weights, margin) in enumerate(settings):
        name = {"beta_rec": weights[0], "beta_kl": weights[1], "margin": margin}
        if any(name.items() <= row.items() for row in found):
            continue
        row = {**name, **{density: score(density, weights, margin) for density in DENSITIES}}
        row["mean"] = sum(row[density] for density in DENSITIES) / len(DENSITIES)
        found.append(row)
        found.sort(key=lambda row: row["mean"])
        record = {
            "command": "python bench/density_grid.py",
            "schedule": SHORT,
            "of": len(settings),
            "settings": found,
        }
        write_text(RESULT, json.dumps(record, indent=1) + "\n")
        print(f"{i + 1}/{len(settings)}", row)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
