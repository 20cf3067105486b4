"""The paper's first experiment: four densities, VAE, IntroVAE and Soft-IntroVAE, several seeds.

    python bench/densities.py --seeds 5             trains what is missing, writes table and figure
    python bench/densities.py --only rings/vae      some cells: density, density/objective or .../seed
    python bench/densities.py --precision bf16      the same with products of hidden layers in bfloat16
    python bench/densities.py --seeds 0             table (docs/densities.md) and figure of what is there

A cell is one run of launch/train.py. An interrupted cell goes on where it stopped; a finished one leaves
`densities/<cell>.json` (scores, facts) and `.npz` (what the figure shows) under bench/results/ and is not
trained again. Cells of bfloat16 are in `densities-bf16`, and the figure does not show them. Cells train side
by side, one thread each; half an hour a cell on one quiet core. With --out all of it is in another folder,
and the table is printed alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from measure import commit

from sivae_fast.checkpoint import load
from sivae_fast.config import Config, load_config
from sivae_fast.data.densities import Density
from sivae_fast.evaluation import density as measures
from sivae_fast.evaluation.density_figures import Learned, Row, draw_overview, look_at
from sivae_fast.files import atomic, write_text
from sivae_fast.progress import duration
from sivae_fast.run import Run, read_stats

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "bench" / "results"
PAGE = REPOSITORY / "docs" / "densities.md"
START, END = "<!-- table: python bench/densities.py --seeds 0 -->\n", "<!-- end of table -->"
DENSITIES = ("8gaussians", "2spirals", "checkerboard", "rings")
OBJECTIVES = {"vae": "VAE", "introvae": "IntroVAE", "soft_introvae": "Soft-IntroVAE"}
FOLDERS = {"fp32": "densities", "bf16": "densities-bf16"}  # of the results, by precision of training
SCORES = ("gnelbo", "kl", "jsd", "kl_nats", "jsd_nats")
# Beside the configs, which hold Soft-IntroVAE's values. VAE: as published by the follow-up on learned priors.
VAE = {"8gaussians": (0.8, 0.05), "2spirals": (1.0, 0.05), "checkerboard": (0.8, 0.1), "rings": (0.8, 0.05)}


class Cell(NamedTuple):
    density: str
    objective: str
    seed: int
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.density}-{self.objective}-{self.seed}"

    def record(self, out: Path) -> Path:
        return out / FOLDERS[self.precision] / f"{self}.json"

    def overrides(self, runs: Path) -> list[str]:
        values = {"kind": self.objective}
        if self.objective == "vae":
            values |= dict(zip(("beta_rec", "beta_kl"), VAE[self.density], strict=True))
        elif self.objective == "introvae":
            values |= introvae_values(self.density)
        objective = [f"objective.{key}={value}" for key, value in values.items()]
        return [
            *objective,
            f"train.seed={self.seed}",
            f"train.precision={self.precision}",
            f"run.name={self}",
            f"run.folder={runs}",
        ]

    def config_file(self) -> str:
        return f"launch/configs/density-{self.density}.yaml"

    def config(self, runs: Path) -> Config:
        return load_config(REPOSITORY / self.config_file(), self.overrides(runs))

    def folder(self, runs: Path) -> Path | None:
        config = self.config(runs)
        return Run.find(config.run.folder, config.run.name, config.identity())


def introvae_values(density: str) -> dict[str, float | str]:
    """The best of bench/density_grid.py: no published values were found."""
    path = RESULTS / "density_grid.json"
    record = json.loads(path.read_text()) if path.exists() else {"runs": [], "of": 1}
    if len(record["runs"]) < record["of"]:
        raise SystemExit(
            f"IntroVAE's values come from {path}, which is not complete: run bench/density_grid.py"
        )
    best = min((row for row in record["runs"] if row["density"] == density), key=lambda row: row["kl_nats"])
    weights = (
        dict(zip(("beta_rec", "beta_kl"), VAE[density], strict=True)) if best["weights"] == "vae" else {}
    )
    return {**weights, **{key: best[key] for key in ("hinge", "beta_neg", "margin")}}


def train(cell: Cell, runs: Path, out: Path) -> None:
    """Trains or resumes the cell, then measures it. Raises RuntimeError with the end of the log."""
    command = [sys.executable, "launch/train.py", "--config", cell.config_file(), *cell.overrides(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{cell}: {' '.join(command)}\n{done.stderr[-2000:]}")
    measure(cell, runs, out)


def measure(cell: Cell, runs: Path, out: Path) -> None:
    config, folder = cell.config(runs), cell.folder(runs)
    model, data = load(folder), Density(cell.density)
    if model.images < config.train.images:
        return  # stopped by a signal; the same command goes on
    grid = measures.energy_grid(model, data.half_range)
    scores = measures.evaluate_density(model, data.sample, data.half_range, seed=cell.seed, grid=grid)
    ticks = read_stats(folder)
    iterations = model.images // config.train.batch
    seconds = sum(tick["step_seconds"] + tick["data_seconds"] for tick in ticks)
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"one thread, {platform.machine()}"
    )
    record = {
        **cell._asdict(),
        **scores,
        "objective_settings": config.to_dict()["objective"],
        "iterations": iterations,
        "training_seconds": round(seconds, 1),
        "rec_real": ticks[-1]["rec_real"],
        "kl_real": ticks[-1]["kl_real"],
        "device": device,
        "torch": torch.__version__,
        "commit": commit(),
        "command": (
            f"python bench/densities.py --precision {cell.precision} "
            f"--only {cell.density}/{cell.objective}/{cell.seed}"
        ),
    }
    path = cell.record(out)
    small = look_at(model, data.half_range, points=192)
    with atomic(path.with_suffix(".npz")) as file:
        arrays = {name: value.numpy().astype(np.float16) for name, value in small._asdict().items()}
        np.savez_compressed(file, **arrays)
    write_text(path, json.dumps(record, indent=1) + "\n")


def progress_of(cell: Cell, runs: Path, out: Path) -> float:
    if cell.record(out).exists():
        return 1.0
    folder = cell.folder(runs)
    ticks = read_stats(folder) if folder else []
    return ticks[-1]["images"] / cell.config(runs).train.images if ticks else 0.0


def show_progress(cells: list[Cell], runs: Path, out: Path, finished: threading.Event) -> None:
    """Every few seconds: finished cells, cells under way, time left at the pace since the start."""
    at_start, began = sum(progress_of(cell, runs, out) for cell in cells), time.monotonic()
    interactive = sys.stderr.isatty()
    while not finished.wait(5 if interactive else 60):
        shares = {cell: progress_of(cell, runs, out) for cell in cells}
        gained = sum(shares.values()) - at_start
        left = (
            (len(cells) - sum(shares.values())) * (time.monotonic() - began) / gained if gained > 0 else None
        )
        under_way = [f"{cell} {100 * share:.0f}%" for cell, share in shares.items() if 0 < share < 1]
        done = sum(share == 1 for share in shares.values())
        line = f"{done}/{len(cells)} cells  {'  '.join(under_way)}  {duration(left) if left else '?'} left"
        print(f"\r\x1b[2K{line}" if interactive else line, end="" if interactive else "\n", file=sys.stderr)


def run_cells(cells: list[Cell], runs: Path, out: Path, jobs: int) -> None:
    """Trains the missing cells; one that fails is reported at the end and does not stop the others."""
    finished = threading.Event()
    watcher = threading.Thread(target=show_progress, args=(cells, runs, out, finished), daemon=True)
    watcher.start()
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(train, cell, runs, out) for cell in cells if not cell.record(out).exists()]
    finished.set()
    watcher.join()
    errors = [str(future.exception()) for future in futures if future.exception()]
    if errors:
        raise SystemExit("\n".join(["", *errors]))


def floors() -> dict[str, dict[str, float]]:
    """Mean scores of the data as its own model, 20 seeds: no model can be meaningfully better."""
    found = {}
    for name in DENSITIES:
        data = Density(name)
        runs = [measures.divergences(data.sample, data.sample, data.half_range, 100 + i) for i in range(20)]
        found[name] = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
    return found


def collect(out: Path) -> dict:
    """Writes and returns the scores of all seeds that are in the folder, beside those of the data."""
    best, rows = floors(), []
    for name in DENSITIES:
        rows.append({"density": name, "model": "the data itself", "seeds": 20, "scores": best[name]})
        for (objective, title), (precision, folder) in itertools.product(OBJECTIVES.items(), FOLDERS.items()):
            files = sorted((out / folder).glob(f"{name}-{objective}-*.json"))
            records = [json.loads(file.read_text()) for file in files]
            title += "" if precision == "fp32" else f", {precision}"
            if records:
                scores = {key: statistics.mean(record[key] for record in records) for key in SCORES}
                row = {"density": name, "model": title, "seeds": len(records), "scores": scores}
                row["commits"] = sorted({record["commit"] for record in records})
                if len(records) > 1:
                    row["deviations"] = {k: statistics.stdev(r[k] for r in records) for k in SCORES}
                rows.append(row)
    found = {"command": "python bench/densities.py", "rows": rows}
    write_text(out / "densities.json", json.dumps(found, indent=1) + "\n")
    return found


def table(found: dict) -> str:
    lines = [
        "| density | model | seeds | gnELBO / 1e-8 | KL | JSD | KL nats | JSD nats |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        cells = " | ".join(_cell(row, key) for key in SCORES)
        lines.append(f"| {row['density']} | {row['model']} | {row['seeds']} | {cells} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict, key: str) -> str:
    if key not in row["scores"]:
        return ""
    scale = 1e8 if key == "gnelbo" else 1
    deviation = row.get("deviations")
    after = f" ± {scale * deviation[key]:.3f}" if deviation else ""
    return f"{scale * row['scores'][key]:.3f}{after}"


def filled(page: str, found: dict) -> str:
    """The page with the table of the results between its marks."""
    before, rest = page.split(START)
    return before + START + table(found) + END + rest.split(END)[1]


def write_figure(out: Path) -> None:
    """All cells of the lowest seed that is in the folder."""
    rows = []
    for name in DENSITIES:
        data, learned = Density(name), []
        for objective in OBJECTIVES:
            files = sorted((out / "densities").glob(f"{name}-{objective}-*.npz"))
            arrays = np.load(files[0]) if files else None
            take = lambda key, arrays=arrays: torch.from_numpy(arrays[key].astype(np.float32))
            learned.append(Learned(take("samples"), take("energy")) if files else None)
        rows.append(Row(name, data.half_range, data.sample(1024), learned))
    draw_overview(out / "densities.png", rows, list(OBJECTIVES.values()))


def select(pattern: str | None, seeds: int, precision: str = "fp32") -> list[Cell]:
    """The cells to train. Raises SystemExit for a pattern that names none."""
    wanted = pattern.split("/") if pattern else []
    numbers = [int(wanted.pop())] if len(wanted) == 3 else range(seeds)
    cells = [Cell(d, o, s, precision) for s in numbers for d in DENSITIES for o in OBJECTIVES]
    chosen = [cell for cell in cells if list(cell[: len(wanted)]) == wanted]
    if pattern and seeds and not chosen:
        raise SystemExit(
            f"--only {pattern}: no such cell; densities are {', '.join(DENSITIES)}, objectives "
            f"{', '.join(OBJECTIVES)}"
        )
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of every cell")
    parser.add_argument("--only", help="density, density/objective or density/objective/seed")
    parser.add_argument("--precision", choices=[*FOLDERS], default="fp32")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells trained side by side")
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "runs" / "densities", help="run folders")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: the committed results")
    options = parser.parse_args()
    cells = select(options.only, options.seeds, options.precision)
    runs, out = options.runs.resolve(), options.out.resolve()
    for cell in cells:
        cell.config(runs)  # what is wrong with a cell is said before the first one trains
    run_cells(cells, runs, out, max(options.jobs, 1))
    found = collect(out)
    if out == RESULTS.resolve():
        write_text(PAGE, filled(PAGE.read_text(encoding="utf-8"), found))
    write_figure(out)
    print(table(found), end="")


if __name__ == "__main__":
    main()
