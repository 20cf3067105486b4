"""The small fully connected pair of the two-dimensional experiments."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional as F

from sivae_fast.contract import Model, Posterior
from sivae_fast.draws import Stream


class MLPModel(Model):
    """Encoder [B, input_size] -> Posterior of [B, latent_size], decoder back; ReLU layers of one width.

    Without normalisation, dropout or output activation; PyTorch's default initialisation. As published for
    the 2D densities of Soft-IntroVAE, whose checkpoints load after `published_state_dict`.
    `hidden_layers` counts the ReLU layers (the paper has 4). Raises ValueError for sizes below 1.
    """

    def __init__(self, input_size: int = 2, latent_size: int = 2, width: int = 256, hidden_layers: int = 4):
        super().__init__()
        options = ("input_size", "latent_size", "width", "hidden_layers")
        for option, value in zip(options, (input_size, latent_size, width, hidden_layers), strict=True):
            if value < 1:
                raise ValueError(f"{option} = {value}: must be at least 1")
        self.latent_size = latent_size
        self.encoder = nn.ModuleDict({"main": _layers(input_size, width, hidden_layers, 2 * latent_size)})
        self.decoder = nn.ModuleDict({"main": _layers(latent_size, width, hidden_layers, input_size)})

    def encode(self, x: Tensor) -> Posterior:
        return Posterior(*_forward(self.encoder["main"], x).chunk(2, dim=1))

    def decode(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        return _forward(self.decoder["main"], z)

    def encoder_modules(self) -> Iterable[nn.Module]:
        return [self.encoder]

    def decoder_modules(self) -> Iterable[nn.Module]:
        return [self.decoder]


def published_state_dict(checkpoint: dict) -> dict[str, Tensor]:
    """Weights for `MLPModel` from a published 2D checkpoint, `{"epoch": int, "model": state}`."""
    state = checkpoint["model"]
    # A scalar of the published decoder that no computation uses.
    return {name: value for name, value in state.items() if name != "decoder.loggamma"}


def _layers(inputs: int, width: int, hidden: int, outputs: int) -> nn.Sequential:
    layers = OrderedDict(input=nn.Linear(inputs, width))
    for i in range(1, hidden):
        layers[f"hidden_{i}"] = nn.Linear(width, width)
    layers["output"] = nn.Linear(width, outputs)
    return nn.Sequential(layers)


def _forward(layers: nn.Sequential, x: Tensor) -> Tensor:
    *hidden, output = layers
    for layer in hidden:
        x = F.relu(layer(x))
    return output(x)
