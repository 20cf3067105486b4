"""The blur and the layers between images and features by their kernels, against PyTorch in float64."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from sivae_fast.kernels import _launch
from sivae_fast.kernels._launch import MapShape
from sivae_fast.kernels.blur import blur
from sivae_fast.kernels.rgb import from_rgb, to_rgb
from tests.kernels.losses import ROUNDING, close

pytestmark = pytest.mark.usefixtures("poisoned")
LAST, PLAIN = torch.channels_last, torch.contiguous_format
FORMS = pytest.mark.parametrize("form", [LAST, PLAIN], ids=["channels-last", "contiguous"])


def tensors(*shapes, dtype=torch.float32, device="cpu", form=LAST):
    """Numbers of bfloat16, whatever the dtype, so that products are exact and leaky ReLUs agree on signs."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    return [
        t.to(device, dtype).contiguous(memory_format=form) if t.dim() == 4 else t.to(device) for t in made
    ]


def layer(run, shape, colors=3, dtype=torch.float32, device="cpu", form=LAST):
    """Input, weight and bias of `from_rgb` or `to_rgb`; the last two in fp32. shape: of the features."""
    b, c, h, w = shape
    inputs, outputs = (colors, c) if run is from_rgb else (c, colors)
    (x,) = tensors((b, inputs, h, w), dtype=dtype, device=device, form=form)
    weight, bias = tensors((outputs, inputs, 1, 1), (outputs,), device=device)
    return [x, weight, bias.float()]


def agrees(run, inputs, wrt=None):
    """The value and its gradients are those of float64; returns both."""
    found = []
    for given in (inputs, [t.detach().cpu().double() for t in inputs]):
        given = [t.detach().requires_grad_(wrt is None or i in wrt) for i, t in enumerate(given)]
        y = run(*given)
        upstream = torch.linspace(-1, 1, y.numel()).bfloat16().view(y.shape)
        wanted = [t for t in given if t.requires_grad]
        found.append((y.detach(), torch.autograd.grad(y, wanted, upstream.to(y))))
    (y, gradients), (want, exact) = found
    dtype = inputs[0].dtype
    assert y.dtype == dtype
    close(y, want, ROUNDING[dtype])
    for gradient, expected, given in zip(gradients, exact, inputs, strict=wrt is None):
        # The gradient behind a leaky ReLU is rounded before it is summed.
        close(gradient, expected, 4 * ROUNDING[dtype])
        assert wrt or gradient.dtype == given.dtype
    return y, gradients


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 5), (2, 5, 7, 3), (1, 4, 9, 8)], ids=str)
def test_blur(device, shape, dtype, form):
    inputs = tensors(shape, dtype=dtype, device=device, form=form)
    y, (gradient,) = agrees(lambda x: blur(x, 4.0), inputs)
    assert y.is_contiguous(memory_format=form) and gradient.stride() == y.stride()


def test_blur_of_several_programs_a_column_and_a_row(device, monkeypatch):
    from sivae_fast.kernels import _blur_triton

    monkeypatch.setattr(_blur_triton, "blur_shape", lambda *_: (8, 1, 3))
    agrees(blur, tensors((2, 3, 7, 5), device=device))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_blur_of_other_layouts(device, layout):
    (x,) = tensors((2, 6, 5, 8), device=device)
    x = {
        "transposed": lambda: x.mT,
        "sliced": lambda: torch.cat([x, x], 1)[:, 3:9],
        "expanded": lambda: x[:1].expand_as(x),
    }[layout]()
    agrees(blur, [x])


@FORMS
@pytest.mark.parametrize("run", [from_rgb, to_rgb])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 7, 3), (2, 70, 4, 4)], ids=str)
def test_layers(device, run, shape, dtype, form):
    inputs = layer(run, shape, dtype=dtype, device=device, form=form)
    call = (lambda *given: from_rgb(*given, 0.04)) if run is from_rgb else to_rgb
    y, (by_x, *_) = agrees(call, inputs)
    assert y.is_contiguous(memory_format=form) and by_x.is_contiguous(memory_format=form)


@pytest.mark.parametrize("run", [from_rgb, to_rgb])
@pytest.mark.parametrize("colors", [1, 4, 15])
def test_colors(device, run, colors):
    agrees(run, layer(run, (2, 9, 3, 5), colors, device=device))


@pytest.mark.parametrize("run", [from_rgb, to_rgb])
def test_many_chunks_and_blocks(device, run, monkeypatch):
    """Programs of several tiles, a last one that is not full, more channels than a tile has."""
    from sivae_fast.kernels import _rgb_triton

    monkeypatch.setattr(_rgb_triton, "rgb_shape", lambda *_: MapShape(16, 16, 32, 3, 1))
    agrees(run, layer(run, (2, 40, 9, 9), device=device))


@pytest.mark.parametrize("run", [from_rgb, to_rgb])
@pytest.mark.parametrize("wrt", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs(device, run, wrt):
    agrees(run, layer(run, (2, 5, 4, 4), device=device), wrt)


@pytest.mark.parametrize("run", [from_rgb, to_rgb])
def test_weights_in_other_layouts(device, run):
    x, weight, bias = layer(run, (2, 6, 4, 4), device=device)
    strided = torch.stack([weight, weight + 1], 2)[:, :, 0]
    agrees(run, [x.mT, strided, torch.stack([bias, bias], 1)[:, 0]])


@pytest.mark.parametrize("run", [from_rgb, to_rgb])
def test_autocast_decides_on_the_dtype(device, run):
    inputs = layer(run, (2, 5, 4, 4), device=device)
    inputs[0].requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        y = run(*inputs)
    assert y.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(y.float().sum(), inputs[0])
    assert gradient.dtype == torch.float32
    close(y, run(*(t.detach().cpu().double() for t in inputs)), ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("run", [blur, from_rgb, to_rgb])
def test_compiled_whole_and_twice_the_same_bits(device, run):
    inputs = tensors((2, 5, 4, 4), device=device) if run is blur else layer(run, (2, 5, 4, 4), device=device)
    inputs = [t.requires_grad_() for t in inputs]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: run(*given).square().sum(), fullgraph=True, backend=aot_eager)
    found = [torch.autograd.grad(f(*inputs), inputs) for f in (compiled, lambda *g: run(*g).square().sum())]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("run", [blur, from_rgb, to_rgb])
def test_no_second_derivatives(device, run):
    inputs = tensors((2, 5, 4, 4), device=device) if run is blur else layer(run, (2, 5, 4, 4), device=device)
    x = inputs[0].requires_grad_()
    (gradient,) = torch.autograd.grad(run(*inputs).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


def test_blur_keeps_nothing_for_its_gradient(device):
    (x,) = tensors((2, 5, 4, 4), device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        blur(x.requires_grad_())
    assert not kept


def test_kernels_ran(device, monkeypatch):
    """None of the tests above would fail if they compared PyTorch with itself."""
    from sivae_fast.kernels import _blur_triton, _rgb_triton

    assert _launch.runs_triton((torch.zeros(1, device=device),))
    for module, name, call in (
        (_blur_triton, "blur", lambda: blur(*tensors((1, 2, 3, 3), device=device))),
        (_rgb_triton, "widen", lambda: from_rgb(*layer(from_rgb, (1, 2, 3, 3), device=device))),
        (_rgb_triton, "narrow", lambda: to_rgb(*layer(to_rgb, (1, 2, 3, 3), device=device))),
    ):
        ran = []
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, f=original, r=ran: r.append(1) or f(*given))
        call()
        assert ran
