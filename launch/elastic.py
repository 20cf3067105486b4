"""torchrun with its options, but listening on the address of the meeting point alone, and quicker to end:

    python launch/elastic.py --nproc_per_node 8 launch/train.py --config launch/configs/ffhq256.yaml ...

The stores of torchrun itself listen on every interface of the first node.
"""

from __future__ import annotations

import functools
import sys
from datetime import timedelta

from torch.distributed import Store, run
from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, static_tcp_rendezvous
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher import api

from sivae_fast.training.meeting import source_address, store_at

LIMIT = timedelta(minutes=5)  # that of PyTorch's stores
#: Seconds in which all nodes end once one has, 300 in torchrun: ranks end together.
ENDING = 30


class Agent(LocalElasticAgent):
    """Tells the others when a signal has ended its ranks, and waits for theirs, as it does without a signal.

    Else they would hold their store for ENDING seconds, and a node that comes back meanwhile would join that.
    """

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        try:
            return super().run(role)
        except SignalException:
            if self._worker_group.state is WorkerState.HEALTHY:  # not where it is told already
                self._exit_barrier()
            raise


def replace_stores(several: bool) -> None:
    """Where torchrun makes a store, it makes one of ours. several: the run has several nodes."""

    def store(host_name, port, world_size=None, is_master=False, timeout=LIMIT, multi_tenant=True) -> Store:
        return store_at(host_name, port, world_size, timeout, listens=is_master, several=several)

    def server(handler, host_name: str, port: int) -> Store:
        return store(host_name, port, is_master=True)

    for module in (static_tcp_rendezvous, c10d_rendezvous_backend):
        module.TCPStore = store
    DynamicRendezvousHandler._create_tcp_store_server = server


@record
def main(arguments: list[str] | None = None) -> None:
    options = run.parse_args(arguments)
    several = run.parse_min_max_nnodes(options.nnodes)[1] > 1
    try:
        if options.local_addr is None:  # torchrun takes the machine's name
            meeting, _ = parse_rendezvous_endpoint(options.rdzv_endpoint or options.master_addr, 0)
            options.local_addr = source_address(meeting, several=several)
        replace_stores(several)
        api.LocalElasticAgent = functools.partial(Agent, exit_barrier_timeout=ENDING)
        run.run(options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except SignalException as error:
        sys.exit(f"stopped by {error.sigval.name}")


if __name__ == "__main__":
    main()
