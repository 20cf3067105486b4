"""A long run under faults: does it end exactly as one without them?

    python bench/soak.py --minutes 10

Two ranks on the CPU train a small style model. Every 30 seconds, or as soon as training goes on again, one of
four faults strikes a rank drawn from the seed; when all ranks have ended, the same command starts again. At
the end the run is finished, an undisturbed one is trained to the same number of images, and all statistics,
weights, averages and moments of the two must be the same bits. Writes bench/results/soak.json.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "soak.json"
sys.path.insert(0, str(ROOT))

from bench.fault_program import damage  # noqa: E402
from bench.fault_scenarios import Bench, Launch, assert_same  # noqa: E402
from bench.measure import machine  # noqa: E402
from sivae_fast.checkpoint import load_newest  # noqa: E402
from sivae_fast.files import read_lines, write_text  # noqa: E402

SETTINGS = {
    "train__images": 10**9, "growth__images_per_level": 4_000, "run__tick": 800, "run__checkpoint": 1_600,
    "run__samples": 10**9, "run__snapshot": 10**9, "engine__timeout_seconds": 10,
}  # fmt: skip
WATCHED = {"kind": "none", "rank": 0, "images": -1}  # no fault, but the times of all iterations


def _kill(launch: Launch, rank: int, checkpoints: Path) -> None:
    launch.processes[rank].kill()


def _terminate(launch: Launch, rank: int, checkpoints: Path) -> None:
    launch.processes[rank].send_signal(signal.SIGTERM)


def _corrupt(launch: Launch, rank: int, checkpoints: Path) -> None:
    launch.processes[rank].kill()
    launch.wait()
    if len(list(checkpoints.glob("*.json"))) > 1:
        damage(checkpoints)


def _stall(launch: Launch, rank: int, checkpoints: Path) -> None:
    launch.processes[rank].send_signal(signal.SIGSTOP)
    launch.processes[1 - rank].wait(120)
    launch.processes[rank].kill()


KINDS = {
    "kill -9": _kill, "SIGTERM": _terminate, "damaged checkpoint": _corrupt, "stalled rank": _stall,
}  # fmt: skip


def soak(folder: Path, seconds: float, every: float = 30.0, seed: int = 0) -> dict:
    """Trains for `seconds` under faults, then holds the run against an undisturbed one.

    Returns the faults and what was compared. Raises AssertionError where the two runs differ.
    """
    bench, kinds = Bench(folder), _kinds(random.Random(seed))
    started = time.time()
    launch, faults = _start(bench, 0), []
    while time.time() + every < started + seconds:
        time.sleep(every)
        kind, rank = next(kinds)
        before, struck = _newest(bench), time.time()
        KINDS[kind](launch, rank, bench.run_folder("soak") / "checkpoints")
        codes = launch.wait()
        launch = _start(bench, before["process"])
        after = _first(bench, before["process"])
        faults.append(
            {
                "kind": kind,
                "rank": rank,
                "exit_codes": codes,
                "seconds": round(after["at"] - struck, 1),
                "images_lost": max(0, before["images"] - after["images"]),
                "at_images": before["images"],
            }
        )
        print(json.dumps(faults[-1]), flush=True)
    launch.kill()
    under_faults = round(time.time() - started)
    images = _newest(bench)["images"] + 32
    return {"faults": faults, **_compare(bench, images), "seconds_under_faults": under_faults}


def _compare(bench: Bench, images: int) -> dict:
    """Finishes the run and trains an undisturbed one, both to `images`. Raises AssertionError."""
    settings = {**SETTINGS, "train__images": images}
    for name in ("soak", "undisturbed"):
        codes = bench.start(name, **settings).wait(1800)
        assert codes == [0, 0], f"run {name}: exit codes {codes}"
    runs = [bench.run_folder(name) for name in ("soak", "undisturbed")]
    assert_same(*runs)
    tensors, state = load_newest(runs[0] / "checkpoints")
    return {
        "images": state["images"],
        "optimizer_steps": state["steps"],
        "tensors_compared": len(tensors),
        "bit_equal": True,  # or assert_same had raised
    }


def _start(bench: Bench, before: int) -> Launch:
    """Starts the run and waits until a process other than `before` trains."""
    launch = bench.start("soak", fault=WATCHED, **SETTINGS)
    while not _first(bench, before):
        ended = [process.poll() for process in launch.processes]
        assert all(code is None for code in ended), f"exit codes {ended}: {launch.text()[-2000:]}"
        time.sleep(0.5)
    return launch


def _iterations(bench: Bench) -> list[dict]:
    return read_lines(bench.place("soak") / "events.jsonl")


def _newest(bench: Bench) -> dict:
    return _iterations(bench)[-1]


def _first(bench: Bench, before: int) -> dict | None:
    """The first iteration of the newest process, None while that is still `before`."""
    steps = _iterations(bench)
    if not steps or steps[-1]["process"] == before:
        return None
    return next(step for step in steps if step["process"] == steps[-1]["process"])


def _kinds(generator: random.Random) -> Iterator[tuple[str, int]]:
    """(kind, rank) endlessly; each kind once in every four."""
    while True:
        for kind in generator.sample(sorted(KINDS), len(KINDS)):
            yield kind, generator.randrange(2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=30.0, help="seconds from training to the next fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT, help="default: the committed file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), 60 * options.minutes, options.every, options.seed)
    found = {"command": "python bench/soak.py", "seed": options.seed, "ranks": 2, **machine("cpu"), **found}
    write_text(options.out, json.dumps(found, indent=1) + "\n")
    print(
        f"{len(found['faults'])} faults, {found['images']:,} images: the same bits as without. {options.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
