"""What training on several processes exchanges, what that costs, and what it would cost on many GPUs.

    python bench/scaling.py --out bench/results/scaling-cpu.json
    python bench/scaling.py --step-seconds 0.2 --images-per-gpu 8 --link-gbps 400 --latency-us 30

Measured here, with gloo and 1, 2 and 4 processes: the collectives of one introspective iteration of a small
style model, counted as they are called; seconds of an iteration and of its collectives; bytes of optimizer
state that each process holds. The processes share this machine's cores, so seconds are the smallest of
several iterations, and those of more processes than cores say nothing about a cluster.

Projected, for the model of --config at a constant number of images a GPU, from a step that was measured on
one GPU and a link, both given as options: a ring all-reduce over n GPUs takes 2 (n - 1) / n * bytes /
bandwidth plus a latency (Patarasuk and Yuan 2009). Without the options nothing is projected.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from sivae_fast.config import load_config
from sivae_fast.files import write_text
from sivae_fast.systems import make_model

ROOT = Path(__file__).parents[1]
ENGINES = {"torch": ("torch", 0), **{f"DeepSpeed ZeRO {zero}": ("deepspeed", zero) for zero in (0, 1, 2)}}
WORLDS, GPUS = (1, 2, 4), (8, 64, 512)
SMALL = [
    "growth.images_per_level=0", "train.warmup_images=0", "train.batch=16", "data.loader=torch",
    "run.name=scaling",
]  # fmt: skip


#: Collectives and which of their arguments is the larger of input and output.
PAYLOAD = {
    "all_reduce": 0,
    "reduce": 0,
    "broadcast": 0,
    "all_gather_into_tensor": 0,
    "reduce_scatter_tensor": 1,
    "all_gather": 0,
    "reduce_scatter": 1,
}


class Collectives:
    """Counts calls, payload bytes and seconds of every collective while it is entered."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.calls, self.bytes, self.seconds = defaultdict(int), defaultdict(int), 0.0

    def __enter__(self) -> Collectives:
        self._before = {name: getattr(dist, name) for name in PAYLOAD}
        for name, larger in PAYLOAD.items():
            setattr(dist, name, self._counted(name, larger, self._before[name]))
        return self

    def __exit__(self, *_) -> None:
        for name, function in self._before.items():
            setattr(dist, name, function)

    def _counted(self, name: str, larger: int, function):
        def call(*arguments, **options):
            payload = [*arguments, *options.values()][larger]
            tensors = payload if isinstance(payload, (list, tuple)) else [payload]
            self.calls[name] += 1
            self.bytes[name] += sum(t.numel() * t.element_size() for t in tensors)
            started = time.perf_counter()
            done = function(*arguments, **options)
            if hasattr(done, "wait"):
                done.wait()  # nothing overlaps: an asynchronous call would hide its time here
            self.seconds += time.perf_counter() - started
            return done

        return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--iterations", type=int, default=8, help="timed iterations; the first two warm up")
    parser.add_argument("--config", default=str(ROOT / "launch" / "configs" / "ffhq256.yaml"))
    parser.add_argument("--step-seconds", type=float, help="an iteration measured on one GPU")
    parser.add_argument("--images-per-gpu", type=int, help="images of that iteration")
    parser.add_argument("--link-gbps", type=float, help="gigabits per second of the slowest link of a GPU")
    parser.add_argument("--latency-us", type=float, help="microseconds of an all-reduce of one number")
    parser.add_argument("--out", type=Path, help="file; without it the result is printed alone")
    options = parser.parse_args()
    from measure import machine

    torch.set_num_threads(1)
    load = os.getloadavg()
    cells = {
        name: {str(world): measure(kind, zero, world, options.iterations) for world in WORLDS}
        for name, (kind, zero) in ENGINES.items()
    }
    result = {
        "command": "python bench/scaling.py",
        **machine("cpu"),
        "backend": "gloo, all processes on the same cores, 1 thread each",
        "load_average": {"before": load, "after": os.getloadavg()},
        "clock": f"wall, smallest of {options.iterations - 2} iterations",
        "model": "quickstart at 32x32, global batch 16",
        "measured": cells,
        "projected": project(options),
    }
    print(json.dumps(result, indent=1))
    if options.out:
        write_text(options.out, json.dumps(result, indent=1) + "\n")


def measure(kind: str, zero: int, world: int, iterations: int) -> dict:
    """One cell of the table, from processes of its own."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        arguments = (kind, zero, world, port, iterations, folder)
        torch.multiprocessing.spawn(_process, arguments, nprocs=world)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
    first = found[0]
    return {
        **first,
        "seconds": round(max(one["seconds"] for one in found), 4),
        "seconds_of_collectives": round(min(one["seconds_of_collectives"] for one in found), 4),
        "share_of_collectives": round(min(one["share_of_collectives"] for one in found), 3),
    }


def _process(rank: int, kind: str, zero: int, world: int, port: int, iterations: int, folder: str) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    os.chdir(folder)
    make_set(Path(folder) / f"set{rank}")
    overrides = [*SMALL, f"data.path=set{rank}", f"engine.kind={kind}", f"engine.zero={zero}"]
    config = load_config(ROOT / "launch" / "configs" / "quickstart.yaml", overrides)
    with contextlib.redirect_stdout(None), Collectives() as collectives:
        found = _iterate(config, kind, zero, iterations, collectives)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


def _iterate(config, kind: str, zero: int, iterations: int, collectives: Collectives) -> dict:
    """The trainer's own iteration on random images."""
    from sivae_fast.systems import make_schedule
    from sivae_fast.training.engine import deepspeed_missing, distributed
    from sivae_fast.training.loop import Trainer

    if kind == "deepspeed":
        deepspeed_missing()  # imports it before the processes are connected, as training does
    with distributed(kind, 300) as (rank, world, device):
        trainer = Trainer(config, make_schedule(config), rank, world, device, kind, zero)
        stage = trainer.schedule.at(0)
        trainer._enter(stage)
        x = torch.rand(stage.batch // world, 3, 32, 32) * 2 - 1
        rounds = []
        for _ in range(iterations):
            if world > 1:
                dist.barrier()
            collectives.clear()
            started = time.perf_counter()
            trainer.iterate(x, stage)
            rounds.append((time.perf_counter() - started, collectives.seconds))
            calls, sent = dict(collectives.calls), dict(collectives.bytes)
        seconds, inside = min(rounds[2:])
        sides = {"encoder": trainer.model.encoder_modules(), "decoder": trainer.model.decoder_modules()}
        parameters = {
            side: 4 * sum(p.numel() for module in modules for p in module.parameters())
            for side, modules in sides.items()
        }
        state = [held(engine) for engine in trainer.engines.values()]
        trainer.close()
    return {
        "seconds": seconds,
        "seconds_of_collectives": min(inside for _, inside in rounds[2:]),
        "share_of_collectives": inside / seconds,
        "calls": calls,
        "bytes": sent,
        "bytes_of_parameters": parameters,
        "bytes_of_moments": sum(moments for moments, _ in state),
        "bytes_of_partition": sum(partition for _, partition in state),
    }


def held(engine) -> tuple[int, int]:
    """Bytes this process holds: (moments, DeepSpeed's own float32 copy of its share of the weights)."""
    moments = sum(
        state[key].numel() * state[key].element_size()
        for state in engine.optimizer.state.values()
        for key in ("exp_avg", "exp_avg_sq")
    )
    zero = getattr(getattr(engine, "_engine", None), "optimizer", None)
    partitions = getattr(zero, "single_partition_of_fp32_groups", ())
    return moments, sum(p.numel() * p.element_size() for p in partitions)


def make_set(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(16):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")


def project(options: argparse.Namespace) -> dict:
    """Seconds and images per second at 8, 64 and 512 GPUs; "not measured" without a step and a link."""
    model = make_model(load_config(options.config))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    given = (options.step_seconds, options.images_per_gpu, options.link_gbps, options.latency_us)
    fixed = {"config": Path(options.config).name, "bytes_of_gradients": size, "given": None}
    moments = {n: {"ZeRO 0": 2 * size, "ZeRO 1 and 2": 3 * size // n} for n in GPUS}
    fixed["bytes_of_optimizer_a_gpu"] = moments
    if None in given:
        return {**fixed, "images_per_second": "not measured"}
    rows = {n: forecast(n, size, *given) for n in GPUS}
    names = ("step_seconds", "images_per_gpu", "link_gbps", "latency_us")
    return {**fixed, "given": dict(zip(names, given, strict=True)), "images_per_second": rows}


def forecast(n: int, size: int, step: float, images: int, gbps: float, latency: float) -> dict[str, float]:
    """One row of the projection: two all-reduces, of the encoder's and of the decoder's gradients, in `size`.

    size: bytes of all gradients; step: seconds; latency: microseconds. "overlapped" is the bound in which
    all communication but its latency hides behind the computation.
    """
    wire = 2 * (n - 1) / n * size / (gbps * 1e9 / 8)
    waiting = 2 * latency * 1e-6
    after, hidden = step + wire + waiting, max(step, wire) + waiting
    return {
        "communication_seconds": round(wire + waiting, 5),
        "after backward": round(n * images / after, 1),
        "overlapped, at best": round(n * images / hidden, 1),
        "efficiency": round(step / after, 3),
        "efficiency overlapped": round(step / hidden, 3),
    }


if __name__ == "__main__":
    main()
