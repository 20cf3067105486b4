"""Iterations a second of the small systems, where launches decide: plain, eager, captured as CUDA graphs.

    python bench/small.py --out bench/results/small-cuda.json

The density model at batch 512 and the residual model at 32x32 and batch 32, as their configurations have
them, data included; on a CPU far smaller, and without graphs, to show that the script runs. `plain` is the
published iteration in plain PyTorch with its data on the device already; on a GPU it is there with networks
compiled by torch.compile, too, then with fused Adam and without reading its losses. All run under the
settings of `launch/train.py`: the fastest of cuDNN's algorithms, TF32 convolutions, float32 matrix products.
Rounds of all are interleaved, a row holds the median. Before anything is timed, the losses of the first
iterations of all must agree.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from measure import machine, reason, rounds, save
from PIL import Image
from plain import density_2d
from plain_residual import PlainResidual

from sivae_fast.config import load_config
from sivae_fast.draws import Draws, Rows
from sivae_fast.systems import make_schedule
from sivae_fast.training.loop import Trainer

REPOSITORY = Path(__file__).parents[1]
SYSTEMS = {
    "density": ["launch/configs/density-8gaussians.yaml", "train.warmup_images=0", "train.precision=fp32"],
    "residual": ["launch/configs/cifar10.yaml", "data.path={pictures}", "data.loader=torch"],
}
TINY = {
    "density": ["train.batch=16"],
    "residual": ["train.batch=4", "model.widths=[4,8]", "model.resolution=8", "model.latent_size=4"],
}
CHECKED = 6  # iterations; the last ones of a captured system are replays
#: Of the losses of each, relative to the plain ones. The game magnifies rounding: in float32 on a CPU those
#: of the residual system are 9e-8, 1e-5, 7e-5, 9e-4, 8e-4 and 5e-4 apart.
TOLERANCES = (1e-3, 1e-3, 1e-3, *[1e-2] * (CHECKED - 3))
#: Of compiled networks, which multiply in TF32: the magnified difference of later iterations tells nothing.
COMPILED = (0.02, 0.02)


class System:
    """One of SYSTEMS in a folder of its own: trainers with any overrides, and its plain iteration."""

    def __init__(self, name: str, folder: Path, device: torch.device):
        self.name, self.folder, self.device = name, folder, device
        tiny = TINY[name] if device.type == "cpu" else []
        path, *self.overrides = [*SYSTEMS[name], *tiny, "engine.kind=torch", "train.images=1000000000"]
        self.path = REPOSITORY / path
        self.overrides = [text.format(pictures=folder / "pictures") for text in self.overrides]
        side = load_config(self.path, self.overrides).model.model_dump().get("resolution")
        if side:
            make_pictures(folder / "pictures", side)

    def trainer(self, *overrides: str) -> Trainer:
        where = [f"run.folder={self.folder / '-'.join(overrides or ['eager'])}"]
        config = load_config(self.path, [*self.overrides, *where, *overrides])
        return Trainer(config, make_schedule(config), 0, 1, self.device)

    def input(self, trainer: Trainer, batch) -> torch.Tensor:
        """What the networks see of a batch where the trainer stands."""
        draws = trainer.draws(Rows.all(trainer.stage.batch))
        return trainer.data.to_input(batch, draws, trainer.lod, 1.0)

    def plain(self, trainer: Trainer, compile: dict | None = None) -> Callable[..., tuple]:
        """Both losses of the plain iteration on x, from the trainer's weights and its draws at `images`.

        compile: options of torch.compile for its networks; the losses are then tensors.
        """
        now, rows, published = {}, Rows.all(trainer.stage.batch), compile is None
        # Not PyTorch's own: where a capture has failed, that draws nothing more.
        own = torch.Generator(self.device).manual_seed(0)

        def draw(name: str, like: torch.Tensor) -> torch.Tensor:
            if now["draws"]:
                return now["draws"].stream(name).normal(*like.shape)
            return torch.randn(like.shape, generator=own, device=like.device, dtype=like.dtype)

        encoder, decoder = copy.deepcopy((trainer.model.encoder, trainer.model.decoder))
        if self.name == "density":
            net = density_2d(normal=draw, published=published)
            for ours, theirs in ((encoder, net.encoder), (decoder, net.decoder)):
                for p, q in zip(ours.parameters(), theirs.to(self.device).parameters(), strict=True):
                    q.data.copy_(p.data)
            iteration, networks = net.soft, (net.encoder, net.decoder)
        else:
            objective, latents = trainer.config.objective, trainer.config.model.latent_size
            betas = objective.beta_rec, objective.beta_kl, objective.beta_neg
            net = PlainResidual(encoder, decoder, decoder, betas, 1e-8, draw, published)
            iteration, networks = lambda x: net.iteration(x, latents), (encoder, decoder)
        if compile is not None:
            for network in networks:
                network.compile(**compile)

        def run(x: torch.Tensor, images: int | None = None) -> tuple[float, float]:
            seed = trainer.config.train.seed
            now["draws"] = None if images is None else Draws(seed, images, rows, self.device)
            if compile is not None:
                torch.compiler.cudagraph_mark_step_begin()
            return iteration(x)

        return run


def make_pictures(folder: Path, side: int, count: int = 256) -> None:
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).save(folder / f"{i}.png")


def contenders(device: torch.device) -> dict[str, list[str]]:
    """Overrides of each of the project's own contenders."""
    captured = {
        "graphs": ["train.graphs=true"],
        "graphs, bf16": ["train.graphs=true", "train.precision=bf16"],
    }
    return {"eager": []} | (captured if device.type == "cuda" else {})


def compiled(device: torch.device) -> dict[str, dict]:
    """Options of torch.compile for the plain iteration; on a CPU compiling would take the longest."""
    modes = {"plain, compiled": {}, "plain, reduce-overhead": {"mode": "reduce-overhead"}}
    return modes if device.type == "cuda" else {}


def compiled_plain(system: System, trainer: Trainer, x: torch.Tensor, options: dict) -> Callable[[], object]:
    """The plain iteration with compiled networks. Raises what compiling does; ValueError at other losses."""
    plain, quick = system.plain(trainer), system.plain(trainer, options)
    for images, tolerance in enumerate(COMPILED):
        pairs = [(float(a), b) for a, b in zip(quick(x, images), plain(x, images), strict=True)]
        if not all(abs(a - b) <= tolerance * abs(b) for a, b in pairs):
            raise ValueError(f"losses and those of the plain iteration: {pairs}")
    return lambda: quick(x)


def largest_differences(system: System) -> list[float]:
    """Of each of the first iterations, the largest relative difference of a loss to the plain one, of all
    contenders in float32."""
    worst = [0.0] * CHECKED
    for name, overrides in contenders(system.device).items():
        if "bf16" in name:
            continue
        with closing(system.trainer(*overrides)) as trainer:
            plain, (batches, twin) = system.plain(trainer), (trainer._batches() for _ in range(2))
            for i in range(CHECKED):
                x = system.input(trainer, next(twin))
                expected = plain(x, trainer.images)
                trainer._advance(batches)
                found = trainer.read_meter()
                trainer.meter.clear()
                pairs = zip((found["loss_encoder"], found["loss_decoder"]), expected, strict=True)
                worst[i] = max(worst[i], *(abs(a - b) / abs(b) for a, b in pairs))
    return worst


def timer(call: Callable[[], object], device: torch.device, seconds: float) -> Callable[[], float]:
    """Measures seconds a call: many between two looks at the clock, so that a GPU may lag behind."""
    cuda = device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    for _ in range(CHECKED):
        call()

    def measured() -> float:
        count, spent = 0, 0.0
        if cuda:
            torch.cuda.synchronize()
        started = clock()
        while spent < seconds:
            for _ in range(20 if cuda else 1):
                call()
            count += 20 if cuda else 1
            if cuda:
                torch.cuda.synchronize()
            spent = clock() - started
        return spent / count

    return measured


def measure(system: System, options: argparse.Namespace) -> dict:
    """Median seconds an iteration of each contender, and how many times the plain one's speed it has."""
    made = {name: system.trainer(*overrides) for name, overrides in contenders(system.device).items()}
    eager = made["eager"]
    x, plain = system.input(eager, next(eager._batches())), system.plain(eager)
    torch._dynamo.config.recompile_limit = 64  # for two networks, each trained and frozen, in several forms
    timers, refused = {"plain": timer(lambda: plain(x), system.device, options.seconds)}, {}
    for name, of_compile in compiled(system.device).items():
        try:
            call = compiled_plain(system, eager, x, of_compile)
            timers[name] = timer(call, system.device, options.seconds)
        except Exception as error:
            refused[name] = reason(error)
    for name, trainer in made.items():
        step = functools.partial(trainer._advance, trainer._batches())
        try:
            timers[name] = timer(step, system.device, options.seconds)
        except Exception as error:
            refused[name] = reason(error)
    found = rounds(timers, options.rounds)
    for trainer in made.values():
        trainer.close()
    return {
        "overrides": [text for text in system.overrides if "pictures" not in text],
        "batch": eager.stage.batch,
        "refused": refused,
        "iterations_per_second": {name: round(1 / seconds.median, 1) for name, seconds in found.items()},
        "least_and_most": {
            name: [round(1 / seconds.most, 1), round(1 / seconds.least, 1)] for name, seconds in found.items()
        },
        "ratio_to_plain": {
            name: round(found["plain"].median / seconds.median, 2) for name, seconds in found.items()
        },
    }


def checked(name: str, folder: Path, options: argparse.Namespace, device: torch.device) -> dict:
    """What is measured of a system; raises ValueError where its losses are not the plain ones."""
    system = System(name, folder, device)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        differences = largest_differences(system)
    if not all(found < allowed for found, allowed in zip(differences, TOLERANCES, strict=True)):
        found = ", ".join(f"{difference:.1e}" for difference in differences)
        raise ValueError(f"losses of the first iterations differ from the plain ones by {found}: no timing")
    return {"losses_differ_by": differences, **measure(system, options)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each contender in each round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file; without it the result is printed alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {
        "command": f"python bench/small.py --rounds {options.rounds} --seconds {options.seconds}",
        **machine(device.type),
        "clock": "wall, synchronised" if device.type == "cuda" else "processor time",
        "not_measured": [] if device.type == "cuda" else ["graphs and torch.compile: on a GPU alone"],
        "refused": {},
        "systems": {},
    }
    for name in SYSTEMS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                record["systems"][name] = checked(name, Path(folder), options, device)
            except Exception as error:
                record["refused"][name] = reason(error)
        if options.out:
            save(options.out, record)
    print(json.dumps(record, indent=1))
    if record["refused"]:
        raise SystemExit(f"error: {record['refused']}")


if __name__ == "__main__":
    main()
