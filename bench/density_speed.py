"""Iterations a second on a density beside the plain published iteration: same threads, machine and run.

    python bench/density_speed.py [--threads 1] [--out bench/results/density_speed.json]

Each contender runs in processes of its own, in turns, so that a change of the machine's load meets all.
The numbers are best of the turns, in processor time of the process (what a quiet core would take) and in wall
time. Ratios are to the plain iteration of the same precision, and for bfloat16 also to the one in float32,
which is the published one. Before anything is timed, the losses of the first iterations are held against the
plain ones in float32. Beside them stands what the matrix products of one iteration take when each is repeated
by itself, in a warm cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import commit
from plain import density_2d

from sivae_fast.config import load_config
from sivae_fast.data.densities import Density
from sivae_fast.draws import Draws, Rows
from sivae_fast.files import write_text
from sivae_fast.systems import make_schedule
from sivae_fast.training.loop import Trainer

REPOSITORY = Path(__file__).parents[1]
RESULT = REPOSITORY / "bench" / "results" / "density_speed.json"
BATCH = 512
PHASES = ("soft", "vae")
PLAIN = {"plain": None, "plain, bf16": torch.bfloat16}
OURS = {  # overrides of the configuration
    "published schedule": ["train.schedule=published", "train.precision=fp32"],
    "minimal schedule": ["train.precision=fp32"],
    "minimal schedule, bf16": ["train.precision=bf16"],
}
CONTENDERS = (*PLAIN, *OURS)
TOLERANCE = {"minimal schedule": 1e-4, "minimal schedule, bf16": 1e-3}  # of the losses, relative


def make_trainer(overrides: list[str], phase: str, folder: str) -> Trainer:
    warmup = 0 if phase == "soft" else 10**9
    common = [f"run.folder={folder}", f"train.warmup_images={warmup}", "train.images=1000000000"]
    config = load_config(REPOSITORY / "launch/configs/density-8gaussians.yaml", [*common, *overrides])
    return Trainer(config, make_schedule(config), 0, 1, torch.device("cpu"))


def contender(name: str, phase: str, folder: str) -> Callable[[], object]:
    """One training iteration, data included."""
    if name in PLAIN:
        data, net = Density("8gaussians"), density_2d(autocast=PLAIN[name])
        iteration = net.soft if phase == "soft" else net.vae
        return lambda: iteration(data.sample(BATCH))
    trainer = make_trainer(OURS[name], phase, folder)
    batches = trainer.data.batches(0, lambda n: BATCH, 0, 1)
    return lambda: trainer._advance(batches)


def check(name: str, iterations: int = 5) -> float:
    """Largest relative difference to the losses of the plain iteration, from the same weights and noise."""
    now = {"images": 0}
    stream = lambda name: Draws(0, now["images"], Rows.all(BATCH)).stream(name)
    plain = density_2d(normal=lambda name, like: stream(name).normal(*like.shape))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(OURS[name], "soft", folder)
        for ours, theirs in ((trainer.model.encoder, plain.encoder), (trainer.model.decoder, plain.decoder)):
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                q.data.copy_(p.data)
        batches, worst = trainer.data.batches(0, lambda n: BATCH, 0, 1), 0.0
        for _ in range(iterations):
            now["images"] = trainer.images
            x = trainer.data.to_input(Rows.all(BATCH), Draws(0, trainer.images, Rows.all(BATCH)))
            expected = plain.soft(x)
            trainer._advance(batches)
            found = trainer.read_meter()
            trainer.meter.clear()
            pairs = zip((found["loss_encoder"], found["loss_decoder"]), expected, strict=True)
            worst = max(worst, *(abs(a - b) / abs(b) for a, b in pairs))
        trainer.close()
    return worst


def time_one(name: str, phase: str, threads: int, rounds: int = 6) -> dict[str, float]:
    """Best milliseconds an iteration over a few rounds of a tenth of a second or more."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        iteration = contender(name, phase, folder)
        for _ in range(4):
            iteration()
        count, found = 6 if phase == "soft" else 20, []
        for _ in range(rounds):
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(count):
                iteration()
            found.append(((time.process_time() - cpu) / count, (time.perf_counter() - wall) / count))
    return {"cpu_ms": 1e3 * min(f[0] for f in found), "wall_ms": 1e3 * min(f[1] for f in found)}


def products(threads: int) -> dict[str, float]:
    """Milliseconds and GFLOP of the matrix products of one introspective iteration, each timed alone."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        iteration = contender("minimal schedule", "soft", folder)
        iteration()
        with torch.profiler.profile(record_shapes=True) as profile:
            iteration()
    milliseconds = gflop = 0.0
    for event in profile.key_averages(group_by_input_shape=True):
        if event.key in ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm"):
            one, operations = _product(event.key, [shape for shape in event.input_shapes if shape])
            milliseconds += 1e3 * event.count * one
            gflop += 1e-9 * event.count * operations
    return {"ms": round(milliseconds, 1), "gflop": round(gflop, 3)}


def _product(name: str, shapes: list[list[int]], rounds: int = 7) -> tuple[float, int]:
    """(best seconds, operations) of one product of fresh operands."""
    tensors = [torch.randn(shape) for shape in shapes]
    if name == "mkldnn::_linear_pointwise":
        x, weight, *bias = tensors
        inner, columns = weight.shape[1], weight.shape[0]
        call = lambda: torch.ops.mkldnn._linear_pointwise(x, weight, *(bias or [None]), "none", [], "")
    else:
        *bias, x, weight = tensors
        inner, columns = weight.shape
        call = (lambda: torch.addmm(*bias, x, weight)) if bias else (lambda: x @ weight)
    operations, found = 2 * x.shape[0] * inner * columns, []
    count = max(4, int(1e9 / operations))
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(count):
            call()
        found.append((time.process_time() - start) / count)
    return min(found), operations


def run(threads: int, turns: int) -> dict:
    results = {phase: {name: [] for name in CONTENDERS} for phase in PHASES}
    for turn in range(turns):
        for phase in PHASES:
            for name in CONTENDERS:
                print(f"turn {turn + 1}/{turns}  {phase}  {name}", file=sys.stderr)
                command = [sys.executable, __file__, "--one", name, phase, "--threads", str(threads)]
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                results[phase][name].append(json.loads(done.stdout.splitlines()[-1]))
    return results


def summary(results: dict) -> dict:
    """Per phase and contender: best times, and how many times faster than plain."""
    table = {}
    for phase, contenders in results.items():
        table[phase] = {}
        for name, turns in contenders.items():
            row = {key: round(min(turn[key] for turn in turns), 2) for key in ("cpu_ms", "wall_ms")}
            row["iterations_per_cpu_second"] = round(1e3 / row["cpu_ms"], 1)
            if name.endswith(", bf16"):
                row |= ratios(contenders["plain, bf16"], turns)
                row["to_fp32"] = ratios(contenders["plain"], turns)
            else:
                row |= ratios(contenders["plain"], turns)
            table[phase][name] = row
    return table


def ratios(plain: list[dict], turns: list[dict]) -> dict[str, float]:
    """How many times faster than plain: by the best turn of each, and the median of the turns."""
    best = min(turn["cpu_ms"] for turn in plain) / min(turn["cpu_ms"] for turn in turns)
    each = [a["cpu_ms"] / b["cpu_ms"] for a, b in zip(plain, turns, strict=True)]
    return {"ratio_best": round(best, 2), "ratio_median": round(statistics.median(each), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT, help="default: the committed file")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "PHASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(time_one(*options.one, options.threads)))
        return
    differences = {name: check(name) for name in TOLERANCE}
    for name, difference in differences.items():
        if difference > TOLERANCE[name]:
            raise SystemExit(f"{name}: losses differ from the plain ones by {difference:.1e}: nothing timed")
    record = {
        "command": f"python bench/density_speed.py --threads {options.threads}",
        "machine": {"cpu": cpu_name(), "threads": options.threads, "load": os.getloadavg()[0]},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
        "losses_differ_at_most": differences,
        "matrix_products_alone": products(options.threads),
        **summary(run(options.threads, options.turns)),
    }
    text = json.dumps(record, indent=1)
    write_text(options.out, text + "\n")
    print(text)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
