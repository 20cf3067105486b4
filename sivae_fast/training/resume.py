"""The whole state of training as named tensors and JSON, and back, on any number of ranks."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from sivae_fast.checkpoint import load_newest, load_weights, part
from sivae_fast.training.agreement import check_parameters, on_all_ranks
from sivae_fast.training.averaging import average_buffers, own_buffers
from sivae_fast.training.guard import Diverged
from sivae_fast.training.optim import MOMENTS

logger = logging.getLogger("sivae_fast")


def state_of(trainer, planned: bool) -> tuple[dict[str, Tensor], dict]:
    """(tensors, state) of a checkpoint. Collective; every rank gets the same.

    planned: it is written at its interval. One that is not also has each rank's own buffers from before they
    are averaged, so that where a run was stopped leaves no trace, not even of rounding.
    Raises RanksDiffer where the ranks' parameters are not equal bit for bit.
    """
    check_parameters(trainer.model)
    tensors = {} if planned else _of_each_rank(trainer.model)
    average_buffers(trainer.model)
    tensors |= {f"model/{name}": value for name, value in trainer.model.state_dict().items()}
    if trainer.average:
        tensors |= {f"average/{name}": value for name, value in trainer.average.state().items()}
    steps = {}
    for side, engine in trainer.engines.items():
        steps[side] = engine.steps()
        for name, moments in engine.state().items():
            tensors |= {f"{side}/{key}/{name}": value for key, value in moments.items()}
    state = {
        "config": trainer.config.portable().to_dict(),
        "lod": trainer.lod,
        "as_vae": trainer.as_vae,
        "steps": steps,
        "tick": trainer.meter.totals(),
        "tick_of_ranks": trainer.meter.of_ranks(),
        "marks": trainer.recorder.marks,
        "guard": trainer.guard.state(),
        "facts": trainer.facts,
        "planned": planned,
        "ranks": trainer.world,
    }
    return tensors, state


def restore(trainer, planned: bool = False) -> bool:
    """Brings the trainer to the newest whole checkpoint of its run; False where there is none. Collective.

    planned: passes over those that a signal caused.
    Raises CheckpointError where there are some and none is whole, or they are of another model.
    """
    folder = trainer.recorder.checkpoints
    found = on_all_ranks(lambda: load_newest(folder, planned) if trainer.rank == 0 else None)
    found = _from_first_rank(found, trainer.world)
    if found is None:
        return False
    tensors, state = found
    own = part(tensors, f"rank{trainer.rank}") if state.get("ranks") == trainer.world else {}
    load_weights(trainer.model, part(tensors, "model") | own, "the checkpoint")
    for side, engine in trainer.engines.items():
        engine.parameters_changed()
        moments = {key: part(tensors, f"{side}/{key}") for key in MOMENTS}
        by_name = {n: {key: values[n] for key, values in moments.items()} for n in moments["exp_avg"]}
        engine.load_state(by_name, state["steps"][side])
    trainer.forget_graphs()
    if trainer.average:
        trainer.average.load(part(tensors, "average"))
    trainer.images, trainer.lod = state["images"], state["lod"]
    # Not in checkpoints of earlier versions and of `convert`: nothing is cleared there.
    trainer.as_vae = state.get("as_vae", trainer.warming_up)
    trainer.stage = trainer.schedule.at(trainer.images)
    trainer.meter.restore(_own_tick(state, trainer.rank, trainer.world))
    trainer.recorder.marks = state["marks"]
    if "guard" in state:  # not in checkpoints of earlier versions and of `convert`
        trainer.guard.restore(state["guard"])
    trainer.guard.checkpoint = trainer.images
    for key, before in state.get("facts", {}).items():
        if trainer.facts.get(key) != before:
            logger.warning("%s changed since the checkpoint: %s, was %s", key, trainer.facts.get(key), before)
    logger.info("resuming at %s images", f"{trainer.images:,}")
    return True


def _own_tick(state: dict, rank: int, world: int) -> dict[str, tuple[float, int]]:
    """What this rank has summed up in the unfinished tick, so that sums go on without a trace of the stop;
    for another number of ranks, and from earlier versions, the totals on the first rank."""
    of_ranks = state.get("tick_of_ranks", [])
    if len(of_ranks) == world:
        return of_ranks[rank]
    return state["tick"] if rank == 0 else dict.fromkeys(state["tick"], (0.0, 0))


def go_back(trainer, error: Diverged) -> None:
    """Back to the last planned checkpoint, leaving out the images seen since. Collective.

    Where all checkpoints are of signals, back to the newest of those. Raises `error` where there is none, or
    where `guard.rollbacks` returns to it did not help.
    """
    reached, end = trainer.images, trainer.position
    if not trainer.guard.may_return() or not (restore(trainer, planned=True) or restore(trainer)):
        raise error
    trainer.guard.skipped = end - trainer.images
    trainer.step_seconds = trainer.data_seconds = 0.0
    logger.warning(
        "%s. Went back from %s to %s images; the images between are left out",
        str(error).partition(". ")[0],
        f"{reached:,}",
        f"{trainer.images:,}",
    )
    trainer.recorder.went_back()


def _of_each_rank(model) -> dict[str, Tensor]:
    """The floating-point buffers as `rank{r}/{name}`; {} with one rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return {}
    found = {}
    for name, buffer in own_buffers(model).items():
        values = [torch.empty_like(buffer) for _ in range(dist.get_world_size())]
        dist.all_gather(values, buffer.contiguous())
        found |= {f"rank{rank}/{name}": value for rank, value in enumerate(values)}
    return found


def _from_first_rank(found, world: int):
    """What rank 0 read, on every rank: no rank needs to see the run folder."""
    if world == 1:
        return found
    shapes = [(list(found[0].items()), found[1]) if found else None]
    meta = [None if shapes[0] is None else ([(n, t.shape, t.dtype) for n, t in shapes[0][0]], found[1])]
    dist.broadcast_object_list(meta, src=0)
    if meta[0] is None:
        return None
    layout, state = meta[0]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    tensors = {}
    for name, shape, dtype in layout:
        value = found[0][name].to(device) if found else torch.empty(shape, dtype=dtype, device=device)
        value = value.contiguous()
        dist.broadcast(value, src=0)
        tensors[name] = value.cpu()
    return tensors, state
