"""The processes of a launch, telling each other facts without any of them being left waiting."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sivae_fast.training.meeting import meeting_point


class Trouble(str):
    """Why something could not be done on one rank."""


def attempt(function: Callable, *arguments) -> Any:
    """What the function returns, or a Trouble with the reason."""
    try:
        return function(*arguments)
    except Exception as error:  # whatever it is, it is a finding
        return Trouble(reason(error))


def reason(error: Exception) -> str:
    """The first line of an error's message, or its kind."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def connected(timeout: float) -> Iterator[str]:
    """The ranks connected over gloo; yields why they could not be, or "".

    timeout: seconds to wait for the others, here and in every later collective call.
    """
    trouble = ""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a timeout raises, it does not abort
        start = attempt(_connect, timeout)
        if isinstance(start, Trouble):
            me, world, host, port = (
                os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            )
            trouble = (
                f"rank {me} of {world} did not meet the others at {host}:{port} ({start}). Is that node 0, "
                "is the port open, did every node start, is GLOO_SOCKET_IFNAME the right interface?"
            )
    try:
        yield trouble
    finally:
        with suppress(Exception):  # the others may be gone
            if dist.is_initialized():
                dist.destroy_process_group()


def _connect(timeout: float) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ["WORLD_SIZE"])
    limit = timedelta(seconds=timeout)
    store = meeting_point(rank, world, limit)
    dist.init_process_group("gloo", timeout=limit, store=store, rank=rank, world_size=world)
    dist.barrier()


class Ranks:
    """The processes of this launch, as torchrun or DeepSpeed's launcher started them."""

    def __init__(self):
        self.rank, self.world, self.local = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        # The number of the node, from torchrun or DeepSpeed: two nodes may have one host name.
        node = os.environ.get("GROUP_RANK") or os.environ.get("CROSS_RANK") or "0"
        self.nodes = self.gather((socket.gethostname(), node))

    def gather(self, fact: Any) -> list:
        """The facts of all ranks in their order; a collective call."""
        if self.world == 1:
            return [fact]
        facts = [None] * self.world
        dist.all_gather_object(facts, fact)
        return facts

    def say(self, members: list[int]) -> str:
        """A few ranks in words."""
        if len(members) == self.world:
            return "every rank"
        shown = ", ".join(f"{rank} ({self.nodes[rank][0]})" for rank in members[:4])
        more = f" and {len(members) - 4} more" if len(members) > 4 else ""
        return f"rank{'s' if len(members) > 1 else ''} {shown}{more}"

    def say_values(self, values: list) -> str:
        """Who has which value."""
        if self.world == 1:
            return str(values[0])
        members: dict[Any, list[int]] = {}
        for rank, value in enumerate(values):
            members.setdefault(value, []).append(rank)
        return "; ".join(f"{value} on {self.say(who)}" for value, who in members.items())

    def troubles(self, facts: list) -> str:
        """The troubles among the facts in words, "" without any."""
        if not any(isinstance(fact, Trouble) for fact in facts):
            return ""
        return self.say_values([fact if isinstance(fact, Trouble) else "nothing wrong" for fact in facts])
