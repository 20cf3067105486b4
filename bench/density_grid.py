"""Hyper-parameters of IntroVAE on the densities, which have never been published: a small grid.

    python bench/density_grid.py     writes bench/results/density_grid.json after every setting; resumable

The published networks, batch 256, 4,000 iterations of which 1,000 as a VAE, on two densities that fail in
different ways, as many side by side as there are cores. The setting with the lowest KL of the samples, in
nats, mean of both, wins: the rule of the follow-up on learned priors. beta_rec = 0.8 is the VAE's, beta_neg =
0.5 that of the released IntroVAE code. With beta_kl of 0.3 and more the game is lost in the first thousand
iterations, with smaller networks or a shorter start as a VAE also Soft-IntroVAE's: neither is in the grid.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
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
    "beta_kl": [0.05, 0.1, 0.2],
    "margin": [4.0, 8.0],
}
FIXED = {"beta_rec": 0.8, "beta_neg": 0.5}
SHORT = [
    "train.batch=256",
    "train.images=1024000",
    "train.warmup_images=256000",
    "optim.learning_rate=5e-4",
    "optim.drops=[768000]",
]


def score(density: str, beta_kl: float, margin: float) -> float:
    """KL in nats between data and samples after the short schedule; infinite where it diverged."""
    torch.set_num_threads(1)
    objective = {"kind": "introvae", "beta_kl": beta_kl, "margin": margin, **FIXED}
    overrides = [f"objective.{key}={value}" for key, value in objective.items()]
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
    grid = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    missing = [setting for setting in grid if not any(setting.items() <= row.items() for row in found)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        runs = [
            {density: pool.submit(score, density, **setting) for density in DENSITIES} for setting in missing
        ]
        for setting, run in zip(missing, runs, strict=True):
            row = {**FIXED, **setting, **{density: future.result() for density, future in run.items()}}
            row["mean"] = sum(row[density] for density in DENSITIES) / len(DENSITIES)
            found = sorted([*found, row], key=lambda row: row["mean"])
            record = {"command": "python bench/density_grid.py", "schedule": SHORT, "of": len(grid)}
            write_text(RESULT, json.dumps({**record, "settings": found}, indent=1) + "\n")
            print(f"{len(found)}/{len(grid)}", row, flush=True)


if __name__ == "__main__":
    main()
