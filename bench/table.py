"""Fills the table of the README from the files in bench/results/.

    python bench/table.py            rewrites the table
    python bench/table.py --check    exit code 1 where the README says something else

Each entry of ROWS reads one file; a file that is not there gives a row "not measured".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from sivae_fast.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
START, END = "<!-- table: python bench/table.py -->\n", "<!-- end of table -->"


def _step(found: dict) -> str:
    """The fastest minimal provider of each precision beside others of it; that in bf16 beside plain, too."""
    best, lines = {name: row["seconds_an_image"] for name, row in found["best"].items()}, []
    for half in (False, True):
        same = {name: seconds for name, seconds in best.items() if ("bf16" in name) == half}
        if half and "plain" in best and same:
            same["plain in float32"] = best["plain"]
        ours = min((name for name in same if name.startswith("minimal")), key=same.get, default=None)
        if ours is None:
            continue
        others = [
            f"**{same[ours] / same[name]:.2f}** of the time of {said}"
            for name, said in (
                ("plain", "the plain published trainer"),
                ("plain in float32", "the plain published trainer in float32"),
                ("plain, TF32", "the same with TF32"),
                ("plain, compiled, bf16", "the plain published trainer, compiled, in bf16"),
                ("published schedule", "all its passes in this project"),
            )
            if name in same
        ]
        name, seconds = "" if ours == "minimal" else f"{ours}: ", same[ours]
        speed = f"{1e3 * seconds:.0f} ms an image" if seconds >= 0.5 else f"{1 / seconds:.0f} images a second"
        lines.append(f"{name}{', '.join(others)} ({speed}, {found['device']})")
    return "; ".join(lines)


def _small(found: dict) -> str:
    """Iterations a second of each small system's fastest contender in float32."""
    said = []
    for name, system in found["systems"].items():
        rates, plain = system["iterations_per_second"], system["ratio_to_plain"]
        single = [other for other in rates if "bf16" not in other]
        best = max((other for other in single if not other.startswith("plain")), key=rates.get)
        others = [other for other in single if other.startswith("plain, ")]
        compiled = max(others, key=rates.get, default=None)
        times = f"{plain[best]:.1f} times plain"
        if compiled:
            times += f", {rates[best] / rates[compiled]:.1f} times the same under torch.compile"
        said.append(f"{name} **{rates[best]:,.0f}** a second ({times})")
    return f"{', '.join(said)} ({found['device']})"


def _memory(found: dict) -> str:
    """From the smallest to the largest batch at which none of those that ran was out of memory."""
    mib = {(row["provider"], row["batch"]): row["mib"] for row in found["rows"] if "mib" in row}
    ran = {name for name, _ in mib}
    compared = [name for name in ("plain", "minimal", "minimal, recomputing") if name in ran]
    batches = sorted({b for _, b in mib if all((name, b) in mib for name in compared)})
    batches = list(dict.fromkeys([batches[0], batches[-1]]))
    plain = [mib["plain", batch] for batch in batches]
    to = lambda values, digits: " to ".join(f"{value:.{digits}f}" for value in values)
    ratio = lambda name: to((mib[name, b] / value for b, value in zip(batches, plain, strict=True)), 2)
    recomputing = "minimal, recomputing"
    less = f", **{ratio(recomputing)}** with `train.recompute`" if recomputing in compared else ""
    return (
        f"**{ratio('minimal')}** of the plain published trainer's{less} "
        f"(at batch {to(batches, 0)}, where plain takes {to(plain, 0)} MiB, {found['device']})"
    )


def _loader(found: dict, kind: str) -> str:
    rows = found["rows"]
    ours, theirs = (
        rows[f"{kind} 256, {name}"]["images_per_cpu_second"] for name in ("DALI", "DataLoader (processes)")
    )
    ratio = found["ratios"][f"{kind}: DALI / DataLoader (processes)"]
    return (
        f"**{ratio['cpu']:.2f}** times the images per core second ({ours:.0f} against {theirs:.0f}); "
        f"{ratio['wall']:.2f} times in wall time on {found['machine']['cores']} CPU cores{_busy(found)}"
    )


def _busy(found: dict) -> str:
    """The load average, to which the bench adds itself, where it is above the number of cores."""
    loads = found["load_average_by_round"]
    if max(loads) <= found["machine"]["cores"]:
        return ""
    return f", at a load of {min(loads):.1f} to {max(loads):.1f}, the bench itself included"


def _density(found: dict) -> str:
    soft = found["soft"]
    ours, plain, half = (soft[name] for name in ("minimal schedule", "plain", "minimal schedule, bf16"))
    return (
        f"**{ours['ratio_best']:.2f}** times the plain published iteration ({ours['cpu_ms']:.0f} against "
        f"{plain['cpu_ms']:.0f} ms, CPU, 1 thread); **{half['to_fp32']['ratio_best']:.2f}** times as "
        f"configured, with hidden layers in bfloat16 ({half['cpu_ms']:.0f} ms, {half['ratio_best']:.2f} "
        "times the plain one under autocast)"
    )


def _samples(found: dict) -> str:
    """KL of Soft-IntroVAE's samples, in the paper's units, beside others' and the data's own."""
    kl = {(row["density"], row["model"]): row["scores"]["kl"] for row in found["rows"]}
    seeds = {row["seeds"] for row in found["rows"] if row["model"] in ("VAE", "IntroVAE", "Soft-IntroVAE")}
    counts = " to ".join(map(str, sorted({min(seeds), max(seeds)})))
    said = [
        f"{density} **{value:.1f}** (VAE {kl[density, 'VAE']:.1f}, IntroVAE {kl[density, 'IntroVAE']:.1f}, "
        f"the data itself {kl[density, 'the data itself']:.1f})"
        for (density, model), value in kl.items()
        if model == "Soft-IntroVAE" and {(density, "VAE"), (density, "IntroVAE")} <= set(kl)
    ]
    return f"{'; '.join(said)}; means of {counts} {'seed' if counts == '1' else 'seeds'}"


def _losses(found: dict) -> str:
    """The range over sizes and batches of how many times faster the fused form is over both passes."""
    clock = "times_gpu" if "times_gpu" in found["speedups"][0] else "times_wall"
    lines = [line for line in found["speedups"] if line["provider"] == "fused"]

    def between(provider: str) -> str:
        values = [line[clock][provider] for line in lines if provider in line[clock]]
        return f"{min(values):.2f} to {max(values):.2f}" if values else "unknown"

    return (
        f"**{between('plain')}** times the plain formulas' speed, {between('compile')} times torch.compile's "
        f"({found['device']})"
    )


def _chamfer(found: dict) -> str:
    """At every number of points that every version which ran has; memory at the largest."""
    rows = {(row["version"], row["points"]): row for row in found["rows"]}
    names = {"expansion": "the expanded squares'", "cdist": "`torch.cdist`'s"}
    ran = {version for version, _ in rows}
    others = [version for version in names if version in ran]
    points = sorted(p for v, p in rows if v == "sivae" and all((other, p) in rows for other in others))

    def times(version: str) -> str:
        took = lambda name, p: rows[name, p]["forward_backward_ms"]
        return " / ".join(f"{took(version, p) / took('sivae', p):.1f}" for p in points)

    if not (others and points):
        return "no other version ran"
    first, *rest = others
    said = [f"**{times(first)}** times {names[first]}", *(f"{times(v)} times {names[v]}" for v in rest)]
    own, *mib = (f"{rows[version, points[-1]]['added_mib']:.0f}" for version in ("sivae", *others))
    return (
        f"{', '.join(said)} speed, forward and backward at {' / '.join(map(str, points))} points; "
        f"{own} MiB against {' and '.join(mib)} at {points[-1]} points "
        f"({found['device']}, batch {found['batch']})"
    )


def _other_images(found: dict) -> str:
    """Of the four other sets, the one that each model tells apart worst."""
    worst = {
        model: min(scores["log_likelihood"][0] for scores in sets.values())
        for model, sets in found["summary"].items()
    }
    seconds = {model: sum(run["training_seconds"] for run in runs) for model, runs in found["runs"].items()}
    longer = seconds["soft_introvae"] / seconds["vae"]
    return (
        f"area under the ROC curve of log p(x), of four sets the hardest: **{worst['soft_introvae']:.3f}**, "
        f"a VAE of as many images {worst['vae']:.3f} in a time {longer:.1f} times shorter "
        f"(digits of 8x8 pixels, {found['norm']} norm, means of {found['seeds']} seeds)"
    )


def _clouds(found: dict) -> str:
    curve = {point["images"]: point["jsd"] for point in found["curve"]}
    minutes = found["processor_seconds"] / 60
    return (
        f"test JSD **{found['curve'][-1]['jsd']:.3f}** after {max(curve):,} made clouds of 256 points, "
        f"{curve[found['train']['warmup_images']]:.3f} where the game begins "
        f"({minutes:.0f} min of one CPU core)"
    )


ROWS: list[tuple[str, str, Callable[[dict], str]]] = [
    ("style iteration at 64x64, CPU", "step-cpu.json", _step),
    ("style iteration at 256x256, GPU", "step-cuda.json", _step),
    ("iterations of the small systems, GPU", "small-cuda.json", _small),
    ("peak memory of a style iteration at 64x64, CPU", "memory-cpu.json", _memory),
    ("peak memory of a style iteration at 256x256, GPU", "memory-cuda.json", _memory),
    ("loader, stored PNG: DALI against PyTorch's", "loader-cpu.json", lambda f: _loader(f, "png")),
    ("loader, JPEG: DALI against PyTorch's", "loader-cpu.json", lambda f: _loader(f, "jpeg")),
    ("encoder phase of the loss, both passes, CPU", "losses-cpu.json", _losses),
    ("encoder phase of the loss, both passes, GPU", "losses-cuda.json", _losses),
    ("density iteration, batch 512", "density_speed.json", _density),
    ("KL between density and samples", "densities.json", _samples),
    ("telling other images from one's own", "ood.json", _other_images),
    ("samples of point clouds", "pointclouds.json", _clouds),
    ("Chamfer distance, CPU", "chamfer-cpu.json", _chamfer),
    ("Chamfer distance, GPU", "chamfer-cuda.json", _chamfer),
]


def table() -> str:
    lines = ["| what | measured | file |", "|---|---|---|"]
    for what, name, say in ROWS:
        path = RESULTS / name
        if path.is_file():
            lines.append(f"| {what} | {say(json.loads(path.read_text()))} | [{name}](bench/results/{name}) |")
        else:
            lines.append(f"| {what} | not measured | |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    filled = before + START + table() + END + after
    if check and filled != text:
        print("the table of the README is not that of bench/results: run python bench/table.py")
        return 1
    if not check:
        write_text(readme, filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
