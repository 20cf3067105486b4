"""Image models that are no part of the package: a class in a Python file, trained by the same loop."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import sys
from pathlib import Path

import torch
from torch import nn

from sivae_fast.contract import Model

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


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
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    name = f"sivae_fast_own_{path.stem}"
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
    for name in ("prior_std", "further_fakes"):  # the objective has them from settings of its own models
        if getattr(model, name) != getattr(Model, name):
            raise ValueError(f"{name} is {getattr(model, name)}, must be {getattr(Model, name)}")
    _check_sides(model)
    if not model.uses_batch_statistics and any(isinstance(m, _BATCH_NORM) for m in model.modules()):
        raise ValueError("it has batch norm: the class needs uses_batch_statistics = True")
    training = model.training
    model.eval()
    x = torch.zeros(2, *shape, device=next(model.parameters()).device)
    posterior = _called("encode(x)", lambda: model.encode(x))
    _check_result("encode(x)", posterior, "(mean, logvar)", [[2, size], [2, size]])
    image = _called("decode(z, stream)", lambda: model.decode(posterior[0], None))
    _check_result("decode(z, stream)", (image,), "an image each", [list(x.shape)])
    model.train(training)


def _check_result(what: str, result, form: str, wanted: list[list[int]]) -> None:
    parts = result if isinstance(result, tuple) else (result,)
    shapes = [list(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__ for part in parts]
    if shapes != wanted:
        given, must = (", ".join(map(str, each)) for each in (shapes, wanted))
        raise ValueError(f"{what} gives {given} for 2 images, must give {form}: {must}")


def _check_sides(model: Model) -> None:
    sides = []
    for method in (model.encoder_modules, model.decoder_modules):
        modules = _called(f"{method.__name__}()", lambda method=method: list(method()))
        sides.append({id(p) for module in modules for p in module.parameters()})
    encoder, decoder = sides
    if not encoder or not decoder:
        raise ValueError("encoder_modules() and decoder_modules() must both have parameters")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        count = (id(parameter) in encoder) + (id(parameter) in decoder)
        if count != 1:
            where = "both" if count else "neither"
            raise ValueError(
                f"{where} of encoder_modules() and decoder_modules() has the parameter {name}, one must"
            )


def _called(what: str, call):
    try:
        return call()
    except NotImplementedError as error:
        raise ValueError(f"the class needs {what}") from error
    except Exception as error:
        raise ValueError(f"{what} fails ({type(error).__name__}: {error})") from error
