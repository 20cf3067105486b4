"""Ranks meet at the chosen address, and nothing listens on any other."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest

from bench.fault_scenarios import ELASTIC, SETTINGS, Bench, Launch, free_port
from launch.elastic import ENDING
from sivae_fast.training import meeting
from sivae_fast.training.engine import distributed
from sivae_fast.training.meeting import meeting_point, source_address, store_at
from tests.training.conftest import ROOT, environment, listening

LIMIT = timedelta(seconds=20)
ELSEWHERE = "203.0.113.7"  # kept for documentation: no machine has it
VARIABLES = (
    "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_CONF_FILE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE",
    "LOCAL_RANK", "WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE",
)  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    """Nothing of a launch is in the environment, and afterwards all is as before."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def known(monkeypatch):
    """known(host=its addresses): what this machine takes names for."""

    def give(**hosts):
        def look_up(host, port, **options):
            return [
                (socket.AF_INET6 if ":" in address else socket.AF_INET, None, 6, "", (address, port))
                for address in hosts.get(host, [])
            ]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)

    return give


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


HOSTS = ["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here"))]


@pytest.mark.parametrize("host", HOSTS)
def test_a_store_listens_at_its_address_alone(host):
    before = listening(os.getpid())
    store = store_at(host, 0, None, LIMIT, listens=True, several=True)
    assert listening(os.getpid()) - before == {(host, store.port)}
    store.set("word", "said")
    assert store_at(host, store.port, None, LIMIT, listens=False, several=True).get("word") == b"said"
    del store
    assert listening(os.getpid()) == before


@pytest.mark.parametrize("host", HOSTS)
def test_ranks_meet_in_the_store_that_rank_0_holds(monkeypatch, host):
    before, port = listening(os.getpid()), free_port()
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", str(port))
    with ThreadPoolExecutor(2) as ranks:
        stores = list(ranks.map(lambda rank: meeting_point(rank, 2, LIMIT), range(2)))
    stores[1].set("word", "said")
    assert stores[0].get("word") == b"said"
    assert listening(os.getpid()) - before == {(host, port)}


def test_a_port_in_use_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} \(127.0.0.1: Address already in use\)"):
            store_at("127.0.0.1", port, None, LIMIT, listens=True, several=True)


def test_an_address_of_another_machine_is_said():
    with pytest.raises(ValueError, match=rf"MASTER_ADDR={ELSEWHERE}.* one of its own addresses"):
        store_at(ELSEWHERE, 29500, None, LIMIT, listens=True, several=True)


def test_a_name_that_is_known_on_one_machine_only(known):
    """Debian's /etc/hosts has the machine's own name at 127.0.1.1."""
    known(node0=["127.0.1.1"])
    with pytest.raises(ValueError, match=r"MASTER_ADDR=node0.* no address of that name"):
        store_at("node0", 29500, None, LIMIT, listens=True, several=True)
    with pytest.raises(ValueError, match="MASTER_ADDR=node1"):
        store_at("node1", 29500, None, LIMIT, listens=True, several=True)
    assert source_address("node0", several=True) is None
    assert source_address("node0", several=False) == "127.0.0.1"


def test_the_first_address_that_this_machine_has_is_taken(known, monkeypatch):
    asked = []

    def create_server(address, **options):
        asked.append(address)
        if address[0] == ELSEWHERE:
            raise OSError(99, "not here")
        return "a listener"

    known(node0=["127.0.1.1", ELSEWHERE, "198.51.100.2", "198.51.100.3"])
    monkeypatch.setattr(socket, "create_server", create_server)
    assert meeting._listen("node0", 7, several=True) == "a listener"
    assert asked == [(ELSEWHERE, 7), ("198.51.100.2", 7)]


@pytest.mark.parametrize(
    "variables, said",
    [
        ({}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT=''"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "65536"}, "MASTER_PORT='65536'"),
    ],
)
def test_a_missing_meeting_point_is_named(monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        meeting_point(0, 2, LIMIT)


@pytest.fixture
def interfaces(monkeypatch, tmp_path):
    """A machine with eth0 and eth01, of which eth0 leads to the others."""
    addresses = {"lo": ["127.0.0.1", "::1"], "eth01": ["10.0.1.2"], "eth0": ["10.0.0.2", "fe80::2%eth0"]}
    table = {name: [SimpleNamespace(address=a) for a in each] for name, each in addresses.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: table)
    monkeypatch.setattr(meeting, "source_address", lambda host, several: "10.0.0.2")
    monkeypatch.setattr(meeting, "store_at", lambda *arguments, **options: "a store")
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("NCCL_CONF_FILE", str(tmp_path / "nccl.conf"))


def chosen() -> tuple[str | None, str | None]:
    return os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")


def test_the_interface_that_leads_to_rank_0_is_named(interfaces):
    assert meeting_point(1, 4, LIMIT) == "a store"
    assert chosen() == ("eth0", "=eth0")


def test_on_one_machine_it_is_the_loopback_interface(interfaces, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    meeting_point(1, 4, LIMIT)
    assert chosen() == ("lo", "=lo")


def test_a_chosen_interface_stays(interfaces, monkeypatch, tmp_path):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth01")
    (tmp_path / "nccl.conf").write_text("NCCL_DEBUG=WARN\nNCCL_SOCKET_IFNAME=ib\n")
    meeting_point(1, 4, LIMIT)
    assert chosen() == ("eth01", None)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker")
    meeting_point(1, 4, LIMIT)
    assert chosen() == ("eth01", "^docker")


def test_one_process_under_deepspeed_uses_the_loopback_interface(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    before = listening(os.getpid())
    with distributed("deepspeed", 10):
        assert os.environ["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")
        assert {address for address, _ in listening(os.getpid()) - before} <= {"127.0.0.1"}


def plain_ranks(bench: Bench, **endless) -> Launch:
    return bench.start("run", **endless)


def one_agent(bench: Bench, **endless) -> Launch:
    return bench.start("run", elastic="--max-restarts 0", **endless)


def two_agents(bench: Bench, **endless) -> Launch:
    return bench.start("run", elastic="--max-restarts 0", nodes=2, **endless)


def two_static_agents(bench: Bench, **endless) -> Launch:
    """As slurm.sh and pod.sh start them."""
    settings = {**SETTINGS, "data.path": bench.images} | {k.replace("__", "."): v for k, v in endless.items()}
    program = [str(ROOT / "launch" / "train.py"), *(f"{key}={value}" for key, value in settings.items())]
    meet = f"--nnodes 2 --nproc_per_node 1 --master_addr 127.0.0.1 --master_port {free_port()} --node_rank"
    place = bench.place("run")
    place.mkdir()
    agent = [sys.executable, str(ELASTIC), *meet.split()]
    return Launch([([*agent, str(rank), *program], {}) for rank in range(2)], place)


@pytest.mark.slow
@pytest.mark.parametrize("start", [plain_ranks, one_agent, two_agents, two_static_agents])
def test_all_processes_of_a_run_listen_at_the_meeting_point_alone(tmp_path, start):
    bench = Bench(tmp_path)
    launch = start(bench, train__images=10**9, growth__images_per_level=10**9, run__checkpoint=10**9)
    try:
        while not list(bench.place("run").glob("runs/*/stats.jsonl")):
            assert all(process.poll() is None for process in launch.processes), launch.text()
            time.sleep(0.1)
        found = set.union(*(listening(process.pid) for process in launch.processes))
        for process in launch.processes:
            process.send_signal(signal.SIGTERM)
        launch.wait(60)
    finally:
        launch.kill()
    assert {address for address, _ in found} == {"127.0.0.1"}
    assert len(found) >= 3  # a store, and gloo in each rank
    assert "stopped at" in launch.text()


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_agent_ends_the_others_at_once(tmp_path, signalled):
    """Else they would hold the store for ENDING seconds, and a node that comes back would join that."""
    bench = Bench(tmp_path)
    launch = two_static_agents(bench, train__images=10**9, growth__images_per_level=10**9)
    try:
        while not list(bench.place("run").glob("runs/*/stats.jsonl")):
            assert all(process.poll() is None for process in launch.processes), launch.text()
            time.sleep(0.1)
        launch.processes[signalled].send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert launch.wait(60)[1 - signalled] == 0
        assert time.monotonic() - started < ENDING / 2
    finally:
        launch.kill()
    assert "stopped at" in launch.text() and "Traceback" not in launch.text()
    assert launch.text(signalled).endswith("stopped by SIGTERM\n")


def test_the_launcher_says_what_is_wrong_with_its_address():
    meet = ["--nnodes", "2", "--master_addr", ELSEWHERE, "--master_port", "29500"]
    command = [sys.executable, ELASTIC, *meet, ROOT / "launch" / "train.py"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"error: cannot listen at MASTER_ADDR={ELSEWHERE}, port 29500"
    )
