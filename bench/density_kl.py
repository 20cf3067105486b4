"""What the published KL of samples consists of: bins that the data hit and the samples do not.

    python bench/density_kl.py RUN [RUN ...]     run folders of one density, e.g. of bench/densities.py --runs

Writes density_kl-<density>.json under --out (bench/results): for each run, and for the data as their own
model, ten pairs of 5,000 points each where the protocol takes one; how far single pairs are apart; what share
of the KL comes from bins without samples; and how many samples lie in bins that none of 400,000 data points
hits.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from measure import machine

from sivae_fast.checkpoint import load
from sivae_fast.data.densities import Density
from sivae_fast.evaluation import density as measures
from sivae_fast.files import write_text

RESULTS = Path(__file__).parent / "results"
PAIRS = 10


def look(sample: measures.Sampler, data: Density) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the pairs of each measure; KL and JSD in the paper's units."""
    square = data.half_range
    often = measures.histogram(data.sample(400_000, 7), square)
    rows = []
    for seed in range(1000, 1000 + 2 * PAIRS, 2):
        p = measures.histogram(data.sample(5000, seed), square)
        q = measures.histogram(sample(5000, seed + 1), square)
        missed = q == 0
        rows.append(
            {
                "kl": measures.kl_published(p, q),
                "kl_of_bins_without_samples": measures.kl_published(p * missed, q * missed),
                "jsd": measures.jsd_published(p, q),
                "bins_with_samples": (~missed).sum().item(),
                "data_in_bins_without_samples": (p[missed].sum() / p.sum()).item(),
                "samples_off_the_data": (q[often == 0].sum() / q.sum()).item(),
            }
        )
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: {"mean": statistics.mean(values), "deviation": statistics.stdev(values)}
        for name, values in columns.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: the committed results")
    options = parser.parse_args()
    models = [load(run).eval() for run in options.runs]
    names = {model.config.data.name for model in models}
    if len(names) > 1:
        raise SystemExit(f"error: the runs are of {', '.join(sorted(names))}: accepted is one density")
    data = Density(names.pop())
    found = {"the data themselves": look(data.sample, data)}
    for model in models:
        draw = lambda count, seed, model=model: measures.prior_samples(model, count, seed)
        found[model.config.run.name] = {"images": model.images, **look(draw, data)}
        print(model.config.run.name, json.dumps(found[model.config.run.name], indent=1), flush=True)
    record = {"command": "python bench/density_kl.py RUN ...", **machine("cpu"), "models": found}
    write_text(options.out / f"density_kl-{data.name}.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
