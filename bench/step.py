"""Cost of one style iteration: the minimal schedule against the published one, in one process.

    python bench/step.py --out bench/results/step-cpu.json

Rounds of both are interleaved; a row holds the median. On the CPU the clock is processor time, so that other
programs on the machine do not count. Before timing, one float64 update of each schedule with equal draws must
agree to 1e-10; otherwise nothing is written.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import time
from pathlib import Path

import torch

from sivae_fast.draws import Draws, Rows
from sivae_fast.files import write_text
from sivae_fast.models.style import StyleModel
from sivae_fast.objectives import SoftIntroVAE
from sivae_fast.training.step import Step

PROVIDERS = {
    "published": {"schedule": "published", "fresh_draws": True},
    "minimal, decoding twice": {"schedule": "minimal", "share_forward": False},
    "minimal": {"schedule": "minimal"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--start-channels", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    agreement = largest_difference()
    if agreement > 1e-10:
        raise SystemExit(f"the schedules disagree by {agreement:.1e}: no timing")
    result = measure(options, device)
    result["updates_differ_at_most"] = agreement
    print(json.dumps(result, indent=1))
    if options.out:
        write_text(options.out, json.dumps(result, indent=1) + "\n")


def measure(options: argparse.Namespace, device: torch.device) -> dict:
    """Median seconds of an iteration without optimizers for each provider, and their ratios."""
    torch.manual_seed(0)
    model = StyleModel(options.resolution, start_channels=options.start_channels).to(device)
    x = torch.randn(options.batch, 3, options.resolution, options.resolution, device=device)
    steps = {name: make_step(model, **settings) for name, settings in PROVIDERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(options.rounds + 1):
        for name, step in steps.items():
            started = clock(device)
            iterate(step, x, Draws(0, round_, Rows.all(len(x)), device))
            if round_:  # the first round warms up
                seconds[name].append(clock(device) - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "command": f"python bench/step.py --resolution {options.resolution} --batch {options.batch}",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "clock": "wall, synchronised" if device.type == "cuda" else "processor time",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "spread": {name: [round(min(v), 4), round(max(v), 4)] for name, v in seconds.items()},
        "ratio_to_published": {name: round(v / medians["published"], 3) for name, v in medians.items()},
    }


def make_step(model: StyleModel, **settings) -> Step:
    gamma_r = 1e-8 if settings["schedule"] == "published" else 0.0
    objective = SoftIntroVAE(beta_rec=0.1, beta_kl=0.2, beta_neg=512.0, scale=5e-6, gamma_r=gamma_r)
    return Step(model, objective.to(next(model.parameters()).device), **settings)


def iterate(step: Step, x: torch.Tensor, draws: Draws) -> None:
    loss, shared = step.encoder_phase(x, draws)
    loss.loss.backward()
    step.decoder_phase(x, draws, shared).loss.backward()
    for parameter in [*step.encoder_parameters, *step.decoder_parameters]:
        parameter.grad = None


def largest_difference() -> float:
    """Largest relative difference of any gradient between the schedules, equal draws, float64."""
    torch.manual_seed(0)
    model = StyleModel(16, start_channels=4, max_channels=8, latent_size=8, mapping_layers=2).double()
    with torch.no_grad():  # a constant map before an instance norm would amplify rounding
        model.decoder.const.normal_()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    found = []
    for schedule in ("published", "minimal"):
        objective = SoftIntroVAE(beta_rec=0.5, beta_kl=0.3, beta_neg=4.0, scale=0.01, gamma_r=0.0)
        step = Step(copy.deepcopy(model), objective, schedule=schedule)
        draws = Draws(0, 0, Rows.all(4))
        loss, shared = step.encoder_phase(x, draws)
        loss.loss.backward()
        step.decoder_phase(x, draws, shared).loss.backward()
        found.append([p.grad for p in step.model.parameters()])
    pairs = [(a, b) for a, b in zip(*found, strict=True) if a is not None]
    return max(float((a - b).norm() / (a.norm() + 1e-12)) for a, b in pairs)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
