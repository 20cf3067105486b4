"""Deterministic weights and inputs for which the published networks' float64 outputs are known."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sequence(t: int, *shape: int) -> Tensor:
    """q(t, j) = 2 ((7919 j + 104729 t + 13) mod 1009) / 1008 - 1 over the flat index j, in float64."""
    j = torch.arange(math.prod(shape), dtype=torch.int64)
    return (((7919 * j + 104729 * t + 13) % 1009).double() * 2 / 1008 - 1).view(shape)


def filled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict with numbers that depend on the place of their name among the sorted names."""
    result = {}
    for t, key in enumerate(sorted(state, key=lambda key: key.encode())):
        value = state[key]
        if key.endswith(("blur.weight", "num_batches_tracked")) or key == "buff":
            result[key] = value
            continue
        q = sequence(t, *value.shape)
        if key.endswith(".weight") and value.ndim >= 2:
            result[key] = q * math.sqrt(3 / math.prod(value.shape[1:]))
        else:
            batch_norm_weight = key.endswith(".weight")
            offset = 1.0 if key == "const" or key.endswith(".running_var") or batch_norm_weight else 0.0
            result[key] = offset + 0.3 * q
    return result
