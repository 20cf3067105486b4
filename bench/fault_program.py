"""launch/train.py with one fault planted in it.

    FAULT='{"kind": "kill", "rank": 1, "images": 48, "events": "e.jsonl"}' python bench/fault_program.py ...

Between the encoder's and the decoder's update of the iteration that starts at `images`, the rank does itself
what FAULTS says. A fault happens once in the life of the events file, but for "nan", which belongs to its
place in the sequence of data. The file says when the fault struck and when rank 0 began each iteration.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from sivae_fast.files import append_line, read_lines
from sivae_fast.training.loop import Trainer

TRAIN = Path(__file__).parents[1] / "launch" / "train.py"


def _signal(number):
    return lambda trainer, fault: os.kill(os.getpid(), number)


def _drift(trainer, fault) -> None:
    """The smallest possible difference: the last bit of one weight."""
    weight = next(trainer.model.encoder.parameters()).data.view(-1)[:1]
    weight.view(torch.int32).bitwise_xor_(1)


def _corrupt(trainer, fault) -> None:
    """The newest checkpoint is damaged, and the rank dies."""
    damage(trainer.recorder.checkpoints)
    os.kill(os.getpid(), signal.SIGKILL)


def damage(checkpoints: Path) -> None:
    """Flips a bit of the newest checkpoint."""
    newest = max(checkpoints.glob("*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[-100] ^= 1
    newest.write_bytes(content)


def _vanish(trainer, fault) -> None:
    """One picture of the training set goes away."""
    path = Path(trainer.config.data.path) / fault["file"]
    shutil.move(path, fault["aside"])


def _mount(options: str):
    """The checkpoints lie on another file system until `until` images: read-only, or almost full."""

    def mount(trainer, fault) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(trainer.recorder.checkpoints)]
        subprocess.run(command, check=True)

    return mount


FAULTS = {
    "kill": _signal(signal.SIGKILL),
    "stall": _signal(signal.SIGSTOP),
    "sigterm": _signal(signal.SIGTERM),
    "drift": _drift,
    "corrupt": _corrupt,
    "vanish": _vanish,
    "read-only": _mount("ro"),
    "full": _mount("size=16k"),
}


def plant(fault: dict) -> None:
    """Wraps the iteration and the encoder's update of every trainer of this process."""
    iterate, events = Trainer.iterate, Path(fault["events"])

    def strike(trainer) -> None:
        append_line(events, {"event": "fault", "at": time.time()})
        FAULTS[fault["kind"]](trainer, fault)

    def faulty(trainer, x, stage, *streams) -> None:
        if trainer.rank == 0:
            now = {"images": trainer.images, "process": os.getpid(), "at": time.time()}
            append_line(events, {"event": "iteration", **now})
        mine = trainer.rank == fault["rank"] and trainer.position == fault["images"]
        if mine and fault["kind"] == "nan":
            x = x * float("nan")
        elif mine and not any(line["event"] == "fault" for line in read_lines(events)):
            _before_decoder(trainer, strike)
        if trainer.rank == fault["rank"] and trainer.images == fault.get("until"):
            subprocess.run(["umount", str(trainer.recorder.checkpoints)], check=True)
        iterate(trainer, x, stage, *streams)

    Trainer.iterate = faulty


def _before_decoder(trainer, strike) -> None:
    phase = trainer.step.decoder_phase

    def once(*arguments):
        trainer.step.decoder_phase = phase
        strike(trainer)
        return phase(*arguments)

    trainer.step.decoder_phase = once


if __name__ == "__main__":
    if os.environ.get("FAULT"):
        plant(json.loads(os.environ["FAULT"]))
    sys.argv[0] = str(TRAIN)
    runpy.run_path(str(TRAIN), run_name="__main__")
