import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]

#: A style model that trains in seconds; grows from 4x4 to 8x8 after 40 images.
TINY = {
    "model.resolution": 8,
    "model.start_channels": 4,
    "model.max_channels": 8,
    "model.latent_size": 8,
    "model.mapping_layers": 2,
    "objective.beta_neg": 16,
    "objective.scale": 0.01,
    "data.loader": "torch",
    "growth.images_per_level": 40,
    "train.images": 80,
    "train.batch": 16,
    "train.warmup_images": 16,
    "optim.betas": "[0.0,0.99]",
    "optim.published_eps": "true",
    "run.tick": 16,
    "run.samples": 1000,
    "run.checkpoint": 1000,
    "engine.kind": "torch",
}


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """40 coloured discs of 8x8 pixels."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(40):
        x, y, radius = random.uniform(2, 6, 3)
        rows, columns = np.mgrid[:8, :8]
        image = np.full((8, 8, 3), 220, np.uint8)
        image[(columns - x) ** 2 + (rows - y) ** 2 < radius**2 / 2] = random.integers(0, 200, 3)
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def launch(image_folder, tmp_path):
    """Runs launch/train.py in a process of its own, in `tmp_path`; keyword arguments override TINY.

    ranks: more than one goes through torchrun. `check` fails on a non-zero exit.
    """

    def start(
        ranks: int = 1, check: bool = True, timeout: int = 500, **overrides
    ) -> subprocess.CompletedProcess:
        command = arguments(ranks, overrides)
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=timeout
        )
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done

    def arguments(ranks: int = 1, overrides: dict | None = None) -> list[str]:
        settings = {**TINY, "data.path": image_folder, **_dotted(overrides or {})}
        program = [str(ROOT / "launch" / "train.py"), *(f"{k}={v}" for k, v in settings.items())]
        if ranks == 1:
            return [sys.executable, *program]
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        return [sys.executable, *run, *program]

    start.arguments = arguments
    start.folder = tmp_path
    return start


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def listening(pid: int) -> set[tuple[str, int]]:
    """(address, port) where a process, or one below it, waits for TCP connections. Linux."""
    process = Path(f"/proc/{pid}")
    links = [os.readlink(link) for link in (process / "fd").iterdir() if link.is_symlink()]
    found = {place for number, place in listeners(pid).items() if f"socket:[{number}]" in links}
    below = [int(child) for task in process.glob("task/*/children") for child in task.read_text().split()]
    return found.union(*(listening(child) for child in below))


def listeners(pid: int) -> dict[str, tuple[str, int]]:
    """(address, port) of all that waits for TCP connections in the network of a process, by socket number."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address, port = fields[1].split(":")
            if fields[3] == "0A":
                found[fields[9]] = _address(address), int(port, 16)
    return found


def _address(text: str) -> str:
    """The kernel writes addresses as 32-bit words in the byte order of the machine."""
    words = [int(text[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(text), 8)]
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, b"".join(words))


def _dotted(overrides: dict) -> dict[str, str]:
    """train__images=3 stands for train.images=3."""
    return {key.replace("__", "."): value for key, value in overrides.items()}
