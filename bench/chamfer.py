"""Chamfer distance, forward and backward: this project's operator beside plain PyTorch and pytorch3d.

    python bench/chamfer.py [--device cuda] [--batch 32] [--points 2048]

A row is printed when the errors and gradients of that version agree with float64 brute force in this run.
Times are medians; memory is what a version adds at its peak. Writes chamfer_<device>.json under
bench/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sivae_fast.files import write_text
from sivae_fast.kernels.chamfer import chamfer

RESULTS = Path(__file__).parent / "results"


def by_cdist(x: Tensor, y: Tensor) -> Tensor:
    """The usual way: the whole matrix of distances, by differences."""
    squares = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    return squares.amin(2).sum(1) + squares.amin(1).sum(1)


def by_expansion(x: Tensor, y: Tensor) -> Tensor:
    """The published way: |x|^2 + |y|^2 - 2 x.y, which can go negative."""
    squares = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None] - 2 * x @ y.transpose(1, 2)
    return squares.min(2).values.sum(1) + squares.min(1).values.sum(1)


def versions() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    found = {"sivae": chamfer, "cdist": by_cdist, "expansion": by_expansion}
    try:
        from pytorch3d.loss import chamfer_distance
    except ImportError:
        return found
    options = {"batch_reduction": None, "point_reduction": "sum"}
    return {**found, "pytorch3d": lambda x, y: chamfer_distance(x, y, **options)[0]}


def clouds(batch: int, points: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, batch, points, 3, generator=generator).mul(0.2).to(device)
    return x, y.requires_grad_()


def step(version, x: Tensor, y: Tensor) -> Tensor:
    return torch.autograd.grad(version(x, y).mean(), y)[0]


def gate(version, device: str) -> float:
    """Largest error of values and gradients, relative to float64 brute force, on small clouds."""
    x, y = clouds(2, 300, device)
    exact_y = y.detach().double().cpu().requires_grad_()
    exact_x = x.double().cpu()
    squares = (exact_x[:, :, None] - exact_y[:, None]).square().sum(3)
    exact = squares.amin(2).sum(1) + squares.amin(1).sum(1)
    gradient = torch.autograd.grad(exact.mean(), exact_y)[0]
    value_error = ((version(x, y).double().cpu() - exact) / exact).abs().max()
    gradient_error = (step(version, x, y).double().cpu() - gradient).abs().max() / gradient.abs().max()
    return max(value_error.item(), gradient_error.item())


def milliseconds(run: Callable[[], object], device: str, repeats: int) -> float:
    def once() -> float:
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        return 1e3 * (time.perf_counter() - start)

    once()
    return statistics.median(once() for _ in range(repeats))


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def added_mib(version, batch: int, points: int, device: str) -> float:
    """Memory that one forward and backward pass adds at its peak, in MiB."""
    x, y = clouds(batch, points, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(version, x, y)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = resident_mib()
    step(version, x, y)
    return resident_mib() - before


def resident_mib() -> float:
    """Peak resident memory of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**10


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--points", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    shape = (options.batch, options.points, options.device)
    table = []
    for name, version in versions().items():
        error = gate(version, options.device)
        if error > 1e-4:
            print(f"{name:<10} wrong by {error:.1e}: no row")
            continue
        x, y = clouds(*shape)
        still = y.detach()
        row = {
            "version": name,
            "forward_ms": milliseconds(partial(version, x, still), options.device, options.repeats),
            "forward_backward_ms": milliseconds(
                partial(step, version, x, y), options.device, options.repeats
            ),
            "added_mib": added_mib(version, *shape),
            "relative_error": error,
        }
        table.append(row)
        print(
            "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v:<10}" for k, v in row.items()),
            flush=True,
        )
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    result = {
        "device": f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "batch": options.batch,
        "points": options.points,
        "rows": table,
    }
    write_text(RESULTS / f"chamfer_{options.device}.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
