"""Batch norm at evaluation: which statistics a trained model is measured with.

The published models are trained, sampled and measured in train mode; in eval mode their running statistics,
which mix real images, reconstructions and samples of small batches, give worse pictures (issues 8, 13, 14 and
20 of the published repository: one checkpoint measures FID 4.37 and 25.86). There are three modes:

- "running": the statistics as training left them;
- "batch": each batch's own statistics, so that a picture depends on its batch;
- "recalibrated": statistics measured anew on many batches of what the net will see, then frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sivae_fast.contract import Model

MODES = ("running", "batch", "recalibrated")
#: Mean and variance [C] of each layer.
Statistics = list[tuple[Tensor, Tensor]]


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norm uses the statistics of each batch and leaves its running ones untouched."""
    layers = [(layer, layer.training, layer.track_running_stats) for layer in batch_norms(model)]
    try:
        for layer, _, _ in layers:
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for layer, training, track in layers:
            layer.training, layer.track_running_stats = training, track


@torch.no_grad()
def recalibrate(module: nn.Module, forward: Callable[[Tensor], object], batches: Iterable[Tensor]) -> int:
    """Replace the running statistics of `module` by their plain mean over `forward(batch)` of all batches.

    Returns the number of batches used; 0 layers or 0 batches change nothing.
    """
    layers = [(layer, layer.training, layer.momentum) for layer in batch_norms(module)]
    used = 0
    try:
        for batch in batches if layers else ():
            if not used:
                for layer, _, _ in layers:
                    layer.reset_running_stats()
                    layer.training, layer.momentum = True, None  # None: the mean over all batches
            forward(batch)
            used += 1
    finally:
        for layer, training, momentum in layers:
            layer.training, layer.momentum = training, momentum
    return used


def statistics(module: nn.Module) -> Statistics:
    """A copy of what the layers of `module` normalise with in eval mode."""
    return [(layer.running_mean.clone(), layer.running_var.clone()) for layer in batch_norms(module)]


@torch.no_grad()
def set_statistics(module: nn.Module, found: Statistics) -> None:
    """Brings back what `statistics` copied from the same module."""
    for layer, (mean, variance) in zip(batch_norms(module), found, strict=True):
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)


def recalibrate_encoder(model: Model, images: Iterable[Tensor]) -> int:
    """Statistics of the encoder from batches of images [B, ...] in the model's input form."""
    return recalibrate(nn.ModuleList(model.encoder_modules()), model.encode, images)


def recalibrate_decoder(model: Model, latents: Iterable[Tensor]) -> int:
    """Statistics of the decoder from batches of latents [B, Z]: prior draws, or posterior means of images."""
    return recalibrate(nn.ModuleList(model.decoder_modules()), model.decode, latents)


def prior_batches(
    model: Model, batches: int, batch: int, seed: int = 0, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """`batches` batches of prior draws [batch, Z], the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        z = torch.randn(batch, model.latent_size, generator=generator) * model.prior_std
        yield z.to(device)
