"""The fully connected model."""

import pytest
import torch
from torch import nn

from sivae_fast.models.mlp import MLPModel, published_state_dict


def test_published_size_and_names():
    model = MLPModel()
    count = lambda modules: sum(p.numel() for m in modules for p in m.parameters())
    assert count(model.encoder_modules()) == 199_172
    assert count(model.decoder_modules()) == 198_658
    layers = ("input", "hidden_1", "hidden_2", "hidden_3", "output")
    names = {
        f"{net}.main.{n}.{p}" for net in ("encoder", "decoder") for n in layers for p in ("weight", "bias")
    }
    assert set(model.state_dict()) == names


def test_published_checkpoint_loads():
    source, target = MLPModel(), MLPModel()
    checkpoint = {"epoch": 5000, "model": {**source.state_dict(), "decoder.loggamma": torch.zeros(())}}
    target.load_state_dict(published_state_dict(checkpoint))
    x = torch.randn(3, 2)
    assert torch.equal(target.encode(x).mean, source.encode(x).mean)


def plain(layers, x):
    layers = list(layers)
    for layer in layers[:-1]:
        x = torch.relu(nn.functional.linear(x, layer.weight, layer.bias))
    return nn.functional.linear(x, layers[-1].weight, layers[-1].bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_and_gradients_are_those_of_plain_layers(dtype):
    model = MLPModel(input_size=3, latent_size=5, width=16).to(dtype)
    x = torch.randn(7, 3, dtype=dtype, requires_grad=True)
    encoder, decoder = model.encoder["main"], model.decoder["main"]
    posterior = model.encode(x)
    assert posterior.mean.shape == posterior.logvar.shape == (7, 5)
    rec = model.decode(posterior.mean)
    assert rec.shape == (7, 3)
    leaves = [x, *model.parameters()]
    ours = torch.autograd.grad(rec.square().sum() + posterior.logvar.exp().sum(), leaves)

    mean, logvar = plain(encoder, x).chunk(2, dim=1)
    expected = torch.autograd.grad(plain(decoder, mean).square().sum() + logvar.exp().sum(), leaves)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_flows_through_a_frozen_net():
    model = MLPModel(width=8)
    model.decoder.requires_grad_(False)
    z = torch.randn(4, 2, requires_grad=True)
    model.decode(z).sum().backward()
    assert z.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.decoder.parameters())


@pytest.mark.parametrize("name", ["input.bias", "hidden_2.weight", "output.bias"])
def test_gradient_of_one_parameter_alone(name):
    model = MLPModel(width=8)
    parameter = dict(model.decoder["main"].named_parameters())[name]
    z = torch.randn(4, 2)
    (expected,) = torch.autograd.grad(plain(model.decoder["main"], z).square().sum(), parameter)
    (found,) = torch.autograd.grad(model.decode(z).square().sum(), parameter)
    torch.testing.assert_close(found, expected)
    model.decode(z).square().sum().backward(inputs=[parameter])
    torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("frozen", ["input.weight", "hidden_1.weight"])
def test_parameters_beside_a_frozen_one_are_trained(frozen):
    model = MLPModel(width=8)
    parameters = dict(model.decoder["main"].named_parameters())
    parameters[frozen].requires_grad_(False)
    z = torch.randn(4, 2)
    trained = [p for name, p in parameters.items() if name != frozen]
    expected = torch.autograd.grad(plain(model.decoder["main"], z).square().sum(), trained)
    model.decode(z).square().sum().backward()
    assert parameters[frozen].grad is None
    for parameter, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("option", ["input_size", "latent_size", "width", "hidden_layers"])
def test_sizes_are_checked(option):
    with pytest.raises(ValueError, match=f"{option} = 0: must be at least 1"):
        MLPModel(**{option: 0})


def test_weights_get_no_gradient_in_a_pass_that_asks_for_the_input_alone(monkeypatch):
    import sivae_fast.models.mlp as mlp

    products = []
    original = mlp._weight_gradient
    monkeypatch.setattr(mlp, "_weight_gradient", lambda g, x: products.append(1) or original(g, x))
    model = MLPModel(width=8)
    z = torch.randn(4, 2, requires_grad=True)
    out = model.decode(z).sum()
    torch.autograd.grad(out, z, retain_graph=True)
    assert not products
    out.backward()
    assert len(products) == 5


def test_second_derivatives_raise():
    model = MLPModel(width=8)
    z = torch.randn(4, 2, requires_grad=True)
    (g,) = torch.autograd.grad(model.decode(z).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_compiled_passes_take_the_plain_layers():
    model, x = MLPModel(width=16), torch.randn(6, 2)
    compiled = torch.compile(model.decode, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model.decode(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), model.decode(x), rtol=1e-2, atol=1e-2)


def gradients(model, x):
    rec = model.decode(model.encode(x).mean)
    assert rec.dtype == torch.float32
    leaves = [x, *model.parameters()]
    return rec, torch.autograd.grad(rec.square().sum(), leaves, allow_unused=True)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("onednn", [True, False])
def test_autocast_lowers_the_products_between_hidden_layers_alone(onednn, monkeypatch):
    """Points that differ by less than bfloat16 can tell keep their difference."""
    import sivae_fast.models.mlp as mlp

    if onednn and not mlp._HAS_ONEDNN_BF16:
        pytest.skip("oneDNN has no bfloat16 on this processor")
    monkeypatch.setattr(mlp, "_HAS_ONEDNN_BF16", onednn)
    torch.manual_seed(0)
    model, x = MLPModel(width=64), (4 * torch.randn(256, 2)).requires_grad_()
    expected, by_fp32 = gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        found, by_bf16 = gradients(model, x)
    assert 1e-5 < relative(found, expected) < 1e-2
    for a, b in zip(by_bf16, by_fp32, strict=True):
        if b is not None and b.any():
            assert a.dtype == torch.float32 and relative(a, b) < 0.2  # units that switch

    one_layer = MLPModel(width=64, hidden_layers=1)
    with torch.autocast("cpu", torch.bfloat16):
        near = one_layer.encode(torch.tensor([[1.0, 1.0], [1.001, 1.0]])).mean
    assert near.dtype == torch.float32 and not torch.equal(near[0], near[1])


def test_sums_of_bfloat16_gradients_keep_their_digits():
    """The bias gradients of the bfloat16 layers are such sums."""
    ones = torch.ones(4096, 8, dtype=torch.bfloat16)
    assert torch.equal(ones.sum(0), torch.full((8,), 4096, dtype=torch.bfloat16))
