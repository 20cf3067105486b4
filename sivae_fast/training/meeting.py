"""Where the ranks meet: a store and network interfaces at the chosen addresses, and at no others.

PyTorch's TCPStore listens on every interface of its machine and has no option for another. Here it is handed
a socket that listens on the address of the meeting point alone; gloo and NCCL are told the interface that
leads there.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from sivae_fast.data.parallel import local_ranks
from sivae_fast.training.agreement import RankFailed

LOOPBACK = "127.0.0.1"


def meeting_point(rank: int, world: int, limit: timedelta) -> dist.Store:
    """The store in which the ranks find each other: that of torchrun's agent, or else one that rank 0 holds.

    Also names the network interface to use to gloo and NCCL, where the environment does not: the loopback
    interface for ranks on one machine, else the one that leads to MASTER_ADDR. ValueError where MASTER_ADDR
    and MASTER_PORT are missing, or not an address and a free port of the machine of rank 0.
    """
    several = world != local_ranks()
    if world == 1:
        _name_interface(LOOPBACK)
        return dist.HashStore()
    host, port = _master(world)
    _name_interface(source_address(host, several=True) if several else LOOPBACK)
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = store_at(host, port, world, limit, listens=rank == 0 and not of_agent, several=several)
    return fresh_store(store, rank, world, limit.total_seconds()) if of_agent else store


def store_at(
    host: str, port: int, world: int | None, limit: timedelta, *, listens: bool, several: bool
) -> dist.TCPStore:
    """The store at host:port. listens: it is made here, at the address of `host` alone (port 0: a free one).

    several: other machines use it, too. ValueError where this machine cannot listen there.
    """
    if not listens:
        return dist.TCPStore(host, port, world, False, limit)
    listener = _listen(host, port, several)
    port = listener.getsockname()[1]
    return dist.TCPStore(host, port, world, True, limit, master_listen_fd=listener.detach())


def source_address(host: str, *, several: bool) -> str | None:
    """The address of this machine from which packets to `host` leave, None where it knows of no way there."""
    for family, address in _addresses(host, 1, several):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return probe.getsockname()[0]
    return None


def fresh_store(store: dist.Store, rank: int, world: int, limit: float) -> dist.Store:
    """A part of the store that this start of the ranks has for itself. RankFailed after `limit` seconds.

    torchrun keeps one store for all restarts (pytorch issue 135712), in which ranks find the addresses of
    those before them; the count of restarts that it hands out is each node's own. So rank 0 makes a new name,
    and tells it to every rank that has asked under a name of its own, until all have acknowledged.
    """
    name, end = uuid.uuid4().hex, time.monotonic() + limit
    if rank:
        store.set(f"sivae_fast/asks/{rank}", name)
        name = store.get(f"sivae_fast/tells/{name}").decode()
        store.set(f"sivae_fast/knows/{name}/{rank}", "")
    waiting = set(range(1, world)) if rank == 0 else set()
    while waiting:
        for other in list(waiting):
            if store.check([f"sivae_fast/asks/{other}"]):
                store.set(f"sivae_fast/tells/{store.get(f'sivae_fast/asks/{other}').decode()}", name)
            if store.check([f"sivae_fast/knows/{name}/{other}"]):
                waiting.remove(other)
        if time.monotonic() > end:
            raise RankFailed(f"ranks {sorted(waiting)} did not start within {limit:.0f} s")
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def _master(world: int) -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host:
        raise ValueError(f"MASTER_ADDR is not set: {world} ranks need the address of the machine of rank 0")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"MASTER_PORT={port!r}: a free port of the machine of rank 0 is needed, 1 to 65535")
    return host, int(port)


def _addresses(host: str, port: int, several: bool) -> list[tuple[socket.AddressFamily, tuple]]:
    """(family, address) of a host that all machines of the run reach, as far as this one knows.

    Many a machine finds its own name at a loopback address (127.0.1.1 in /etc/hosts): between machines such
    an address counts only where it was written as one.
    """
    with suppress(OSError):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        named = several and host != "localhost" and all(address[0] != host for *_, address in found)
        return [
            (family, address)
            for family, *_, address in found
            if not (named and ipaddress.ip_address(address[0]).is_loopback)
        ]
    return []


def _listen(host: str, port: int, several: bool) -> socket.socket:
    troubles = []
    for family, address in _addresses(host, port, several):
        try:
            return socket.create_server(address, family=family)
        except OSError as error:
            troubles.append(f"{address[0]}: {os.strerror(error.errno)}")
    reason = "; ".join(troubles) or "this machine knows no address of that name that others could reach"
    raise ValueError(
        f"cannot listen at MASTER_ADDR={host}, port {port} ({reason}). The machine of rank 0 needs one of "
        "its own addresses there, best as a number, and a free port; the MASTER_ADDR of other machines may "
        "be another one by which they reach it"
    )


def _name_interface(address: str | None) -> None:
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if address in (entry.address.split("%")[0] for entry in entries):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            if not _in_nccl_file("NCCL_SOCKET_IFNAME"):
                os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without "=" a prefix of names
            return


def _in_nccl_file(name: str) -> bool:
    """Whether one of NCCL's own files of settings, which yield to the environment, has this one."""
    paths = [Path("/etc/nccl.conf"), Path(os.environ.get("NCCL_CONF_FILE", "~/.nccl.conf")).expanduser()]
    return any(path.is_file() and name in path.read_text(errors="replace") for path in paths)
