"""Encoder and decoder for point clouds: a PointNet and a fully connected net, as published."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import Tensor, nn

from sivae_fast.contract import Model, Posterior
from sivae_fast.draws import Stream

_POINT_WIDTHS = (3, 64, 128, 256, 256, 512)
_DECODER_WIDTHS = (64, 128, 512, 1024)


class PointNetModel(Model):
    """Clouds [B, points, 3] to Posterior of [B, latent_size] and back; the prior is N(0, prior_std^2 I).

    Encoder: five layers shared by all points (linear, ReLU, batch norm), the maximum over the points, a
    hidden layer of 256 and one head each for mean and log-variance; the number of points is free. Decoder:
    ReLU layers of 64, 128, 512 and 1024 and `points` x 3 outputs without activation. This is the network of
    the point cloud experiments of Soft-IntroVAE (7,342,848 parameters at 2048 points), whose checkpoints
    load after `published_state_dict`. Raises ValueError for sizes that are not positive.
    """

    uses_batch_statistics = True

    def __init__(self, points: int = 2048, latent_size: int = 128, prior_std: float = 0.2):
        super().__init__()
        for option, value in (("points", points), ("latent_size", latent_size), ("prior_std", prior_std)):
            if value <= 0:
                raise ValueError(f"{option} = {value}: must be positive")
        self.points, self.latent_size, self.prior_std = points, latent_size, prior_std
        self.encoder = _Encoder(latent_size)
        self.decoder = nn.ModuleDict({"model": _decoder(latent_size, 3 * points)})

    def encode(self, x: Tensor) -> Posterior:
        self.check_rows("x", x, "points", 3)
        return self.encoder(x)

    def decode(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        self.check_rows("z", z, self.latent_size)
        # The published order of the outputs: all x, all y, all z.
        return self.decoder["model"](z).view(-1, 3, self.points).transpose(1, 2).contiguous()

    def encoder_modules(self) -> Iterable[nn.Module]:
        return [self.encoder]

    def decoder_modules(self) -> Iterable[nn.Module]:
        return [self.decoder]


class _Encoder(nn.Module):
    def __init__(self, latent_size: int):
        super().__init__()
        layers = []
        for inputs, outputs in itertools.pairwise(_POINT_WIDTHS):
            # Normalisation after the activation, as published.
            layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU(), nn.BatchNorm1d(outputs)]
        self.conv = nn.Sequential(*layers)
        self.fc = nn.Sequential(nn.Linear(_POINT_WIDTHS[-1], 256), nn.ReLU())
        self.mu_layer = nn.Linear(256, latent_size)
        self.std_layer = nn.Linear(256, latent_size)  # holds the log-variance; the name is the published one

    def forward(self, x: Tensor) -> Posterior:
        batch, points, _ = x.shape
        features = self.conv(x.reshape(batch * points, 3)).view(batch, points, self.fc[0].in_features)
        hidden = self.fc(features.max(1).values)
        return Posterior(self.mu_layer(hidden), self.std_layer(hidden))


def _decoder(latent_size: int, outputs: int) -> nn.Sequential:
    layers = []
    for inputs, width in itertools.pairwise((latent_size, *_DECODER_WIDTHS)):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(_DECODER_WIDTHS[-1], outputs))


def published_state_dict(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights for `PointNetModel` from a published checkpoint, whose shared layers are convolutions."""
    return {
        name: value.squeeze(2) if name.startswith("encoder.conv") and value.dim() == 3 else value
        for name, value in checkpoint.items()
    }
