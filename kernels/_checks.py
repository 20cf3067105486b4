"""Errors about arguments, raised before anything is launched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from .reference import Source

_FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def check_sources(sources: Sequence[Source], names: Sequence[str]) -> None:
    """The sources have their parts in pairs, and all tensors fit together."""
    images, latents, errors = [], [], []
    for name, source in zip(names, sources, strict=True):
        target, prediction, mean, logvar, error = source
        if (target is None) != (prediction is None) or (mean is None) != (logvar is None):
            raise ValueError(
                f"{name} has {_parts(source)}: target and prediction, mean and logvar come in pairs"
            )
        if target is not None:
            images += [(target, "target of", name), (prediction, "prediction of", name)]
        if mean is not None:
            latents += [(mean, "mean of", name), (logvar, "logvar of", name)]
        if error is not None:
            errors.append((error, "error of", name))
        if (target is None) == (error is None) and (error is not None or mean is None):
            raise ValueError(
                f"{name} has {_parts(source)}: must have a posterior or a target with its prediction, or "
                "both, or an error in place of the pair"
            )
    check_tensors(images, latents, errors)
    if errors and errors[0][0].dim() != 1:
        raise ValueError(f"error of {errors[0][2]} has shape {list(errors[0][0].shape)}, must be [B]")


def check_tensors(*groups: Sequence[tuple[Tensor, str, str]]) -> None:
    """Float tensors of one device and batch size, of one shape within a group; each with its two names."""
    whole = next(group[0] for group in groups if group)
    for group in groups:
        if group:
            _check_first(group[0], whole)
            first = group[0][0]
            shape, device = first.shape, first.device
            for entry in group[1:]:
                tensor = entry[0]
                if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS or tensor.device != device:
                    _check_first(entry, whole)
                if tensor.shape != shape:
                    raise ValueError(
                        f"{_name(entry)} has shape {list(tensor.shape)}, {_name(group[0])} {list(shape)}: "
                        "must be equal"
                    )


def finite(name: str, value: float) -> float:
    """`value`, a number of Python or numpy, as a float; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)) or not math.isfinite(value):
        hint = f": float({name}) if it holds one" if isinstance(value, Tensor) else ""
        raise ValueError(f"{name} is {value!r}, must be a finite number{hint}")
    return float(value)


def positive(name: str, value: float) -> float:
    if finite(name, value) <= 0:
        raise ValueError(f"{name} is {value!r}, must be positive")
    return float(value)


def bounds(name: str, value: Sequence[float] | None) -> tuple[float, float] | None:
    """(low, high) as floats, which may be infinite; ValueError for anything else."""
    if value is None:
        return None
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not pair or not all(isinstance(number, Real) for number in value) or not value[0] < value[1]:
        raise ValueError(f"{name} is {value!r}, must be (low, high) with low < high, or None")
    return float(value[0]), float(value[1])


def _check_first(entry: tuple[Tensor, str, str], whole: tuple[Tensor, str, str]) -> None:
    tensor, first = entry[0], whole[0]
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{_name(entry)} is a {type(tensor).__name__}, must be a tensor")
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{_name(entry)} is {tensor.dtype}, must be float16, bfloat16, float32 or float64")
    if tensor.dim() == 0 or tensor.numel() == 0:
        raise ValueError(
            f"{_name(entry)} has shape {list(tensor.shape)}, must be [B, ...] with no dimension of 0"
        )
    if tensor.device != first.device:
        raise ValueError(
            f"{_name(entry)} is on {tensor.device}, {_name(whole)} on {first.device}: must be on one device"
        )
    if tensor.shape[0] != first.shape[0]:
        raise ValueError(
            f"{_name(entry)} holds {tensor.shape[0]} samples, {_name(whole)} {first.shape[0]}: "
            "must be one batch size"
        )


def _name(entry: tuple[Tensor, str, str]) -> str:
    return f"{entry[1]} {entry[2]}".strip()


def _parts(source: Source) -> str:
    return ", ".join(part for part, tensor in source._asdict().items() if tensor is not None) or "no part"
