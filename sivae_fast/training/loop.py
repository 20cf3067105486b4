"""The training loop: one for every system, with images seen as its only clock."""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path

import torch
from torch import Tensor

from sivae_fast.config import Config, ConfigError
from sivae_fast.draws import Rows
from sivae_fast.growth import Schedule, Stage
from sivae_fast.systems import make_data, make_schedule
from sivae_fast.training.agreement import check_same, data_facts, on_all_ranks, program_facts, run_facts
from sivae_fast.training.compiling import forget_compiled
from sivae_fast.training.device import precision
from sivae_fast.training.engine import check_engine, deepspeed_missing, distributed
from sivae_fast.training.fitting import fitted
from sivae_fast.training.graphs import Graphs, check_graphs
from sivae_fast.training.guard import Diverged, Guard
from sivae_fast.training.initial import begin
from sivae_fast.training.iteration import Iteration
from sivae_fast.training.meter import means
from sivae_fast.training.optim import set_learning_rate
from sivae_fast.training.recorder import Recorder
from sivae_fast.training.resume import go_back, restore, state_of
from sivae_fast.training.signals import Stopper

logger = logging.getLogger("sivae_fast")


def train(config: Config) -> Path:
    """Trains, or resumes the run of the same configuration; returns the run folder.

    Called once in each process of a launch by deepspeed, torchrun or plain python.
    Raises ConfigError for settings that do not fit together, Diverged when a loss is not finite, RanksDiffer
    where ranks run different settings, code or data, RankFailed where another rank is lost, RunInUse where
    another process trains the run, CheckpointError where no checkpoint of it is whole, OSError for folders.
    """
    kind, zero = engine_kind(config)
    with distributed(kind, config.engine.timeout_seconds) as (rank, world, device):
        if rank:
            logger.setLevel(logging.ERROR)
        check_graphs(config, kind, world, device)
        lowered = precision(config, device)
        check_same(program_facts(config, kind, zero) | {"the precision": lowered})
        identity = config.identity()  # where the batch is found, it is no part of it
        config = fitted(config, rank, world, device, kind, zero)
        trainer = Trainer(config, make_schedule(config), rank, world, device, kind, zero, identity)
        if config.train.precision == "auto":
            logger.info("train.precision=auto: %s", lowered)
        try:
            return trainer.run()
        finally:
            trainer.close()


class Trainer(Iteration):
    """Everything one process holds while it trains.

    identity: by which the run is found again; None for that of `config`.
    """

    def __init__(
        self,
        config: Config,
        schedule: Schedule,
        rank: int,
        world: int,
        device: torch.device,
        kind: str = "torch",
        zero: int = 0,
        identity: str | None = None,
    ):
        self.schedule, self.identity = schedule, identity or config.identity()
        self.data = on_all_ranks(lambda: make_data(config, device, show=rank == 0))
        check_same(data_facts(self.data))
        self.facts = run_facts(config, self.data)
        super().__init__(config, self.data.input_shape, rank, world, device, kind, zero)
        begin(self)
        self.graphs = Graphs(config.train.seed, device) if config.train.graphs else None
        self.guard = Guard(config)
        self.lod, self.stage = schedule.lod(self.images), schedule.at(self.images)
        self.as_vae = self.warming_up
        self._blend = torch.ones((), device=device)
        self.step_seconds = self.data_seconds = 0.0
        self.recorder = Recorder(self)

    def run(self) -> Path:
        """Trains to the end, to a signal or to a divergence; what was reached is saved on the way out."""
        resumed = restore(self)
        if self.images >= self.config.train.images:
            logger.info(
                "%s is finished at %s images: train.images=N goes on, run.new=true starts another",
                self.recorder.folder,
                f"{self.images:,}",
            )
            return self.recorder.folder
        self.recorder.start(resumed)
        batches = self._batches()
        with Stopper(self.world, self.config.engine.timeout_seconds) as stopper:
            while self.images < self.config.train.images:
                self._advance(batches)
                stopped = stopper.asked(self.images // self.schedule.batch(self.images))
                try:
                    self.recorder.after_iteration(stopped)
                except Diverged as error:
                    if stopped:  # where it was stopped must not decide which images are left out
                        raise
                    batches.close()
                    go_back(self, error)
                    batches = self._batches()
                    continue
                if stopped:
                    logger.info("stopped at %s images; the same command resumes", f"{self.images:,}")
                    break
        return self.recorder.folder

    def close(self) -> None:
        self.data.close()
        self.recorder.close()

    @property
    def position(self) -> int:
        """Where the next batch stands in the endless sequence of data and random numbers."""
        return self.images + self.guard.skipped

    def _batches(self):
        skipped = self.guard.skipped
        batch_at = lambda position: self.schedule.batch(position - skipped)
        return self.data.batches(self.position, batch_at, self.rank, self.world)

    def _advance(self, batches) -> None:
        """One iteration, its averaging and its clocks."""
        stage = self.stage = self.schedule.at(self.images)
        self._enter(stage)
        started = time.perf_counter()
        batch = next(batches)
        loaded = time.perf_counter()
        update = functools.partial(self._update, stage)
        if self.graphs:
            self.graphs.run(self._key(stage, batch), update, batch, self.position)
        else:
            update(batch)
        epochs = self.images // len(self.data)
        self.images += stage.batch
        for epoch in range(epochs, self.images // len(self.data)):
            self.model.end_of_epoch(epoch + 1)
        self.data_seconds += loaded - started
        self.step_seconds += time.perf_counter() - loaded

    def _update(self, stage: Stage, batch, make_stream=None) -> None:
        """Everything an iteration does on the device."""
        rows = Rows.all(stage.batch).part(self.rank, self.world)
        blend = 1.0 if stage.blend == 1 else self._blend
        x = self.data.to_input(batch, self.draws(rows, make_stream), stage.lod, blend)
        self.iterate(x, stage, make_stream)
        if self.average:
            self.average.update(stage.batch)

    def _key(self, stage: Stage, batch) -> tuple:
        """Equal where `_update` does the same to other numbers on the device."""
        form = (batch.shape, batch.dtype) if isinstance(batch, Tensor) else batch
        return stage.lod, stage.blend == 1, stage.batch, stage.micro_batch, self.warming_up, form

    def forget_graphs(self) -> None:
        """To be called when the optimizers' state was replaced."""
        if self.graphs:
            self.graphs.forget()

    def _enter(self, stage: Stage) -> None:
        """Level, rates and weights of this moment; optimizer state does not survive a level switch, nor the
        end of the warm-up where `optim.clear_after_warmup` is on."""
        grown, warmed_up = stage.lod != self.lod, self.as_vae and not self.warming_up
        self.lod, self.as_vae = stage.lod, self.warming_up
        if grown or (warmed_up and self.config.optim.clear_after_warmup):
            for engine in self.engines.values():
                engine.clear_state()
            self.forget_graphs()
        if grown:
            if self.config.train.compile:
                forget_compiled()
            self.guard.new_level()
            logger.info(
                "level %d (%d pixels) from %s images on", stage.lod, 4 << stage.lod, f"{self.images:,}"
            )
        self.model.set_level(stage.lod, stage.blend)
        self._blend.fill_(stage.blend)
        for engine in self.engines.values():
            set_learning_rate(engine.optimizer, stage.learning_rate)
        if getattr(self.objective, "beta_neg", None) != stage.beta_neg and self.objective.introspective:
            self.objective.beta_neg = stage.beta_neg

    def read_meter(self) -> dict[str, float]:
        """Means of the tick so far; raises Diverged where one, or a gradient, is not finite. Collective."""
        values = means(self.meter.totals())
        left_out = [side for side, engine in self.engines.items() if engine.left_out()]
        self.guard.check_finite(values, self.lod, self.images, left_out)
        return values

    def checkpoint(self, planned: bool) -> tuple[dict[str, Tensor], dict]:
        """What a resumed run needs, on every rank; a collective call."""
        return state_of(self, planned)


def engine_kind(config: Config) -> tuple[str, int]:
    kind, zero = config.engine.kind, config.engine.zero
    if kind != "torch":
        missing = deepspeed_missing()
        if missing and kind == "deepspeed":
            raise ConfigError(
                f"engine.kind=deepspeed: DeepSpeed cannot be imported ({missing}). "
                "Install it with `pip install deepspeed`, or use engine.kind=torch"
            )
        if missing:
            logger.warning("DeepSpeed cannot be imported (%s): using the torch engine", missing)
        kind = "torch" if missing else "deepspeed"
    zero = zero if zero is not None else (1 if kind == "deepspeed" else 0)
    try:
        check_engine(kind, zero, config.engine.deepspeed)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return kind, zero
