"""What the style model does to a map between convolutions: the project's operators beside plain PyTorch and
torch.compile.

    python bench/chains.py [--batches 16] [--only encoder blur] [--config launch/configs/ffhq256.yaml]

decoder: bias, noise, leaky ReLU, instance norm, modulation. encoder: bias, leaky ReLU, instance norm with the
gradients of its moments. blur; from_rgb and to_rgb: the layers between images and features, from_rgb without
a gradient for images, as where the encoder trains. At the maps of every level of a configuration, in bf16 on
a GPU and fp32 on a CPU; a version that misses float64 is not timed. `least_mib` is what moves at least, see
`passes`. What torch.compile gets of the blur is sums of shifted maps, which it fuses, unlike convolutions.
Inputs rotate through more than three times the L2 cache ("cold") where 32 sets suffice for that, else they
stay in it ("hot"). On a CPU the operators are plain PyTorch and have no rows of their own. Writes
chains-<device>.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from measure import Captured, copy_bandwidth, each, machine, reason, rounds, save, second_level_cache, wall
from torch import Tensor
from torch.nn import functional as F

from sivae_fast.config import load_config
from sivae_fast.kernels.blur import blur, blur_weight
from sivae_fast.kernels.rgb import from_rgb, to_rgb
from sivae_fast.kernels.style import activate_normalize, reference

RESULTS = Path(__file__).parent / "results"
DIRECTIONS = ("forward", "backward", "both")
LIMITS = {torch.bfloat16: (1e-2, 1e-2), torch.float32: (1e-4, 1e-4)}  # of values, of gradients
#: Of plain PyTorch and what is compiled from it in bf16, which rounds after every operation: sums that nearly
#: cancel, as the gradient of a bias before a normalization, lose a quarter. The operator sums in float32.
OF_PLAIN = {**LIMITS, torch.bfloat16: (2e-2, 0.5)}
Chain = Callable[..., tuple[Tensor, ...]]


def plain(x, bias, noise, weight, style) -> tuple[Tensor, ...]:
    return reference(x, bias, noise, weight, style, 1e-8, 0.2)


def fused(x, bias, noise, weight, style) -> tuple[Tensor, ...]:
    return activate_normalize(x, bias=bias, noise=noise, weight=weight, style=style, eps=1e-8)


def plain_blur(x) -> tuple[Tensor, ...]:
    return (F.conv2d(x, _blur_weight(x.shape[1], x.dtype, x.device), padding=1, groups=x.shape[1]),)


@cache  # a copy from the host, call by call, is no part of a blur and ends a capture
def _blur_weight(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return blur_weight(channels).to(device, dtype)


def shifted_blur(x) -> tuple[Tensor, ...]:
    wide = F.pad(x.float(), (1, 1, 1, 1))
    rows = 0.25 * (wide[..., :-2] + wide[..., 2:]) + 0.5 * wide[..., 1:-1]
    return ((0.25 * (rows[:, :, :-2] + rows[:, :, 2:]) + 0.5 * rows[:, :, 1:-1]).to(x.dtype),)


def plain_from_rgb(x, weight, bias) -> tuple[Tensor, ...]:
    return (F.leaky_relu(F.conv2d(x, weight.to(x), bias.to(x)), 0.04),)


def plain_to_rgb(x, weight, bias) -> tuple[Tensor, ...]:
    return (F.conv2d(x, weight.to(x), bias.to(x)),)


#: Plain PyTorch, what torch.compile gets, and the operator.
CHAINS: dict[str, tuple[Chain, Chain, Chain]] = {
    "decoder": (plain, plain, fused),
    "encoder": (plain, plain, fused),
    "blur": (plain_blur, shifted_blur, lambda x: (blur(x),)),
    "from_rgb": (plain_from_rgb, plain_from_rgb, lambda *given: (from_rgb(*given, 0.04),)),
    "to_rgb": (plain_to_rgb, plain_to_rgb, lambda *given: (to_rgb(*given),)),
}


def providers(device: str, kind: str) -> dict[str, Chain]:
    torch._dynamo.reset()
    # Backward passes are repeated on one graph, and compiling for each direction would take too long.
    torch._functorch.config.donated_buffer = False
    eager, other, operator = CHAINS[kind]
    found = {"plain": eager, "compile": torch.compile(other, dynamic=False)}
    return {**found, "fused": operator} if device == "cuda" else found


def sizes(config: str) -> list[tuple[int, int]]:
    """(channels, pixels of a side) of the maps at every level, the largest first."""
    model = load_config(config, ["data.path=none"]).model
    found, side, width = [], model.resolution, model.start_channels
    while side >= 4:
        found.append((min(width, model.max_channels), side))
        side, width = side // 2, 2 * width
    return found


def passes(kind: str, side: int, direction: str) -> int:
    """Reads and writes of a map of features, at least; a chain's of up to 32x32 stays where it is between two
    readings. from_rgb has no gradient for its images, which count as nothing beside features."""
    forward, backward = {"blur": (2, 2), "from_rgb": (1, 1), "to_rgb": (1, 2)}.get(
        kind, (2, 3) if side <= 32 else (3, 5)
    )
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


class Case:
    """Inputs of a chain, channels-last, and the gradients of what comes out."""

    def __init__(
        self, kind: str, batch: int, channels: int, side: int, dtype: torch.dtype, device: str, seed: int = 0
    ):
        # Not PyTorch's own: where a capture has failed, that draws nothing more.
        generator = torch.Generator(device).manual_seed(seed)
        new = lambda *size: torch.randn(size, generator=generator, device=device)
        new_map = lambda c: new(batch, c, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
        x, image = new_map(channels), new_map(3)
        self.map_bytes = x.numel() * x.element_size()
        per_channel = [new(batch, channels) for _ in range(2)]
        self.inputs, self.by = {
            "decoder": lambda: (
                [x, new(channels), new(batch, 1, side, side), new(channels), new(batch, 2 * channels)],
                [new_map(channels)],
            ),
            "encoder": lambda: ([x, new(channels), None, None, None], [new_map(channels), *per_channel]),
            "blur": lambda: ([x], [new_map(channels)]),
            "from_rgb": lambda: ([image, new(channels, 3, 1, 1), new(channels)], [new_map(channels)]),
            "to_rgb": lambda: ([x, new(3, channels, 1, 1), new(3)], [new_map(3)]),
        }[kind]()
        self.constants = {"decoder": (2,), "from_rgb": (0,)}.get(kind, ())
        self.require()

    def require(self) -> None:
        self.wanted = [
            t.requires_grad_() for i, t in enumerate(self.inputs) if t is not None and i not in self.constants
        ]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.inputs, *self.by) if t is not None)

    def double(self) -> Case:
        other = Case.__new__(Case)
        other.constants = self.constants
        other.inputs = [None if t is None else t.detach().double() for t in self.inputs]
        other.by = [t.double() for t in self.by]
        other.require()
        return other

    def backward(self, outputs) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs[: len(self.by)], self.wanted, self.by, retain_graph=True)


def misses(run: Chain, case: Case, exact: list[Tensor]) -> tuple[float, float]:
    """Largest relative error (norm over norm) of values and of gradients against float64.

    Norms: where the argument of the leaky ReLU rounds to the other sign single gradients are 0.8 off.
    """
    outputs = run(*case.inputs)
    found = [*outputs, *case.backward(outputs)]
    errors = [((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)]
    return max(errors[: len(outputs)]), max(errors[len(outputs) :])


def call(run: Chain, case: Case, direction: str) -> Callable[[], object]:
    if direction == "forward":
        return lambda: run(*case.inputs)
    if direction == "both":
        return lambda: case.backward(run(*case.inputs))
    outputs = run(*case.inputs)
    return lambda: case.backward(outputs)


def rotated(first: Case, make: Callable[[int], Case], device: str) -> tuple[list[Case], str]:
    """Cases to take in turns, together over three times the L2 cache; one where that would be too many."""
    wanted = 1 + max(1, 3 * second_level_cache(device) // first.bytes)
    if device == "cpu" or wanted > 32:
        return [first], "hot"
    return [first, *map(make, range(1, wanted))], "cold"


def measure(kind, batch, channels, side, dtype, device, seconds, bandwidth) -> list[dict]:
    """Rows of one case: every provider and direction."""
    case = Case(kind, batch, channels, side, dtype, device)
    wide = case.double()
    outputs = CHAINS[kind][0](*wide.inputs)
    exact = [*outputs, *wide.backward(outputs)]
    del wide, outputs
    base = {"chain": kind, "batch": batch, "channels": channels, "side": side}
    rows, sound = [], {}
    runs, refused = providers(device, kind), {}
    missed = each({name: partial(misses, run, case, exact) for name, run in runs.items()}, refused)
    for name, errors in missed.items():
        limits = (LIMITS if name == "fused" else OF_PLAIN)[dtype]
        known = dict(zip(("error", "gradient_error"), errors, strict=True))
        if all(error <= limit for error, limit in zip(errors, limits, strict=True)):  # NaN is refused, too
            sound[name] = (runs[name], known)
        else:
            rows.append({**base, "provider": name, "refused": "misses float64", **known})
    rows += [{**base, "provider": name, "refused": why} for name, why in refused.items()]
    del exact
    cases, state = rotated(case, lambda seed: Case(kind, batch, channels, side, dtype, device, seed), device)
    for direction in DIRECTIONS:
        makers = {
            name: lambda run=run, direction=direction: [call(run, case, direction) for case in cases]
            for name, (run, _) in sound.items()
        }
        refused = {}
        calls = each(makers, refused)
        times = {"wall_ms": rounds({n: partial(wall, c, device, seconds) for n, c in calls.items()}, 3)}
        if device == "cuda":
            graphs = each({name: partial(Captured, makers[name]) for name in calls}, refused)
            times["gpu_ms"] = rounds({name: graph.seconds for name, graph in graphs.items()}, 5)
        rows += [
            {**base, "provider": name, "refused": f"{direction}: {why}"} for name, why in refused.items()
        ]
        least = passes(kind, side, direction) * case.map_bytes
        for name, (_, errors) in sound.items():
            if name in refused:
                continue
            row = {
                **base,
                "provider": name,
                "direction": direction,
                "cache": state,
                **errors,
                "least_mib": least / 2**20,
            }
            for clock, found in times.items():
                row |= found[name].row(clock)
            if bandwidth:
                row["percent_of_copy"] = 100 * least / (row["gpu_ms"] * 1e-3) / bandwidth
            rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    clock = "gpu_ms" if any("gpu_ms" in row for row in rows) else "wall_ms"
    names = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != "all"))
    lines = [f"| chain | map | batch | direction | {' | '.join(f'{name}, ms' for name in names)} |"]
    lines.append("|---" * (4 + len(names)) + "|")
    cases: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if clock in row:
            case = tuple(row[key] for key in ("chain", "channels", "side", "batch", "direction"))
            cases.setdefault(case, {})[row["provider"]] = row[clock]
    for (kind, channels, side, batch, direction), found in cases.items():
        values = " | ".join(f"{found[name]:.4f}" if name in found else "refused" for name in names)
        lines.append(f"| {kind} | {channels} x {side}x{side} | {batch} | {direction} | {values} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="launch/configs/ffhq256.yaml")
    parser.add_argument("--only", choices=CHAINS, nargs="+", default=list(CHAINS))
    parser.add_argument("--batches", type=int, nargs="+", help="16; on the CPU 2")
    parser.add_argument(
        "--sides", type=int, nargs="+", help="of maps; all of the configuration's, on the CPU to 64"
    )
    parser.add_argument("--seconds", type=float, default=0.1, help="of each measurement")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: the committed results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bandwidth = copy_bandwidth() if device == "cuda" else None
    largest = 256 if device == "cuda" else 64
    known, rows = machine(device), []
    known |= {
        "config": Path(options.config).stem,
        "dtype": str(dtype).removeprefix("torch."),
        "clock": "CUDA graph and wall" if device == "cuda" else "processor time, best of single calls",
        "copy_gb_per_second": bandwidth and bandwidth / 1e9,
        "not_measured": [] if device == "cuda" else ["the fused operators: they run on a GPU alone"],
    }
    for channels, side in sizes(options.config):
        if side not in (options.sides or range(largest + 1)):
            continue
        for batch in options.batches or [16 if device == "cuda" else 2]:
            for kind in options.only:
                try:
                    rows += measure(kind, batch, channels, side, dtype, device, options.seconds, bandwidth)
                except Exception as error:
                    case = {"chain": kind, "batch": batch, "channels": channels, "side": side}
                    rows.append({**case, "provider": "all", "refused": reason(error)})
            print(f"{channels} x {side}x{side}, batch {batch}", flush=True)
            save(options.out / f"chains-{device}.json", {**known, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
