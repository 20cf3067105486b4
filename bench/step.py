"""Cost of one style iteration, optimizers included: the plain published trainer, and the project's schedules.

    python bench/step.py --out bench/results/step-cpu.json

A row holds the median of its rounds. On the CPU rounds of all are interleaved and the clock is processor
time, so that other programs on the machine do not count; on a GPU each provider has the memory to itself.
Before timing, one float64 update of each must agree to 1e-10, otherwise nothing is timed, and on a GPU one
float32 and one bf16 update there to what rounding allows: a precision that misses this has no rows, `refused`
says why, and the exit code is 1. On a GPU there are also bf16, compiled and captured versions; the last two
are held against the same without compiling or capturing, and have a row that says `refused` where they
differ. --batches then tries several batches and each provider counts with its best; --only takes some rows.
All run under the settings of `launch/train.py`: the fastest of cuDNN's algorithms, TF32 convolutions, float32
matrix products. Beside them "plain, TF32" multiplies matrices in TF32, too, which a user of the plain trainer
might switch on.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import shlex
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from measure import machine, reason, save
from plain_style import PlainStyle
from plain_trainer import PlainTrainer

from sivae_fast.draws import Draws, Rows
from sivae_fast.models.style import StyleModel
from sivae_fast.models.style_names import our_name, swap_layout
from sivae_fast.objectives import SoftIntroVAE
from sivae_fast.training.averaging import Average
from sivae_fast.training.compiling import compile_networks
from sivae_fast.training.device import prepare
from sivae_fast.training.engine import make_engine
from sivae_fast.training.graphs import Graphs
from sivae_fast.training.optim import make_optimizer, set_learning_rate
from sivae_fast.training.step import Step

WEIGHTS = {"beta_rec": 0.1, "beta_kl": 0.2, "beta_neg": 512.0, "scale": 5e-6}
#: Of the relative difference of updates that should be the same, by precision. Maps of 4x4 pixels are
#: normalised in the check: on a CPU, too, rounding to bf16 changes it by 0.25.
LIMITS = {"float64": 1e-10, "float32": 1e-3, "bf16": 0.5}
Iteration = Callable[[torch.Tensor, Draws], None]
Makers = dict[str, Callable[[StyleModel], Iteration]]


class Ours:
    """One iteration as the training loop makes it, averaging included."""

    def __init__(
        self,
        model: StyleModel,
        *,
        compile: bool = False,
        weights: dict = WEIGHTS,
        learning_rate: float = 2e-5,
        graphs: bool = False,
        **step,
    ):
        gamma_r = 1e-8 if step.get("schedule") == "published" else 0.0
        objective = SoftIntroVAE(**{"gamma_r": gamma_r, **weights}).to(next(model.parameters()).device)
        self.model, self.step = model, Step(model, objective, **step)
        optimizer = functools.partial(make_optimizer, betas=(0.0, 0.99), on_device=graphs)
        self.encoder, self.decoder = (
            make_engine(model, side, optimizer, kind="torch") for side in ("encoder", "decoder")
        )
        self.optimizers = [engine.optimizer for engine in (self.encoder, self.decoder)]
        for made in self.optimizers:
            set_learning_rate(made, learning_rate)
        self.average = Average(model, 10_000)
        self.graphs = Graphs(0, next(model.parameters()).device) if graphs else None
        if compile:
            compile_networks(model)

    def __call__(self, x: torch.Tensor, draws: Draws) -> None:
        if not self.graphs:
            return self._iterate(x, draws)
        again = lambda x, make_stream: self._iterate(x, Draws(0, 0, draws.rows, draws.device, make_stream))
        self.graphs.run(x.shape, again, x, draws.images)

    def _iterate(self, x: torch.Tensor, draws: Draws) -> None:
        loss, shared = self.step.encoder_phase(x, draws)
        self.encoder.backward(loss.loss)
        self.encoder.step()
        self.decoder.backward(self.step.decoder_phase(x, draws, shared).loss)
        self.decoder.step()
        self.average.update(len(x))


class WithTF32:
    """An iteration whose float32 matrix products are TF32."""

    def __init__(self, iteration: Iteration):
        self.iteration = iteration

    def __call__(self, x: torch.Tensor, draws: Draws) -> None:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            self.iteration(x, draws)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False


def providers(device: torch.device) -> Makers:
    def plain(model: StyleModel, learning_rate: float = 2e-5, **options) -> PlainTrainer:
        return PlainTrainer(PlainStyle(model).to(device), **WEIGHTS, learning_rate=learning_rate, **options)

    found = {
        "plain": plain,
        "published schedule": functools.partial(Ours, schedule="published", fresh_draws=True),
        "minimal, decoding twice": functools.partial(Ours, schedule="minimal", share_forward=False),
        "minimal": Ours,
    }
    if device.type == "cuda":
        quick = {"autocast": torch.bfloat16, "compile": True}
        found["plain, TF32"] = lambda model: WithTF32(plain(model))
        found["minimal, bf16"] = functools.partial(Ours, autocast=torch.bfloat16)
        found["minimal, graphs"] = functools.partial(Ours, graphs=True)
        found["minimal, bf16, graphs"] = functools.partial(Ours, autocast=torch.bfloat16, graphs=True)
        # Last, since compiling takes minutes.
        found["plain, compiled, bf16"] = functools.partial(plain, **quick)
        found["plain, reduce-overhead, bf16"] = functools.partial(plain, **quick, mode="reduce-overhead")
        found["minimal, compiled, bf16"] = functools.partial(Ours, **quick)
    return found


def precision(provider: str) -> str:
    return "bf16" if "bf16" in provider else "float32"


def measure(options: argparse.Namespace, device: torch.device, refused: Collection[str]) -> Iterator[dict]:
    """After each row the result so far; `refused`: precisions that have none."""
    facts = machine(device.type)
    torch.manual_seed(0)
    model = StyleModel(options.resolution, start_channels=options.start_channels).to(device)
    rows, makers = [], providers(device)
    chosen = options.only or makers
    makers = {n: make for n, make in makers.items() if n in chosen and precision(n) not in refused}
    command = ["python", "bench/step.py", "--resolution", options.resolution, "--batches", *options.batches]
    command += ["--only", *options.only] if options.only else []
    for batch in options.batches:
        for row in measure_batch(model, batch, options.rounds, device, makers, alone=device.type == "cuda"):
            rows.append(row)
            yield {
                "command": shlex.join(map(str, command)),
                **facts,
                "clock": "wall, synchronised" if device.type == "cuda" else "processor time",
                "resolution": options.resolution,
                "parameters": sum(p.numel() for p in model.parameters()),
                **compare(rows),
                "rows": rows,
            }


def compare(rows: list[dict]) -> dict[str, dict]:
    """Each provider at its best batch, and what of the plain trainer's time it takes there."""
    best = {}
    for row in rows:
        if "seconds" in row:
            known = best.get(row["provider"])
            better = known is None or row["seconds_an_image"] < known["seconds_an_image"]
            best[row["provider"]] = row if better else known
    ratios = {}
    if "plain" in best:
        plain = best["plain"]["seconds_an_image"]
        ratios = {name: round(row["seconds_an_image"] / plain, 3) for name, row in best.items()}
    return {"best": best, "ratio_to_plain": ratios}


def measure_batch(
    model: StyleModel, batch: int, rounds: int, device: torch.device, makers: Makers, alone: bool
) -> Iterator[dict]:
    """A row a provider; `alone`: one after the other, each with the memory to itself."""
    # Not PyTorch's own: where a capture has failed, that draws nothing more.
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, 3, model.resolution, model.resolution, generator=generator, device=device)
    if not alone:
        made = {name: make(copy.deepcopy(model)) for name, make in makers.items()}
        found = timed_rounds(made, x, 1, rounds, device)
        yield from (row_of(name, batch, seconds) for name, seconds in found.items())
        return
    for name, make in makers.items():
        try:
            check_update(make, device)
            torch._dynamo.reset()  # else what was compiled before counts against the limit of this one
            torch._functorch.config.donated_buffer = True  # the default; our compiled one changes it
            gc.collect()
            torch.cuda.empty_cache()
            # Before the first timed round: compilers, and captures for either fall of the style coin.
            found = timed_rounds({name: make(copy.deepcopy(model))}, x, 8, rounds, device)
            row = row_of(name, batch, found[name])
        except Exception as error:
            row = {"provider": name, "batch": batch, "refused": reason(error)}
        print(row, flush=True)
        yield row


def row_of(name: str, batch: int, seconds: list[float]) -> dict:
    median = statistics.median(seconds)
    row = {"provider": name, "batch": batch, "seconds": round(median, 5)}
    return row | {"seconds_an_image": median / batch, "least": min(seconds), "most": max(seconds)}


def timed_rounds(
    iterations: dict[str, Iteration], x: torch.Tensor, warm: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each round after `warm` others, the iterations in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in iterations}
    for round_ in range(-warm, rounds):
        for name, iteration in iterations.items():
            spent = timed(iteration, x, round_, device)
            if round_ >= 0:
                seconds[name].append(spent)
    return seconds


def timed(iteration: Iteration, x: torch.Tensor, round_: int, device: torch.device) -> float:
    started = clock(device)
    iteration(x, Draws(0, round_, Rows.all(len(x)), device))
    return clock(device) - started


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def largest_difference(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    autocast: torch.dtype | None = None,
) -> float:
    """Largest relative difference of the gradients of plain, published and minimal.

    In float64 that of any parameter; else of all together, as single ones are sums that nearly cancel.
    The plain trainer draws anew for its decoder phase; it is held against the published schedule that does
    so, too, and the minimal schedule against the published one with shared draws.
    """
    model, x = small_model(device, dtype)
    weights = {"beta_rec": 0.5, "beta_kl": 0.3, "beta_neg": 4.0, "scale": 0.01}
    bare = {**weights, "gamma_r": 0.0}  # the minimal schedule leaves these terms of weight 1e-8 out

    def ours(weights: dict, **step) -> dict[str, torch.Tensor]:
        step = {"weights": weights, "learning_rate": 0.0, "autocast": autocast, **step}
        return gradients(Ours(copy.deepcopy(model), **step), x)

    plain = PlainTrainer(PlainStyle(model).to(device), **weights, learning_rate=0.0, autocast=autocast)
    pairs = [
        (renamed(gradients(plain, x)), ours(weights, schedule="published", fresh_draws=True)),
        (ours(bare, schedule="published"), ours(bare, schedule="minimal")),
        (ours(bare, schedule="published"), ours(bare, schedule="minimal", share_forward=False)),
    ]
    if any(a.keys() != b.keys() for a, b in pairs):
        raise SystemExit("the schedules train different parameters: no timing")
    if dtype != torch.float64:
        flat = lambda found, names: torch.cat([found[name].flatten() for name in names])
        pairs = [({"all": flat(a, a)}, {"all": flat(b, a)}) for a, b in pairs]
    both = [(a[name], b[name]) for a, b in pairs for name in a]
    return max(float((a - b).norm() / (a.norm() + 1e-12)) for a, b in both)


@functools.cache  # by batches
def check_update(make: Callable[..., Iteration], device: torch.device) -> None:
    """Raises ValueError where a compiled or captured iteration is not the same one run line by line.

    Compiled: one iteration, by what the optimizers see. Captured: by how far the parameters move in some
    iterations, the last of them replays. In bf16 ten of them magnify rounding of 1e-7 to 0.05 to 0.15; seeds
    of the iteration before make 0.3.
    """
    options = getattr(make, "keywords", {})
    eager = {name: value for name, value in options.items() if name not in ("compile", "mode", "graphs")}
    if eager == options:
        return
    model, x = small_model(device, torch.float32)
    makers = functools.partial(make.func, **eager), make
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        if "graphs" in options:
            twin, captured = (make(copy.deepcopy(model), learning_rate=1e-3) for _ in range(2))
            twin.graphs = None
            moved = [movement(iteration, x) for iteration in (twin, captured)]
            limit = 0.2 if "autocast" in options else 0.05
        else:
            moved = [gradients(make(copy.deepcopy(model), learning_rate=0.0), x) for make in makers]
            limit = LIMITS["bf16" if "autocast" in options else "float32"]
    expected, found = (torch.cat([moved_[name].flatten() for name in moved[0]]) for moved_ in moved)
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= limit:  # NaN is refused, too
        raise ValueError(
            f"the update differs by {difference:.1e} from that without {', '.join(options.keys() - eager)}, "
            f"accepted is {limit:.0e}"
        )


def movement(iteration: Ours, x: torch.Tensor, iterations: int = 10) -> dict[str, torch.Tensor]:
    """By how much each parameter changes in so many iterations."""
    before = {name: p.detach().clone() for name, p in iteration.model.named_parameters()}
    for images in range(iterations):
        iteration(x, Draws(0, images, Rows.all(len(x)), x.device))
    return {name: p.detach() - before[name] for name, p in iteration.model.named_parameters()}


def small_model(device: torch.device | str, dtype: torch.dtype) -> tuple[StyleModel, torch.Tensor]:
    """A style model of 16x16 pixels and a batch for it, the same in every precision."""
    torch.manual_seed(0)
    model = StyleModel(16, start_channels=4, max_channels=8, latent_size=8, mapping_layers=2).double()
    with torch.no_grad():  # a constant map before an instance norm would amplify rounding
        model.decoder.const.normal_()
    return model.to(device, dtype), torch.randn(4, 3, 16, 16, dtype=torch.float64).to(device, dtype)


def differences(device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """Largest difference by precision, those of a GPU on it with exact convolutions; why some are refused."""
    checks = {"float64": largest_difference}
    if device.type == "cuda":
        checks["float32"] = functools.partial(largest_difference, device, torch.float32)
        checks["bf16"] = functools.partial(largest_difference, device, torch.float32, torch.bfloat16)
    found, refused = {}, {}
    for name, check in checks.items():
        limit = LIMITS[name]
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                found[name] = check()
        except Exception as error:
            refused[name] = reason(error)
            continue
        if not found[name] <= limit:  # NaN is refused, too
            refused[name] = f"the updates differ by {found[name]:.1e}, accepted is {limit:.0e}"
    return found, refused


def gradients(iteration: PlainTrainer | Ours, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the optimizers see in one iteration, by parameter name."""
    names, found = {p: name for name, p in iteration.model.named_parameters()}, {}

    def keep(optimizer, *_):
        for group in optimizer.param_groups:
            found.update({names[p]: p.grad.clone() for p in group["params"] if p.grad is not None})

    for optimizer in iteration.optimizers:
        optimizer.register_step_pre_hook(keep)
    iteration(x, Draws(0, 0, Rows.all(len(x)), x.device))
    return found


def renamed(published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of the plain networks under the names and in the layouts of `StyleModel`."""
    names = {key: our_name(*key.split(".", 1)) for key in published}
    return {name: swap_layout(name, published[key]) for key, name in names.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--start-channels", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[4])
    parser.add_argument("--only", nargs="+", metavar="ROW", help='such as plain "minimal, bf16, graphs"')
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file; without it the result is printed alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = providers(device)
    for name in options.only or ():
        if name not in rows:
            parser.error(f"--only {name}: here are {', '.join(rows)}")
    prepare(device)
    found, refused = differences(device)
    if "float64" in refused:  # then the versions are not the same iteration
        raise SystemExit(f"error: float64: {refused['float64']}: no timing")
    checks = result = {"updates_differ_at_most": found, "refused": refused}
    for result in measure(options, device, refused):
        result |= checks
        if options.out:
            save(options.out, result)
    print(json.dumps(result, indent=1))
    if refused:
        raise SystemExit(f"error: not timed: {refused}")


if __name__ == "__main__":
    main()
