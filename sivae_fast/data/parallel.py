"""Work on many items in several processes, results in order, few items in memory."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

#: Below this number of items a pool of processes costs more than it saves.
_SMALL = 32


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_ranks() -> int:
    """How many ranks share this machine, as torchrun or DeepSpeed's launcher say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def ordered(function: Callable, calls: Iterable[tuple], count: int, workers: int) -> Iterator[tuple]:
    """(key, function(*arguments)) for each (key, *arguments) of about `count` calls, in order.

    At most four items a worker are in memory. The function must be importable by name. Raises
    ChildProcessError where a worker was killed.
    """
    if workers == 1 or count < _SMALL:
        yield from ((key, function(*arguments)) for key, *arguments in calls)
        return
    # Forked workers need no guarded main module and share what is imported already.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ahead: deque = deque()
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        try:
            for key, *arguments in calls:
                ahead.append((key, pool.submit(function, *arguments)))
                if len(ahead) >= 4 * workers:
                    key, future = ahead.popleft()
                    yield key, future.result()
            while ahead:
                key, future = ahead.popleft()
                yield key, future.result()
        except BrokenProcessPool:
            raise ChildProcessError("a worker process was killed (out of memory?)") from None


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent, and does not outlive it: an orphan would keep the parent's locks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
