"""The style model's pointwise chain where no kernel runs it: its formulas, its gradients, its errors."""

import pytest
import torch
import torch.nn.functional as F

from sivae_fast.kernels.style import Moments, activate_normalize


def chain(b=2, c=3, h=4, w=5, noises=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    new = lambda *size: torch.randn(size, generator=generator, dtype=dtype)
    return {
        "x": new(b, c, h, w),
        "bias": new(1, c, 1, 1),
        "noise": new(noises or b, 1, h, w),
        "weight": new(c),
        "style": new(b, 2 * c),
    }


def literal(x, eps, bias=0.0, noise=0.0, weight=0.0, style=None):
    """Step by step."""
    weight = weight if isinstance(weight, float) else weight.view(1, -1, 1, 1)
    h = F.leaky_relu(x + bias + weight * noise, 0.2)
    mean = h.mean((2, 3), keepdim=True)
    variance = (h - mean).square().mean((2, 3), keepdim=True)
    y = (h - mean) / (variance + eps).sqrt()
    if style is not None:
        scale, shift = style[:, :, None, None].chunk(2, 1)
        y = y * (1 + scale) + shift
    return y, variance[:, :, 0, 0], mean[:, :, 0, 0]


PARTS = [(), ("bias",), ("noise", "weight"), ("style",), ("bias", "noise", "weight", "style")]


@pytest.mark.parametrize("parts", PARTS, ids="-".join)
@pytest.mark.parametrize("noises", [1, 2])
@pytest.mark.parametrize("inplace", [False, True])
def test_is_the_literal_chain_with_its_gradients(parts, noises, inplace):
    given = {n: t for n, t in chain(noises=noises).items() if n == "x" or n in parts}
    wanted = [t.requires_grad_() for n, t in given.items() if n != "noise"]
    found = []
    for run, options in ((activate_normalize, {"inplace": inplace}), (literal, {})):
        y, variance, mean = run(**{**given, "x": given["x"] * 1}, eps=1e-3, **options)
        total = (y * torch.arange(5.0)).square().sum() + (variance * mean).sum()
        found.append([y, variance, mean, *torch.autograd.grad(total, wanted)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_finite_differences():
    given = {name: t.requires_grad_(name != "noise") for name, t in chain().items()}
    call = lambda *tensors: activate_normalize(**dict(zip(given, tensors, strict=True)), eps=1e-3)
    assert torch.autograd.gradcheck(call, tuple(given.values()))


def test_moments_have_the_gradients_of_their_definition():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Moments.apply, x)
    assert torch.autograd.gradgradcheck(Moments.apply, x)
    variance, mean = Moments.apply(x)
    torch.testing.assert_close(variance, x.var((2, 3), correction=0, keepdim=True))
    torch.testing.assert_close(mean, x.mean((2, 3), keepdim=True))


def test_what_is_given_is_left_alone():
    given = chain()
    copies = {name: t.clone() for name, t in given.items()}
    activate_normalize(given["x"], eps=1e-3)
    activate_normalize(**given, eps=1e-3)
    assert all(torch.equal(given[name], copies[name]) for name in given)


def test_one_sample_for_all_styles():
    given = chain(noises=1)
    one = given["x"][:1].contiguous()
    found = activate_normalize(**{**given, "x": one}, eps=1e-3)
    expanded = activate_normalize(**{**given, "x": one.expand(2, -1, -1, -1).contiguous()}, eps=1e-3)
    for a, b in zip(found, expanded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_dtypes():
    given = {n: t.bfloat16() if n == "x" else t.float() for n, t in chain().items()}
    y, variance, mean = activate_normalize(**given, eps=1e-3)
    assert y.dtype == torch.bfloat16 and variance.dtype == mean.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, r"x has shape \[2, 3, 4\]"),
        ({"x": torch.zeros(2, 3, 0, 5)}, ValueError, "no dimension of 0"),
        ({"x": torch.zeros(2, 3, 4, 5, dtype=torch.int32)}, TypeError, "x is torch.int32"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \[4\] beside x"),
        ({"noise": None}, ValueError, "noise and weight: give both or none"),
        ({"noise": torch.zeros(3, 1, 4, 5)}, ValueError, r"accepted is \[2, 1, 4, 5\] or \[1, 1, 4, 5\]"),
        ({"style": torch.zeros(2, 3)}, ValueError, r"style has shape \[2, 3\]"),
        ({"style": torch.zeros(2, 6, dtype=torch.int64)}, TypeError, "style is torch.int64"),
        ({"noise": torch.zeros(2, 1, 4, 5, requires_grad=True)}, ValueError, "noise requires a gradient"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        activate_normalize(**{"eps": 1e-3, **chain(), **change})
