"""Hyper-parameters of IntroVAE on the densities, which have never been published: a small grid.

    python bench/density_grid.py     writes bench/results/density_grid.json after every setting; resumable

The first 5,000 iterations of the published schedule with each density's weights for Soft-IntroVAE and the
hinge of each sample, on two densities that fail in different ways, as many side by side as there are cores.
The margin with the lowest KL of the samples, in nats, mean of both, wins: the rule of the follow-up on
learned priors. beta_neg = 0.5 is that of the released IntroVAE code. Its hinge of the batch mean is not in
the grid: it was seen to let the KL of fakes run away.
"""

from __future__ import annotations

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
MARGINS = (2.0, 2.5, 3.0, 4.0)
FIXED = {"hinge": "sample", "beta_neg": 0.5}
SHORT = ["train.images=2560000"]


def score(density: str, margin: float) -> float:
    """KL in nats between data and samples after the short schedule; infinite where it diverged."""
    torch.set_num_threads(1)
    objective = {"kind": "introvae", "margin": margin, **FIXED}
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
    missing = [margin for margin in MARGINS if margin not in [row["margin"] for row in found]]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        runs = [{density: pool.submit(score, density, margin) for density in DENSITIES} for margin in missing]
        for margin, run in zip(missing, runs, strict=True):
            row = {**FIXED, "margin": margin, **{density: future.result() for density, future in run.items()}}
            row["mean"] = sum(row[density] for density in DENSITIES) / len(DENSITIES)
            found = sorted([*found, row], key=lambda row: row["mean"])
            record = {"command": "python bench/density_grid.py", "schedule": SHORT, "of": len(MARGINS)}
            write_text(RESULT, json.dumps({**record, "settings": found}, indent=1) + "\n")
            print(f"{len(found)}/{len(MARGINS)}", row, flush=True)


if __name__ == "__main__":
    main()
