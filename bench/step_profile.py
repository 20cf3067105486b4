"""Where the time of a training iteration goes, by part, with FLOPs, bytes and the machine's own limits.

    python bench/step_profile.py [--config launch/configs/quickstart.yaml] [key=value ...]

Runs the real trainer of a configuration at its last level and writes step-profile-<device>.json and .png
under --out (bench/results). Times are means over the iterations; on a CPU the clock is processor time. FLOPs
and bytes are counted in a further iteration: bytes are those of all operands and results of every operation,
what would move if no cache held anything. Limits (matrix product, copy) are measured in the same process. On
a GPU `idle` is the part of the iteration in which no kernel ran.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
from measure import Captured, copy_bandwidth, machine, on_device, pyplot, wall
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sivae_fast.config import Config, load_config
from sivae_fast.files import write_text
from sivae_fast.systems import make_schedule
from sivae_fast.training.loop import Trainer

RESULTS = Path(__file__).parent / "results"
OF_A_SIDE = ("forward", "loss", "backward", "optimizer")
SIDES = ("encoder", "decoder")
PARTS = ["loader", *(f"{side} {part}" for side in SIDES for part in OF_A_SIDE), "averaging", "rest"]


class Clock:
    """Time, FLOPs and bytes of nested sections; each counts what is not inside another one."""

    def __init__(self, now):
        self.now = now  # () -> {quantity: value so far}
        self.found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._open: list[str] = []
        self._last = now()

    @contextmanager
    def section(self, name: str):
        self._book()
        self._open.append(name)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def wrap(self, owner: object, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def timed(*args, **options):
            with self.section(name):
                return inner(*args, **options)

        setattr(owner, method, timed)

    def _book(self) -> None:
        now = self.now()
        if self._open:
            for quantity, value in now.items():
                self.found[self._open[-1]][quantity] += value - self._last[quantity]
        self._last = now


class Bytes(TorchDispatchMode):
    """Bytes of the tensors that operations read and write; views move nothing."""

    total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        if not operation.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, results)) if isinstance(t, torch.Tensor)]
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return results


def seconds(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def attach(clock: Clock, trainer: Trainer) -> None:
    """Names the parts of the trainer's iteration."""
    step, objective = trainer.step, trainer.objective
    for side in SIDES:
        clock.wrap(step, f"{side}_phase", f"{side} forward")
        clock.wrap(objective, side, f"{side} loss")
        clock.wrap(trainer.engines[side], "backward", f"{side} backward")
        clock.wrap(trainer.engines[side], "step", f"{side} optimizer")
    clock.wrap(trainer.data, "to_input", "loader")
    if trainer.average:
        clock.wrap(trainer.average, "update", "averaging")


class Loader:
    """Batches under the name `loader`."""

    def __init__(self, batches, clock: Clock):
        self.batches, self.clock = batches, clock

    def __next__(self):
        with self.clock.section("loader"):
            return next(self.batches)


def make_trainer(config: Config, device: torch.device) -> tuple[Trainer, object]:
    """A trainer past its warm-up, at the last level."""
    trainer = Trainer(config, make_schedule(config), 0, 1, device)
    levels = trainer.schedule.levels
    per_level = trainer.schedule.images_per_level
    begin = int((levels - 1 + trainer.schedule.fade) * per_level) + 1 if per_level else 0
    trainer.images = max(begin, config.train.warmup_images)
    return trainer, trainer.data.batches(trainer.images, trainer.schedule.batch, 0, 1)


def profile(config: Config, device: torch.device, iterations: int) -> dict:
    trainer, batches = make_trainer(config, device)
    try:
        for _ in range(2):
            trainer._advance(batches)
        total = [seconds(device)]
        for _ in range(iterations):
            trainer._advance(batches)
        total.append(seconds(device))
        clock = Clock(lambda: {"seconds": seconds(device)})
        attach(clock, trainer)
        loader = Loader(batches, clock)
        for _ in range(iterations):
            with clock.section("rest"):
                trainer._advance(loader)
        with FlopCounterMode(display=False) as flops, Bytes() as moved:
            clock.now = lambda: {"flops": flops.get_total_flops(), "bytes": moved.total}
            clock._last = clock.now()
            with clock.section("rest"):
                trainer._advance(loader)
        batch = trainer.schedule.batch(trainer.images)
        iteration_seconds = (total[1] - total[0]) / iterations
        idle = idle_share(trainer, batches, iteration_seconds) if device.type == "cuda" else None
    finally:
        trainer.close()
    rows = [row_of(part, clock.found[part], iterations) for part in PARTS if part in clock.found]
    return {
        "batch": batch,
        "level": trainer.lod,
        "iteration_seconds": iteration_seconds,
        "idle": idle,
        "rows": rows,
    }


def row_of(part: str, found: dict[str, float], iterations: int) -> dict:
    return {
        "part": part,
        "seconds": found["seconds"] / iterations,
        "gflop": found["flops"] / 1e9,
        "mib": found["bytes"] / 2**20,
    }


def idle_share(trainer: Trainer, batches, iteration_seconds: float) -> float | None:
    """Share of an iteration in which the GPU did nothing; it takes `iteration_seconds` without a profiler.

    None where the profiler sees nothing of it.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as found:
        trainer._advance(batches)
        torch.cuda.synchronize()
    seen = on_device(found.events())
    busy = 1e-6 * sum(event.device_time for event in seen)
    return max(0.0, 1 - busy / iteration_seconds) if seen else None


def limits(device: torch.device) -> dict[str, float]:
    """Measured FLOPs a second of a matrix product (bf16 on a GPU, float32 on a CPU) and bytes a second."""
    if device.type == "cuda":
        a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
        return {
            "flops": 2 * 8192**3 / Captured(lambda: [lambda: a @ b]).seconds(0.2),
            "bytes": copy_bandwidth(),
        }
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    source, target = torch.rand(1 << 26), torch.zeros(1 << 26)
    return {
        "flops": 2 * 1024**3 / wall([lambda: a @ b], "cpu"),
        "bytes": 2 * 4 * source.numel() / wall([lambda: target.copy_(source)], "cpu"),
    }


def add_limits(rows: list[dict], limit: dict[str, float]) -> None:
    whole = sum(row["seconds"] for row in rows)
    for row in rows:
        row["share"] = row["seconds"] / whole
        row["of_flop_limit"] = 1e9 * row["gflop"] / row["seconds"] / limit["flops"]
        row["of_byte_limit"] = 2**20 * row["mib"] / row["seconds"] / limit["bytes"]


def text(found: dict) -> str:
    lines = [
        "| part | ms | share | GFLOP | MiB | of FLOP limit | of byte limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['part']} | {1e3 * row['seconds']:.2f} | {row['share']:.1%} | {row['gflop']:.2f} "
            f"| {row['mib']:.0f} | {row['of_flop_limit']:.0%} | {row['of_byte_limit']:.0%} |"
        )
    return "\n".join(lines)


def draw(found: dict, path: Path) -> None:
    plt = pyplot(path)
    if plt is None:
        return
    rows = found["rows"]
    figure, axis = plt.subplots(figsize=(9, 0.4 * len(rows) + 1.2))
    axis.barh([row["part"] for row in rows], [1e3 * row["seconds"] for row in rows], color="#4878a8")
    for i, row in enumerate(rows):
        label = f" {row['share']:.1%}, {row['of_flop_limit']:.0%} of the FLOP limit"
        axis.text(1e3 * row["seconds"], i, label, va="center", fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.35)
    axis.set(xlabel="ms an iteration", title=f"{found['config']}, batch {found['batch']}, {found['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="launch/configs/quickstart.yaml")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: the committed results")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = machine(device.type)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            options.config, [*options.overrides, f"run.folder={folder}", "engine.kind=torch"]
        )
        found = profile(config, device, options.iterations)
    limit = limits(device)
    add_limits(found["rows"], limit)
    found = {
        "config": Path(options.config).stem,
        "overrides": options.overrides,
        **known,
        "clock": "wall, synchronised at every part" if device.type == "cuda" else "processor time",
        "limits": limit,
        **found,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / f"step-profile-{device.type}.json", json.dumps(found, indent=1) + "\n")
    draw(found, options.out / f"step-profile-{device.type}.png")
    print(text(found))


if __name__ == "__main__":
    main()
