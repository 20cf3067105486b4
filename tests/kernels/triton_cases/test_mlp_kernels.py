"""Small fully connected networks by their kernels, against PyTorch's layers in float64."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from sivae_fast.kernels import _mlp_triton
from sivae_fast.kernels.mlp import mlp, reference
from sivae_fast.models import mlp as models_mlp
from sivae_fast.models.mlp import MLPModel
from tests.kernels.losses import ROUNDING, close

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def passes(monkeypatch):
    """What was launched: "forward", or whether a backward pass wanted gradients of x and of weights."""
    monkeypatch.setattr(models_mlp, "_onednn_can_take", lambda *_: False)  # would come first on a CPU
    ran = []
    forward, backward = _mlp_triton.forward, _mlp_triton.backward
    monkeypatch.setattr(_mlp_triton, "forward", lambda *given: ran.append("forward") or forward(*given))
    monkeypatch.setattr(
        _mlp_triton, "backward", lambda *given: ran.append(tuple(given[-2:])) or backward(*given)
    )
    return ran


def network(rows=20, inputs=2, width=16, layers=3, outputs=4, device="cpu"):
    """x, then weights, then biases."""
    generator = torch.Generator().manual_seed(0)
    new = lambda *size: torch.randn(size, generator=generator)
    sizes = [(width, inputs), *[(width, width)] * (layers - 1), (outputs, width)]
    weights = [new(*size) * (2 / size[1]) ** 0.5 for size in sizes]
    return [t.to(device) for t in (new(rows, inputs), *weights, *(0.3 * new(size[0]) for size in sizes))]


def results(run, tensors, dtype, wrt=None):
    tensors = [t.detach().requires_grad_(wrt is None or i in wrt) for i, t in enumerate(tensors)]
    x, parameters = tensors[0], tensors[1:]
    half = len(parameters) // 2
    y = run(x, parameters[:half], parameters[half:], dtype)
    upstream = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
    return [y, *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], upstream)]


def exact(tensors, wrt=None):
    return results(reference, [t.cpu().double() for t in tensors], torch.float64, wrt)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"rows": 1, "inputs": 1, "outputs": 1},
        {"rows": 33, "width": 40},
        {"layers": 1},
        {"layers": 2, "inputs": 16, "outputs": 16},
        {"width": 5},
    ],
    ids=str,
)
def test_values_and_gradients(device, sizes, passes):
    tensors = network(**sizes, device=device)
    for got, want in zip(results(mlp, tensors, torch.float32), exact(tensors), strict=True):
        assert got.dtype == torch.float32
        close(got, want, ROUNDING[torch.float32])
    assert passes == ["forward", (True, True)]


def test_hidden_values_in_bfloat16(device, passes):
    """As far from float64 as PyTorch's layers are; Triton's interpreter truncates where they round."""
    tensors = network(rows=40, width=32, layers=4, device=device)
    found, plain = (results(run, tensors, torch.bfloat16) for run in (mlp, reference))
    for got, theirs, want in zip(found, plain, exact(tensors), strict=True):
        off, allowed = ((t.cpu().double() - want).norm() / want.norm() for t in (got, theirs))
        assert got.dtype == torch.float32 and off < 6 * allowed + 1e-6
    assert len(passes) == 2


@pytest.mark.parametrize("wrt", [(0,), (2,), (0, 5)])
def test_gradients_of_some(device, wrt, passes):
    tensors = network(device=device)
    for got, want in zip(results(mlp, tensors, torch.float32, wrt), exact(tensors, wrt), strict=True):
        close(got, want, ROUNDING[torch.float32])
    assert passes[1] == (0 in wrt, wrt != (0,))


def test_a_pass_for_the_input_alone_leaves_out_the_weights(device, passes):
    model = MLPModel(width=8).to(device)
    z = torch.randn(4, 2, device=device, requires_grad=True)
    out = model.decode(z).sum()
    torch.autograd.grad(out, z, retain_graph=True)
    out.backward()
    assert passes == ["forward", (True, False), (True, True)]


def test_rows_that_are_strided_and_many(device, passes):
    tensors = network(device=device)
    tensors[0] = torch.cat([tensors[0], tensors[0]], 1)[:, 1:3]
    for got, want in zip(results(mlp, tensors, torch.float32), exact(tensors), strict=True):
        close(got, want, ROUNDING[torch.float32])
    mlp(torch.zeros(5000, 2, device=device), tensors[1:5], tensors[5:], torch.float32)
    assert len(passes) == 2  # many rows go through PyTorch's layers


def test_nan_is_not_hidden(device):
    """Who diverges has to see it."""
    tensors = network(device=device)
    tensors[2][3, 4] = float("nan")
    found, plain = results(mlp, tensors, torch.float32), exact(tensors)
    assert plain[0].isnan().all() and plain[1].isnan().any()
    assert all(torch.equal(got.isnan().cpu(), want.isnan()) for got, want in zip(found, plain, strict=True))


def test_compiled_whole(device):
    tensors = [t.requires_grad_() for t in network(device=device)]

    def loss(x, *parameters):
        return mlp(x, parameters[:4], parameters[4:], torch.float32).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=aot_eager)
    found = [torch.autograd.grad(f(*tensors), tensors) for f in (compiled, loss)]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_no_second_derivatives(device):
    tensors = network(device=device)
    x = tensors[0].requires_grad_()
    out = mlp(x, tensors[1:5], tensors[5:], torch.float32).square().sum()
    (gradient,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


def test_the_model_under_autocast(device, passes):
    torch.manual_seed(0)
    model, x = MLPModel(width=16).to(device), torch.randn(6, 2).to(device)
    with torch.autocast(device, torch.bfloat16):
        found = model.decode(model.encode(x).mean)
    assert passes == ["forward"] * 2 and found.dtype == torch.float32
    wide = model.cpu().double()
    close(found, wide.decode(wide.encode(x.cpu().double()).mean).detach(), 3e-2)
