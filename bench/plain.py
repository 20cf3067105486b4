"""The published iterations, plainly in PyTorch: the baselines of the speed benches. No project code."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

Normal = Callable[[str, Tensor], Tensor]


def _standard_normal(name: str, like: Tensor) -> Tensor:
    return torch.randn_like(like)


def _mlp(inputs: int, outputs: int, width: int = 256) -> nn.Sequential:
    layers = [nn.Linear(inputs, width), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def _error(x: Tensor, y: Tensor) -> Tensor:
    return ((x - y) ** 2).sum(1)


def _kl(mean: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(1)


def _train_only(trained: nn.Module, frozen: nn.Module) -> None:
    for net, flag in ((trained, True), (frozen, False)):
        for parameter in net.parameters():
            parameter.requires_grad = flag


class Density2D(NamedTuple):
    """Soft-IntroVAE on points in the plane; `vae` and `soft` do one iteration on x [512, 2]."""

    encoder: nn.Module
    decoder: nn.Module
    vae: Callable[[Tensor], float]
    soft: Callable[[Tensor], tuple[float, float]]


def density_2d(
    beta_rec: float = 0.2,
    beta_kl: float = 0.3,
    beta_neg: float = 0.9,
    lr: float = 2e-4,
    normal: Normal = _standard_normal,
    autocast: torch.dtype | None = None,
    published: bool = True,
) -> Density2D:
    """Every pass of the published loop is here: two deterministic reconstructions that only its log uses, the
    decoder's terms of weight 1e-8, and fakes computed anew in the decoder's phase.

    normal(name, like) draws the noise; the names tell the draws of an iteration apart.
    autocast: dtype of the networks' arithmetic; None keeps float32.
    published: Adam as PyTorch chooses it, and losses are read in every iteration. False: fused Adam, and
        losses stay tensors, so that nothing waits for a GPU.
    """
    encoder, decoder = _mlp(2, 4), _mlp(2, 2)
    fused = None if published else True
    for_encoder = torch.optim.Adam(encoder.parameters(), lr, fused=fused)
    for_decoder = torch.optim.Adam(decoder.parameters(), lr, fused=fused)
    read = Tensor.item if published else Tensor.detach

    def run(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
            return net(x).float()

    def encode(x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = run(encoder, x).chunk(2, dim=1)
        return mean, logvar, mean + torch.exp(0.5 * logvar) * normal(name, mean)

    def decode(z: Tensor) -> Tensor:
        return run(decoder, z)

    def vae(x: Tensor) -> float:
        for net in (encoder, decoder):
            net.requires_grad_(True)
        mean, logvar, z = encode(x, "posterior")
        loss = (beta_rec * _error(x, decode(z)) + beta_kl * _kl(mean, logvar)).mean()
        for_encoder.zero_grad()
        for_decoder.zero_grad()
        loss.backward()
        for_encoder.step()
        for_decoder.step()
        return read(loss)

    def encoder_phase(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        _train_only(encoder, decoder)
        fake = decode(noise)
        mean, logvar, z = encode(x, "posterior")
        rec = decode(z)
        decode(mean)  # for the log
        rec_mean, rec_logvar, rec_z = encode(rec.detach(), "rec_rec/z")
        fake_mean, fake_logvar, fake_z = encode(fake.detach(), "rec_fake/z")
        rec_rec, rec_fake = decode(rec_z), decode(fake_z)
        decode(rec_mean)  # for the log
        rec_elbo = beta_rec * _error(rec, rec_rec) + beta_neg * _kl(rec_mean, rec_logvar)
        fake_elbo = beta_rec * _error(fake, rec_fake) + beta_neg * _kl(fake_mean, fake_logvar)
        real = (beta_rec * _error(x, rec) + beta_kl * _kl(mean, logvar)).mean()
        loss = 0.5 * real + 0.25 * torch.exp(-rec_elbo).mean() + 0.25 * torch.exp(-fake_elbo).mean()
        for_encoder.zero_grad()
        loss.backward()
        for_encoder.step()
        return loss, z.detach()

    def decoder_phase(x: Tensor, noise: Tensor, z: Tensor) -> Tensor:
        _train_only(decoder, encoder)
        fake, rec = decode(noise), decode(z)
        rec_mean, rec_logvar, rec_z = encode(rec, "again/rec")
        fake_mean, fake_logvar, fake_z = encode(fake, "again/fake")
        again = _error(rec.detach(), decode(rec_z.detach())).mean()
        again = again + _error(fake.detach(), decode(fake_z.detach())).mean()
        fake_kl = 0.5 * (_kl(rec_mean, rec_logvar) + _kl(fake_mean, fake_logvar)).mean()
        real = beta_rec * _error(x, rec).mean()
        loss = 0.5 * (real + beta_kl * fake_kl + 1e-8 * beta_rec * 0.5 * again)
        for_decoder.zero_grad()
        loss.backward()
        for_decoder.step()
        return loss

    def soft(x: Tensor) -> tuple[float, float]:
        noise = normal("prior", x)
        encoder_loss, z = encoder_phase(x, noise)
        return read(encoder_loss), read(decoder_phase(x, noise, z))

    return Density2D(encoder, decoder, vae, soft)
