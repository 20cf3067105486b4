"""One training over two hosts: two network namespaces joined by a cable, launched as the documentation says.

pytest -m cluster tests/clusters      needs root and `ip netns`
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.conftest import ROOT, TINY, environment, image_folder, launch, listeners
from tests.training.test_distributed import FLOOR, STEADY, largest_difference, start, weights

__all__ = ["image_folder", "launch", "start"]

#: What a tick says about the machine rather than the training.
MACHINE = {"time", "images_per_second", "step_seconds", "data_seconds", "memory_bytes"}
NODE = ROOT / "launch" / "clusters" / "node.sh"
ENDLESS = {**TINY, "train.images": 10**7, "growth.images_per_level": 10**7}


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def why_not() -> str:
    """Why this machine cannot play two hosts, or ""."""
    if not shutil.which("ip"):
        return "needs the `ip` command of iproute2"
    name = f"sivae-{os.getpid()}-probe"
    try:
        ip("netns", "add", name)
        ip("netns", "delete", name)
    except OSError as error:
        return f"needs root and network namespaces ({error})"
    return ""


class Hosts:
    """Two namespaces, a cable between them, and the processes started in them."""

    def __init__(self, folder: Path, addresses: list[str]):
        self.folder, self.addresses = folder, addresses
        self.names = [f"sivae-{os.getpid()}-{side}" for side in "ab"]
        self.processes: list[subprocess.Popen] = []

    def connect(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        first, second = self.names
        ip("-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
        for name, address in zip(self.names, self.addresses, strict=True):
            at_once = ["nodad"] if ":" in address else []  # no search for another host of this address
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0", *at_once)
            ip("-n", name, "link", "set", "eth0", "up")

    def cut(self) -> None:
        ip("-n", self.names[0], "link", "set", "eth0", "down")

    def start(self, program: str, settings: dict) -> None:
        """The documented command on both hosts, one process each."""
        hostfile = self.folder / "hostfile"
        hostfile.write_text("node-0 slots=1\nnode-1 slots=1\n")
        arguments = [f"{key}={value}" for key, value in settings.items()]
        for rank, name in enumerate(self.names):
            env = environment() | {
                "NODE_RANK": str(rank),
                "MASTER_ADDR": self.addresses[0],
                "HOSTFILE": str(hostfile),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            }
            command = ["ip", "netns", "exec", name, NODE, ROOT / "launch" / program, *arguments]
            with open(self.output(rank), "w") as output:
                self.processes.append(
                    subprocess.Popen(command, cwd=self.folder, env=env, stdout=output, stderr=output)
                )

    def wait_for_training(self) -> None:
        """Until the first tick is written."""
        end = time.monotonic() + 180
        while not list(self.folder.glob("runs/*/stats.jsonl")):
            running = [process.poll() is None for process in self.processes]
            assert time.monotonic() < end and all(running), self.output(0).read_text()[-3000:]
            time.sleep(0.2)

    def output(self, rank: int) -> Path:
        return self.folder / f"host{rank}.txt"

    def wait(self, seconds: float) -> list[int]:
        """Exit codes of both; fails where one still runs after `seconds`."""
        end = time.monotonic() + seconds
        return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]

    def clean_up(self) -> None:
        for name in self.names:
            with contextlib.suppress(OSError):
                for pid in ip("netns", "pids", name).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(OSError):
                ip("netns", "delete", name)
        for process in self.processes:
            process.wait(30)


CABLES = {"IPv4": ["10.213.77.1", "10.213.77.2"], "IPv6": ["fd00:213:77::1", "fd00:213:77::2"]}


@pytest.fixture
def hosts(request, tmp_path):
    reason = why_not()
    if reason:
        pytest.skip(reason)
    made = Hosts(tmp_path, CABLES[getattr(request, "param", "IPv4")])
    try:
        made.connect()
        yield made
    finally:
        made.clean_up()


def ticks(folder: Path, name: str) -> list[dict]:
    (path,) = (folder / "runs").glob(f"*-{name}/stats.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.cluster
@pytest.mark.parametrize("kind, zero", [("torch", 0), ("deepspeed", 1)])
def test_two_hosts_equal_one_process(hosts, launch, image_folder, start, kind, zero):
    launch(run__name="one", **STEADY)
    engine = {"engine.kind": kind, "engine.zero": zero, "optim.eps": STEADY["optim__eps"]}
    hosts.start("train.py", {**TINY, "data.path": image_folder, "run.name": "two", **engine})
    assert hosts.wait(240) == [0, 0], hosts.output(0).read_text()[-3000:]
    one, two = weights(launch.folder, "one"), weights(launch.folder, "two")
    assert largest_difference(one, two, start) < FLOOR
    for mine, theirs in zip(ticks(launch.folder, "one"), ticks(launch.folder, "two"), strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - MACHINE:
            assert theirs[key] == pytest.approx(mine[key], rel=1e-3), key


@pytest.mark.cluster
def test_a_cut_cable_ends_both_hosts_with_a_reason(hosts, image_folder):
    seconds = 20
    hosts.start("train.py", {**ENDLESS, "data.path": image_folder, "engine.timeout_seconds": seconds})
    hosts.wait_for_training()
    hosts.cut()
    # The reduction that never ends, then the processes and their launchers.
    assert 0 not in hosts.wait(seconds + 40)
    for rank in range(2):
        said = hosts.output(rank).read_text()
        assert f"error: rank {rank}: another rank ended without a word" in said
        assert f"engine.timeout_seconds={seconds}" in said and "the same command resumes" in said.lower()


@pytest.mark.cluster
@pytest.mark.parametrize("hosts", CABLES, indirect=True)
def test_nothing_listens_but_at_the_end_of_the_cable(hosts, image_folder):
    hosts.start("train.py", {**ENDLESS, "data.path": image_folder})
    hosts.wait_for_training()
    found = [set(listeners(process.pid).values()) for process in hosts.processes]
    hosts.processes[1].terminate()
    assert hosts.wait(120)[0] == 0  # DeepSpeed's launcher never ends well after a signal of its own
    assert (hosts.addresses[0], 29500) in found[0]  # the store
    for own, places in zip(hosts.addresses, found, strict=True):
        assert {address for address, _ in places} == {own}


@pytest.mark.cluster
def test_the_doctor_sees_two_hosts(hosts, image_folder):
    hosts.start("doctor.py", {})
    assert hosts.wait(120) == [0, 0]
    lines = hosts.output(0).read_text()
    assert "2 on 2 nodes" in lines and "gloo: right sums" in lines
