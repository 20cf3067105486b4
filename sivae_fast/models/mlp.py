"""The small fully connected pair of the two-dimensional experiments."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sivae_fast.contract import Model, Posterior
from sivae_fast.draws import Stream
from sivae_fast.kernels._operator import are_wanted
from sivae_fast.kernels.mlp import mlp

_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_HAS_ONEDNN_BF16 = _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


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
        self.check_rows("x", x, self.encoder["main"][0].in_features)
        return Posterior(*_forward(self.encoder["main"], x).chunk(2, dim=1))

    def decode(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        self.check_rows("z", z, self.latent_size)
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
    """Under autocast the products between hidden layers alone are lowered: points need all their digits."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return _through(layers, x, x.dtype)
    with torch.autocast(device, enabled=False):
        return _through(layers, x.to(layers[0].weight.dtype), torch.get_autocast_dtype(device))


def _through(layers: nn.Sequential, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The layers with hidden values in `dtype`; the result has the dtype of x."""
    if _onednn_can_take(x, dtype):
        # Views: of leaves a backward pass cannot tell whether it wants their gradients.
        parameters = [tensor.view_as(tensor) for layer in layers for tensor in (layer.weight, layer.bias)]
        return _OneDNN.apply(dtype, x, *parameters)
    return mlp(x, [layer.weight for layer in layers], [layer.bias for layer in layers], dtype)


def _onednn_can_take(x: Tensor, dtype: torch.dtype) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and _HAS_ONEDNN_BF16))
        and _HAS_ONEDNN
        and not torch.compiler.is_compiling()
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")


class _OneDNN(torch.autograd.Function):
    """The layers on a CPU: the arithmetic of `F.linear` and `F.relu` with less memory traffic.

    Bias and ReLU are applied inside oneDNN's product, the backward pass masks gradients in place. Arguments
    are the dtype of hidden values (float32 or bfloat16), x [B, inputs] in float32, then views of weight,
    bias, weight, bias, ... of all layers. A layer's backward pass has the dtype of its input.
    """

    @staticmethod
    def forward(ctx, dtype: torch.dtype, x: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[0::2], parameters[1::2]
        inputs = [x, _linear(x, weights[0], biases[0], "relu").to(dtype)]
        lowered = [weights[0], *(weight.to(dtype) for weight in weights[1:])]
        for weight, bias in zip(lowered[1:-1], biases[1:-1], strict=True):
            inputs.append(_linear(inputs[-1], weight, bias.to(dtype), "relu"))
        ctx.save_for_backward(*inputs, *lowered)
        return F.linear(inputs[-1].to(x.dtype), weights[-1], biases[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        saved = ctx.saved_tensors
        inputs, weights = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        nodes = [node for node, _ in ctx.next_functions[1:]]  # of weights and biases; None where frozen
        trains = any(are_wanted(nodes, [node is not None for node in nodes]))
        gradients = [None] * len(ctx.needs_input_grad)
        for i in reversed(range(len(weights))):
            gradient = gradient.to(inputs[i].dtype)
            if trains:
                gradients[2 + 2 * i] = _weight_gradient(gradient, inputs[i]).float()
                gradients[3 + 2 * i] = gradient.sum(0).float()
            if i:
                gradient = _linear(gradient, weights[i].t())
                torch.ops.aten.threshold_backward.grad_input(gradient, inputs[i], 0, grad_input=gradient)
        if ctx.needs_input_grad[1]:
            # Products with few columns are several times faster with the other operand transposed.
            gradients[1] = F.linear(gradient, weights[0].t().contiguous())
        return tuple(gradients)


def _weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    return (x.t() @ gradient).t() if x.shape[1] < 16 else gradient.t() @ x
