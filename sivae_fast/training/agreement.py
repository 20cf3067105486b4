"""What all ranks of a run must have in common, and how each of them learns why another one failed.

Ranks that start from different code, settings or data train on without any message and end with nonsense;
a rank that dies leaves the others waiting. Both end here, on every rank and with the reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from sivae_fast.config import Config
from sivae_fast.models import own as own_model

#: Settings that may differ between ranks: where things lie on a node, and how it reads them.
FREE = (
    "data.path", "data.workers", "data.cache_gib", "evaluate.data", "evaluate.weights", "run.folder",
    "train.init_from", "model.source",
)  # fmt: skip
ABSENT = "absent"
_WORD = "sivae_fast/failed"  # where a rank that fails leaves the reason for the others

Made = TypeVar("Made")


class RanksDiffer(RuntimeError):
    """Ranks that should be equal are not; the message names the first rank, the key and both values."""


class RankFailed(RuntimeError):
    """Another rank failed, is gone or no longer answers; the message has its reason where it left one."""


def program_facts(config: Config, kind: str, zero: int) -> dict[str, str]:
    """What runs here: settings, the resolved engine, PyTorch and every source file, each as short text."""
    facts = {key: value for key, value in _flat(config.to_dict()).items() if key not in FREE}
    facts |= {"the engine": f"{kind} with ZeRO {zero}", "torch": torch.__version__}
    return facts | {f"source file {name}": digest for name, digest in _sources(config).items()}


def data_facts(data) -> dict[str, str]:
    """The number of items and a checksum of the training data."""
    return {"items in the data": str(len(data)), "checksum of the data": data.checksum()}


def source_files() -> dict[str, str]:
    """First 12 hexadecimal digits of the SHA-256 of every Python file of the package, by its name."""
    import sivae_fast
    from sivae_fast import kernels

    roots = {"sivae_fast": sivae_fast.__path__[0], "kernels": kernels.__path__[0]}
    return {
        f"{name}/{path.relative_to(root).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for name, root in roots.items()
        for path in sorted(Path(root).rglob("*.py"))
        if name == "kernels" or path.relative_to(root).parts[0] != "kernels"
    }


def _sources(config: Config) -> dict[str, str]:
    """`source_files`, and the file of a model of one's own."""
    if config.model.kind != "own":
        return source_files()
    return source_files() | {"of model.source": own_model.digest(config.model.source)}


def run_facts(config: Config, data) -> dict[str, str]:
    """What a checkpoint remembers, to say on resume what has changed since."""
    code = hashlib.sha256("".join(_sources(config).values()).encode()).hexdigest()[:12]
    return {**data_facts(data), "torch": torch.__version__, "checksum of the code": code}


def check_same(facts: dict[str, str]) -> None:
    """Raises RanksDiffer, on every rank, where another rank has other `facts` than rank 0. Collective."""
    first, *others = _gather(facts)
    found = []
    for rank, theirs in enumerate(others, 1):
        for key in [*first, *(key for key in theirs if key not in first)]:
            here, there = first.get(key, ABSENT), theirs.get(key, ABSENT)
            if here != there:
                found.append(f"rank {rank} has {key}={there}, rank 0 has {here}")
    if found:
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise RanksDiffer(
            f"the ranks do not run the same: {'; '.join(found[:5])}{more}. "
            "Give every rank the same settings, data and version of the code"
        )


def on_all_ranks(make: Callable[[], Made]) -> Made:
    """make() of this rank. Where it fails on any rank, every rank raises that error. Collective."""
    made, error = None, None
    try:
        made = make()
    except Exception as caught:
        error = caught
    told = _gather(None if error is None else str(error))
    if error is not None:
        raise error
    for rank, text in enumerate(told):
        if text is not None:
            raise RankFailed(f"rank {rank} failed: {text}")
    return made


def everywhere(holds: bool) -> bool:
    """Whether it holds on every rank. Collective."""
    return all(_gather(holds))


def of_first_rank(value: Made) -> Made:
    """What rank 0 has. Collective."""
    return _gather(value)[0]


def check_parameters(model) -> None:
    """Raises RanksDiffer, on every rank, naming the first parameter whose bits differ. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    names, sums = [], []
    for name, parameter in model.named_parameters():
        names.append(name)
        sums.append(parameter.detach().contiguous().view(torch.int32).sum(dtype=torch.int64))
    sums = torch.stack(sums)
    extremes = torch.stack([sums, -sums])  # the largest of both gives the range in one all-reduce
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    differing = (extremes[0] != -extremes[1]).nonzero().flatten().tolist()
    if differing:
        raise RanksDiffer(
            f"the ranks have drifted apart: {len(differing)} parameters differ, the first is "
            f"{names[differing[0]]}. Nothing was saved since; the same command resumes from the last "
            "checkpoint"
        )


@contextlib.contextmanager
def reasons_shared(rank: int, timeout: int) -> Iterator[None]:
    """Turns the loss of a peer into RankFailed with that peer's own reason, where it could leave one."""
    try:
        yield
    except Exception as error:
        if not _is_loss(error):
            text = f"rank {rank} failed: {error}"
            _briefly(lambda store: store.set(_WORD, text))
            raise
        word = _briefly(lambda store: store.check([_WORD]) and store.get(_WORD).decode())
        reason = word or (
            "another rank ended without a word (killed, out of memory, or its machine is gone) or did not "
            f"answer within engine.timeout_seconds={timeout}"
        )
        detail = str(error).splitlines()[0]
        raise RankFailed(f"{reason}. The same command resumes from the last checkpoint ({detail})") from error


def _is_loss(error: Exception) -> bool:
    # Gloo raises plain RuntimeErrors whose text names its source file.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def _briefly(ask: Callable[[dist.Store], Made], seconds: float = 5.0) -> Made | None:
    """ask(the store of the ranks), or None: where rank 0 holds the store, it may be gone or stand still."""
    answers = []

    def run() -> None:
        with contextlib.suppress(Exception):
            answers.append(ask(dist.distributed_c10d._get_default_store()))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def _gather(value) -> list:
    """`value` of every rank, in their order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _flat(values: dict, prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
