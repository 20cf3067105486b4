"""Reads the checkpoints that the authors of Soft-IntroVAE and of the models before it published.

Nothing in a file is executed: PyTorch's weights-only reader refuses every class and function but tensors,
plain containers and one class of the published trainer, for which an empty one stands in.

| file | how it is known |
|---|---|
| style | `models` with `discriminator` (the encoder), `generator`, two mappings, and averaged copies `*_s` |
| residual, bootstrap | `{"epoch", "model"}`; the bootstrap variant has a `target_decoder` |
| two-dimensional | `{"epoch", "model"}` with fully connected layers |
| point cloud | a bare state dict, `config.json` and the optimizers in files beside it |
"""

from __future__ import annotations

import json
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from sivae_fast.checkpoint import CheckpointError
from sivae_fast.models import mlp, pointnet, style_names

#: Published name of each network of the style model.
_STYLE_NETWORKS = {
    "discriminator": "encoder",
    "generator": "decoder",
    "mapping_tl": "mapping_tl",
    "mapping_fl": "mapping_fl",
}
#: Training images of an epoch by data set, which the names of published files begin with.
_EPOCH_IMAGES = {
    "ffhq": 60_000,
    "celebahq": 28_992,  # 16 shards of 1,812
    "cifar10": 50_000,
    "svhn": 73_257,
    "mnist": 60_000,
    "fmnist": 60_000,
    "celeb128": 162_770,
    "celeb256": 162_770,
    "celeb1024": 29_000,
}
_ACCEPTED = (
    "accepted are style, residual, bootstrap, two-dimensional and point cloud checkpoints of Soft-IntroVAE"
)


@dataclass
class Published:
    """What a file holds, under the names and in the layouts of this project."""

    title: str
    #: Sections of a `Config` that the file determines.
    settings: dict[str, dict]
    weights: dict[str, Tensor]
    #: Averaged weights, complete, where the file has them.
    averaged: dict[str, Tensor] | None = None
    #: Finished epochs (iterations for the two-dimensional model), where the file says it.
    epoch: int | None = None
    #: Images (points of the two-dimensional model) of one of these epochs, where the file says it.
    epoch_images: int | None = None
    #: The level of detail that training had reached, 0 for 4x4, where the file says it.
    level: int | None = None
    #: PyTorch optimizer states by side, "encoder" and "decoder".
    optimizers: dict[str, dict] = field(default_factory=dict)
    #: Networks of the model that the file does not have in usable form.
    missing: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


class _RunningMean:
    """Stands for `tracker.RunningMeanTorch`, the published trainer's record of its losses."""


def read_published(path: str | Path) -> Published:
    """The weights and architecture of a published checkpoint, and how far it was trained.

    Raises CheckpointError, naming the file, where it cannot be read, wants to run code, is of an unknown
    kind, or contradicts its own name.
    """
    path = Path(path)
    content = _load(path)
    try:
        found = _recognised(content, path)
        _heed_name(found, path.stem)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not whole ({type(error).__name__}: {error}); {_ACCEPTED}") from error
    for name, value in [*found.weights.items(), *(found.averaged or {}).items()]:
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name} is a {type(value).__name__}, no tensor")
    return found


def _recognised(content: Mapping, path: Path) -> Published:
    if "models" in content:
        return _style(content)
    if isinstance(content.get("model"), Mapping):
        return _wrapped(content)
    if "encoder.conv.0.weight" in content:
        return _pointnet(content, path)
    if "param_groups" in content:
        raise CheckpointError("the state of an optimizer: give the file with the weights beside it")
    raise CheckpointError(f"it holds {_contents(content)}: {_ACCEPTED}")


def _heed_name(found: Published, name: str) -> None:
    """Adds what a published file says in its name alone. CheckpointError where its content says otherwise."""
    found.epoch_images = found.epoch_images or _EPOCH_IMAGES.get(name.split("_")[0])
    if said := re.search(r"epoch_(\d+)", name):
        epoch = int(said[1])
        # Files are written before and after an epoch is counted.
        if found.epoch is not None and abs(found.epoch - epoch) > 1:
            raise CheckpointError(
                f"its name says epoch {epoch}, its content epoch {found.epoch}: correct its name"
            )
        found.epoch = epoch if found.epoch is None else found.epoch
    if found.settings["model"]["kind"] == "style":
        _heed_level(found, name)


def _heed_level(found: Published, name: str) -> None:
    trained, last = found.level, style_names.last_level(found.weights)
    reason = "the levels above are as they were made"
    if said := re.search(r"_lod(\d+)", name):
        found.level = int(said[1])
        reason = "by its name"
        if found.level > last:
            raise CheckpointError(
                f"its name says level {found.level}, the model's last is {last}: correct its name"
            )
        if trained is not None and found.level > trained:
            raise CheckpointError(
                f"its name says level {found.level}, but nothing above level {trained} was trained: "
                "correct its name"
            )
    if found.level is None:
        found.notes.append("nothing says which level it had reached: taken for the last")
    elif found.level < last:
        found.notes.append(f"training had reached level {found.level} of {last}: {reason}")


def _load(path: Path) -> Mapping:
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}: give a published checkpoint (.pth)")
    allowed = [(_RunningMean, "tracker.RunningMeanTorch")]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it refers to {found[1]}" if found else "it is no plain checkpoint"
        raise CheckpointError(
            f"{path} is refused, nothing in it was run: {what}; a checkpoint holds tensors and numbers alone"
        ) from None
    except Exception as error:
        reason = str(error).split(". ")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read: truncated, or no PyTorch file ({reason})") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}: {_ACCEPTED}")
    return content


def _contents(content: Mapping) -> str:
    return "the keys " + ", ".join([str(key) for key in content][:5]) if content else "nothing"


def _style(content: Mapping) -> Published:
    models = content["models"]
    absent = [name for name in _STYLE_NETWORKS if name not in models and f"{name}_s" not in models]
    if absent:
        raise CheckpointError(f"models.{absent[0]} is absent; {_ACCEPTED}")
    for name, key in (("discriminator", "encode_block.0.conv_1.weight"), ("generator", "const")):
        for copy in {name, f"{name}_s"} & models.keys():
            if key not in models[copy]:
                raise CheckpointError(f"models.{copy} has no {key}: it is not the {_STYLE_NETWORKS[name]}")
    notes = []
    raw, averaged = _style_weights(models, ""), _style_weights(models, "_s")
    if averaged is None:
        notes.append("no averaged copies (*_s): the raw weights are all there is")
    elif raw is None:
        raw = averaged
        notes.append("averaged copies (*_s) alone")
    if averaged is not None and "dlatent_avg_s" not in models:
        notes.append("the averaged copy has no style average of its own: it shares the raw model's")
    missing = _alae_mapping(models)
    if missing:
        raw = {name: value for name, value in raw.items() if not name.startswith("mapping_tl.")}
        averaged = averaged and {n: v for n, v in averaged.items() if not n.startswith("mapping_tl.")}
        notes.append("an ALAE checkpoint: its mapping to the latent is another function, without activation")
    auxiliary = content.get("auxiliary", {})
    optimizers = {
        side: auxiliary[f"{side}_optimizer"]
        for side in ("encoder", "decoder")
        if f"{side}_optimizer" in auxiliary
    }
    if "tracker" in auxiliary:
        notes.append("skipped: the trainer's record of its losses")
    settings = {"model": _style_size(raw), "data": {"kind": "images", "value_range": "symmetric"}}
    size = settings["model"]["resolution"]
    epoch = _style_epoch(auxiliary)
    return Published(
        f"style model, {size}x{size}",
        settings,
        raw,
        averaged,
        epoch,
        level=_trained_level(raw),
        optimizers=optimizers,
        missing=missing,
        notes=notes,
    )


def at_level(found: Published) -> Published:
    """A style model without the levels that were not trained: a smaller model of the same kind.

    Raises CheckpointError for level 0: a model has 8x8 images at least.
    """
    dropped = 0 if found.level is None else style_names.last_level(found.weights) - found.level
    if not dropped:
        return found
    if found.level == 0:
        raise CheckpointError("only its 4x4 level was trained, and models begin at 8x8: go on training it")
    raw, averaged = (
        weights and style_names.relevelled(weights, -dropped) for weights in (found.weights, found.averaged)
    )
    return replace(
        found, settings={**found.settings, "model": _style_size(raw)}, weights=raw, averaged=averaged
    )


def _trained_level(weights: dict[str, Tensor]) -> int | None:
    """The highest level that has learned anything: the biases of all levels begin at 0."""
    biases = (
        (i, weights.get(f"decoder.to_rgb.{i}.bias")) for i in range(style_names.last_level(weights) + 1)
    )
    return max((i for i, bias in biases if isinstance(bias, Tensor) and bias.any()), default=None)


def _style_weights(models: Mapping, suffix: str) -> dict[str, Tensor] | None:
    if f"generator{suffix}" not in models:
        return None
    networks = {ours: models[name + suffix] for name, ours in _STYLE_NETWORKS.items()}
    average = models.get(f"dlatent_avg{suffix}", models.get("dlatent_avg"))
    if average is not None:
        networks["dlatent_avg"] = average
    weights = style_names.from_published(networks)
    weights.setdefault("dlatent_avg", torch.zeros(weights["mapping_fl.layers.0.weight"].shape[0]))
    return weights


def _alae_mapping(models: Mapping) -> tuple[str, ...]:
    mapping = models.get("mapping_tl", models.get("mapping_tl_s"))
    return () if any(".fc." in key for key in mapping) else ("mapping_tl",)


def _style_size(weights: dict[str, Tensor]) -> dict:
    levels = style_names.last_level(weights) + 1
    first = weights["encoder.from_rgb.0.weight"]
    return {
        "kind": "style",
        "resolution": 4 << (levels - 1),
        "channels": first.shape[1],
        "start_channels": first.shape[0],
        "max_channels": weights[f"encoder.blocks.{levels - 1}.conv_2.weight"].shape[0],
        "latent_size": weights["mapping_fl.layers.0.weight"].shape[1],
        "mapping_layers": sum(name.startswith("mapping_fl.") for name in weights) // 2,
    }


def _style_epoch(auxiliary: Mapping) -> int | None:
    """The published scheduler is one epoch ahead of what it has done."""
    states = auxiliary.get("scheduler", {})
    last = [state["last_epoch"] for state in states.values() if "last_epoch" in state]
    return max(0, last[0] - 1) if last else None


def _wrapped(content: Mapping) -> Published:
    state, epoch = content["model"], content.get("epoch")
    if "encoder.main.input.weight" in state:
        return _densities(content, epoch)
    if "encoder.main.0.weight" in state:
        return _residual(dict(state), epoch)
    raise CheckpointError(f"model has {_contents(state)}: {_ACCEPTED}")


def _densities(content: Mapping, epoch: int | None) -> Published:
    weights = mlp.published_state_dict(content)
    first = weights["encoder.main.input.weight"]
    hidden = sum(
        re.fullmatch(r"encoder\.main\.(input|hidden_\d+)\.weight", name) is not None for name in weights
    )
    model = {
        "kind": "mlp",
        "latent_size": weights["decoder.main.input.weight"].shape[1],
        "width": first.shape[0],
        "hidden_layers": hidden,
    }
    notes = (
        ["skipped: decoder.loggamma, which nothing uses"] if "decoder.loggamma" in content["model"] else []
    )
    settings = {"model": model, "data": {"kind": "density"}}
    return Published("two-dimensional model", settings, weights, epoch=epoch, epoch_images=512, notes=notes)


def _residual(weights: dict[str, Tensor], epoch: int | None) -> Published:
    first = weights["encoder.main.0.weight"]
    widths = [first.shape[0]]
    sizes = {int(m[1]) for name in weights if (m := re.match(r"encoder\.main\.res_in_(\d+)\.", name))}
    for size in sorted(sizes, reverse=True)[:-1]:
        widths.append(weights[f"encoder.main.res_in_{size}.conv2.weight"].shape[0])
    latent = weights["decoder.fc.0.weight"].shape[1]
    features, lagged = weights["encoder.fc.weight"].shape[1], "target_decoder.fc.0.weight" in weights
    final = math.isqrt(features // widths[-1])
    condition = latent - weights["encoder.fc.weight"].shape[0] // 2
    if condition > 0:
        raise CheckpointError(
            f"a model with a condition: its decoder takes {condition} numbers of it beside the "
            f"{latent - condition} of the latent. Training and commands here give none: only files trained "
            "without a condition, as all published ones are, can be converted"
        )
    if features != widths[-1] * final * final or condition:
        raise CheckpointError(
            f"encoder.fc.weight is {list(weights['encoder.fc.weight'].shape)}, which does not fit a last map "
            f"of {widths[-1]} channels and a latent of {latent}"
        )
    resolution = final << len(widths)
    model = {
        "kind": "residual",
        "resolution": resolution,
        "channels": first.shape[1],
        "widths": widths,
        "latent_size": latent,
        "lagged_decoder": lagged,
    }
    settings = {"model": model, "data": {"kind": "images", "value_range": "unit"}}
    title = f"{'bootstrap' if lagged else 'residual'} model, {resolution}x{resolution}"
    notes = ["batch norm: published figures used batch statistics (--batch-norm batch), not running ones"]
    return Published(title, settings, weights, epoch=epoch, notes=notes)


def _pointnet(content: Mapping, path: Path) -> Published:
    weights, notes, optimizers = pointnet.published_state_dict(dict(content)), [], {}
    points = weights["decoder.model.8.weight"].shape[0] // 3
    model = {"kind": "pointnet", "points": points, "latent_size": weights["decoder.model.0.weight"].shape[1]}
    beside = path.with_name("config.json")
    if beside.is_file():
        model["prior_std"] = float(json.loads(beside.read_text(encoding="utf-8")).get("prior_std", 0.2))
    else:
        notes.append("no config.json beside the file: prior_std is taken as 0.2, the published value")
    epoch = re.match(r"(?:[a-z]+_)?(\d+)", path.stem)  # the trainer's names, or with the class before
    if epoch:
        for side in ("encoder", "decoder"):
            other = path.with_name(f"{epoch[1]}_optim_{side[0]}.pth")
            if other.is_file():
                optimizers[side] = _load(other)
    data = {"kind": "pointclouds", "points": points, "path": "shape_net_core_uniform_samples_2048"}
    settings = {"model": model, "data": data, "objective": {"reconstruction": "chamfer"}}
    title = f"point cloud model, {points} points"
    return Published(
        title, settings, weights, epoch=int(epoch[1]) if epoch else None, optimizers=optimizers, notes=notes
    )
