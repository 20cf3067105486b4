"""Small fully connected networks where no kernel runs them."""

import torch
from torch import nn

from sivae_fast.kernels.mlp import mlp


def test_is_a_stack_of_layers():
    torch.manual_seed(0)
    layers = [nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    stack, x = nn.Sequential(*layers).double(), torch.randn(5, 2, dtype=torch.float64)
    weights, biases = zip(*((layer.weight, layer.bias) for layer in layers[::2]), strict=True)
    torch.testing.assert_close(mlp(x, weights, biases, torch.float64), stack(x))


def test_hidden_values_are_lowered():
    weights, biases = [torch.full((1, 1), 257.0), torch.ones(1, 1), torch.ones(1, 1)], [torch.zeros(1)] * 3
    assert mlp(torch.ones(1, 1), weights, biases, torch.bfloat16).item() == 256
    assert mlp(torch.ones(1, 1), weights, biases, torch.float32).item() == 257
