"""Image translation without labels: one encoder for the class of an image, one for its content.

The layout is that of LORD (Gabbay and Hoshen, 2020), which the Soft-IntroVAE paper took over: content enters
the decoder as a small feature map, class as scale and offset of every normalised layer. Sizes of the latents
and the Gaussian posteriors on both codes are ours; the paper's were not found.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sivae_fast.contract import Model, Posterior
from sivae_fast.draws import Stream
from sivae_fast.kernels.style import activate_normalize
from sivae_fast.models.enlarging import twice

_SMALLEST = 4


class TwoEncoderModel(Model):
    """Images [B, channels, R, R] in [0, 1] to one posterior over class and content codes, side by side, and
    back.

    The first `class_size` of the latent_size = class_size + content_size numbers are the class code, so the
    posterior's KL is the sum of both. `width` is that of the first layer (LORD: 64); R is a power of two, at
    least 8. `swapped_fakes`: training exchanges the contents of every two neighbours of a batch, which must
    be even, and treats the result as a third kind of fake (our addition). Raises ValueError for other sizes.
    """

    def __init__(
        self,
        resolution: int = 64,
        channels: int = 3,
        class_size: int = 256,
        content_size: int = 128,
        width: int = 64,
        swapped_fakes: bool = False,
    ):
        super().__init__()
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(f"resolution={resolution}: must be a power of two, at least 8")
        sizes = {"channels": channels, "class_size": class_size, "content_size": content_size, "width": width}
        for option, value in sizes.items():
            if value < 1 or (option == "width" and value % 2):
                raise ValueError(f"{option}={value}: must be positive{', and even' * (option == 'width')}")
        self.resolution, self.channels = resolution, channels
        self.class_size, self.content_size = class_size, content_size
        self.latent_size = class_size + content_size
        self.further_fakes = ("swap",) if swapped_fakes else ()
        halvings = (resolution // _SMALLEST).bit_length() - 1
        self.class_encoder = _encoder(channels, width, halvings, class_size)
        self.content_encoder = _encoder(channels, width, halvings, content_size)
        self.decoder = _Decoder(channels, width, halvings, class_size, content_size)
        self.to(memory_format=torch.channels_last)

    def encode(self, x: Tensor) -> Posterior:
        self.check_rows("x", x, self.channels, self.resolution, self.resolution)
        x = x.contiguous(memory_format=torch.channels_last)
        class_mean, class_logvar = self.class_encoder(x).chunk(2, 1)
        content_mean, content_logvar = self.content_encoder(x).chunk(2, 1)
        return Posterior(
            torch.cat([class_mean, content_mean], 1), torch.cat([class_logvar, content_logvar], 1)
        )

    def decode(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        self.check_rows("z", z, self.latent_size)
        return self.decoder(*self.split(z))

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(class codes [B, class_size], content codes [B, content_size]) of latents [B, latent_size]."""
        return tuple(z.split([self.class_size, self.content_size], 1))

    def swap(self, class_of: Tensor, content_of: Tensor) -> Tensor:
        """Latents with the class code of the one and the content code of the other, [B, latent_size] each."""
        return torch.cat([self.split(class_of)[0], self.split(content_of)[1]], 1)

    def further_latents(self, z: Tensor) -> Sequence[Tensor]:
        if not self.further_fakes:
            return ()
        # Neighbours, so that the pairs are the same for any number of ranks and micro-batches.
        return (self.swap(z, z.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)),)

    def encoder_modules(self) -> Iterable[nn.Module]:
        return [self.class_encoder, self.content_encoder]

    def decoder_modules(self) -> Iterable[nn.Module]:
        return [self.decoder]


def _encoder(channels: int, width: int, halvings: int, code: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 7, padding=3), _relu()]
    widths = [min(2**i, 4) * width for i in range(halvings + 1)]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), _relu()]
    hidden = 4 * width
    layers += [nn.Flatten(), nn.Linear(widths[-1] * _SMALLEST**2, hidden), _relu()]
    return nn.Sequential(*layers, nn.Linear(hidden, hidden), _relu(), nn.Linear(hidden, 2 * code))


def _relu() -> nn.Module:
    return nn.LeakyReLU(0.2)


class _Decoder(nn.Module):
    def __init__(self, channels: int, width: int, halvings: int, class_size: int, content_size: int):
        super().__init__()
        cells, self.width = _SMALLEST**2, 4 * width
        sizes = (content_size, cells * width // 2, cells * width, cells * self.width)
        self.content = nn.Sequential(
            *itertools.chain.from_iterable((nn.Linear(a, b), _relu()) for a, b in itertools.pairwise(sizes))
        )
        self.convolutions = nn.ModuleList(
            nn.Conv2d(self.width, self.width, 3, padding=1) for _ in range(halvings)
        )
        self.styles = nn.ModuleList(nn.Linear(class_size, 2 * self.width) for _ in range(halvings))
        self.to_image = nn.Sequential(
            nn.Conv2d(self.width, width, 5, padding=2),
            _relu(),
            nn.Conv2d(width, channels, 7, padding=3),
            nn.Sigmoid(),
        )

    def forward(self, class_code: Tensor, content_code: Tensor) -> Tensor:
        x = self.content(content_code).view(-1, self.width, _SMALLEST, _SMALLEST)
        x = x.contiguous(memory_format=torch.channels_last)
        for convolution, style in zip(self.convolutions, self.styles, strict=True):
            # One plus the scale: a fresh network passes its features on instead of erasing them.
            x, *_ = activate_normalize(convolution(twice(x)), eps=1e-5, style=style(class_code), inplace=True)
        return self.to_image(x)
