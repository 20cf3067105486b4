"""The largest batches that fit the memory of the GPUs, found by training throwaway networks."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor

from sivae_fast.checkpoint import load_newest, run_config
from sivae_fast.config import Config, ConfigError, make_config
from sivae_fast.contract import Model
from sivae_fast.draws import Draws, Rows
from sivae_fast.growth import Stage
from sivae_fast.run import Run
from sivae_fast.systems import make_data, make_schedule
from sivae_fast.training.agreement import everywhere, of_first_rank, on_all_ranks
from sivae_fast.training.compiling import forget_compiled
from sivae_fast.training.engine import bucket_bytes
from sivae_fast.training.iteration import Iteration, check_batches
from sivae_fast.training.memory import check_fills, free_memory, limited, ran_out

logger = logging.getLogger("sivae_fast")

#: Of the free memory of a GPU. The rest is for what PyTorch does not allocate (NCCL, DALI) and for fragments.
SHARE = 0.9


def fitted(
    config: Config, rank: int, world: int, device: torch.device, kind: str = "torch", zero: int = 0
) -> Config:
    """The configuration with numbers for train.batch=auto and train.micro_batch=auto. Collective.

    A run that is resumed keeps the batch it began with. Otherwise the batch of a level is the ranks times the
    largest power of two of images that each of them can train on in one pass. A micro-batch is found at every
    start. Raises ConfigError for batches that cannot be trained, and where nothing fits.
    """
    if config.train.batch == "auto":
        kept = of_first_rank(on_all_ranks(lambda: _batch_of_run(config) if rank == 0 else None))
        config = _with(config, batch=kept or "auto")
    schedule = make_schedule(config)
    check_batches(config, schedule, world)
    asked = _asked(config)
    if not asked:
        return config
    reserved = bucket_bytes(config.engine.deepspeed) if kind == "deepspeed" and zero else 0
    load = lambda: make_data(config, device, show=rank == 0)  # some data take a part of the GPU
    with limited(device, f"train.{asked[0]}=auto", SHARE, reserved), closing(on_all_ranks(load)) as data:
        found = [_fit(config, stage, data, rank, world, device) for stage in schedule.stages()]
    for name in asked:
        values = tuple(getattr(stage, name) for stage in found)
        logger.info("train.%s=auto: %s fits; the learning rate stays", name, ", ".join(map(str, values)))
        config = _with(config, **{name: values if len(values) > 1 else values[0]})
    return config


class Rehearsal(Iteration):
    """Iterations of a level on networks of their own, by this rank alone: another may be out of memory."""

    def __init__(self, config: Config, data, rank: int, world: int, device: torch.device):
        super().__init__(config, data.input_shape, rank, world, device)
        for engine in self.engines.values():
            engine.reduction = None
        self.images = config.train.warmup_images  # the iterations from there on take more
        self._data = data
        self._rows = next(data.batches(0, lambda _: 4 * world, rank, world))

    def fits(self, stage: Stage) -> bool:
        """Whether every rank has the memory for an iteration of `stage`. Collective."""
        return everywhere(on_all_ranks(lambda: self._fits_here(stage)))

    def _fits_here(self, stage: Stage) -> bool:
        fits = True
        self.model.set_level(stage.lod, stage.blend)
        first = not self.engines["decoder"].steps()  # it makes the optimizers' states, the next has them
        try:
            for _ in range(2 if first else 1):
                self.iterate(self._input(stage), stage)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            fits = False
        for engine in self.engines.values():
            engine.optimizer.zero_grad(set_to_none=True)
        free_memory(self.device)
        return fits

    def _input(self, stage: Stage) -> Tensor:
        mine = Rows.all(stage.batch).part(self.rank, self.world)
        rows = mine
        if isinstance(self._rows, Tensor):  # a few images over and over: reading so many could take minutes
            rows = self._rows[torch.arange(len(mine), device=self._rows.device) % len(self._rows)]
        draws = Draws(self.config.train.seed, 0, mine, self.device)
        return self._data.to_input(rows, draws, stage.lod, stage.blend)


def _fit(config: Config, stage: Stage, data, rank: int, world: int, device: torch.device) -> Stage:
    """The stage with numbers in place of what is to be found."""
    rehearsal = on_all_ranks(lambda: Rehearsal(config, data, rank, world, device))
    _check_passes(config, rehearsal.model)
    if stage.blend < 1:
        stage = replace(stage, blend=0.5)  # two levels at once take the most
    local = _batch(rehearsal, stage, len(data)) if stage.batch == "auto" else _micro_batch(rehearsal, stage)
    if config.train.compile:
        forget_compiled()
    del rehearsal
    free_memory(device)
    if local is None:
        raise ConfigError(
            f"train.batch={config.train.batch}, train.micro_batch={config.train.micro_batch}: at level "
            f"{stage.lod} not even the smallest pass fits the GPU; train.recompute=true, "
            "train.precision=bf16 or a smaller model take less"
        )
    batch = local * world if stage.batch == "auto" else stage.batch
    return replace(stage, batch=batch, micro_batch=stage.micro_batch and local)


def _batch(rehearsal: Rehearsal, stage: Stage, items: int) -> int | None:
    """The largest power of two of images that fits each rank in one pass."""
    config, world, found = rehearsal.config, rehearsal.world, None
    most = min(items, config.train.images, config.growth.images_per_level or items)
    local = max(2, 4 // world)  # pairs and batch statistics need 2 a rank, the densest data 4 in all
    while (found is None or local * world <= most) and rehearsal.fits(
        replace(stage, batch=local * world, micro_batch=None)
    ):
        found, local = local, 2 * local
    return found


def _micro_batch(rehearsal: Rehearsal, stage: Stage) -> int | None:
    """The most images of one pass that fit each rank, in equal passes."""
    local = stage.batch // rehearsal.world
    step = 2 if getattr(rehearsal.config.model, "swapped_fakes", False) else 1
    sizes = (n for n in range(local, 0, -1) if local % n == 0 and n % step == 0)
    return next((n for n in sizes if rehearsal.fits(replace(stage, micro_batch=n))), None)


def check_fitting(config: Config, model: Model, device: torch.device) -> None:
    """Raises ConfigError where `fitted` would, before its search, on the only rank or the first."""
    batch = _batch_of_run(config) if config.train.batch == "auto" else None
    asked = _asked(_with(config, batch=batch) if batch else config)
    if asked:
        check_fills(device, f"train.{asked[0]}=auto")
        _check_passes(config, model)


def _asked(config: Config) -> list[str]:
    """The options whose numbers are still to be found."""
    return [name for name in ("batch", "micro_batch") if getattr(config.train, name) == "auto"]


def _check_passes(config: Config, model: Model) -> None:
    hinge = config.objective.kind == "introvae" and config.objective.hinge == "batch"
    if config.train.micro_batch == "auto" and (model.uses_batch_statistics or hinge):
        cause = "objective.hinge=batch" if hinge else f"batch statistics (model.kind={config.model.kind})"
        raise ConfigError(
            f"train.micro_batch=auto: with {cause} the size of a pass is part of the result and must not "
            "depend on the GPU: give a number or null"
        )


def _batch_of_run(config: Config):
    """The batch of the run that is to be resumed; None where there is none.

    Raises CheckpointError where nothing says it: to find another one would change the run.
    """
    run = config.run
    folder = Run.to_resume(run.folder, run.name, config.identity(), run.new)
    if folder is None:
        return None
    advice = "bring it back, or remove it and train.batch=auto takes the batch of the newest checkpoint"
    there = run_config(folder, advice)
    if there is None:
        newest = load_newest(folder / "checkpoints")
        there = make_config(newest[1]["config"]) if newest else None
    return there and there.train.batch


def _with(config: Config, **train) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})
