"""Checkpoints (to resume) and snapshots (to use): safetensors and JSON, never pickle.

A checkpoint is `NNNNNNNNNN.safetensors` (parameters, buffers, averaged parameters, optimizer moments, all in
full and by name, whatever engine and number of ranks wrote them) and `NNNNNNNNNN.json` beside it. The JSON is
written last and holds the checksum of the tensors: without it, or where it does not agree, the checkpoint is
not whole and the next older one is used. A snapshot is one safetensors file with its configuration
and its checksum inside.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sivae_fast import hub
from sivae_fast.config import Config, ConfigError, load_config, make_config
from sivae_fast.contract import Model
from sivae_fast.files import write_text
from sivae_fast.run import remove_unfinished
from sivae_fast.systems import make_model, make_schedule

logger = logging.getLogger("sivae_fast")

FORMAT = "sivae-fast 1"
_CHECKPOINT = re.compile(r"\d{10,}\.json")
_TENSORS = re.compile(r"\d{10,}\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint or snapshot that cannot be read or does not fit; the message names the file and why."""


def save_checkpoint(folder: Path, images: int, tensors: dict[str, Tensor], state: dict, keep: int) -> Path:
    """Writes the checkpoint after `images` images, then removes all but the newest `keep`.

    The newest with `planned` in its state stays too: it is the one to go back to when training diverges.
    Raises OSError where it cannot be written; older checkpoints are then untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    for left in folder.iterdir():  # without its JSON, by a kill or a full disk in the middle of a save
        if _TENSORS.fullmatch(left.name) and not left.with_suffix(".json").exists():
            left.unlink()
    path = folder / f"{images:010d}.safetensors"
    digest = _save_tensors(path, tensors, {"format": FORMAT})
    state = {"format": FORMAT, "images": images, "sha256": digest, **state}
    write_text(path.with_suffix(".json"), json.dumps(state, indent=1))
    complete = _complete(folder)
    planned = next((path for path in complete if _is_planned(path)), None)
    for old in set(complete[keep:]) - {planned, path}:
        _remove(old)
    return path


def remove_after(folder: Path, images: int) -> None:
    """Removes the checkpoints of more than `images` images: the course of training they are of was left."""
    for path in _complete(folder):
        if int(path.stem) > images:
            _remove(path)


def load_newest(folder: Path, planned: bool = False) -> tuple[dict[str, Tensor], dict] | None:
    """(tensors, state) of the newest whole checkpoint, or None; says which damaged ones it passed over.

    planned: only those written at their interval, not those that a signal caused.
    Raises CheckpointError where there are checkpoints and none is whole, OSError for a folder that cannot be
    read: whoever takes this for no checkpoint begins anew and loses the statistics.
    """
    found = _complete(folder)
    damaged = 0
    for path in found:
        try:
            tensors, state = load_checkpoint(path)
            if state.get("planned", True) or not planned:
                return tensors, state
        except CheckpointError as error:
            logger.warning("%s; falling back to the checkpoint before it", error)
            damaged += 1
    if found and damaged == len(found):
        raise CheckpointError(
            f"no checkpoint in {folder} can be used ({damaged} tried): bring a whole one back, or move them "
            "away to begin at 0 images"
        )
    return None


def has_checkpoints(folder: Path) -> bool:
    """Whether any was written, be it whole or damaged since."""
    return bool(_complete(folder))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, state) of one checkpoint. Raises CheckpointError where it is not whole."""
    try:
        state = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        digest = _digest(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path.name} cannot be read ({error})") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path.name} has format {state.get('format')!r}, not {FORMAT!r}")
    if digest != state["sha256"]:
        raise CheckpointError(f"checkpoint {path.name} is damaged (its checksum does not agree)")
    return _load_tensors(path), state


def save_snapshot(path: Path, model: Model, config: Config, images: int, **facts: str) -> None:
    """Writes the weights of `model` for use, with all that rebuilds it and nothing about this machine.

    facts: more about the weights, such as weights="averaged"; `load` gives them back.
    """
    settings = json.dumps(config.portable().to_dict())
    metadata = {"format": FORMAT, "config": settings, "images": str(images), **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    _save_tensors(path, weights, {**metadata, "sha256": _digest_of(weights, metadata)})


def snapshot_images(path: Path) -> int | None:
    """Images that the model of a snapshot has seen, by its header; None where there is none to be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return int(file.metadata()["images"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None


def load(path: str | os.PathLike, averaged: bool = True, device: torch.device | str = "cpu") -> Model:
    """The model of a snapshot, a run folder (its newest checkpoint) or a checkpoint, in eval mode.

    path: also "hub:owner/name", or "hub:owner/name@revision", of the Hugging Face Hub.
    A model that grows is at the level of detail that it had reached.
    averaged: the averaged weights, where there are any; False gives those of the optimizer, and refuses a
    snapshot, which has only one kind of weights, of averaged ones.
    `.config`, `.images` and `.facts` of the model say what it is, `.facts["weights"]` "averaged", "raw" or,
    for a snapshot that does not say, "unknown"; the config is that of the run folder where there is one,
    which knows the paths of the data. Raises CheckpointError, naming the file; also for weights that are NaN
    or infinite.
    """
    name = os.fspath(path)
    path = hub.pull(name.removeprefix(hub.PREFIX)) if name.startswith(hub.PREFIX) else Path(path)
    if path.is_dir():
        tensors, config, images, facts = _of_folder(path, averaged)
    elif path.with_suffix(".json").is_file() and path.parent.name == "checkpoints":
        if path.suffix == ".json":
            raise CheckpointError(f"{name} only describes a checkpoint: give {path.stem}.safetensors")
        tensors, config, images, facts = _of_checkpoint(path, *load_checkpoint(path), averaged)
    else:
        tensors, config, images, facts = _of_snapshot(path, averaged)
    config = run_config(run_folder(path)) or config
    model = make_model(config)
    load_weights(model, tensors, name)
    stage = make_schedule(config).at(max(images - 1, 0))
    model.set_level(stage.lod, stage.blend)
    model.config, model.images, model.facts = config, images, facts
    return model.to(device).eval()


def run_folder(path: Path) -> Path | None:
    """The run folder that a model comes from: `path` itself, or the one it lies in; None for a lone file."""
    if path.is_dir():
        return path
    if path.name.startswith("best-"):  # lies in the run folder itself
        return path.parent
    return path.parent.parent if path.parent.name in ("checkpoints", "snapshots") else None


def run_config(folder: Path | None, advice: str = "") -> Config | None:
    """The configuration in a run folder; None for no folder, or one without.

    Raises CheckpointError, naming the file, where it cannot be used; `advice` says what to do then, where it
    is not the usual.
    """
    path = folder and folder / "config.yaml"
    if path is None or not path.is_file():
        return None
    try:
        if not path.stat().st_size:  # would be taken for the defaults
            raise ConfigError("it is empty")
        return load_config(path)
    except ConfigError as error:
        why = str(error).removeprefix(f"--config {path}: ").partition(". Give the path")[0]
        raise CheckpointError(
            f"{path}, the configuration of this run, cannot be used ({why}): "
            + (
                advice
                or "the command that trained it writes it again; where it is removed, that of the "
                "checkpoint or snapshot is used"
            )
        ) from error


def load_weights(model: Model, tensors: dict[str, Tensor], source: str) -> None:
    """Copies `tensors` into the state dict of `model`; names and shapes must agree.

    Raises CheckpointError naming the first tensors that do not.
    """
    own = model.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in tensors]
    wrong += [f"{name} is unknown" for name in tensors if name not in own]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, the model's is {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{source} is of another architecture: {'; '.join(wrong[:3])}{more}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix/`, without it."""
    return {n.removeprefix(prefix + "/"): t for n, t in tensors.items() if n.startswith(prefix + "/")}


def _of_folder(path: Path, averaged: bool) -> tuple[dict[str, Tensor], Config, int, dict[str, str]]:
    if (path / hub.MODEL).is_file():
        return _of_snapshot(path / hub.MODEL, averaged)
    snapshots = sorted((path / "snapshots").glob("*.safetensors"))
    try:
        found = load_newest(path / "checkpoints")
    except CheckpointError:
        if not snapshots:
            raise
        found = None
    if found is not None:
        newest = path / "checkpoints" / f"{found[1]['images']:010d}.safetensors"
        return _of_checkpoint(newest, *found, averaged)
    if not snapshots:
        here = path.resolve()
        if here.name in ("checkpoints", "snapshots"):
            raise CheckpointError(
                f"{path} is a part of a run folder: give {here.parent}, or one of the files"
            )
        raise CheckpointError(f"{path} holds no checkpoint and no snapshot: give a run folder or a snapshot")
    return _of_snapshot(snapshots[-1], averaged)


def _of_checkpoint(
    path: Path, tensors: dict[str, Tensor], state: dict, averaged: bool
) -> tuple[dict[str, Tensor], Config, int, dict[str, str]]:
    average = part(tensors, "average") if averaged else {}
    facts = {"weights": "averaged" if average else "raw"}
    weights = _finite(part(tensors, "model") | average, path)
    return weights, make_config(state["config"]), state["images"], facts


def _of_snapshot(path: Path, averaged: bool) -> tuple[dict[str, Tensor], Config, int, dict[str, str]]:
    from safetensors import safe_open

    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: give a snapshot (.safetensors) or a run folder")
    tensors = _load_tensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT or "config" not in metadata:
        raise CheckpointError(f"{path} is not a snapshot of this project (`sivae-fast convert` makes one)")
    if metadata.pop("sha256", None) not in (None, _digest_of(tensors, metadata)):  # older ones have none
        raise CheckpointError(f"{path} is damaged (its checksum does not agree)")
    about = {name: value for name, value in metadata.items() if name not in ("format", "config", "images")}
    facts = {"weights": "unknown", **about}
    if facts["weights"] == "averaged" and not averaged:
        has = "`sivae-fast convert --raw` takes" if "source" in facts else "a run folder or a checkpoint has"
        raise CheckpointError(
            f"{path} holds averaged weights alone: {has} those of the optimizer (--raw, averaged=False)"
        )
    return _finite(tensors, path), make_config(json.loads(metadata["config"])), int(metadata["images"]), facts


def _finite(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`tensors`. Raises CheckpointError naming the first one that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity, these weights cannot be used")
    return tensors


def _remove(path: Path) -> None:
    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _complete(folder: Path) -> list[Path]:
    """Checkpoints whose JSON was written, newest first; files of other names are somebody's own.

    Raises OSError for what is there and cannot be listed, such as a link to a disk that is not.
    """
    if not os.path.lexists(folder):
        return []
    found = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    found.sort(key=lambda path: int(path.stem), reverse=True)
    return [path.with_suffix(".safetensors") for path in found]


def _is_planned(path: Path) -> bool:
    try:
        return json.loads(path.with_suffix(".json").read_text(encoding="utf-8")).get("planned", False)
    except (OSError, ValueError):
        return False


def _save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Atomic: the file appears under its name only when it is whole and on the disk. Returns its SHA-256.

    It is written in a folder of its own, since a kill leaves a file there that safetensors has named.
    """
    from safetensors.torch import save_file

    with _temporary(path) as temporary:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary, metadata)
        mask = os.umask(0o077)
        os.umask(mask)
        with contextlib.suppress(OSError):  # safetensors makes files that nobody else can read
            temporary.chmod(0o666 & ~mask)
        digest = _digest(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return digest


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    from safetensors import SafetensorError

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(exist_ok=True)
    try:
        yield temporary / path.name
    except SafetensorError as error:
        why = str(error).partition(" at path ")[0]  # which names a temporary file of safetensors
        raise OSError(f"{path} could not be written: {why}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with open(path, "rb"):  # of a file that may not be read safetensors says that it does not exist
            return load_file(path)
    except (SafetensorError, OSError) as error:
        hint = (
            ""
            if path.suffix == ".safetensors"
            else "; `sivae-fast convert` makes a snapshot of a published file"
        )
        raise CheckpointError(f"{path} cannot be read as .safetensors ({error}){hint}") from error


def _digest_of(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Of all that a snapshot holds, in an order of its own. tensors: contiguous, on the CPU."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
