"""Chamfer distance, forward and backward: this project's operator beside plain PyTorch and pytorch3d.

    python bench/chamfer.py [--device cuda] [--batch 8] [--points 512 1024 2048]

A version is measured when its errors and gradients agree with float64 brute force in this run. Time is that
of one call, on the CPU the best in processor time, on a GPU as issued from Python and, as `..._gpu_ms`, in a
CUDA graph; memory is what forward and backward add at their peak. Writes chamfer-<device>.json; pytorch3d has
no rows where it is not installed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from measure import Captured, machine, memory, reason, rounds, save, wall
from torch import Tensor

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


def added_mib(version, x: Tensor, y: Tensor, device: str) -> float:
    """Most memory that forward and backward add at any time, MiB (on the CPU: resident memory, Linux)."""
    if device == "cuda":
        loss = lambda: version(x, y).mean()
        return memory(loss, lambda kept: torch.autograd.grad(kept, y))[1] / 2**20
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else earlier peaks, kept by the allocator, would hide this one
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = _peak_kib()
    step(version, x, y)
    return (_peak_kib() - before) / 2**10


def _peak_kib() -> int:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measured(version, batch: int, points: int, device: str, seconds: float) -> dict[str, float]:
    x, y = clouds(batch, points, device)
    still = y.detach()
    # Memory first: the timing loop leaves freed blocks behind.
    added = added_mib(version, x, y, device)
    calls = {"forward": partial(version, x, still), "forward_backward": partial(step, version, x, y)}
    found = {"points": points, "added_mib": added}
    for name, call in calls.items():
        found[f"{name}_ms"] = 1e3 * wall([call], device, seconds)
        if device == "cuda":
            graph = Captured(lambda call=call: [call])
            found |= rounds({name: graph.seconds}, 5)[name].row(f"{name}_gpu_ms")
    return found


def rows_of(name: str, version, options: argparse.Namespace) -> Iterator[dict]:
    error = gate(version, options.device)
    if not error <= 1e-4:
        raise ValueError(f"wrong by {error:.1e}")
    for points in options.points:
        values = measured(version, options.batch, points, options.device, options.seconds)
        yield {"version": name, **values, "relative_error": error}
        print(name, "  ".join(f"{key} {value:.4g}" for key, value in values.items()), flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--points", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--seconds", type=float, default=0.3, help="of each measurement")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: the committed results")
    options = parser.parse_args(arguments)
    device, known, rows = options.device, machine(options.device), []
    for name, version in versions().items():
        try:
            rows.extend(rows_of(name, version, options))
        except Exception as error:
            print(f"{name:<10} {reason(error)}: not measured")
        save(options.out / f"chamfer-{device}.json", {**known, "batch": options.batch, "rows": rows})


if __name__ == "__main__":
    main()
