"""Faults of a training run, one scenario each: what is injected, what has to happen, what it costs.

A scenario trains a small style model, injects its fault, starts the same command again where that is what a
user would do, and asserts that the run ends exactly (bit for bit) as the undisturbed one. It returns a row:
seconds from the fault until training goes on, and images that had to be trained again. The tests run these
scenarios, and bench/faults.py fills the table of docs/faults.md from them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sivae_fast.checkpoint import load_newest
from sivae_fast.files import read_lines

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "bench" / "fault_program.py"
ELASTIC = ROOT / "launch" / "elastic.py"
#: Grows from 4x4 to 8x8 pixels after 40 images; ten iterations, a checkpoint after every second one.
SETTINGS = {
    "model.resolution": 8, "model.start_channels": 4, "model.max_channels": 8, "model.latent_size": 8,
    "model.mapping_layers": 2, "objective.beta_neg": 16, "objective.scale": 0.01, "data.loader": "torch",
    "data.cache_gib": 0, "growth.images_per_level": 40, "train.images": 160, "train.batch": 16,
    "train.warmup_images": 16, "run.tick": 16, "run.samples": 1000, "run.checkpoint": 32,
    "engine.kind": "torch", "engine.timeout_seconds": 60,
}  # fmt: skip
TIMING = {"time", "images_per_second", "step_seconds", "data_seconds", "memory_bytes"}
SCENARIOS: dict[str, Callable[[Bench], dict]] = {}


def make_images(folder: Path) -> Path:
    """40 pictures of 8x8 pixels."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(40):
        pixels = random.integers(0, 255, (2, 2, 3), np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


class Launch:
    """The processes of one start of a run, and what each of them wrote."""

    def __init__(self, commands: list[tuple[list[str], dict]], folder: Path):
        self._logs = [folder / f"rank{rank}.log" for rank in range(len(commands))]
        self.started = time.time()
        self.processes = []
        for (command, environment), log in zip(commands, self._logs, strict=True):
            settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
            with open(log, "w") as file:
                self.processes.append(
                    subprocess.Popen(
                        command, cwd=folder, stderr=file, env={**os.environ, **settings, **environment}
                    )
                )

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit codes; kills what is left after `seconds` and raises TimeoutError."""
        end = time.time() + seconds
        try:
            return [process.wait(max(0.1, end - time.time())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"still running after {seconds} s: {self.text()[-2000:]}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def text(self, rank: int | None = None) -> str:
        logs = self._logs if rank is None else [self._logs[rank]]
        return "\n".join(log.read_text() for log in logs)

    def error(self, rank: int) -> str:
        lines = [line for line in self.text(rank).splitlines() if line.startswith("error: ")]
        assert lines, f"rank {rank} said no reason:\n{self.text(rank)[-2000:]}"
        return lines[-1]


class Bench:
    """A folder with images, disturbed runs, and the undisturbed ones, made when they are first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.images = make_images(folder / "images")
        self._whole: dict[tuple, Path] = {}

    def start(self, name: str, ranks: int = 2, fault: dict | None = None, elastic: str = "", nodes: int = 1,
              each=None, **settings) -> Launch:  # fmt: skip
        """Starts run `name`; elastic: options of launch/elastic.py, else the ranks are plain processes.

        nodes: with launch/elastic.py, how many of it share the ranks.
        each: (settings, environment) of its own for a rank, by rank. `settings`: a__b=c is a.b=c.
        """
        place = self.place(name)
        place.mkdir(exist_ok=True)
        settings = {key.replace("__", "."): value for key, value in settings.items()}
        settings = {**SETTINGS, "data.path": self.images, "run.name": name, **settings}
        planted = {"FAULT": json.dumps({"events": str(place / "events.jsonl"), **fault}) if fault else ""}
        port = str(free_port())
        if elastic:
            command = [sys.executable, str(ELASTIC), "--nproc_per_node", str(ranks // nodes)]
            meet = f"--nnodes {nodes} --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{port} --rdzv_id {name}"
            command += ["--standalone"] if nodes == 1 else meet.split()
            command += [*elastic.split(), str(PROGRAM), *_written(settings)]
            return Launch([(command, planted)] * nodes, place)
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        commands = []
        for rank in range(ranks):
            own, environment = (each or {}).get(rank, ({}, {}))
            command = [sys.executable, str(PROGRAM), *_written({**settings, **own})]
            numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), **rendezvous}
            commands.append((command, {**planted, **numbers, **environment}))
        return Launch(commands, place)

    def run(self, name: str, **options) -> Launch:
        """`start`, then waits for a good end."""
        launch = self.start(name, **options)
        codes = launch.wait()
        assert not any(codes), f"exit codes {codes}: {launch.text()[-2000:]}"
        return launch

    def place(self, name: str) -> Path:
        return self.folder / name

    def run_folder(self, name: str) -> Path:
        (folder,) = (self.place(name) / "runs").iterdir()
        return folder

    def checkpoint(self, name: str) -> int | None:
        """Images of the newest whole checkpoint."""
        found = load_newest(self.run_folder(name) / "checkpoints")
        return found and found[1]["images"]

    def assert_as_undisturbed(self, name: str, ranks: int = 2, **settings) -> None:
        """Run `name` has the statistics, weights, averages and moments of a run without the fault."""
        key = (ranks, *sorted(settings.items()))
        if key not in self._whole:
            whole = f"whole-{len(self._whole)}"
            self.run(whole, ranks=ranks, **settings)
            self._whole[key] = self.run_folder(whole)
        assert_same(self.run_folder(name), self._whole[key])

    def row(self, name: str, injected: str, happened: str) -> dict:
        """Times and losses come from the events that the processes wrote."""
        events = read_lines(self.place(name) / "events.jsonl")
        struck = next(event["at"] for event in events if event["event"] == "fault")
        steps = [event for event in events if event["event"] == "iteration"]
        before = [step for step in steps if step["process"] == steps[0]["process"]]
        after = steps[len(before) :][:1]
        return {
            "injected": injected,
            "happened": happened,
            "seconds": round(after[0]["at"] - struck, 1) if after else 0.0,
            "images_lost": max(0, before[-1]["images"] - after[0]["images"]) if after else 0,
        }


def assert_same(run: Path, other: Path) -> None:
    """Two run folders hold the same statistics and the same newest checkpoint, bit for bit."""
    stats = [
        [{k: v for k, v in line.items() if k not in TIMING} for line in read_lines(folder / "stats.jsonl")]
        for folder in (run, other)
    ]
    assert stats[0] == stats[1], "statistics differ"
    (tensors, state), (others, wanted) = (load_newest(folder / "checkpoints") for folder in (run, other))
    assert (state["images"], state["steps"]) == (wanted["images"], wanted["steps"])
    assert tensors.keys() == others.keys()
    differing = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    assert not differing, f"{len(differing)} tensors differ: {differing[:3]}"


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


@scenario
def killed_rank(bench: Bench) -> dict:
    launch = bench.start("killed", fault={"kind": "kill", "rank": 1, "images": 80})
    codes = launch.wait()
    assert codes == [1, -signal.SIGKILL]
    assert "rank 0: another rank ended without a word" in launch.error(0)
    bench.run("killed", fault={"kind": "kill", "rank": 1, "images": 80})
    bench.assert_as_undisturbed("killed")
    return bench.row("killed", "`kill -9` of a rank in the middle of a step",
                     "the others end at once and say so; the same command resumes")  # fmt: skip


@scenario
def killed_rank_under_elastic(bench: Bench) -> dict:
    fault = {"kind": "kill", "rank": 1, "images": 80}
    bench.run("elastic", fault=fault, elastic="--max-restarts 2")
    bench.assert_as_undisturbed("elastic")
    return bench.row("elastic", "the same under `launch/elastic.py --max-restarts 2`",
                     "it starts all ranks again; they resume by themselves")  # fmt: skip


@scenario
def killed_rank_of_another_node(bench: Bench) -> dict:
    fault = {"kind": "kill", "rank": 1, "images": 80}
    bench.run("nodes", fault=fault, elastic="--max-restarts 2", nodes=2)
    bench.assert_as_undisturbed("nodes")
    return bench.row("nodes", "the same with one `launch/elastic.py --nnodes 2 --max-restarts 2` a rank",
                     "both meet again and resume")  # fmt: skip


@scenario
def stalled_rank(bench: Bench) -> dict:
    return _stalled(bench, 1, "a rank stands still (SIGSTOP), with `engine.timeout_seconds=8`")


@scenario
def stalled_first_rank(bench: Bench) -> dict:
    return _stalled(bench, 0, "the same, but rank 0, in which the ranks' store lives")


def _stalled(bench: Bench, rank: int, injected: str) -> dict:
    name, fault = f"stalled-{rank}", {"kind": "stall", "rank": rank, "images": 80}
    launch = bench.start(name, fault=fault, engine__timeout_seconds=8)
    assert launch.processes[1 - rank].wait(120) == 1
    assert "did not answer within engine.timeout_seconds=8" in launch.error(1 - rank)
    launch.processes[rank].send_signal(signal.SIGCONT)  # a link that comes back too late
    assert launch.wait()[rank] == 1
    assert f"rank {rank}: another rank ended" in launch.error(rank)
    bench.run(name, fault=fault, engine__timeout_seconds=8)
    bench.assert_as_undisturbed(name)
    return bench.row(name, injected, "the others end after the timeout, the late rank as it returns; the "
                     "same command resumes")  # fmt: skip


@scenario
def terminated_rank(bench: Bench) -> dict:
    fault = {"kind": "sigterm", "rank": 1, "images": 80}
    launch = bench.start("terminated", fault=fault)
    assert launch.wait() == [0, 0]
    (stopped,) = (line for line in launch.text().splitlines() if "stopped at" in line)
    saved = bench.checkpoint("terminated")
    assert f"stopped at {saved} images" in stopped and 80 < saved < 160
    bench.run("terminated", fault=fault)
    bench.assert_as_undisturbed("terminated")
    return bench.row("terminated", "SIGTERM to one rank (preemption)", "all ranks stop at the same iteration "
                     "and save once; the same command resumes")  # fmt: skip


@scenario
def damaged_checkpoint(bench: Bench) -> dict:
    fault = {"kind": "corrupt", "rank": 0, "images": 80}
    assert bench.start("damaged", fault=fault).wait()[0] == -signal.SIGKILL
    again = bench.run("damaged", fault=fault)
    assert "0000000064.safetensors is damaged (its checksum does not agree)" in again.text(0)
    bench.assert_as_undisturbed("damaged")
    return bench.row("damaged", "a flipped bit in the newest checkpoint, then `kill -9`",
                     "the checksum tells; the same command resumes from the checkpoint before")  # fmt: skip


@scenario
def read_only_checkpoints(bench: Bench) -> dict:
    return _unwritable(bench, "read-only", "the folder of checkpoints becomes read-only for a while")


@scenario
def full_disk(bench: Bench) -> dict:
    return _unwritable(bench, "full", "the disk of the checkpoints is full for a while")


def _unwritable(bench: Bench, kind: str, injected: str) -> dict:
    fault = {"kind": kind, "rank": 0, "images": 80, "until": 112}
    try:
        launch = bench.run(kind, fault=fault)
    finally:
        subprocess.run(["umount", "-q", str(bench.run_folder(kind) / "checkpoints")])
    assert launch.text(0).count("checkpoint at 96 images not saved") == 1
    bench.assert_as_undisturbed(kind)
    return bench.row(kind, injected, "said at each checkpoint that fails; training goes on and saves later")


@scenario
def vanished_file(bench: Bench) -> dict:
    aside = bench.folder / "aside.png"
    fault = {"kind": "vanish", "rank": 0, "images": 48, "file": "017.png", "aside": str(aside)}
    launch = bench.start("vanished", ranks=1, fault=fault)
    assert launch.wait() == [1]
    shutil.move(aside, bench.images / "017.png")
    assert "017.png of " in launch.error(0) and "cannot be read" in launch.error(0)
    assert bench.checkpoint("vanished") >= 32
    bench.run("vanished", ranks=1, fault=fault)
    bench.assert_as_undisturbed("vanished", ranks=1)
    return bench.row("vanished", "a picture of a folder data set is removed",
                     "ends, naming the file; with the file back, the same command resumes")  # fmt: skip


@scenario
def drifted_rank(bench: Bench) -> dict:
    fault = {"kind": "drift", "rank": 1, "images": 80}
    launch = bench.start("drifted", fault=fault)
    assert launch.wait() == [1, 1]
    for rank in (0, 1):
        assert f"rank {rank}: the ranks have drifted apart" in launch.error(rank)
    bench.run("drifted", fault=fault)
    bench.assert_as_undisturbed("drifted")
    return bench.row("drifted", "one bit of one weight flips on one rank", "all ranks end at the next tick, "
                     "naming the parameter; the same command resumes")  # fmt: skip


@scenario
def not_finite(bench: Bench) -> dict:
    """The undisturbed run of this one has the same fault; the other is stopped and resumed around it."""
    fault = {"kind": "nan", "rank": 1, "images": 80}
    settings = {"guard__rollbacks": 1, "run__checkpoint": 64}
    launch = bench.run("nan", fault=fault, **settings)
    assert "kl_real is not finite" in launch.text(0)
    assert "Went back from 96 to 64 images" in launch.text(0)
    assert load_newest(bench.run_folder("nan") / "checkpoints")[1]["guard"]["skipped"] == 32
    for images in (80, 112, 160):  # one stop before the fault, one after the return
        bench.run("parts", fault=fault, train__images=images, **settings)
    assert_same(bench.run_folder("nan"), bench.run_folder("parts"))
    return {
        "injected": "NaN in the images of one iteration, with `guard.rollbacks=1`",
        "happened": "all ranks go back to the last checkpoint and leave these images out",
        "seconds": 0.0,
        "images_lost": 32,
    }


@scenario
def other_settings(bench: Bench) -> dict:
    each = {1: ({"train.seed": 7}, {})}
    return _refused(bench, each, "a rank is started with another `train.seed`",
                    "rank 1 has train.seed=7, rank 0 has 0")  # fmt: skip


@scenario
def other_data(bench: Bench) -> dict:
    other = shutil.copytree(bench.images, bench.folder / "other-images")
    Image.new("RGB", (8, 8)).save(other / "005.png")
    each = {1: ({"data.path": other}, {})}
    return _refused(bench, each, "a rank has one other picture in its data",
                    "rank 1 has checksum of the data=")  # fmt: skip


@scenario
def other_code(bench: Bench) -> dict:
    other = bench.folder / "other-code"
    left_out = shutil.ignore_patterns("kernels", "__pycache__")
    shutil.copytree(ROOT / "sivae_fast", other / "sivae_fast", ignore=left_out)
    shutil.copytree(ROOT / "kernels", other / "sivae_fast" / "kernels")
    with open(other / "sivae_fast" / "growth.py", "a") as file:
        file.write("# another version\n")
    each = {1: ({}, {"PYTHONPATH": str(other)})}
    return _refused(bench, each, "a rank runs another version of one source file",
                    "rank 1 has source file sivae_fast/growth.py=")  # fmt: skip


def _refused(bench: Bench, each: dict, injected: str, reason: str) -> dict:
    name = f"refused-{len(list(bench.folder.glob('refused-*')))}"
    launch = bench.start(name, each=each)
    assert launch.wait() == [1, 1]
    for rank in (0, 1):
        assert reason in launch.error(rank)
    assert not list(bench.place(name).glob("runs/*"))
    return {
        "injected": injected,
        "happened": "every rank refuses to start and names the difference",
        "seconds": 0.0,
        "images_lost": 0,
    }


def _written(settings) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
