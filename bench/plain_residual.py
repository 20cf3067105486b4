"""The published training iterations of the residual model and of its bootstrap variant, written out plainly.

No shared forwards, no fused losses, no contract: networks in, gradients and two losses out.
`draw(name, like)` gives the standard normal numbers of one draw, so that another implementation can have
the same ones.
"""

from __future__ import annotations

import torch


def sse(a, b):
    return (a - b).square().flatten(1).sum(1)


def divergence(mean, logvar):
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)


class PlainResidual:
    def __init__(self, encoder, decoder, target, betas, gamma_r, draw, published=True):
        """`target` reconstructs the fakes: the decoder itself, or the bootstrap variant's lagged one.

        published: Adam as PyTorch chooses it, and losses are read in every iteration. False: fused Adam, and
            losses stay tensors, so that nothing waits for a GPU.
        """
        self.encoder, self.decoder, self.target = encoder, decoder, target
        self.beta_rec, self.beta_kl, self.beta_neg = betas
        self.gamma_r, self.draw = gamma_r, draw
        self.read = torch.Tensor.item if published else torch.Tensor.detach
        adam = {"lr": 2e-4, "fused": None if published else True}
        self.encoder_optimizer = torch.optim.Adam(encoder.parameters(), **adam)
        self.decoder_optimizer = torch.optim.Adam(decoder.parameters(), **adam)

    def encode(self, x, name):
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar, mean + (0.5 * logvar).exp() * self.draw(name, mean)

    def train_only(self, trained, frozen):
        for parameter in trained.parameters():
            parameter.requires_grad_(True)
        for parameter in frozen.parameters():
            parameter.requires_grad_(False)

    def warm_up(self, x):
        self.train_only(self.encoder, torch.nn.Module())
        self.train_only(self.decoder, torch.nn.Module())
        mean, logvar, z = self.encode(x, "posterior")
        rec = self.decoder(z)
        loss = self.beta_rec * sse(x, rec).mean() + self.beta_kl * divergence(mean, logvar).mean()
        self.encoder_optimizer.zero_grad()
        self.decoder_optimizer.zero_grad()
        loss.backward()
        self.encoder_optimizer.step()
        self.decoder_optimizer.step()
        return self.read(loss)

    def iteration(self, x, latent_size):
        prior = self.draw("prior", x.new_empty(len(x), latent_size))
        z, encoder_loss = self.encoder_step(x, prior)
        return encoder_loss, self.decoder_step(x, prior, z)

    def encoder_step(self, x, prior):
        scale = 1 / x[0].numel()
        self.train_only(self.encoder, self.decoder)
        fake = self.decoder(prior)
        mean, logvar, z = self.encode(x, "posterior")
        rec = self.decoder(z)
        mean_rec, logvar_rec, z_rec = self.encode(rec.detach(), "rec_rec/z")
        mean_fake, logvar_fake, z_fake = self.encode(fake.detach(), "rec_fake/z")
        rec_rec, rec_fake = self.target(z_rec), self.target(z_fake)
        real = scale * (self.beta_rec * sse(x, rec) + self.beta_kl * divergence(mean, logvar)).mean()

        def exp_elbo(target, prediction, mean, logvar):
            elbo = self.beta_rec * sse(target, prediction) + self.beta_neg * divergence(mean, logvar)
            return (-2 * scale * elbo).exp().mean()

        loss = real + 0.25 * (
            exp_elbo(rec, rec_rec, mean_rec, logvar_rec)
            + exp_elbo(fake.detach(), rec_fake, mean_fake, logvar_fake)
        )
        self.encoder_optimizer.zero_grad()
        loss.backward()
        self.encoder_optimizer.step()
        return z.detach(), self.read(loss)

    def decoder_step(self, x, prior, z):
        scale = 1 / x[0].numel()
        bootstrap = self.target is not self.decoder
        self.train_only(self.decoder, self.encoder)
        fake, rec = self.decoder(prior), self.decoder(z)
        mean_rec, logvar_rec, z_rec = self.encode(rec, "rec_rec/z/decoder")
        mean_fake, logvar_fake, z_fake = self.encode(fake, "rec_fake/z/decoder")
        if bootstrap:
            fakes = sse(rec, self.target(z_rec)) + sse(fake, self.target(z_fake))
        else:
            fakes = sse(rec.detach(), self.decoder(z_rec.detach()))
            fakes = fakes + sse(fake.detach(), self.decoder(z_fake.detach()))
        loss = scale * (
            self.beta_rec * sse(x, rec).mean()
            + 0.5
            * self.beta_kl
            * (divergence(mean_rec, logvar_rec) + divergence(mean_fake, logvar_fake)).mean()
            + 0.5 * self.gamma_r * self.beta_rec * fakes.mean()
        )
        self.decoder_optimizer.zero_grad()
        loss.backward()
        self.decoder_optimizer.step()
        return self.read(loss)
