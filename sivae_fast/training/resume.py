"""The whole state of training as named tensors and JSON, and back, on any number of ranks."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from sivae_fast.checkpoint import load_newest, load_weights, part

logger = logging.getLogger("sivae_fast")


def state_of(trainer) -> tuple[dict[str, Tensor], dict]:
    """(tensors, state) of a checkpoint. Collective; every rank gets the same.

    Raises RuntimeError where the ranks' parameters are not equal bit for bit.
    """
    check_ranks_agree(trainer.model)
    tensors = {f"model/{name}": value for name, value in _rank_means(trainer.model).items()}
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
        "steps": steps,
        "tick": trainer.meter.totals(),
        "marks": trainer.recorder.marks,
    }
    return tensors, state


def restore(trainer) -> None:
    """Brings the trainer to the newest whole checkpoint of its run, where there is one. Collective."""
    found = load_newest(trainer.recorder.checkpoints) if trainer.rank == 0 else None
    found = _from_first_rank(found, trainer.world)
    if found is None:
        return
    tensors, state = found
    load_weights(trainer.model, part(tensors, "model"), "the checkpoint")
    for side, engine in trainer.engines.items():
        engine.parameters_changed()
        moments = {key: part(tensors, f"{side}/{key}") for key in ("exp_avg", "exp_avg_sq")}
        by_name = {n: {key: values[n] for key, values in moments.items()} for n in moments["exp_avg"]}
        engine.load_state(by_name, state["steps"][side])
    if trainer.average:
        trainer.average.load(part(tensors, "average"))
    trainer.images, trainer.lod = state["images"], state["lod"]
    trainer.stage = trainer.schedule.at(trainer.images)
    trainer.meter.restore(state["tick"], first_rank=trainer.rank == 0)
    trainer.recorder.marks = state["marks"]
    logger.info("resuming at %s images", f"{trainer.images:,}")


def check_ranks_agree(model) -> None:
    """Raises RuntimeError, on every rank, naming the first parameter whose bits differ between ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    names, bits = [], []
    for name, parameter in model.named_parameters():
        names.append(name)
        bits.append(parameter.detach().contiguous().view(torch.int32).to(torch.int64).sum())
    low, high = torch.stack(bits), torch.stack(bits)
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    differing = (low != high).nonzero().flatten().tolist()
    if differing:
        raise RuntimeError(
            f"the ranks have drifted apart: {len(differing)} parameters differ, the first is "
            f"{names[differing[0]]}. Nothing was saved; resume from the last checkpoint"
        )


def _rank_means(model) -> dict[str, Tensor]:
    """The state dict with floating-point buffers averaged over ranks.

    Parameters are equal on all ranks. Buffers that follow each rank's own rows (the style average, running
    statistics) are linear in them, so that the mean over ranks is what one rank would hold.
    """
    state = dict(model.state_dict())
    if dist.is_initialized() and dist.get_world_size() > 1:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in state and buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= dist.get_world_size()
    return state


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
