"""The style-based model of Soft-IntroVAE (Daniel and Tamar, CVPR 2021).

The networks are those of ALAE (Pidhorskyi et al., CVPR 2020), the decoder that of StyleGAN (Karras et al.,
CVPR 2019).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from sivae_fast.contract import Model, Posterior
from sivae_fast.draws import Rows, Stream
from sivae_fast.models.style_layers import Decoder, Encoder, Equalized, Mapping, Noise

NoiseMode = Literal["sample", "batch", "bump", "none"]

#: The average style keeps this share of itself at every decode of a model in training.
AVERAGE_KEEPS = 0.995
#: Truncation pulls this many layers (the coarse ones) towards the average style.
TRUNCATED_LAYERS = 8


class StyleModel(Model):
    """Encoder, style decoder and the two mapping networks, over all levels of detail of progressive growing.

    Level `lod` has images of 4*2^lod pixels; a new model is at the last one. `learning_rate_factors` is the
    equalised learning rate, which the optimizer has to apply.

    Args:
        resolution: pixels of a side at the last level, a power of two from 8.
        channels: of the images.
        start_channels: width of the features at full size; doubles at every level down.
        max_channels: limit on the width.
        latent_size: of z, of w and of every layer of the mappings.
        mapping_layers: of the mapping from z to w.
        style_mixing: probability that a batch of prior samples takes its finer layers from a second latent.
    """

    def __init__(
        self,
        resolution: int = 256,
        channels: int = 3,
        start_channels: int = 64,
        max_channels: int = 512,
        latent_size: int = 512,
        mapping_layers: int = 8,
        style_mixing: float = 0.9,
    ):
        super().__init__()
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(f"resolution is {resolution}: it has to be a power of two, 8 or more")
        sizes = {
            "channels": channels,
            "start_channels": start_channels,
            "max_channels": max_channels,
            "latent_size": latent_size,
            "mapping_layers": mapping_layers,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value}: it has to be 1 or more")
        if not 0 <= style_mixing <= 1:
            raise ValueError(f"style_mixing is {style_mixing}: a probability lies in [0, 1]")
        self.levels = int(math.log2(resolution)) - 1
        self.channels, self.latent_size, self.style_mixing = channels, latent_size, style_mixing
        widths = [min(max_channels, start_channels * 2**i) for i in range(self.levels + 1)]
        self.encoder = Encoder(widths, channels, latent_size)
        self.decoder = Decoder(widths[-2::-1], channels, latent_size)
        self.mapping_tl = Mapping([latent_size, latent_size, latent_size, 2 * latent_size])
        self.mapping_fl = Mapping([latent_size] * (mapping_layers + 1))
        self.register_buffer("dlatent_avg", torch.zeros(latent_size))
        # A tensor, so that a compiled network is not compiled again when it changes.
        self.register_buffer("_blend", torch.ones(()), persistent=False)
        self.set_level(self.levels - 1, 1.0)
        self.to(memory_format=torch.channels_last)

    def set_level(self, lod: int, blend: float) -> None:
        """Work at 4*2^lod pixels, the level faded in by `blend` in [0, 1] over the one below."""
        if not 0 <= lod < self.levels:
            raise ValueError(f"lod is {lod}: this model has levels 0 to {self.levels - 1}")
        if not 0 <= blend <= 1 or (lod == 0 and blend != 1):
            raise ValueError(f"blend is {blend} at lod {lod}: it lies in [0, 1], and is 1 at level 0")
        self.lod, self.fading = lod, blend != 1
        self._blend.fill_(blend)

    @property
    def resolution(self) -> int:
        """Pixels of a side at the present level."""
        return 4 << self.lod

    def encode(self, x: Tensor) -> Posterior:
        """Posterior of images [B, channels, r, r] in [-1, 1], r the present `resolution`."""
        self.check_rows(f"x at level {self.lod}", x, self.channels, self.resolution, self.resolution)
        x = x.contiguous(memory_format=torch.channels_last)
        w = self.encoder(x, self.lod, self._blend if self.fading else None)
        return Posterior(*self.mapping_tl(w).chunk(2, dim=1))

    def decode(
        self,
        z: Tensor,
        stream: Stream | None = None,
        *,
        noise: NoiseMode = "sample",
        truncation: float = 1.0,
    ) -> Tensor:
        """Images [B, channels, r, r], nominally in [-1, 1], of latents [B, latent_size].

        noise: one map a "sample", one for the "batch", the "bump" that the published model has in place of
            noise when noise is switched off, or "none".
        truncation: below 1 it pulls the first 8 layers towards the average style.

        Draws, in this order: the first noise map, which the whole batch shares, then the others from coarse
        to fine. In training mode `dlatent_avg` follows the mean style; each rank sees its own rows alone.
        """
        return self.synthesize(self._tracked(self.styles(z)), stream, noise=noise, truncation=truncation)

    def generate(
        self,
        z: Tensor,
        stream: Stream | None = None,
        *,
        noise: NoiseMode = "sample",
        truncation: float = 1.0,
        mixing: bool | None = None,
    ) -> Tensor:
        """`decode` with style mixing: with probability `style_mixing`, layers from a random cutoff on take
        the style of a second latent; coin and cutoff are the same for the whole batch.

        mixing: None mixes in training mode alone.

        Draws, in this order: the coin, the cutoff in 1, ..., 2(lod + 1), the second latent, then as `decode`.
        """
        stream = stream or _own_stream(z)
        styles = self._tracked(self.styles(z))
        mixing = self.training if mixing is None else mixing
        if mixing and stream.coin(self.style_mixing):
            layers = torch.arange(2 * (self.lod + 1), device=z.device)[:, None]
            finer = layers >= stream.index(1, len(layers))
            styles = torch.where(finer, self.styles(stream.normal(*z.shape, dtype=z.dtype)), styles)
        return self.synthesize(styles, stream, noise=noise, truncation=truncation)

    def styles(self, z: Tensor) -> Tensor:
        """Styles [B, 2(lod + 1), latent_size] of latents [B, latent_size], coarse to fine: all the same."""
        self.check_rows("z", z, self.latent_size)
        w = self.mapping_fl(z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt())
        return w[:, None].repeat(1, 2 * (self.lod + 1), 1)

    def synthesize(
        self,
        styles: Tensor,
        stream: Stream | None = None,
        *,
        noise: NoiseMode = "sample",
        truncation: float = 1.0,
    ) -> Tensor:
        """Images of styles [B, 2(lod + 1), latent_size], e.g. mixed ones; options as `decode`."""
        if truncation != 1:
            coarse = torch.lerp(self.dlatent_avg, styles[:, :TRUNCATED_LAYERS], truncation)
            styles = torch.cat([coarse, styles[:, TRUNCATED_LAYERS:]], dim=1)
        maps = self._noise(styles, stream, noise)
        return self.decoder(styles, maps, self.lod, self._blend if self.fading else None)

    def encoder_modules(self) -> Iterable[nn.Module]:
        return [self.encoder, self.mapping_tl]

    def decoder_modules(self) -> Iterable[nn.Module]:
        return [self.decoder, self.mapping_fl]

    def recomputable_modules(self) -> Iterable[nn.Module]:
        return [*self.encoder.blocks, *self.decoder.blocks]

    def learning_rate_factors(self) -> dict[str, float]:
        """Equalised learning rate: gain/sqrt(fan_in) for weights, and the tenfold slower mappings."""
        return {
            f"{name}.{parameter}": layer.learning_rates[parameter]
            for name, layer in self.named_modules()
            if isinstance(layer, Equalized)
            for parameter, _ in layer.named_parameters()
        }

    @torch.no_grad()
    def _tracked(self, styles: Tensor) -> Tensor:
        if self.training and len(styles):  # no rows have no mean
            self.dlatent_avg.lerp_(styles[:, 0].mean(0), 1 - AVERAGE_KEEPS)
        return styles

    def _noise(self, styles: Tensor, stream: Stream | None, mode: NoiseMode) -> list[Noise]:
        """What enters the decoder at its two noise points a block, from coarse to fine."""
        if mode in ("bump", "none"):
            return [mode if mode == "bump" else None] * (2 * (self.lod + 1))
        if mode not in ("sample", "batch"):
            raise ValueError(f"noise is {mode!r}: it can be 'sample', 'batch', 'bump' or 'none'")
        stream = stream or _own_stream(styles)
        maps = []
        for i in range(2 * (self.lod + 1)):
            size = 4 << (i // 2)
            if i == 0 or mode == "batch":
                maps.append(stream.shared_normal(1, 1, size, size, dtype=styles.dtype))
            else:
                maps.append(stream.normal(len(styles), 1, size, size, dtype=styles.dtype))
        return maps


def _own_stream(z: Tensor) -> Stream:
    """Draws seeded by torch's own generator."""
    return Stream(int(torch.randint(2**62, ())), Rows.all(len(z)), z.device)
