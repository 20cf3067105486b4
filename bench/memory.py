"""Peak memory of a style iteration over the batch: the plain trainer and the project's ways.

    python bench/memory.py [--resolution 64] [--batches 2 4 8]

Writes memory-<device>.json and .png under bench/results. A number is what one iteration adds at its peak to a
process that holds networks, optimizer states and inputs, and the plain trainer's also the gradients of the
iteration before, which it keeps; each is measured in a process of its own, and one that fails says why in its
place. On a CPU it is resident memory (Linux), the median of three processes; on a GPU what PyTorch allocated.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measure import machine, pyplot, save
from plain_style import PlainStyle
from plain_trainer import PlainTrainer
from step import WEIGHTS, Iteration, Ours

from sivae_fast.draws import Draws, Rows
from sivae_fast.models.style import StyleModel
from sivae_fast.training.recompute import recompute

RESULTS = Path(__file__).parent / "results"
#: Processes a number; resident memory differs by tens of MiB from one to the next.
RUNS = {"cpu": 3, "cuda": 1}


def plain(model: StyleModel) -> Iteration:
    where = next(model.parameters()).device
    return PlainTrainer(PlainStyle(model).to(where), **WEIGHTS, learning_rate=2e-5)


def recomputing(model: StyleModel) -> Iteration:
    made = Ours(model)
    recompute(model.recomputable_modules())
    return made


PROVIDERS: dict[str, Callable[[StyleModel], Iteration]] = {
    "plain": plain,
    "minimal": Ours,
    "minimal, decoding twice": functools.partial(Ours, share_forward=False),
    "minimal, recomputing": recomputing,
}


def added(run: Callable[[], None], device: torch.device) -> float:
    """MiB that a call adds at its peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = peak_resident()
    run()
    return peak_resident() - before


def peak_resident() -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**10


def measure(provider: str, resolution: int, batch: int) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    iteration = PROVIDERS[provider](StyleModel(resolution).to(device))
    draws = lambda i, count: Draws(0, i, Rows.all(count), device)
    small = torch.randn(1, 3, resolution, resolution, device=device)
    iteration(small, draws(0, 1))  # optimizer states, workspaces
    x = torch.randn(batch, 3, resolution, resolution, device=device)
    return added(lambda: iteration(x, draws(1, batch)), device)


def draw(rows: list[dict], path: Path, title: str) -> None:
    plt = pyplot(path)
    if plt is None:
        return
    figure, axis = plt.subplots(figsize=(6, 4))
    rows = [row for row in rows if "mib" in row]
    for name in dict.fromkeys(row["provider"] for row in rows):
        line = [(row["batch"], row["mib"]) for row in rows if row["provider"] == name]
        axis.plot(*zip(*line, strict=True), marker="o", label=name)
    axis.set(xlabel="batch", ylabel="MiB at the peak of an iteration", title=title, ylim=(0, None))
    axis.set_xticks(sorted({row["batch"] for row in rows}))
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: the committed results")
    parser.add_argument("--one", nargs=2, metavar=("PROVIDER", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(measure(options.one[0], options.resolution, int(options.one[1])))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = {
        "command": f"python bench/memory.py --resolution {options.resolution}",
        **machine(device),
        "resolution": options.resolution,
    }
    rows = []
    for provider in PROVIDERS:
        for batch in options.batches:
            command = [sys.executable, __file__, "--resolution", str(options.resolution)]
            command += ["--one", provider, str(batch)]
            runs = [subprocess.run(command, capture_output=True, text=True) for _ in range(RUNS[device])]
            row = {"provider": provider, "batch": batch}
            if failed := next((done for done in runs if done.returncode), None):
                row["refused"] = (failed.stderr.strip() or f"exit code {failed.returncode}").splitlines()[-1]
            else:
                row["mib"] = round(statistics.median(float(done.stdout) for done in runs), 1)
            rows.append(row)
            print(row, flush=True)
            save(options.out / f"memory-{device}.json", {**known, "rows": rows})
    title = f"{options.resolution}x{options.resolution}, {known['device']}"
    draw(rows, options.out / f"memory-{device}.png", title)


if __name__ == "__main__":
    main()
