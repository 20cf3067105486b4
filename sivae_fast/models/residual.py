"""The residual convolutional model of the CIFAR-10, SVHN, MNIST, CelebA and Digital Monsters experiments.

After Daniel and Tamar, "Soft-IntroVAE", CVPR 2021, appendix on image models; state-dict names are those
of the published weights. Images are [B, C, S, S] with values in [0, 1]; the decoder has no output activation.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sivae_fast.contract import Model, Posterior
from sivae_fast.draws import Stream
from sivae_fast.models.enlarging import Twice


def _size(resolution: int, channels: int, widths: tuple[int, ...], latent_size: int) -> dict:
    return {"resolution": resolution, "channels": channels, "widths": widths, "latent_size": latent_size}


#: Constructor arguments of every published size.
SIZES = {
    "cifar10": _size(32, 3, (64, 128, 256), 128),
    "svhn": _size(32, 3, (64, 128, 256), 128),
    "mnist": _size(28, 1, (64, 128), 32),
    "fmnist": _size(28, 1, (64, 128), 32),
    "monsters128": _size(128, 3, (64, 128, 256, 512, 512), 128),
    "celeb128": _size(128, 3, (64, 128, 256, 512, 512), 256),
    "celeb256": _size(256, 3, (64, 128, 256, 512, 512, 512), 256),
    "celeb1024": _size(1024, 3, (16, 32, 64, 128, 256, 512, 512, 512), 256),
}

NORMS = ("batch", "group")


class ResidualModel(Model):
    """Residual encoder [B, C, S, S] -> Posterior of [B, Z], and residual decoder back.

    resolution, channels: S and C. widths: channels after each halving, so S must divide by 2 ** len(widths).
    norm: "batch" as published, where the rows of a batch influence each other while training and running
        statistics are used in eval mode (see `sivae_fast.evaluation.batchnorm`); "group" has neither effect.
    lagged_decoder: the bootstrap variant. A copy of the decoder, never optimised, reconstructs the fakes; it
        is taken anew after the first epoch and every `lag_epochs` epochs on. It begins as a copy too,
        where the published one begins with other random weights and so misleads the first epoch.
    augment: in training the encoder sees its input randomly cut out and moved, see `augmented`.
    condition_size: numbers of a condition [B, condition_size] that both nets take; 0 for none.
    Raises ValueError for sizes that do not fit and for unknown norms.
    """

    def __init__(
        self,
        resolution: int = 32,
        channels: int = 3,
        widths: Sequence[int] = (64, 128, 256),
        latent_size: int = 128,
        norm: str = "batch",
        lagged_decoder: bool = False,
        lag_epochs: int = 1,
        augment: bool = False,
        condition_size: int = 0,
    ):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}, must be one of {', '.join(NORMS)}")
        if not widths or min(widths) < 1:
            raise ValueError(f"widths is {widths!r}, must be one or more positive numbers")
        final, rest = divmod(resolution, 2 ** len(widths))
        if rest or not final:
            raise ValueError(
                f"resolution is {resolution}, must be a multiple of {2 ** len(widths)}: "
                f"{len(widths)} widths halve it as often"
            )
        counts = {"channels": channels, "latent_size": latent_size, "lag_epochs": lag_epochs}
        for option, value in counts.items():
            if value < 1:
                raise ValueError(f"{option} is {value}, must be at least 1")
        self.resolution, self.channels, self.latent_size = resolution, channels, latent_size
        self.norm, self.augment = norm, augment
        self.lagged_decoder, self.lag_epochs = lagged_decoder, lag_epochs
        self.condition_size = condition_size
        shape = (widths[-1], final, final)
        self.encoder = Encoder(resolution, channels, widths, shape, latent_size, norm, condition_size)
        self.decoder = Decoder(channels, widths, shape, latent_size, norm, condition_size)
        if lagged_decoder:
            self.target_decoder = copy.deepcopy(self.decoder).requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    @property
    def uses_batch_statistics(self) -> bool:
        return self.norm == "batch"

    def encode(self, x: Tensor, stream: Stream | None = None, condition: Tensor | None = None) -> Posterior:
        """`stream` serves the augmentation; `condition` [B, condition_size] is needed if that is > 0."""
        self.check_rows("x", x, self.channels, self.resolution, self.resolution)
        if self.augment and self.training:
            x = augmented(x, stream)
        x = x.contiguous(memory_format=torch.channels_last)
        return Posterior(*self.encoder(x, self._checked(condition)).chunk(2, dim=1))

    def decode(self, z: Tensor, stream: Stream | None = None, condition: Tensor | None = None) -> Tensor:
        self.check_rows("z", z, self.latent_size)
        return self.decoder(z, self._checked(condition))

    def decode_fake(self, z: Tensor, stream: Stream | None = None, condition: Tensor | None = None) -> Tensor:
        decoder = self.target_decoder if self.lagged_decoder else self.decoder
        return decoder(z, self._checked(condition))

    @property
    def random_encoder(self) -> bool:
        return self.augment

    @torch.no_grad()
    def end_of_epoch(self, epoch: int) -> None:
        """Copies weights and running statistics into the lagged decoder, where there is one."""
        if self.lagged_decoder and (epoch - 1) % self.lag_epochs == 0:
            self.target_decoder.load_state_dict(self.decoder.state_dict())

    def encoder_modules(self) -> Iterable[nn.Module]:
        return [self.encoder]

    def decoder_modules(self) -> Iterable[nn.Module]:
        return [self.decoder]

    def _checked(self, condition: Tensor | None) -> Tensor | None:
        size = 0 if condition is None else condition.shape[-1]
        if size != self.condition_size:
            raise ValueError(f"condition has {size} numbers a row, this model takes {self.condition_size}")
        return condition


class Encoder(nn.Module):
    """[B, C, S, S] -> [B, 2 Z]: means, then log-variances."""

    def __init__(self, resolution, channels, widths, final_shape, latent_size, norm, condition_size):
        super().__init__()
        size = resolution // 2
        layers = OrderedDict()
        layers["0"] = nn.Conv2d(channels, widths[0], 5, padding=2, bias=False)
        layers["1"] = _norm(norm, widths[0])
        layers["2"] = nn.LeakyReLU(0.2)
        layers["3"] = nn.AvgPool2d(2)
        for before, after in itertools.pairwise(widths):
            layers[f"res_in_{size}"] = Block(before, after, norm)
            layers[f"down_to_{size // 2}"] = nn.AvgPool2d(2)
            size //= 2
        layers[f"res_in_{size}"] = Block(widths[-1], widths[-1], norm)
        self.main = nn.Sequential(layers)
        features = final_shape[0] * final_shape[1] * final_shape[2]
        self.fc = nn.Linear(features + condition_size, 2 * latent_size)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.fc(_with(self.main(x).flatten(1), condition))


class Decoder(nn.Module):
    """[B, Z] -> [B, C, S, S]."""

    def __init__(self, channels, widths, final_shape, latent_size, norm, condition_size):
        super().__init__()
        self.final_shape = final_shape
        features = final_shape[0] * final_shape[1] * final_shape[2]
        self.fc = nn.Sequential(nn.Linear(latent_size + condition_size, features), nn.ReLU())
        layers = OrderedDict()
        size, before = 4, widths[-1]  # the published names count from 4 whatever the true size
        for after in reversed(widths):
            layers[f"res_in_{size}"] = Block(before, after, norm)
            layers[f"up_to_{2 * size}"] = Twice()
            size, before = 2 * size, after
        layers[f"res_in_{size}"] = Block(before, before, norm)
        layers["predict"] = nn.Conv2d(before, channels, 5, padding=2)
        self.main = nn.Sequential(layers)

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        x = self.fc(_with(z, condition)).unflatten(1, self.final_shape)
        return self.main(x.contiguous(memory_format=torch.channels_last))


class Block(nn.Module):
    """Two 3x3 convolutions beside the identity, which a 1x1 convolution widens where the widths differ."""

    def __init__(self, inputs: int, outputs: int, norm: str):
        super().__init__()
        if inputs != outputs:
            self.conv_expand = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = _norm(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = _norm(norm, outputs)
        self.widens = inputs != outputs

    def forward(self, x: Tensor) -> Tensor:
        branch = F.leaky_relu(self.bn1(self.conv1(x)), 0.2)
        branch = self.bn2(self.conv2(branch))
        return F.leaky_relu(branch + (self.conv_expand(x) if self.widens else x), 0.2)


def published_state_dict(checkpoint: dict) -> dict[str, Tensor]:
    """The weights of a published checkpoint `{"epoch": int, "model": state}`; the names are already ours."""
    return checkpoint["model"]


def augmented(x: Tensor, stream: Stream | None = None) -> Tensor:
    """Differentiable random cutout and translation of images [B, C, S, S], each with probability 1/2 a row.

    The cutout is a square with a side of up to S/2 anywhere in the image; the translation is up to S/8 each
    way; both fill with 0. After "Augmentation-enhanced Soft-IntroVAE" (2022), where the reconstruction
    error is still taken against the clean image.
    """
    rows, _, height, width = x.shape
    if stream is None:
        u = torch.rand(rows, 8, device=x.device)
    else:
        u = stream.uniform(rows, 8)
    y = torch.arange(height, device=x.device)
    across = torch.arange(width, device=x.device)

    side = u[:, :1] * (height / 2) * (u[:, 1:2] < 0.5)
    inside_y = ((y + 0.5) - u[:, 2:3] * height).abs() < side / 2
    inside_x = ((across + 0.5) - u[:, 3:4] * width).abs() < side / 2
    x = x * ~(inside_y[:, None, :, None] & inside_x[:, None, None, :])

    moves = (u[:, 6:7] < 0.5) * ((u[:, 4:6] * 2 - 1) * (height / 8)).round()
    from_y, from_x = (y - moves[:, :1]).long(), (across - moves[:, 1:]).long()
    known_y = (from_y >= 0) & (from_y < height)
    known_x = (from_x >= 0) & (from_x < width)
    x = x.gather(2, from_y.clamp(0, height - 1)[:, None, :, None].expand_as(x))
    x = x.gather(3, from_x.clamp(0, width - 1)[:, None, None, :].expand_as(x))
    return x * (known_y[:, None, :, None] & known_x[:, None, None, :])


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return _GroupNorm(max(1, channels // 16), channels)


class _GroupNorm(nn.GroupNorm):
    """Computed in float32 under autocast on a GPU, but what follows stays in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


def _with(features: Tensor, condition: Tensor | None) -> Tensor:
    return features if condition is None else torch.cat([features, condition.to(features.dtype)], dim=1)
