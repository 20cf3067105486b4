"""The published style iteration, plainly in PyTorch: the baseline of `bench/step.py`.

Every pass of the published trainer, one after the other, with the usual formulas and PyTorch's own Adam. Only
the draws come from the project, so that both can be held against each other.
"""

from __future__ import annotations

import torch
from plain_style import PlainStyle
from torch import Tensor, nn

from sivae_fast.contract import Posterior
from sivae_fast.draws import Draws


def kl(posterior: Posterior) -> Tensor:
    return -0.5 * (1 + posterior.logvar - posterior.mean.pow(2) - posterior.logvar.exp()).sum(1)


def error(target: Tensor, prediction: Tensor) -> Tensor:
    return (prediction - target).pow(2).flatten(1).sum(1)


class PlainTrainer:
    """Calls of an instance with x [B, channels, r, r] and draws make one update of both networks.

    autocast: torch.bfloat16 is what one would add in an afternoon, together with compile=True, which compiles
    each network and takes PyTorch's fused Adam, as the project does. mode: that of torch.compile.
    """

    def __init__(
        self,
        model: PlainStyle,
        *,
        beta_rec: float,
        beta_kl: float,
        beta_neg: float,
        scale: float,
        gamma_r: float = 1e-8,
        learning_rate: float = 0.002,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        mode: str | None = None,
    ):
        self.model, self.autocast, self.compiled = model, autocast, compile
        self.beta_rec, self.beta_kl, self.beta_neg = beta_rec, beta_kl, beta_neg
        self.scale, self.gamma_r = scale, gamma_r
        self.sides = (nn.ModuleList(model.encoder_modules()), nn.ModuleList(model.decoder_modules()))
        self.optimizers = [
            torch.optim.Adam(side.parameters(), learning_rate, betas=(0.0, 0.99), fused=compile or None)
            for side in self.sides
        ]
        if compile:
            for side in self.sides:
                for network in side:
                    network.compile(mode=mode)

    def __call__(self, x: Tensor, draws: Draws) -> None:
        if self.compiled:  # with the mode reduce-overhead, networks write where those of the last step wrote
            torch.compiler.cudagraph_mark_step_begin()
        for loss_of, optimizer, trained in zip(
            (self.encoder_loss, self.decoder_loss), self.optimizers, (0, 1), strict=True
        ):
            self.sides[trained].requires_grad_(True)
            self.sides[1 - trained].requires_grad_(False)
            with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                loss = loss_of(x, draws)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def encode(self, x: Tensor, draws: Draws, name: str) -> tuple[Tensor, Posterior]:
        posterior = Posterior(*(part.to(torch.promote_types(part.dtype, torch.float32))
                                for part in self.model.encode(x)))  # fmt: skip
        noise = draws.stream(name).normal(*posterior.mean.shape, dtype=posterior.mean.dtype)
        return posterior.mean + torch.exp(0.5 * posterior.logvar) * noise, posterior

    def fake(self, x: Tensor, draws: Draws, suffix: str = "") -> Tensor:
        prior = draws.stream("prior" + suffix).normal(len(x), self.model.latent_size, dtype=x.dtype)
        return self.model.generate(prior, draws.stream("fake" + suffix))

    def encoder_loss(self, x: Tensor, draws: Draws) -> Tensor:
        decode, weights = self.model.decode, (self.beta_rec, self.beta_neg)
        with torch.no_grad():
            fake = self.fake(x, draws)
        z, posterior = self.encode(x, draws, "posterior")
        rec = decode(z, draws.stream("rec"))
        z_rec, posterior_rec = self.encode(rec.detach(), draws, "rec_rec/z")
        rec_rec = decode(z_rec, draws.stream("rec_rec"))
        z_fake, posterior_fake = self.encode(fake, draws, "rec_fake/z")
        rec_fake = decode(z_fake, draws.stream("rec_fake"))
        real = self.beta_rec * error(x, rec) + self.beta_kl * kl(posterior)
        pushed = 0.0
        for target, prediction, seen in ((rec, rec_rec, posterior_rec), (fake, rec_fake, posterior_fake)):
            elbo = weights[0] * error(target, prediction) + weights[1] * kl(seen)
            pushed = pushed + torch.exp(-2 * self.scale * elbo).mean()
        return self.scale * real.mean() + 0.25 * pushed

    def decoder_loss(self, x: Tensor, draws: Draws) -> Tensor:
        decode = self.model.decode
        fake = self.fake(x, draws, "/decoder")
        with torch.no_grad():
            z, _ = self.encode(x, draws, "posterior/decoder")
        rec = decode(z, draws.stream("rec/decoder"))
        z_rec, posterior_rec = self.encode(rec, draws, "rec_rec/z/decoder")
        z_fake, posterior_fake = self.encode(fake, draws, "rec_fake/z/decoder")
        rec_rec = decode(z_rec.detach(), draws.stream("rec_rec/decoder"))
        rec_fake = decode(z_fake.detach(), draws.stream("rec_fake/decoder"))
        again = error(rec.detach(), rec_rec).mean() + error(fake.detach(), rec_fake).mean()
        pulled = 0.5 * self.beta_kl * (kl(posterior_rec).mean() + kl(posterior_fake).mean())
        total = self.beta_rec * error(x, rec).mean() + pulled
        return self.scale * (total + 0.5 * self.gamma_r * self.beta_rec * again)
