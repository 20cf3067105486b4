"""Measuring helpers of the benches: times on either device, memory, launches, what the machine is."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from sivae_fast.files import write_text

Call = Callable[[], object]
T = TypeVar("T")


#: What benches write: changed, it does not make other code of a commit.
WRITTEN = ("bench/results", "docs", "README.md")


def commit() -> str:
    """What the variable SIVAE_COMMIT says, for a copy without its repository; else what git says.

    "-dirty" follows where files differ from the commit, but for `WRITTEN`.
    """
    if known := os.environ.get("SIVAE_COMMIT"):
        return known
    try:
        found = _git("describe", "--always").stdout.strip()
        changed = _git("diff", "--quiet", "HEAD", "--", ":/", *(f":(top,exclude){name}" for name in WRITTEN))
    except OSError:  # no git
        found = ""
    if not found:
        return "unknown"
    return f"{found}-dirty" if changed.returncode else found


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)


def machine(device: str) -> dict:
    """What a result has to name: hardware, versions, commit. To be asked for before measuring."""
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    if device == "cuda":
        import triton

        found |= {"triton": triton.__version__, "cuda": torch.version.cuda, **driver()}
    return found


def driver() -> dict[str, str]:
    """Driver, clocks and power limit of the GPU in use; {} where nvidia-smi does not answer."""
    wanted = {
        "driver": "driver_version",
        "clock_before": "clocks.sm",
        "clock_limit": "clocks.max.sm",
        "power_limit": "power.limit",
    }
    command = ["nvidia-smi", f"--query-gpu={','.join(wanted.values())}", "--format=csv,noheader"]
    if uuid := getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None):
        command += ["-i", f"GPU-{uuid}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.strip().split("\n")[0].split(", ")
    return dict(zip(wanted, values, strict=True)) if len(values) == len(wanted) else {}


def wall(calls: Sequence[Call], device: str, seconds: float = 0.2) -> float:
    """Seconds a call takes as issued from Python, over a loop through `calls`; CPU: processor time, best."""
    for call in calls[:3]:
        call()
    if device == "cpu":
        return _processor_time(calls, seconds)
    passes = -(-20 // len(calls))  # at least 20 calls before Python waits for the GPU
    torch.cuda.synchronize()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or count < 3 * len(calls):
        for _ in range(passes):
            for call in calls:
                call()
        count += passes * len(calls)
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def _processor_time(calls: Sequence[Call], seconds: float) -> float:
    """Best of single calls in processor time of the process, which other programs do not lengthen."""
    times, begin = [], time.process_time()
    while time.process_time() - begin < seconds or len(times) < 5:
        for call in calls:
            start = time.process_time_ns()
            call()
            times.append(time.process_time_ns() - start)
    return min(times) * 1e-9


class Captured:
    """Calls captured in one CUDA graph, so that launching from Python is not part of what is timed.

    make: makes the calls, on the stream that they are captured on: a backward pass runs on the stream of its
        forward pass, and any other one would end the capture.
    """

    def __init__(self, make: Callable[[], Sequence[Call]]):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.calls = make()
            for _ in range(2):
                for call in self.calls:
                    call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            for call in self.calls:
                call()

    def seconds(self, at_least: float = 0.02) -> float:
        """Seconds of one call, by events around enough replays to last `at_least` seconds."""
        replays = 1
        while True:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(replays):
                self.graph.replay()
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end) * 1e-3
            if elapsed >= at_least:
                return elapsed / replays / len(self.calls)
            replays = max(replays + 1, int(1.5 * replays * at_least / max(elapsed, 1e-6)))


def save(path: Path, result: dict) -> None:
    """Called again after each case: a machine that is lent for minutes may end a bench at any of them."""
    write_text(path, json.dumps(result, indent=1) + "\n")


def reason(error: Exception) -> str:
    """What a result says in place of times: one version that fails must not cost the others."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {error}"[:500]


def each(calls: dict[str, Callable[[], T]], refused: dict[str, str]) -> dict[str, T]:
    """What the calls return; of one that fails `refused` says why."""
    found = {}
    for name, call in calls.items():
        try:
            found[name] = call()
        except Exception as error:
            refused[name] = reason(error)
    return found


def pyplot(path: Path):
    """matplotlib.pyplot for a picture at `path`; None, and a line, where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print(f"matplotlib is missing: no {path.name}")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


class Spread(NamedTuple):
    """Of the rounds of one timer, in what it returns."""

    median: float
    least: float
    most: float

    def row(self, name: str, factor: float = 1e3) -> dict[str, float]:
        """The entries of a result; milliseconds of seconds by default."""
        values = (factor * value for value in self)
        return dict(zip((name, f"{name}_least", f"{name}_most"), values, strict=True))


def rounds(timers: dict[str, Callable[[], float]], count: int) -> dict[str, Spread]:
    """`count` rounds of every timer, in turns, so that drift of the machine meets all."""
    found: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(count):
        for name, timer in timers.items():
            found[name].append(timer())
    return {name: Spread(statistics.median(v), min(v), max(v)) for name, v in found.items()}


def copy_bandwidth() -> float:
    """Bytes a second that copying 1 GiB on the GPU reads and writes together."""
    source = torch.randint(256, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / Captured(lambda: [lambda: target.copy_(source)]).seconds(0.1)


def second_level_cache(device: str) -> int:
    """Bytes of the GPU's L2; 0 on the CPU, where inputs are not rotated."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20) if device == "cuda" else 0


def launches(call: Call) -> int:
    """Kernels, copies and fills that a call puts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        call()
        torch.cuda.synchronize()
    return len(on_device(found.events()))


def on_device(events: Iterable) -> list:
    """Of a profile's events the kernels, copies and fills, without annotations and waiting."""
    waiting = (" Sync", "Stream Wait Event")
    return [
        event
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.endswith(waiting)
    ]


def memory(forward: Callable[[], object], backward: Callable[[object], object]) -> tuple[int, int]:
    """Bytes held between forward and backward, and the most that both add at any time."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = forward()
    held = torch.cuda.memory_allocated() - before
    gradients = backward(kept)
    peak = torch.cuda.max_memory_allocated() - before
    del kept, gradients
    return held, peak
