"""Activations that are computed again in the backward pass instead of kept: memory for time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(modules: Iterable[nn.Module]) -> None:
    """From now on each module keeps its inputs alone for the backward pass and runs again there.

    The modules must give the same outputs for the same inputs and change nothing else.
    """
    for module in modules:
        module.forward = functools.partial(_recomputed, module, module.forward)


def _recomputed(module: nn.Module, forward: Callable, *inputs):
    if not torch.is_grad_enabled():
        return forward(*inputs)
    parameters = [*module.parameters(), *(value for value in inputs if isinstance(value, nn.Parameter))]
    trained = [parameter.requires_grad for parameter in parameters]

    def again(*inputs):
        # By the time of the backward pass the step has thawed or frozen the network: what autograd saves, and
        # how often, depends on that.
        with _trained_as(parameters, trained):
            return forward(*inputs)

    return checkpoint(again, *inputs, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def _trained_as(parameters: list[nn.Parameter], trained: list[bool]) -> Iterator[None]:
    now = [parameter.requires_grad for parameter in parameters]
    for parameter, flag in zip(parameters, trained, strict=True):
        parameter.requires_grad_(flag)
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, now, strict=True):
            parameter.requires_grad_(flag)
