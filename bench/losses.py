"""The fused encoder phase beside the plain formulas, the same under autocast, and torch.compile.

    python bench/losses.py [--out bench/results] [--batches 4 16 64 256] [--sizes image256 image32 plane]

Writes losses-<device>.json, .csv and .png. Every provider computes loss, per-sample statistics and the
gradients by rec, rec_rec, rec_fake and the three posteriors. A provider whose loss or gradients miss float64
by more than its dtype allows gets a refusal in place of times. On a GPU `gpu` times a call in a CUDA graph
(nothing of Python; the row "plain" is then the CUDA-graphed plain version) with inputs that rotate through
more than three times the L2 cache ("cold"), through "32 sets" where those are less, or stay in it ("hot");
`wall` times calls from Python. On a CPU there is processor time only, and what runs is PyTorch: closed forms
beside plain formulas.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from measure import (
    Captured,
    copy_bandwidth,
    each,
    launches,
    machine,
    memory,
    pyplot,
    reason,
    rounds,
    save,
    second_level_cache,
    wall,
)
from torch import Tensor

from sivae_fast import Posterior, SoftIntroVAE, Term

RESULTS = Path(__file__).parent / "results"
SIZES = {"image256": ((3, 256, 256), 512), "image32": ((3, 32, 32), 128), "plane": ((2,), 2)}
BATCHES = (4, 16, 64, 256)
DIRECTIONS = ("forward", "both", "backward")
BETA_REC, BETA_KL, BETA_NEG = 1.0, 0.5, 4.0


class Inputs(NamedTuple):
    """Of one encoder phase: images [B, ...], then means and log-variances [B, Z] of x, rec and fake."""

    x: Tensor
    rec: Tensor
    rec_rec: Tensor
    fake: Tensor
    rec_fake: Tensor
    mean: Tensor
    mean_rec: Tensor
    mean_fake: Tensor
    logvar: Tensor
    logvar_rec: Tensor
    logvar_fake: Tensor

    @classmethod
    def make(cls, size: str, batch: int, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        # Not PyTorch's own: where a capture has failed, that draws nothing more.
        generator = torch.Generator(device).manual_seed(seed)
        new = lambda *sizes: torch.randn(sizes, generator=generator, device=device)
        shape, latents = SIZES[size]
        images = [new(batch, *shape).mul_(0.5).to(dtype) for _ in range(5)]
        latents = [new(batch, latents) for _ in range(6)]
        made = cls(*images, *latents)
        for tensor in made.wanted:
            tensor.requires_grad_()
        return made

    @property
    def wanted(self) -> list[Tensor]:
        """What gets a gradient: everything but the data x and the detached fake."""
        return [tensor for name, tensor in self._asdict().items() if name not in ("x", "fake")]

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self)

    @property
    def gradient_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.wanted)


def scale(i: Inputs) -> float:
    return 1 / i.x[0].numel()


def plain(i: Inputs) -> tuple[Tensor, ...]:
    """The formulas as they are usually written: loss, then statistics."""

    def error(t: Tensor, y: Tensor) -> Tensor:
        return (t - y).pow(2).flatten(1).sum(1)

    def kl(mean: Tensor, logvar: Tensor) -> Tensor:
        return -0.5 * (1 + logvar - mean.pow(2) - logvar.exp()).sum(1)

    c = scale(i)
    r, k = error(i.x, i.rec), kl(i.mean, i.logvar)
    r_rec, k_rec = error(i.rec, i.rec_rec), kl(i.mean_rec, i.logvar_rec)
    r_fake, k_fake = error(i.fake, i.rec_fake), kl(i.mean_fake, i.logvar_fake)
    elbo_rec = (-2 * c * (BETA_REC * r_rec + BETA_NEG * k_rec)).exp()
    elbo_fake = (-2 * c * (BETA_REC * r_fake + BETA_NEG * k_fake)).exp()
    loss = c * (BETA_REC * r.mean() + BETA_KL * k.mean()) + 0.25 * (elbo_rec.mean() + elbo_fake.mean())
    return loss, *(s.detach() for s in (r, k, r_rec, k_rec, r_fake, k_fake, elbo_rec, elbo_fake))


def plain_autocast(i: Inputs) -> tuple[Tensor, ...]:
    with torch.autocast(i.x.device.type, dtype=torch.bfloat16):
        return plain(i)


def fused(first: Inputs, **options) -> Callable[[Inputs], tuple[Tensor, ...]]:
    objective = SoftIntroVAE(
        beta_rec=BETA_REC, beta_kl=BETA_KL, beta_neg=BETA_NEG, scale=scale(first), **options
    ).to(first.x.device)

    def run(i: Inputs) -> tuple[Tensor, ...]:
        loss, statistics = objective.encoder(
            Term(i.x, i.rec, Posterior(i.mean, i.logvar)),
            Term(i.rec, i.rec_rec, Posterior(i.mean_rec, i.logvar_rec)),
            Term(i.fake, i.rec_fake, Posterior(i.mean_fake, i.logvar_fake)),
        )
        return loss, *statistics.values()

    return run


def compiled(**options) -> Callable[[Inputs], tuple[Tensor, ...]]:
    return torch.compile(plain_autocast, dynamic=False, options=options or None)


def providers(first: Inputs, repeated: bool = False) -> dict[str, Callable[[Inputs], tuple[Tensor, ...]]]:
    """repeated: backward passes are repeated on one graph, whose buffers no compiled one may overwrite."""
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = not repeated
    found = {
        "plain": plain,
        "plain, autocast": plain_autocast,
        "compile": compiled(),
        "fused": fused(first),
    }
    if first.x.is_cuda:
        found["compile, cooperative"] = compiled(**{"triton.cooperative_reductions": True})
        found["fused, single launch"] = fused(first, single_launch=True)
    return found


def misses(run: Callable[[Inputs], tuple[Tensor, ...]], i: Inputs) -> dict[str, float]:
    """Relative errors of loss and gradients (largest entry over largest entry) against float64."""
    exact = Inputs(*(t.detach().double().requires_grad_(t.requires_grad) for t in i))
    want = plain(exact)[0]
    loss = run(i)[0]
    got = torch.autograd.grad(loss, i.wanted)
    known = torch.autograd.grad(want, exact.wanted)
    worst = max(
        ((g.double() - w).abs().max() / w.abs().max()).item() for g, w in zip(got, known, strict=True)
    )
    return {"loss_error": abs(loss.item() / want.item() - 1), "gradient_error": worst}


def sound_errors(name: str, errors: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether a provider may be timed: in bf16 plain formulas miss 1e-3 of the loss, fused ones do not."""
    loss, gradient = 1e-4, 1e-4
    if dtype == torch.bfloat16:
        loss, gradient = (1e-5, 1e-2) if name.startswith("fused") else (1e-2, 2e-2)
    return errors["loss_error"] <= loss and errors["gradient_error"] <= gradient  # never for NaN


def call(run, i: Inputs, direction: str) -> Callable[[], object]:
    if direction == "forward":
        return lambda: run(i)
    if direction == "both":
        return lambda: torch.autograd.grad(run(i)[0], i.wanted)
    loss = run(i)[0]
    return lambda: torch.autograd.grad(loss, i.wanted, retain_graph=True)


def least_bytes(i: Inputs, provider: str, direction: str) -> int:
    """What has to move: inputs once a pass, gradients once. The single launch passes once over everything."""
    reads, writes = i.bytes, i.gradient_bytes
    if "single" in provider:
        return reads + writes
    return {"forward": reads, "backward": reads + writes, "both": 2 * reads + writes}[direction]


def times(
    runs: dict, sets: list[Inputs], direction: str, device: str, refused: dict[str, str]
) -> dict[str, dict[str, float]]:
    """Milliseconds by provider: of the GPU alone, and from Python; `refused` says of which there are none."""
    makers = {}
    for name, run in runs.items():
        if "single" in name and direction == "backward":
            continue  # its gradients are made in the forward pass and handed out once
        makers[name] = lambda run=run: [call(run, i, direction) for i in sets]
    found = {name: {} for name in makers}
    if device == "cuda":
        graphs = each({name: partial(Captured, make) for name, make in makers.items()}, refused)
        for name, seconds in rounds({name: graph.seconds for name, graph in graphs.items()}, 5).items():
            found[name] |= seconds.row("gpu_ms")
        del graphs
    calls = each({name: make for name, make in makers.items() if name not in refused}, refused)
    walls = {name: partial(wall, sets_of, device, 0.1) for name, sets_of in calls.items()}
    for name, seconds in rounds(walls, 3).items():
        found[name] |= seconds.row("wall_ms")
    return {name: row for name, row in found.items() if name not in refused}


def measure(size: str, batch: int, dtype: torch.dtype, device: str, bandwidth: float | None) -> list[dict]:
    """Rows of one case: every provider, direction and, on a GPU, state of the cache."""
    first = Inputs.make(size, batch, dtype, device)
    base = {"size": size, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
    rows, sound = [], {}
    runs, refused = providers(first), {}
    for name, errors in each({n: partial(misses, run, first) for n, run in runs.items()}, refused).items():
        if sound_errors(name, errors, dtype):
            sound[name] = errors
        else:
            rows.append({**base, "provider": name, "refused": "misses float64", **errors})
    rows += [{**base, "provider": name, "refused": why} for name, why in refused.items()]
    copies = min(1 + 3 * second_level_cache(device) // first.bytes, 32)
    sets = [first, *(Inputs.make(size, batch, dtype, device, seed) for seed in range(1, copies))]
    rotating = "cold" if copies * first.bytes > 3 * second_level_cache(device) else f"{copies} sets"
    states = {"hot": sets[:1]} if copies == 1 else {rotating: sets, "hot": sets[:1]}
    if device == "cuda" and copies == 1:
        states = {"cold": [first, Inputs.make(size, batch, dtype, device, 1)]}
    for direction in DIRECTIONS:
        if direction == "backward":
            runs = providers(first, repeated=True)
        runs = {name: runs[name] for name in sound}
        count = device == "cuda" and direction == "both"
        uncounted: dict[str, str] = {}
        counted = each({n: partial(costs, run, first) for n, run in runs.items() if count}, uncounted)
        rows += [{**base, "provider": n, "refused": f"costs: {why}"} for n, why in uncounted.items()]
        for state, members in states.items():
            refused = {}
            timed = times(runs, members, direction, device, refused)
            why = {name: f"{direction}, {state}: {why}" for name, why in refused.items()}
            rows += [{**base, "provider": name, "refused": why[name]} for name in why]
            for name, found in timed.items():
                row = {**base, "provider": name, "direction": direction, "cache": state, **found}
                row |= sound[name]
                if bandwidth and "gpu_ms" in found:
                    moved = least_bytes(first, name, direction)
                    row["least_mib"] = moved / 2**20
                    row["percent_of_copy"] = 100 * moved / (found["gpu_ms"] * 1e-3) / bandwidth
                rows.append(row | counted.get(name, {}))
    return rows


def costs(run, i: Inputs) -> dict[str, float]:
    """Launches of both passes, bytes a sample held in between, most memory added at any time."""
    backward = lambda outputs: torch.autograd.grad(outputs[0], i.wanted)
    held, peak = memory(lambda: run(i), backward)
    return {
        "launches": launches(lambda: backward(run(i))),
        "held_bytes_per_sample": held / len(i.x),
        "peak_mib": peak / 2**20,
    }


def summary(rows: list[dict]) -> list[dict]:
    """How many times faster than the others each fused form is over both passes."""
    found = []
    both = [row for row in rows if row.get("direction") == "both"]
    for row in both:
        if not row["provider"].startswith("fused"):
            continue
        same = [o for o in both if all(o[k] == row[k] for k in ("size", "batch", "dtype", "cache"))]
        line = {k: row[k] for k in ("size", "batch", "dtype", "cache", "provider")}
        for clock in ("gpu_ms", "wall_ms"):
            if clock in row:
                ratios = {o["provider"]: o[clock] / row[clock] for o in same if o is not row}
                line[f"times_{clock.removesuffix('_ms')}"] = {k: round(v, 2) for k, v in ratios.items()}
        found.append(line)
    return found


def draw(rows: list[dict], path: Path) -> None:
    """Time of both passes over the batch, one panel a size; nothing where matplotlib is missing."""
    plt = pyplot(path)
    if plt is None:
        return
    from matplotlib.ticker import NullFormatter

    rows = [row for row in rows if row.get("direction") == "both" and row["cache"] != "hot"] or [
        row for row in rows if row.get("direction") == "both"
    ]
    clock = "gpu_ms" if any("gpu_ms" in row for row in rows) else "wall_ms"
    sizes = [size for size in SIZES if any(row["size"] == size for row in rows)]
    figure, axes = plt.subplots(1, len(sizes), figsize=(5 * len(sizes), 4), squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        for name in dict.fromkeys(row["provider"] for row in rows):
            line = [
                (row["batch"], row[clock]) for row in rows if (row["size"], row["provider"]) == (size, name)
            ]
            axis.plot(*zip(*sorted(line), strict=True), marker="o", label=name) if line else None
        axis.set(title=size, xlabel="batch", ylabel="ms, forward and backward", xscale="log", yscale="log")
        batches = sorted({row["batch"] for row in rows if row["size"] == size})
        axis.set_xticks(batches, batches)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: the committed results")
    parser.add_argument("--batches", type=int, nargs="+", help="4 16 64 256; on the CPU up to 64")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bandwidth = copy_bandwidth() if device == "cuda" else None
    batches = options.batches or (BATCHES if device == "cuda" else BATCHES[:-1])
    known, rows = machine(device), []
    known |= {
        "clock": "CUDA graph and wall" if device == "cuda" else "processor time, best of single calls",
        "copy_gb_per_second": bandwidth and bandwidth / 1e9,
        "not_measured": [] if device == "cuda" else ["everything on a GPU"],
    }
    for size in options.sizes:
        for batch in batches:
            try:
                rows += measure(size, batch, dtype, device, bandwidth)
            except Exception as error:
                rows.append({"size": size, "batch": batch, "provider": "all", "refused": reason(error)})
            print(f"{size}, batch {batch}: {sum('refused' not in row for row in rows)} rows", flush=True)
            result = {**known, "speedups": summary(rows), "rows": rows}
            save(options.out / f"losses-{device}.json", result)
    with open(options.out / f"losses-{device}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, options.out / f"losses-{device}.png")
    for line in result["speedups"]:
        print(line)


if __name__ == "__main__":
    main()
