"""The two networks of the style model, as pure functions of tensors over all levels of detail.

A level of detail `lod` works at 4*2^lod pixels. Feature maps and weights are channels-last: on a CPU the
4x4 convolutions of stride 2 are then the faster form from 16 pixels on, and at most equal below. Weights are
kept at working scale: equalised learning rate is a factor for the optimizer, not a product here.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sivae_fast.kernels.blur import blur, blur_weight
from sivae_fast.kernels.rgb import from_rgb, to_rgb
from sivae_fast.kernels.style import activate_normalize, fuses
from sivae_fast.models.enlarging import twice

#: Under the square root of the encoder's channel statistics: a constant channel then has gradient 0, not NaN.
DEVIATION_EPS = 1e-14
ENCODER_NORM_EPS = 1e-5
DECODER_NORM_EPS = 1e-8
SLOPE = 0.2

#: What is added at one of the decoder's two noise points of a block: a map, the published bump, or nothing.
Noise = Tensor | Literal["bump"] | None


class Equalized(nn.Module):
    """A weight drawn from N(0, gain^2/fan_in), perhaps a bias of zeros, and their learning-rate factors."""

    def __init__(
        self, *shape: int, fan_in: int, gain: float = math.sqrt(2), multiplier: float = 1.0, bias: int = 0
    ):
        super().__init__()
        deviation = gain / math.sqrt(fan_in)
        self.weight = nn.Parameter(torch.randn(shape) * deviation)
        self.bias = nn.Parameter(torch.zeros(bias)) if bias else None
        self.learning_rates = {"weight": multiplier * deviation, "bias": multiplier}

    def linear(self, x: Tensor) -> Tensor:
        """In the dtype of the weights, autocast or not: these layers cost nothing and feed the posterior."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def conv(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolution at equal size."""
        bias = self.bias if bias is None else bias.flatten()
        return F.conv2d(x, self.weight, bias, padding=self.weight.shape[-1] // 2)


def linear(inputs: int, outputs: int, gain: float = math.sqrt(2), multiplier: float = 1.0) -> Equalized:
    return Equalized(outputs, inputs, fan_in=inputs, gain=gain, multiplier=multiplier, bias=outputs)


def conv3(inputs: int, outputs: int) -> Equalized:
    return Equalized(outputs, inputs, 3, 3, fan_in=9 * inputs)


def per_channel(channels: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, channels, 1, 1))


class MeanOfShifts(torch.autograd.Function):
    """Mean of the four one-pixel shifts of `weight` [.., .., 3, 3]: [.., .., 4, 4].

    The gradient is the mean over the four places that a pixel went to. PyTorch's own is wrong on CUDA for
    channels-last weights: shifted by the padding (pytorch/pytorch#188344 of June 2026, seen with 2.11).
    """

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        return F.avg_pool2d(weight, 2, 1, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return F.avg_pool2d(gradient, 2, 1)


def halve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """3x3 convolution, then 2x2 mean, as one 4x4 convolution of stride 2.

    Equal, borders included, at 4/9 of the multiplications. The 4x4 kernel is the mean of the four one-pixel
    shifts of `weight` [out, in, 3, 3].
    """
    bias = None if bias is None else bias.flatten()
    return F.conv2d(x, MeanOfShifts.apply(weight), bias, stride=2, padding=1)


def double(x: Tensor, weight: Tensor) -> Tensor:
    """A quarter of: nearest x2, then 3x3 convolution; as one 4x4 transposed convolution of stride 2.

    Equal, borders included, at 4/9 of the multiplications. The 4x4 kernel is the sum of the four shifts, here
    their mean: the blur that follows has a gain of 4. `weight` [in, out, 3, 3] is that of the transposed
    convolution: both spatial axes flipped.
    """
    return F.conv_transpose2d(x, MeanOfShifts.apply(weight), stride=2, padding=1)


class Blur(nn.Module):
    """[1, 2, 1] x [1, 2, 1] / 16 a channel, times `gain`, with zeros outside."""

    def __init__(self, channels: int, gain: float = 1.0):
        super().__init__()
        self.gain = gain
        self.register_buffer("weight", blur_weight(channels, gain), persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """bias: only where a convolution adds it while it writes, see `bias_places`."""
        if bias is None and fuses(x):
            return blur(x, self.gain)
        bias = None if bias is None else bias.flatten()
        return F.conv2d(x, self.weight, bias, padding=1, groups=x.shape[1])


def statistics(variance: Tensor, mean: Tensor) -> Tensor:
    """What a style layer of the encoder sees: means, then standard deviations, [B, 2C]."""
    return torch.cat([mean, (variance + DEVIATION_EPS).sqrt()], dim=1)


def lrelu(x: Tensor) -> Tensor:
    return F.leaky_relu_(x, SLOPE)


def bias_places(x: Tensor, bias: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """`bias` for the convolution of `x`, or for the fused chain after it.

    On a GPU a convolution adds its bias in a pass of its own over the map, on a CPU while it writes the map.
    """
    return (None, bias) if fuses(x) else (bias, None)


class EncoderBlock(nn.Module):
    """[B, inputs, r, r] -> features [B, outputs, r/2, r/2] and this block's share of w [B, latent]."""

    def __init__(self, inputs: int, outputs: int, latent: int):
        super().__init__()
        self.bias_1 = per_channel(inputs)
        self.bias_2 = per_channel(outputs)
        self.conv_1 = conv3(inputs, inputs)
        self.conv_2 = conv3(inputs, outputs)
        self.style_1 = linear(2 * inputs, latent)
        self.style_2 = linear(2 * outputs, latent)
        self.blur = Blur(inputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inside, after = bias_places(x, self.bias_1)
        x, w = self._normalized(self.conv_1.conv(x, inside), after, self.style_1)
        x = self.blur(x)
        inside, after = bias_places(x, self.bias_2)
        x, share = self._normalized(halve(x, self.conv_2.weight, inside), after, self.style_2)
        return x, w + share

    def _normalized(self, x: Tensor, bias: Tensor | None, style: Equalized) -> tuple[Tensor, Tensor]:
        """Bias, leaky ReLU and instance norm, and the linear map of the statistics between the last two."""
        x, variance, mean = activate_normalize(x, eps=ENCODER_NORM_EPS, bias=bias, slope=SLOPE, inplace=True)
        return x, style.linear(statistics(variance, mean))


class Encoder(nn.Module):
    """Images to the sum over blocks of linear maps of their channel statistics, w [B, latent]."""

    def __init__(self, widths: list[int], channels: int, latent: int):
        """`widths`: channels entering block 0 (full size), ..., leaving the last block."""
        super().__init__()
        self.from_rgb = nn.ModuleList(
            Equalized(width, channels, 1, 1, fan_in=channels, bias=width) for width in widths[:-1]
        )
        self.blocks = nn.ModuleList(
            EncoderBlock(inputs, outputs, latent) for inputs, outputs in pairwise(widths)
        )

    def forward(self, x: Tensor, lod: int, blend: Tensor | None) -> Tensor:
        """Images [B, channels, r, r] in [-1, 1], r = 4*2^lod; `blend` in [0, 1], None for 1."""
        first = len(self.blocks) - 1 - lod
        h, w = self.blocks[first](self._features(x, first))
        if blend is not None:
            below = self._features(F.avg_pool2d(x, 2), first + 1)
            h, w = torch.lerp(below, h, blend.to(h.dtype)), w * blend
        for block in self.blocks[first + 1 :]:
            h, share = block(h)
            w = w + share
        return w

    def _features(self, x: Tensor, block: int) -> Tensor:
        # The published network applies its leaky ReLU twice here.
        return from_rgb(x, self.from_rgb[block].weight, self.from_rgb[block].bias, SLOPE * SLOPE)


def bump(x: Tensor, block: int) -> Tensor:
    """What the published decoder adds in block `block` in place of noise when noise is switched off."""
    deviation = math.sqrt(block + 1)
    return (0.8 / math.sqrt(2 * math.pi) * deviation) * torch.exp(-x.square() / (2 * deviation**2))


class DecoderBlock(nn.Module):
    """Features [B, inputs, r/2, r/2] -> [B, outputs, r, r]; the first block works on the 4x4 constant."""

    def __init__(self, index: int, inputs: int, outputs: int, latent: int):
        super().__init__()
        self.index = index
        self.noise_weight_1 = per_channel(outputs)
        self.bias_1 = per_channel(outputs)
        self.noise_weight_2 = per_channel(outputs)
        self.bias_2 = per_channel(outputs)
        if index > 0:
            self.conv_1 = Equalized(inputs, outputs, 3, 3, fan_in=9 * inputs)
            self.blur = Blur(outputs, gain=4.0)
        self.style_1 = linear(latent, 2 * outputs, gain=1)
        self.conv_2 = conv3(outputs, outputs)
        self.style_2 = linear(latent, 2 * outputs, gain=1)

    def forward(self, x: Tensor, styles: tuple[Tensor, Tensor], noise: tuple[Noise, Noise]) -> Tensor:
        inside, after = bias_places(x, self.bias_1)
        if self.index > 0:
            x = self.blur(double(x, self.conv_1.weight), inside)
        elif inside is not None:
            x = x + inside
        x = self._modulated(x, (inside, after), self.noise_weight_1, noise[0], self.style_1.linear(styles[0]))
        inside, after = bias_places(x, self.bias_2)
        x = self.conv_2.conv(x, inside)
        return self._modulated(
            x, (inside, after), self.noise_weight_2, noise[1], self.style_2.linear(styles[1])
        )

    def _modulated(self, x: Tensor, biases, weight: Tensor, noise: Noise, style: Tensor) -> Tensor:
        """Noise, bias, leaky ReLU, instance norm and modulation; of `biases`, `x` has the first already."""
        inside, after = biases
        # Dynamo of PyTorch 2.11 breaks its graph where a tensor is compared with a string.
        if isinstance(noise, str) and noise == "bump":
            x = x + bump(x if inside is None else x - inside, self.index)
        noisy = {"noise": noise, "weight": weight} if isinstance(noise, Tensor) else {}
        return activate_normalize(
            x, eps=DECODER_NORM_EPS, bias=after, style=style, slope=SLOPE, inplace=True, **noisy
        )[0]


class Decoder(nn.Module):
    """Styles to images."""

    def __init__(self, widths: list[int], channels: int, latent: int):
        """`widths`: channels of block 0 (4x4), ..., of the last block (full size)."""
        super().__init__()
        self.const = nn.Parameter(torch.ones(1, widths[0], 4, 4))
        self.blocks = nn.ModuleList(
            DecoderBlock(i, widths[max(i - 1, 0)], width, latent) for i, width in enumerate(widths)
        )
        self.to_rgb = nn.ModuleList(
            Equalized(channels, width, 1, 1, fan_in=width, gain=0.03, bias=channels) for width in widths
        )

    def forward(self, styles: Tensor, noise: list[Noise], lod: int, blend: Tensor | None) -> Tensor:
        """Styles [B, >= 2(lod + 1), latent] -> images [B, channels, r, r], nominally in [-1, 1], r = 4*2^lod.

        noise: for the two noise points of each block, a map [B or 1, 1, r_i, r_i], "bump" or None.
        blend: in [0, 1], None for 1.
        """
        x = self.const
        for i in range(lod):
            x = self._block(i, x, styles, noise)
        image = self._image(lod, self._block(lod, x, styles, noise))
        if blend is None:
            return image
        below = twice(self._image(lod - 1, x))
        return torch.lerp(below, image, blend.to(image.dtype))

    def _image(self, lod: int, x: Tensor) -> Tensor:
        return to_rgb(x, self.to_rgb[lod].weight, self.to_rgb[lod].bias)

    def _block(self, i: int, x: Tensor, styles: Tensor, noise: list[Noise]) -> Tensor:
        return self.blocks[i](x, styles[:, 2 * i : 2 * i + 2].unbind(1), noise[2 * i : 2 * i + 2])


class Mapping(nn.Module):
    """Fully connected layers, each followed by a leaky ReLU (the last one, too)."""

    def __init__(self, widths: list[int]):
        super().__init__()
        self.layers = nn.ModuleList(linear(a, b, multiplier=0.1) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = lrelu(layer.linear(x))
        return x
