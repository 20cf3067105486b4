"""Image models that are no part of the package: a class in a Python file, trained by the same loop."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import sys
from pathlib import Path

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from sivae_fast.contract import Model, Posterior
from sivae_fast.draws import Rows, Stream


def own_model(source: str, resolution: int, channels: int, settings: dict) -> Model:
    """An untrained model of the class that `source`, "FILE.py:CLASS", names.

    It is made as CLASS(resolution=..., channels=..., **settings), for images [B, C, R, R] of these sizes.
    Raises ValueError where there is no such class, where it cannot be made, and where the model is not what
    training needs; the message says which.
    """
    model_class = find_class(source)
    try:
        model = model_class(resolution=resolution, channels=channels, **settings)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"source={source} cannot be made from model.settings={settings} ({said})") from error
    try:
        _check(model, (channels, resolution, resolution))
    except ValueError as error:
        raise ValueError(f"source={source}: {error}") from error
    if not hasattr(model, "resolution"):
        model.resolution = resolution
    return model


def find_class(source: str) -> type[Model]:
    """The class that "FILE.py:CLASS" names, a subclass of `Model`. The file can import others of its folder.

    Raises ValueError where there is none.
    """
    path, name = _parts(source)
    if not path.is_file():
        raise ValueError(f"source={source}: there is no such file in {Path.cwd()}")
    stamp = path.stat().st_mtime_ns
    try:
        module = _module(path.resolve(), stamp)
    except Exception as error:
        raise ValueError(
            f"source={source}: {path} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    found = getattr(module, name, None)
    if not (inspect.isclass(found) and issubclass(found, Model)):
        raise ValueError(f"source={source}: {path} has no subclass of sivae_fast.Model called {name}")
    return found


def digest(source: str) -> str:
    """First 12 hexadecimal digits of the SHA-256 of the file; "absent" where it cannot be read."""
    try:
        return hashlib.sha256(_parts(source)[0].read_bytes()).hexdigest()[:12]
    except (OSError, ValueError):
        return "absent"


def _parts(source: str) -> tuple[Path, str]:
    path, _, name = source.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ValueError(f"source={source}: must be FILE.py:CLASS")
    return Path(path), name


@functools.cache
def _module(path: Path, stamp: int):
    """The module of a file as it was at that time."""
    folder = str(path.parent)
    if sys.path[0] != folder:  # as of a program: before the folder of launch/train.py
        sys.path.insert(0, folder)
    name = f"sivae_fast_own_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for the module of a class there
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def _check(model: Model, shape: tuple[int, ...]) -> None:
    """Raises ValueError for the first thing that training would fail at, or do without a word."""
    size = getattr(model, "latent_size", None)
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"latent_size is {size!r}, must be a positive number, set in __init__")
    # The objective has the first two from settings of the package's own models.
    fixed = {"prior_std": Model.prior_std, "further_fakes": Model.further_fakes, "resolution": shape[-1]}
    for name, value in fixed.items():
        if getattr(model, name, value) != value:
            raise ValueError(f"{name} is {getattr(model, name)}, must be {value}")
    _check_sides(model)
    _check_state(model)
    if not model.uses_batch_statistics and any(isinstance(m, _BatchNorm) for m in model.modules()):
        raise ValueError("it has batch norm: the class needs uses_batch_statistics = True")
    _check_passes(model, shape)


def _check_passes(model: Model, shape: tuple[int, ...]) -> None:
    training = model.training
    model.eval()
    x = torch.zeros(2, *shape)
    stream = lambda: Stream(0, Rows.all(2))
    posterior = _called("encode(x)", lambda: model.encode(x))
    if model.random_encoder:  # as training calls it
        _called("encode(x, stream)", lambda: model.encode(x, stream()))
    if not isinstance(posterior, Posterior):
        raise ValueError(
            f"encode(x) gives {type(posterior).__name__}, must give sivae_fast.Posterior(mean, logvar)"
        )
    wanted = [2, model.latent_size]
    _check_shapes("encode(x)", posterior, [wanted, wanted])
    for name in ("decode", "generate", "decode_fake"):
        call = lambda name=name: getattr(model, name)(posterior.mean, stream())
        _check_shapes(f"{name}(z, stream)", (_called(f"{name}(z, stream)", call),), [list(x.shape)])
    model.train(training)


def _check_shapes(what: str, parts, wanted: list[list[int]]) -> None:
    shapes = [list(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__ for part in parts]
    if shapes != wanted:
        given, must = (", ".join(map(str, each)) for each in (shapes, wanted))
        raise ValueError(f"{what} gives {given} for 2 images, must give {must}")


def _check_sides(model: Model) -> None:
    """Every parameter that is trained is of one side, and a side has no others."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    sides = {}
    for method in (model.encoder_modules, model.decoder_modules):
        what = f"{method.__name__}()"
        modules = _called(what, lambda method=method: list(method()))
        sides[what] = {parameter for module in modules for parameter in module.parameters()}
        if not sides[what]:
            raise ValueError(f"{what} has no parameters")
        for parameter in sides[what]:
            if parameter not in names:
                raise ValueError(f"{what} has parameters that are not the model's: lists need nn.ModuleList")
            if not parameter.requires_grad:
                raise ValueError(
                    f"{what} has {names[parameter]}, which is frozen: give what is trained alone"
                )
    for parameter, name in names.items():
        count = sum(parameter in side for side in sides.values())
        if parameter.requires_grad and count != 1:
            raise ValueError(
                f"{'both' if count else 'neither'} of {' and '.join(sides)} has {name}, one must"
            )


def _check_state(model: Model) -> None:
    """Checkpoints hold tensors by name, each of its own."""
    found = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"its state dict has {name}, which is no tensor")
        other = found.setdefault(value.untyped_storage().data_ptr() or name, name)
        if other != name:
            raise ValueError(f"{other} and {name} share their numbers, each must have its own")


def _called(what: str, call):
    try:
        return call()
    except NotImplementedError as error:
        raise ValueError(f"the class needs {what}") from error
    except Exception as error:
        raise ValueError(f"{what} fails ({type(error).__name__}: {error})") from error
