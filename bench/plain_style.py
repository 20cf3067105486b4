"""The style model written down literally, one operation a line: the oracle and the baseline of `StyleModel`.

Parameters have the names and layouts of the published checkpoints; 3x3 convolutions with pooling or nearest
up-sampling where the published networks have them; nothing is merged, shared or skipped, maps are NCHW.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sivae_fast.contract import Model, Posterior
from sivae_fast.draws import Rows, Stream
from sivae_fast.models.style import StyleModel
from sivae_fast.models.style_names import to_published


class Weight(nn.Module):
    def __init__(self, weight: tuple[int, ...], bias: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(weight))
        if bias is not None:
            self.bias = nn.Parameter(torch.empty(bias))


class Blur(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("weight", (torch.outer(row, row) / 16).repeat(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1, groups=x.shape[1])


def lrelu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def linear(x: Tensor, layer: Weight) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def kernel4(w: Tensor) -> Tensor:
    w = F.pad(w, (1, 1, 1, 1))
    return w[:, :, 1:, 1:] + w[:, :, 1:, :-1] + w[:, :, :-1, 1:] + w[:, :, :-1, :-1]


def bias(channels: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, channels, 1, 1))


class EncodeBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, latent: int, fused: bool):
        super().__init__()
        self.fused = fused
        self.bias_1, self.bias_2 = bias(inputs), bias(outputs)
        self.conv_1 = Weight((inputs, inputs, 3, 3))
        self.blur = Blur(inputs)
        self.conv_2 = Weight((outputs, inputs, 3, 3))
        self.style_1 = Weight((latent, 2 * inputs), latent)
        self.style_2 = Weight((latent, 2 * outputs), latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = lrelu(F.conv2d(x, self.conv_1.weight, padding=1) + self.bias_1)
        w1 = linear(self.statistics(x), self.style_1)
        x = self.blur(F.instance_norm(x, eps=1e-5))
        if self.fused:
            x = F.conv2d(x, 0.25 * kernel4(self.conv_2.weight), stride=2, padding=1)
        else:
            x = F.avg_pool2d(F.conv2d(x, self.conv_2.weight, padding=1), 2)
        x = lrelu(x + self.bias_2)
        w2 = linear(self.statistics(x), self.style_2)
        return F.instance_norm(x, eps=1e-5), w1 + w2

    @staticmethod
    def statistics(x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        deviation = (x - mean).square().mean((2, 3)).sqrt()
        return torch.cat([mean.flatten(1), deviation], 1)


class Rgb(nn.Module):
    def __init__(self, weight: tuple[int, ...], name: str):
        super().__init__()
        self.name = name
        self.add_module(name, Weight(weight, weight[0]))

    def forward(self, x: Tensor) -> Tensor:
        layer = getattr(self, self.name)
        return F.conv2d(x, layer.weight, layer.bias)


class PlainEncoder(nn.Module):
    def __init__(self, widths: list[int], channels: int, latent: int):
        super().__init__()
        self.levels = len(widths) - 1
        self.from_rgb = nn.ModuleList(Rgb((width, channels, 1, 1), "from_rgb") for width in widths[:-1])
        self.encode_block = nn.ModuleList(
            EncodeBlock(widths[i], widths[i + 1], latent, fused=(4 << (self.levels - 1 - i)) >= 128)
            for i in range(self.levels)
        )

    def forward(self, x: Tensor, lod: int, blend: float) -> Tensor:
        first = self.levels - 1 - lod
        h, w = self.encode_block[first](lrelu(lrelu(self.from_rgb[first](x))))
        if blend != 1:
            w = blend * w
            below = lrelu(lrelu(self.from_rgb[first + 1](F.avg_pool2d(x, 2))))
            h = below + blend * (h - below)
        for block in self.encode_block[first + 1 :]:
            h, share = block(h)
            w = w + share
        return w


class DecodeBlock(nn.Module):
    def __init__(self, index: int, inputs: int, outputs: int, latent: int):
        super().__init__()
        self.index, self.fused = index, (4 << index) >= 128
        self.noise_weight_1, self.bias_1 = bias(outputs), bias(outputs)
        self.noise_weight_2, self.bias_2 = bias(outputs), bias(outputs)
        if index > 0:
            self.conv_1 = Weight((inputs, outputs, 3, 3) if self.fused else (outputs, inputs, 3, 3))
        self.blur = Blur(outputs)
        self.style_1 = Weight((2 * outputs, latent), 2 * outputs)
        self.conv_2 = Weight((outputs, outputs, 3, 3))
        self.style_2 = Weight((2 * outputs, latent), 2 * outputs)

    def forward(self, x: Tensor, style_1: Tensor, style_2: Tensor, noise_1, noise_2) -> Tensor:
        if self.index > 0:
            if self.fused:
                x = F.conv_transpose2d(x, kernel4(self.conv_1.weight), stride=2, padding=1)
            else:
                x = F.conv2d(F.interpolate(x, scale_factor=2), self.conv_1.weight, padding=1)
            x = self.blur(x)
        x = lrelu(self.noisy(x, self.noise_weight_1, noise_1) + self.bias_1)
        x = self.modulated(x, linear(style_1, self.style_1))
        x = F.conv2d(x, self.conv_2.weight, padding=1)
        x = lrelu(self.noisy(x, self.noise_weight_2, noise_2) + self.bias_2)
        return self.modulated(x, linear(style_2, self.style_2))

    def noisy(self, x: Tensor, weight: Tensor, noise) -> Tensor:
        if noise is None:
            return x
        if isinstance(noise, Tensor):
            return x + weight * noise
        s = math.sqrt(self.index + 1)
        return x + 0.8 * s * torch.exp(-(x**2) / (2 * s**2)) / math.sqrt(2 * math.pi)

    @staticmethod
    def modulated(x: Tensor, style: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        variance = (x - mean).square().mean((2, 3), keepdim=True)
        x = (x - mean) / (variance + 1e-8).sqrt()
        a, b = style[:, :, None, None].chunk(2, 1)
        return x * (1 + a) + b


class PlainDecoder(nn.Module):
    def __init__(self, widths: list[int], channels: int, latent: int):
        super().__init__()
        self.const = nn.Parameter(torch.empty(1, widths[0], 4, 4))
        self.decode_block = nn.ModuleList(
            DecodeBlock(i, widths[max(0, i - 1)], width, latent) for i, width in enumerate(widths)
        )
        self.to_rgb = nn.ModuleList(Rgb((channels, width, 1, 1), "to_rgb") for width in widths)

    def forward(self, styles: Tensor, noise: list, lod: int, blend: float) -> Tensor:
        x = self.const
        for i in range(lod + 1):
            below = x
            x = self.decode_block[i](x, *styles[:, 2 * i : 2 * i + 2].unbind(1), *noise[2 * i : 2 * i + 2])
        image = self.to_rgb[lod](x)
        if blend != 1:
            p = F.interpolate(self.to_rgb[lod - 1](below), scale_factor=2)
            image = p + blend * (image - p)
        return image


class Fc(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.fc = Weight((outputs, inputs), outputs)


class PlainMapping(nn.Module):
    def __init__(self, widths: list[int]):
        super().__init__()
        self.map_blocks = nn.ModuleList(Fc(widths[i], widths[i + 1]) for i in range(len(widths) - 1))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.map_blocks:
            x = lrelu(linear(x, block.fc))
        return x


class DlatentAvg(nn.Module):
    def __init__(self, layers: int, latent: int):
        super().__init__()
        self.register_buffer("buff", torch.zeros(layers, latent))


class PlainStyle(Model):
    """The weights of a `StyleModel` in the literal networks, with the same draws for the same stream."""

    def __init__(self, model: StyleModel):
        super().__init__()
        self.latent_size, self.style_mixing, self.levels = model.latent_size, model.style_mixing, model.levels
        widths = [block.conv_1.weight.shape[0] for block in model.encoder.blocks]
        widths.append(model.encoder.blocks[-1].conv_2.weight.shape[0])
        channels, latent = model.channels, model.latent_size
        self.encoder = PlainEncoder(widths, channels, latent)
        self.decoder = PlainDecoder(widths[-2::-1], channels, latent)
        self.mapping_tl = PlainMapping([latent, latent, latent, 2 * latent])
        self.mapping_fl = PlainMapping([latent] * (len(model.mapping_fl.layers) + 1))
        self.dlatent_avg = DlatentAvg(2 * self.levels, latent)
        self.to(next(model.parameters()).dtype)
        for name, state in to_published(model.state_dict()).items():
            getattr(self, name).load_state_dict(state)
        self.set_level(model.lod, float(model._blend))
        self.train(model.training)

    def set_level(self, lod: int, blend: float) -> None:
        self.lod, self.blend = lod, blend

    def encode(self, x: Tensor) -> Posterior:
        return Posterior(*self.mapping_tl(self.encoder(x, self.lod, self.blend)).chunk(2, 1))

    def decode(self, z: Tensor, stream: Stream | None = None, noise: str = "sample") -> Tensor:
        return self._synthesize(self._styles(z), stream or self._own(z), noise)

    def generate(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        stream = stream or self._own(z)
        styles = self._styles(z)
        if stream.coin(self.style_mixing):
            cutoff = stream.integer(1, 2 * (self.lod + 1))
            second = self._styles(stream.normal(*z.shape, dtype=z.dtype), track=False)
            layer = torch.arange(styles.shape[1], device=styles.device)[None, :, None]
            styles = torch.where(layer < cutoff, styles, second)
        return self._synthesize(styles, stream, "sample")

    def encoder_modules(self):
        return [self.encoder, self.mapping_tl]

    def decoder_modules(self):
        return [self.decoder, self.mapping_fl]

    def _styles(self, z: Tensor, track: bool = True) -> Tensor:
        w = self.mapping_fl(z / torch.sqrt(z.square().mean(1, keepdim=True) + 1e-8))
        if track and self.training:
            buff = self.dlatent_avg.buff
            buff.copy_(0.995 * buff + 0.005 * w.detach().mean(0))
        return w[:, None].repeat(1, 2 * self.levels, 1)

    def _synthesize(self, styles: Tensor, stream: Stream, noise: str) -> Tensor:
        maps = [None if noise == "none" else noise] * (2 * (self.lod + 1))
        for i in range(2 * (self.lod + 1)):
            size = 4 << (i // 2)
            if noise == "batch" or (noise == "sample" and i == 0):
                maps[i] = stream.shared_normal(1, 1, size, size, dtype=styles.dtype)
            elif noise == "sample":
                maps[i] = stream.normal(len(styles), 1, size, size, dtype=styles.dtype)
        return self.decoder(styles, maps, self.lod, self.blend)

    @staticmethod
    def _own(z: Tensor) -> Stream:
        return Stream(int(torch.randint(2**62, ())), Rows.all(len(z)), z.device)
