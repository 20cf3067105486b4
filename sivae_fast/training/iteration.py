"""One update of both networks, and everything that takes part in it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sivae_fast.config import Config, ConfigError
from sivae_fast.draws import Draws, Rows
from sivae_fast.growth import Schedule, Stage
from sivae_fast.systems import check_batch, error_function, make_model, make_objective
from sivae_fast.training.averaging import Average
from sivae_fast.training.compiling import compile_networks
from sivae_fast.training.device import precision, prepare
from sivae_fast.training.engine import make_engine
from sivae_fast.training.meter import Meter
from sivae_fast.training.optim import make_optimizer
from sivae_fast.training.recompute import recompute
from sivae_fast.training.step import Step, posterior_surrogate


class Iteration:
    """Networks, objective, engines, average and meter of one rank, at `images` images seen."""

    def __init__(
        self,
        config: Config,
        input_shape: tuple[int, ...],
        rank: int,
        world: int,
        device: torch.device,
        kind: str = "torch",
        zero: int = 0,
    ):
        self.config, self.rank, self.world, self.device = config, rank, world, device
        self.images = 0
        prepare(device)
        self.model = make_model(config).to(device)
        self.objective = make_objective(config, input_shape).to(device)
        self.step = Step(
            self.model,
            self.objective,
            schedule=config.train.schedule,
            fresh_draws=config.train.fresh_draws,
            autocast=torch.bfloat16 if precision(config, device) == "bf16" else None,
            error=error_function(config),
        )
        optimizer = functools.partial(
            make_optimizer,
            implementation=config.optim.implementation,
            betas=config.optim.betas,
            eps=config.optim.eps,
            published_eps=config.optim.published_eps,
            on_device=config.train.graphs,
        )
        self.engines = {
            side: make_engine(
                self.model, side, optimizer, kind=kind, zero=zero, settings=config.engine.deepspeed
            )
            for side in ("encoder", "decoder")
        }
        half_life = config.average.half_life
        self.average = Average(self.model, half_life) if half_life else None
        if config.train.recompute:
            recompute(self.model.recomputable_modules())
        if config.train.compile:
            compile_networks(self.model)
        self.meter = Meter(device)

    @property
    def position(self) -> int:
        """Where the batch stands in the endless sequence of data and random numbers."""
        return self.images

    @property
    def warming_up(self) -> bool:
        """Whether the networks are trained as a plain VAE now."""
        return not self.objective.introspective or self.images < self.config.train.warmup_images

    def draws(self, rows: Rows, make_stream=None) -> Draws:
        """The random numbers of this iteration for these rows of the global batch."""
        return Draws(self.config.train.seed, self.position, rows, self.device, make_stream)

    def iterate(self, x: Tensor, stage: Stage, make_stream=None) -> None:
        """One update of both networks from this rank's rows x [B / world, ...] of the global batch.

        make_stream: as of `Draws`.
        """
        pieces = stage.pieces(self.world)
        self.step.shares_forward = self.step.may_share and pieces == 1
        mine = Rows.all(stage.batch).part(self.rank, self.world)
        parts = [
            (part, self.draws(mine.part(i, pieces), make_stream)) for i, part in enumerate(x.chunk(pieces))
        ]
        if self.warming_up:
            self._vae_iteration(parts)
        else:
            self._introspective_iteration(parts)

    def _introspective_iteration(self, parts) -> None:
        encoder, decoder = self.engines["encoder"], self.engines["decoder"]
        kept = []
        for i, (x, draws) in enumerate(parts, 1):
            (loss, statistics), shared = self.step.encoder_phase(x, draws)
            encoder.backward(_mean(loss, parts), last=i == len(parts))
            self.meter.add({"loss_encoder": loss, **statistics}, len(x))
            kept.append(shared)
        encoder.step()
        for i, ((x, draws), shared) in enumerate(zip(parts, kept, strict=True), 1):
            loss, statistics = self.step.decoder_phase(x, draws, shared)
            decoder.backward(_mean(loss, parts), last=i == len(parts))
            self.meter.add({"loss_decoder": loss}, len(x))
        decoder.step()

    def _vae_iteration(self, parts) -> None:
        for i, (x, draws) in enumerate(parts, 1):
            (loss, statistics), posterior, cut = self.step.vae_phase(x, draws)
            self.engines["decoder"].backward(_mean(loss, parts), last=i == len(parts))
            self.engines["encoder"].backward(posterior_surrogate(posterior, cut), last=i == len(parts))
            self.meter.add({"loss_vae": loss, **statistics}, len(x))
        for engine in self.engines.values():
            engine.step()


def _mean(loss: Tensor, parts: list) -> Tensor:
    """This part's share of the mean over all: no division, and no launch for it, where there is one."""
    return loss / len(parts) if len(parts) > 1 else loss


def check_batches(config: Config, schedule: Schedule, world: int) -> None:
    """Raises ConfigError where a level's global batch does not divide over ranks and micro-batches, or not in
    pairs, or cannot be filled by the data. What is still to be found is passed over."""
    for stage in schedule.stages():
        batch = stage.batch
        if batch == "auto":
            continue
        if batch % world:
            raise ConfigError(
                f"train.batch={batch} (level {stage.lod}) does not divide over {world} ranks: "
                f"use a multiple of {world}, e.g. {-(-batch // world) * world}"
            )
        check_batch(config, batch)
        images = batch // world // (stage.pieces(world) if stage.micro_batch != "auto" else 1)
        if getattr(config.model, "swapped_fakes", False) and images % 2:
            raise ConfigError(
                f"train.batch={batch} over {world} ranks goes in passes of {images} images: "
                "model.swapped_fakes=true needs an even number"
            )
