"""Looks over one process, or all ranks of a launch, before training does: one line a check.

Every check is a function of (ranks, plan) that returns the verdict and the text of a Finding. What can go
wrong on one rank alone runs inside `attempt` and is gathered before anything is concluded, so that a rank in
trouble keeps no other waiting and every rank reaches the same findings.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sivae_fast.commands.fingerprint import fingerprint
from sivae_fast.commands.ranks import Ranks, Trouble, attempt, connected, reason
from sivae_fast.config import Config, load_config
from sivae_fast.training.agreement import program_facts, source_files

GIB = 1 << 30
#: Seconds between clocks from which log lines and file times of two nodes are no longer in order.
CLOCKS_APART = 2.0
#: Share of a GPU's memory that has to be free; below it something else is running there.
FREE_SHARE = 0.9


class Finding(NamedTuple):
    """What one check found: verdict is "ok", "warning" or "failed", text says what to do."""

    check: str
    verdict: str
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:<9}{self.check:<15}{self.text}"


def doctor(
    config_path: str | None = None, overrides: list[str] | tuple[str, ...] = (), timeout: float = 60
) -> Iterator[Finding]:
    """The findings, one after the other, the same on every rank; a collective call.

    config_path, overrides: the configuration that is to be trained; without it only what does not depend on
    one is looked at. timeout: seconds to wait for other ranks. Raises ValueError for a timeout that is not
    above 0, and for overrides of nothing.
    """
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout is {timeout:g}, must be above 0 and finite")
    if overrides and not config_path:
        raise ValueError(f"{' '.join(overrides)}: overrides change a configuration, give it as --config FILE")
    # Before the ranks are connected: processes that import DeepSpeed later may abort when they end.
    plan = attempt(_plan, config_path, overrides) if config_path else None
    with connected(timeout) as trouble:
        if trouble:
            yield Finding("ranks", "failed", trouble)
            return
        ranks = Ranks()
        checks = [_ranks, _versions, _devices, _clocks]
        if config_path:
            checks.append(_configuration)
            broken = ranks.troubles(ranks.gather(plan))
            checks += [] if broken else [_data, _run_folder, _disk]
        for check in [*checks, _reduction]:
            name = check.__name__.strip("_").replace("_", " ")
            try:
                yield Finding(name, *check(ranks, plan))
            except Exception as error:  # another rank is gone: nothing more can be asked
                yield Finding(name, "failed", f"{reason(error)}: did another rank end? See its output")
                return


class Plan(NamedTuple):
    """What is to be trained, and with which engine."""

    config: Config
    kind: str
    zero: int


def _plan(config_path: str, overrides) -> Plan:
    from sivae_fast.training.loop import engine_kind

    config = load_config(config_path, overrides)
    return Plan(config, *engine_kind(config))


def _ranks(ranks: Ranks, plan) -> tuple[str, str]:
    nodes = {node: ranks.nodes.count(node) for node in ranks.nodes}
    text = f"{ranks.world} on {len(nodes)} node{'s' if len(nodes) > 1 else ''}"
    if len(set(nodes.values())) > 1:
        uneven = ", ".join(f"{count} on {host}" for (host, _), count in nodes.items())
        return "warning", f"{text}, unevenly: {uneven}. Is that meant? The launcher may have lost a GPU"
    return "ok", f"{text}: {', '.join(dict.fromkeys(host for host, _ in nodes))}"


def versions() -> dict[str, str]:
    """Versions of what training uses, or "absent"; that of sivae-fast is a digest of its sources."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "deepspeed"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    dali = [d for d in importlib.metadata.distributions() if (d.name or "").startswith("nvidia-dali")]
    found["DALI"] = dali[0].version if dali else "absent"
    sources = "".join(source_files().values())
    found["sivae-fast"] = hashlib.sha256(sources.encode()).hexdigest()[:8]
    return found


def _versions(ranks: Ranks, plan) -> tuple[str, str]:
    facts = ranks.gather(attempt(versions))
    if trouble := ranks.troubles(facts):
        return "failed", trouble
    apart = [name for name in facts[0] if len({fact[name] for fact in facts}) > 1]
    if apart:
        values = ". ".join(f"{name}: {ranks.say_values([fact[name] for fact in facts])}" for name in apart)
        return "failed", f"{values}. Give every node the same checkout and environment (constraints.txt)"
    return "ok", ", ".join(f"{name} {version}" for name, version in facts[0].items())


def device(local: int) -> dict[str, Any]:
    """What rank `local` of this node computes on; {"gpus": 0} without a GPU. Memory in bytes."""
    if not torch.cuda.is_available():
        return {"gpus": 0}
    facts = {"gpus": torch.cuda.device_count()}
    if local < facts["gpus"]:
        free, total = torch.cuda.mem_get_info(local)
        properties = torch.cuda.get_device_properties(local)
        facts |= {"name": properties.name, "id": str(properties.uuid), "free": free, "total": total}
    return facts


def _devices(ranks: Ranks, plan) -> tuple[str, str]:
    facts = ranks.gather(attempt(device, ranks.local))
    if trouble := ranks.troubles(facts):
        return "failed", f"{trouble}. Does nvidia-smi work there?"
    without = [rank for rank, fact in enumerate(facts) if not fact["gpus"]]
    if len(without) == ranks.world:
        return "warning", (
            f"no GPU is visible to torch {torch.__version__}: training runs on the CPU. If there is one, "
            "look at nvidia-smi, CUDA_VISIBLE_DEVICES and whether torch is a CUDA build"
        )
    if without:
        return "failed", f"no GPU on {ranks.say(without)}: nvidia-smi and CUDA_VISIBLE_DEVICES say why"
    lacking = [rank for rank, fact in enumerate(facts) if "id" not in fact]
    if lacking:
        return "failed", (
            f"{ranks.say(lacking)}: more processes than the {facts[lacking[0]]['gpus']} visible GPUs of the "
            "node; start one a GPU"
        )
    ids = [fact["id"] for fact in facts]
    doubled = [rank for rank, one in enumerate(ids) if ids.count(one) > 1]
    if doubled:
        return "failed", f"{ranks.say(doubled)} use the same GPU: start one process a GPU"
    busy = [rank for rank, fact in enumerate(facts) if fact["free"] < FREE_SHARE * fact["total"]]
    if busy:
        free = facts[busy[0]]["free"] / GIB
        return (
            "warning",
            f"something else uses the GPU of {ranks.say(busy)} ({free:.1f} GiB free): nvidia-smi",
        )
    names = ranks.say_values([f"{fact['name']}, {fact['total'] / GIB:.0f} GiB" for fact in facts])
    same = len({fact["name"] for fact in facts}) == 1
    return ("ok", names) if same else ("warning", f"{names}: the slowest sets the pace")


def now() -> float:
    """The clock that is compared, in seconds."""
    return time.time()


def _clocks(ranks: Ranks, plan) -> tuple[str, str]:
    if ranks.world == 1:
        return "ok", "one process"
    rounds = []
    for _ in range(5):  # the round in which the ranks looked most nearly at once
        ranks.gather(None)
        rounds.append(ranks.gather(now()))
    times = min(rounds, key=lambda times: max(times) - min(times))
    apart = max(times) - min(times)
    if apart > CLOCKS_APART:
        late = times.index(max(times))
        return "warning", f"{apart:.1f} s apart, {ranks.say([late])} is ahead: set them by NTP or chrony"
    return "ok", f"within {apart * 1e3:.0f} ms"


def _configuration(ranks: Ranks, plan: Plan | Trouble) -> tuple[str, str]:
    from sivae_fast.training.starting import check_settings

    def look() -> dict[str, str]:
        check_settings(plan.config)
        facts = program_facts(plan.config, plan.kind, plan.zero)
        return {key: value for key, value in facts.items() if not key.startswith("source file")}

    facts = ranks.gather(plan if isinstance(plan, Trouble) else attempt(look))
    if trouble := ranks.troubles(facts):
        return "failed", trouble
    apart = [key for key in facts[0] if len({fact[key] for fact in facts}) > 1]
    if apart:
        values = ". ".join(f"{key}: {ranks.say_values([fact[key] for fact in facts])}" for key in apart[:3])
        return "failed", f"{values}. Give every node the same file and overrides"
    return "ok", f"{facts[0]['the engine']}, train.batch={plan.config.train.batch}"


def _data(ranks: Ranks, plan: Plan) -> tuple[str, str]:
    from sivae_fast.systems import image_path, make_data

    config = plan.config
    path = getattr(config.data, "path", None)
    if path == "quickstart" or (path is None and config.data.kind != "images"):
        return "ok", "made by the project, nothing to compare"

    def look():
        if config.data.kind == "images":
            image_path(config)
        make_data(config, torch.device("cpu"), show=False).close()
        return fingerprint(Path(path))

    facts = ranks.gather(attempt(look))
    if trouble := ranks.troubles(facts):
        return "failed", f"{trouble}. Every node has to read data.path={path}"
    if len(set(facts)) > 1:
        return "failed", f"{ranks.say_values(facts)}: copy data.path={path} again, or use one shared copy"
    return "ok", f"{facts[0]}" + (" on every rank" if ranks.world > 1 else "")


def _run_folder(ranks: Ranks, plan: Plan) -> tuple[str, str]:
    config = plan.config
    folder = Path(config.run.folder)
    token = ranks.gather(uuid.uuid4().hex)[0]
    names = [folder / f".doctor-{token}-{rank}" for rank in range(ranks.world)]
    made = not folder.exists()
    try:
        trouble = ranks.troubles(ranks.gather(attempt(_touch, names[ranks.rank])))
        unseen = ranks.gather(None if trouble else attempt(_missing, names))
    finally:
        with suppress(OSError):
            names[ranks.rank].unlink()
            if made:
                folder.rmdir()
    ranks.gather(None)  # the folder is as it was
    if trouble := trouble or ranks.troubles(unseen):
        return "failed", f"run.folder={folder} cannot be written: {trouble}"
    blind = [rank for rank, missing in enumerate(unseen) if missing]
    if blind:
        return "failed", (
            f"run.folder={folder} is not shared: {ranks.say(blind)} cannot see the files of "
            f"{ranks.say(unseen[blind[0]])}. Only rank 0 writes, but after a restart it may be on another "
            "node and would begin from nothing: use a shared file system"
        )
    return "ok", f"{folder} is written and seen by every rank"


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def _missing(paths: list[Path], patience: float = 5) -> list[int]:
    """Numbers of the paths that do not appear within `patience` seconds."""
    end = time.monotonic() + patience
    while True:
        missing = [rank for rank, path in enumerate(paths) if not path.exists()]
        if not missing or time.monotonic() > end:
            return missing
        time.sleep(0.1)


def _disk(ranks: Ranks, plan: Plan) -> tuple[str, str]:
    config = plan.config
    facts = ranks.gather(attempt(_room, config) if ranks.rank == 0 else None)
    if trouble := ranks.troubles(facts[:1]):
        return "failed", trouble
    free, checkpoint, snapshot = facts[0]
    snapshots = -(-config.train.images // config.run.snapshot)
    wanted = (config.run.keep + 1) * checkpoint + snapshots * snapshot
    text = (
        f"{free / GIB:.2f} GiB free; a checkpoint takes {checkpoint / GIB:.2f}, the whole run up to "
        f"{wanted / GIB:.2f} (checkpoints: {config.run.keep + 1}, snapshots: {snapshots})"
    )
    if free < 2 * checkpoint:
        return "failed", f"{text}: the next checkpoint has to fit beside the last one"
    return ("ok", text) if free >= wanted else ("warning", f"{text}: make room, or lower run.keep")


def _room(config: Config) -> tuple[int, int, int]:
    """(free bytes where the run folder will be, bytes of a checkpoint, bytes of a snapshot)."""
    from sivae_fast.systems import make_model

    folder = Path(config.run.folder).absolute()
    while not folder.is_dir():
        folder = folder.parent
    model = make_model(config)
    snapshot = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    copies = 2 + (config.average.half_life is not None)  # two moments, the average
    checkpoint = snapshot + copies * sum(p.numel() * 4 for p in model.parameters())
    return shutil.disk_usage(folder).free, checkpoint, snapshot


def _reduction(ranks: Ranks, plan) -> tuple[str, str]:
    if ranks.world == 1:
        return "ok", "one process, nothing to reduce"
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    facts = ranks.gather(attempt(_time_reductions, ranks, backend))
    if trouble := ranks.troubles(facts):
        return "failed", (
            f"{backend}: {trouble}. Name the network interface ({backend.upper()}_SOCKET_IFNAME=...)"
            + ("; NCCL_DEBUG=INFO says more" if backend == "nccl" else "")
        )
    latency, seconds = (max(values) for values in zip(*(fact[:2] for fact in facts), strict=True))
    size = facts[0][2]
    rate = 2 * (ranks.world - 1) / ranks.world * size / seconds
    return "ok", (
        f"{backend}: right sums; {latency * 1e3:.2f} ms for one number, {size >> 20} MiB in "
        f"{seconds * 1e3:.0f} ms = {rate / 1e9:.2f} GB/s through each rank"
    )


def _time_reductions(ranks: Ranks, backend: str) -> tuple[float, float, int]:
    """(seconds of one number, seconds of many, bytes of many): the fastest of several."""
    cuda = backend == "nccl"
    place = torch.device("cuda", ranks.local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    group = dist.new_group(backend=backend) if cuda else None
    size = (256 if cuda else 16) << 20
    fastest = []
    for numbers, rounds in ((1, 20), (size // 4, 5)):
        seconds = []
        for _ in range(rounds):
            tensor = torch.full((numbers,), float(ranks.rank + 1), device=place)
            ranks.gather(None)
            started = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            expected = ranks.world * (ranks.world + 1) / 2
            if tensor[0].item() != expected:  # waits for the device
                raise RuntimeError(f"the sum over ranks is {tensor[0].item()}, not {expected}")
            seconds.append(time.perf_counter() - started)
        fastest.append(min(seconds))
    return fastest[0], fastest[1], size
