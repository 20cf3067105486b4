"""From a published checkpoint to a snapshot that every command takes, or to a run that training continues."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from sivae_fast.checkpoint import CheckpointError, load_weights, save_checkpoint, save_snapshot
from sivae_fast.config import Config, ConfigError, make_config
from sivae_fast.contract import Model
from sivae_fast.files import check_folder
from sivae_fast.models.style_names import swap_layout
from sivae_fast.published import Published, at_level, read_published
from sivae_fast.run import Run, naming_folder
from sivae_fast.systems import levels, make_model, make_schedule
from sivae_fast.training.optim import MOMENTS

logger = logging.getLogger("sivae_fast")

#: Images of an epoch by images of a level: 16 epochs of FFHQ, 30 of CelebA-HQ in the published schedules.
_PUBLISHED_SCHEDULES = {960_000: 60_000, 869_760: 28_992}


def convert(source: str | Path, dest: str | Path, *, raw: bool = False) -> Path:
    """Writes the weights of a published checkpoint as the snapshot `dest` (.safetensors).

    raw: the weights of the optimizer, not their average where the file has one.
    A style model whose last levels were not trained is written without them, at the size of its images.
    Raises CheckpointError, naming the file, where it cannot be converted, OSError where `dest` cannot be
    written; it is then as it was.
    """
    dest = Path(dest)
    if dest.suffix != ".safetensors":
        raise ValueError(f"{dest}: a snapshot is a file that ends in .safetensors")
    check_folder(dest.parent)
    if dest.exists() and not dest.is_file():
        raise FileExistsError(f"{dest} is there already and no plain file")
    found = _read(source)
    if found.missing:
        raise CheckpointError(
            f"{source} cannot be used as it is: {', '.join(found.missing)} is another function in ALAE. It "
            "can only be trained on, in a new run (--config, `start_run`) in which that network starts anew"
        )
    try:
        found = at_level(found)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}, in a new run (--config, `start_run`)") from None
    config = make_config(found.settings)
    averaged = found.averaged is not None and not raw
    model = _filled(config, found.averaged if averaged else found.weights, source)
    facts = {"weights": "averaged" if averaged else "raw", "source": Path(source).name}
    if found.epoch is not None:
        facts["epoch"] = str(found.epoch)
    save_snapshot(dest, model, config, 0, **facts)
    size = f", {model.resolution}x{model.resolution}" if hasattr(model, "resolution") else ""
    logger.info("wrote the %s weights%s to %s", facts["weights"], size, dest)
    return dest


def start_run(
    source: str | Path, config: Config, *, optimizer: bool = True, images: int | None = None
) -> Path:
    """Makes a new run folder from which `train(config)` goes on with the published weights.

    config: of the training to come; its `model` has to be that of the file.
    optimizer: take over the optimizers' second moments and step counts, where the file has them.
    images: where the clock of images seen starts. None multiplies the epochs that the file counts with the
        images of an epoch, which its name or the published schedule of `config` tells. Where that is not
        known, the clock starts where the level that the file had reached is faded in, or at 0 for models of
        one size.
    Raises CheckpointError for the file, ConfigError for a configuration of another model or one that has
    another level after so many images.
    """
    found = _read(source)
    try:
        model = _filled(config, found.weights, source)
    except CheckpointError as error:
        model = found.settings["model"].items()
        right = " ".join(f"model.{name}={value}".replace(" ", "") for name, value in model)
        raise ConfigError(f"the configuration is of another model ({error}); the file's is {right}") from None
    tensors = _of_file("model", model.state_dict(), found.weights)
    if config.average.half_life:
        average = found.averaged or {name: value.clone() for name, value in found.weights.items()}
        tensors |= _of_file("average", dict(model.named_parameters()), average)
    steps = {"encoder": 0, "decoder": 0}
    if optimizer and not found.missing:
        for side, state in found.optimizers.items():
            moments, steps[side] = _moments(model, side, state)
            tensors |= moments
            logger.info("%s optimizer: state of %d tensors, %d steps", side, len(moments) // 2, steps[side])
    schedule, given = make_schedule(config), images is not None
    images = images if given else _first_image(found, config)
    level = schedule.lod(max(images - 1, 0)) if found.level is None else found.level
    if level not in (schedule.lod(images), schedule.lod(max(images - 1, 0))):  # a switch lies between these
        what = (
            f"{source} had reached level {level}, the configuration has level {schedule.lod(images)} at "
            f"{images:,} images (growth.images_per_level={config.growth.images_per_level})"
        )
        if not given:
            raise ConfigError(f"{what}: give the growth.images_per_level of the file, or --images")
        logger.warning("%s", what)
    every = {"tick": config.run.tick, "samples": config.run.samples}
    every |= {"checkpoint": config.run.checkpoint, "snapshot": config.run.snapshot}
    state = {
        "config": config.portable().to_dict(),
        "lod": level,  # of the optimizers' state: training forgets it where the clock has another one
        "steps": steps,
        "tick": {},
        "marks": {name: (images // interval + 1) * interval for name, interval in every.items()},
        "source": Path(source).name,
    }
    about = config.run.name, config.to_dict(), config.identity()
    with naming_folder(config.run.folder), Run.create(config.run.folder, *about) as run:
        save_checkpoint(run.folder / "checkpoints", images, tensors, state, config.run.keep)
        end = config.train.images
        logger.info("wrote the run %s, at %s of %s images", run.folder, f"{images:,}", f"{end:,}")
        return run.folder


def _read(source: str | Path) -> Published:
    found = read_published(source)
    logger.info("%s: %s%s", source, found.title, "" if found.epoch is None else f", epoch {found.epoch}")
    for note in found.notes:
        logger.info("  %s", note)
    return found


def _filled(config: Config, weights: dict[str, Tensor], source: str | Path) -> Model:
    """The model with these weights; networks that are absent as a whole keep their initial ones."""
    model = make_model(config)
    own = model.state_dict()
    present = {name.split(".")[0] for name in weights}
    fresh = {name: value.clone() for name, value in own.items() if name.split(".")[0] not in present}
    load_weights(model, {**fresh, **weights}, str(source))
    return model


def _of_file(part: str, own: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`part/name` for every name of `own`: the tensor of the file, or else a copy of our own."""
    found = {name: weights[name].to(value.dtype) for name, value in own.items() if name in weights}
    return {f"{part}/{n}": found[n] if n in found else value.detach().clone() for n, value in own.items()}


def _moments(model: Model, side: str, state: dict) -> tuple[dict[str, Tensor], int]:
    """Adam's state by parameter name, `{side}/{moment}/{name}`, and the number of its steps."""
    modules = model.encoder_modules() if side == "encoder" else model.decoder_modules()
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [(names[p], p) for module in modules for p in module.parameters()]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    if len(indices) != len(parameters):
        raise CheckpointError(
            f"the {side} optimizer has {len(indices)} tensors, the model {len(parameters)}: "
            "convert without it"
        )
    tensors, steps = {}, 0
    for index, (name, parameter) in zip(indices, parameters, strict=True):
        if index not in state["state"]:
            continue  # a level that was not in use since the last switch
        entry = state["state"][index]
        steps = max(steps, int(entry["step"]))
        for key in MOMENTS:
            # The published optimizer of the style model has no first moment.
            value = swap_layout(name, entry[key]) if key in entry else torch.zeros_like(parameter)
            if value.numel() != parameter.numel():
                raise CheckpointError(f"the {side} optimizer's {key} does not fit {name}: convert without it")
            tensors[f"{side}/{key}/{name}"] = value.reshape(parameter.shape)
    return tensors, steps


def _first_image(found: Published, config: Config) -> int:
    """Images seen, by what the file says; tells what was assumed."""
    each = found.epoch_images or _PUBLISHED_SCHEDULES.get(config.growth.images_per_level)
    if found.epoch is not None and each:
        images = found.epoch * each
        why = "this kind of file or its name" if found.epoch_images else "growth.images_per_level"
        logger.info("assumed: %s images seen, %s x %s, by %s", f"{images:,}", found.epoch, f"{each:,}", why)
        return images
    level = levels(config) - 1 if found.level is None else found.level
    images = make_schedule(config).faded_in(level)
    logger.warning(
        "assumed: %s images seen%s; the file does not say how many: --images does",
        f"{images:,}",
        f", where level {level} is faded in" if images else "",
    )
    return images
