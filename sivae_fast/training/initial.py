"""What a new run begins with: its own first weights, or those of another model (`train.init_from`)."""

from __future__ import annotations

import logging

import torch.distributed as dist
from torch import Tensor

from sivae_fast.checkpoint import CheckpointError, has_checkpoints, load, load_weights
from sivae_fast.config import Config, ConfigError
from sivae_fast.contract import Model
from sivae_fast.growth import Schedule
from sivae_fast.models import style_names
from sivae_fast.run import Run
from sivae_fast.systems import levels
from sivae_fast.training.agreement import of_first_rank, on_all_ranks

logger = logging.getLogger("sivae_fast")

#: Settings of a model that its weights do not depend on.
_FREE = {"kind", "source", "style_mixing", "lagged_decoder", "lag_epochs", "augment", "swapped_fakes"}


def begin(trainer) -> None:
    """Gives every rank the first weights of rank 0, which are those of `train.init_from` where it is set and
    there is nothing to resume, and puts the clock where that model belongs. Collective.

    Raises ConfigError as `take_over` does.
    """
    config = trainer.config

    def take() -> int | None:
        if trainer.rank or not config.train.init_from or resumes(config, trainer.identity):
            return None
        return take_over(trainer.model, config, trainer.schedule)

    images = on_all_ranks(take)
    if images is not None:
        if trainer.average:
            trainer.average.load(dict(trainer.model.named_parameters()))
        for engine in trainer.engines.values():
            engine.parameters_changed()
    trainer.images = of_first_rank(images or 0)
    share_first_weights(trainer)


def take_over(model: Model, config: Config, schedule: Schedule) -> int:
    """Copies the averaged weights of `train.init_from` into the untrained `model`.

    Returns the images at which training begins: 0, or for a model that grows those after which the level that
    was reached is faded in. A style model may have more levels than the other one: these keep their own first
    weights. The lagged decoder begins as a copy of the decoder.
    Raises ConfigError for what is no model, for one of another architecture, and where `train.images` is over
    before training begins.
    """
    source = f"train.init_from={config.train.init_from}"
    try:
        other = load(config.train.init_from)
    except (ValueError, OSError, ImportError) as error:
        why = str(error).removeprefix(f"{config.train.init_from} ")
        raise ConfigError(f"{source}: {why}") from error
    difference = _difference(other.config, config)
    try:
        load_weights(model, _fitted(model, other), source)
    except CheckpointError as error:
        raise ConfigError(f"{source}: {difference}" if difference else str(error)) from error
    if difference:
        logger.warning("%s: %s, which its weights fit all the same", source, difference)
    ranges = [getattr(each.data, "value_range", None) for each in (other.config, config)]
    if None not in ranges and ranges[0] != ranges[1]:
        logger.warning("%s was trained with data.value_range=%s, here it is %s", source, *ranges)
    images = schedule.faded_in(other.lod) if config.model.kind == "style" else 0
    if images >= config.train.images:
        raise ConfigError(
            f"train.images={config.train.images}: level {other.lod}, which {source} had reached, is faded in "
            f"after {images}: give more, or growth.images_per_level=0 for a model that does not grow"
        )
    logger.info(
        "beginning with the %s weights of %s (%s images), at %s images",
        other.facts["weights"],
        config.train.init_from,
        f"{other.images:,}",
        f"{images:,}",
    )
    return images


def _fitted(model: Model, other: Model) -> dict[str, Tensor]:
    """The state dict of `other` under the names of `model`, with what only that one has."""
    own, tensors = model.state_dict(), other.state_dict()
    if other.config.model.kind == "style" and "decoder.to_rgb.0.weight" in own:
        added = style_names.last_level(own) - style_names.last_level(tensors)
        if added > 0:
            tensors = style_names.relevelled(tensors, added)
            tensors |= {name: value for name, value in own.items() if name not in tensors}
    tensors = {name: value for name, value in tensors.items() if not name.startswith("target_decoder.")}
    lagged = {name: name.removeprefix("target_") for name in own if name.startswith("target_decoder.")}
    return tensors | {name: tensors[copied] for name, copied in lagged.items() if copied in tensors}


def _difference(theirs: Config, ours: Config) -> str:
    """The settings of the model that another one's weights do not fit, as the message says them."""
    if theirs.model.kind != ours.model.kind:
        return f"it is a model of model.kind={theirs.model.kind}, here it is {ours.model.kind}"
    wanted, found = theirs.model.model_dump(exclude=_FREE), ours.model.model_dump(exclude=_FREE)
    added = levels(ours) - levels(theirs)
    if added > 0:  # widths halve from level to level
        wanted["resolution"] = found["resolution"]
        wanted["start_channels"] = f"{wanted['start_channels'] / 2**added:g}"
    pairs = ((name, value, found[name]) for name, value in wanted.items())
    return ", ".join(
        f"it asks for model.{name}={a}, here it is {b}" for name, a, b in pairs if str(a) != str(b)
    )


def resumes(config: Config, identity: str) -> bool:
    """Whether a start goes on with a run that has a checkpoint."""
    folder = Run.to_resume(config.run.folder, config.run.name, identity, config.run.new)
    return folder is not None and has_checkpoints(folder / "checkpoints")


def share_first_weights(trainer) -> None:
    """Gives every rank the initial weights of rank 0: other processors round them otherwise. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    averaged = trainer.average.state().values() if trainer.average else ()
    for tensor in (*trainer.model.parameters(), *trainer.model.buffers(), *averaged):
        dist.broadcast(tensor.data, src=0)
    for engine in trainer.engines.values():
        engine.parameters_changed()
