"""The style model's pointwise chain by its kernels, against its definition in float64."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.debugging import aot_eager

from sivae_fast.kernels import _style_triton
from sivae_fast.kernels._launch import MapShape
from sivae_fast.kernels.style import activate_normalize
from sivae_fast.models.style import StyleModel
from tests.kernels.losses import ROUNDING, close

pytestmark = pytest.mark.usefixtures("poisoned")
LAST, PLAIN = torch.channels_last, torch.contiguous_format
PARTS = ("bias", "noise", "weight", "style")
QUICK = settings(
    max_examples=10,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking is too slow in the interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Names of the kernels that were launched."""
    ran = []
    launch = _style_triton._Launch.__call__
    monkeypatch.setattr(
        _style_triton._Launch,
        "__call__",
        lambda self, kernel, *given: ran.append(kernel.__name__) or launch(self, kernel, *given),
    )
    return ran


def chain(shape, dtype=torch.float32, device="cpu", seed=0, parts=PARTS, shared=False, form=LAST):
    """{name: tensor} of a call."""
    generator = torch.Generator().manual_seed(seed)
    new = lambda *size: torch.randn(size, generator=generator).to(device)
    b, c, h, w = shape
    made = {
        "x": new(*shape).to(dtype).contiguous(memory_format=form),
        "bias": new(c),
        "noise": new(1 if shared else b, 1, h, w),
        "weight": new(1, c, 1, 1),
        "style": new(b, 2 * c),
    }
    return {name: t for name, t in made.items() if name == "x" or name in parts}


def results(given, upstream, wrt=None, eps=1e-5):
    """(y, variance, mean) and the gradients of `wrt`, by default of all that have one."""
    names = [name for name in given if name != "noise"] if wrt is None else wrt
    given = {n: t.detach().requires_grad_(n in names) for n, t in given.items()}
    outputs = activate_normalize(**given, eps=eps)
    known = [(o, u.to(o)) for o, u in zip(outputs, upstream, strict=True) if u is not None]
    wanted = [given[name] for name in names]
    made, by = zip(*known, strict=True)
    gradients = torch.autograd.grad(made, wanted, by, allow_unused=True)
    return outputs, dict(zip(names, gradients, strict=True))


def upstream_of(given, by=(True, True, True), seed=7):
    """Gradients of y, variance and mean, in float64; None where `by` says so."""
    generator = torch.Generator().manual_seed(seed)
    x = given["x"]
    b = len(given.get("style", x))
    shapes = [(b, *x.shape[1:]), (b, x.shape[1]), (b, x.shape[1])]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [u if wanted else None for u, wanted in zip(made, by, strict=True)]


def agrees(given, by=(True, True, True), wrt=None, eps=1e-5, factor=1.0):
    """Values and gradients of the kernels agree with float64."""
    upstream = upstream_of(given, by)
    low = [None if u is None else u.to(given["x"].dtype if u.dim() == 4 else torch.float32) for u in upstream]
    got, gradients = results(given, low, wrt, eps)
    exact = {name: t.detach().cpu().double() for name, t in given.items()}
    want, exact_gradients = results(exact, [None if u is None else u.double() for u in low], wrt, eps)
    dtype = given["x"].dtype
    assert got[0].dtype == dtype and got[1].dtype == got[2].dtype == torch.float32
    for g, w, rounding in zip(got, want, (ROUNDING[dtype], 2e-6, 2e-6), strict=True):
        close(g, w.detach(), factor * rounding)
    for name, w in exact_gradients.items():
        if w is None:
            assert gradients[name] is None or not gradients[name].any()
            continue
        assert gradients[name].dtype == given[name].dtype
        close(gradients[name], w, factor * 2 * ROUNDING[given[name].dtype])
    return got, gradients


SIZES = [(1, 1, 1, 2), (2, 3, 1, 7), (2, 5, 7, 5), (1, 16, 8, 8), (1, 70, 2, 4), (1, 8, 64, 64)]


@pytest.mark.parametrize("form", [LAST, PLAIN], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_sizes(device, shape, form):
    # Of two pixels the gradient is what is left where all but 1e-5 of it cancels: 5e-5 off as a GPU rounds.
    factor = 16.0 if device == "cuda" and shape[2] * shape[3] == 2 else 1.0
    (y, *_), gradients = agrees(chain(shape, device=device, form=form), factor=factor)
    assert y.is_contiguous(memory_format=form) and gradients["x"].stride() == y.stride()


def test_one_launch_each_way(device, launches):
    agrees(chain((1, 64, 4, 4), torch.bfloat16, device))
    assert launches == ["normalize_kernel", "gradient_kernel"]


def test_two_launches_each_way(device, launches):
    agrees(chain((1, 64, 33, 32), torch.bfloat16, device))
    forward, backward = ["moments_kernel", "normalize_kernel"], ["gradient_sums_kernel", "gradient_kernel"]
    assert launches == forward + backward


@pytest.mark.parametrize("form", [LAST, PLAIN], ids=["channels-last", "contiguous"])
def test_many_chunks(device, form, monkeypatch):
    """More slots than are added up at once, and a last chunk that is not full."""
    monkeypatch.setattr(MapShape, "of", lambda *_: MapShape(4, 2, 8, 5, 1))
    agrees(chain((1, 3, 5, 7), device=device, form=form))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 8, 5, 5), (1, 16, 40, 40)], ids=str)
def test_half_precision(device, dtype, shape):
    agrees(chain(shape, dtype, device))


@pytest.mark.parametrize("parts", [(), ("bias",), ("noise", "weight"), ("style",), ("bias", "style")])
def test_parts_that_are_left_out(device, parts):
    agrees(chain((2, 5, 6, 6), device=device, parts=parts))


def test_one_noise_map_and_one_sample_for_all(device):
    given = chain((3, 5, 4, 4), device=device, shared=True)
    agrees(given)
    got, _ = agrees({**given, "x": given["x"][:1]})
    assert [len(part) for part in got] == [3, 3, 3]


@pytest.mark.parametrize(
    "by", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (1, 3, 40, 40)], ids=str)
def test_gradients_of_some_outputs(device, by, shape):
    agrees(chain(shape, device=device), by=by)


@pytest.mark.parametrize("wrt", [["x"], ["weight"], ["bias"], ["style"], ["x", "style"], ["weight", "bias"]])
def test_gradients_of_some_inputs(device, wrt):
    agrees(chain((2, 5, 40, 30), device=device), by=(True, wrt != ["style"], wrt != ["style"]), wrt=wrt)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "expanded"])
def test_layouts(device, layout):
    given = chain((2, 6, 5, 8), device=device)
    x = given["x"]
    given["x"] = {
        "transposed": lambda: x.mT,
        "sliced": lambda: torch.cat([x, x], 1)[:, 3:9],
        "offset": lambda: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
        "expanded": lambda: x[:1].expand_as(x),
    }[layout]()
    if layout == "transposed":
        given["noise"] = given["noise"].mT
    given["style"] = torch.cat([given["style"], given["style"]], 1)[:, 2:14]
    given |= {name: torch.stack([given[name], given[name] + 1], 1)[:, 0] for name in ("bias", "weight")}
    agrees(given)


def test_upstream_gradients_in_other_forms(device):
    given = chain((2, 6, 5, 8), device=device)
    x = given["x"].requires_grad_()
    y, variance, mean = activate_normalize(**given, eps=1e-5)
    weight = torch.arange(8.0, device=device)
    dense = torch.autograd.grad(
        [y, variance, mean],
        x,
        [weight.expand(y.shape).contiguous(), torch.ones_like(mean), torch.ones_like(mean)],
        retain_graph=True,
    )
    strided = torch.autograd.grad((y * weight).sum() + variance.sum() + mean.sum(), x)
    torch.testing.assert_close(dense, strided, rtol=1e-6, atol=1e-7)


def test_results_are_the_same_bits(device):
    given = chain((1, 9, 40, 40), torch.bfloat16, device)
    upstream = upstream_of(given)
    runs = [results(given, upstream) for _ in range(2)]
    for first, second in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(first, second)
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


def test_a_sample_does_not_depend_on_the_batch(device):
    given = chain((3, 5, 35, 40), device=device)
    whole = activate_normalize(**given, eps=1e-5)
    alone = {n: t[1:2] if n in ("x", "noise", "style") else t for n, t in given.items()}
    for all_, one in zip(whole, activate_normalize(**alone, eps=1e-5), strict=True):
        assert torch.equal(all_[1:2], one)


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("outlier", [False, True])
def test_a_small_deviation_about_a_large_mean(device, size, outlier):
    """The mean of 1000 is a float32 number: 3e-5 of rounding beside a deviation of 0.01."""
    generator = torch.Generator().manual_seed(0)
    x = (1000 + 0.01 * torch.randn(2, 5, size, size, generator=generator)).contiguous(memory_format=LAST)
    if outlier:
        x[:, :, 0, 0] += 3.0  # where sums of differences start
    y, variance, mean = activate_normalize(x.to(device), eps=1e-8)
    want = activate_normalize(x.double(), eps=1e-8)
    close(mean, want[2], 6e-8)
    close(variance, want[1], 1e-4)
    close(y, want[0], 2e-3)


@pytest.mark.parametrize("size", [4, 40])
def test_a_constant_channel(device, size):
    given = chain((2, 6, size, size), device=device, parts=("bias", "style"))
    given["x"][:, 2] = 0.7
    upstream = upstream_of(given)
    (y, variance, _), gradients = results(given, upstream)
    shift = given["style"][:, 8, None, None]
    assert variance[:, 2].abs().max() == 0 and torch.equal(y[:, 2], shift.expand_as(y[:, 2]))
    assert all(g.isfinite().all() for g in gradients.values())
    agrees(given, factor=16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [4, 40])
def test_non_finite_inputs_show_in_their_channel(device, value, size):
    given = chain((2, 6, size, size), device=device)
    given["x"][1, 2, 3, 1] = value
    outputs, gradients = results(given, upstream_of(given))
    bad = torch.zeros(2, 6, dtype=torch.bool, device=device)
    bad[1, 2] = True
    for output in (*outputs, gradients["x"]):
        assert torch.equal(
            ~output.isfinite().flatten(2).all(2) if output.dim() == 4 else ~output.isfinite(), bad
        )


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    form=st.sampled_from([LAST, PLAIN]),
    parts=st.sampled_from([PARTS, ("bias",), ("noise", "weight", "style")]),
    shared=st.booleans(),
    seed=st.integers(0, 100),
)
@QUICK
def test_anything(device, shape, dtype, form, parts, shared, seed):
    # A single pixel is its own mean: the gradient is 0 beside rounding errors.
    given = chain((*shape[:3], shape[3] + 1), dtype, device, seed, parts, shared, form)
    agrees(given, eps=1e-2, factor=2)


def test_the_graph_serves_twice(device):
    """As the minimal schedule goes through it: for the data alone, then for everything."""
    given = {n: t.requires_grad_(n != "noise") for n, t in chain((2, 5, 6, 6), device=device).items()}
    total = activate_normalize(**given, eps=1e-5)[0].square().sum()
    wanted = [given[name] for name in ("x", "bias", "weight", "style")]
    data = torch.autograd.grad(total, wanted[0], retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(total, wanted)[0], data)


def test_recomputed(device):
    from torch.utils.checkpoint import checkpoint

    given = chain((2, 5, 6, 6), device=device)
    found = []
    for run in (activate_normalize, lambda **g: checkpoint(activate_normalize, use_reentrant=False, **g)):
        x = given["x"].clone().requires_grad_()
        y, variance, mean = run(**{**given, "x": x}, eps=1e-5)
        found.append(torch.autograd.grad(y.square().sum() + (variance * mean).sum(), x)[0])
    assert torch.equal(*found)


def test_compiled_whole(device):
    given = {n: t.requires_grad_(n != "noise") for n, t in chain((2, 5, 6, 6), device=device).items()}
    wanted = [given[name] for name in ("x", "bias", "weight", "style")]

    def loss(given):
        y, variance, mean = activate_normalize(**given, eps=1e-5)
        return (y.square().sum((2, 3)) * variance + mean).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=aot_eager)
    for got, want in zip(*(torch.autograd.grad(f(given), wanted) for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_no_second_derivatives(device):
    x = chain((2, 5, 6, 6), device=device)["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(activate_normalize(x, eps=1e-5)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("noise", ["sample", "bump", None])
def test_the_model_through_the_kernels(device, noise, launches):
    """Both networks, where the kernels add the biases that convolutions add elsewhere."""
    torch.manual_seed(0)
    model = StyleModel(8, 3, 4, 8, 6, 2)
    for name, parameter in model.named_parameters():
        if "bias" in name or "noise" in name or "const" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    maps = [torch.randn(1 if i == 0 else 2, 1, 4 << i // 2, 4 << i // 2) for i in range(4)]
    exact = copy.deepcopy(model).double()
    model.to(device)
    found = []
    for each in (model, exact):
        like = each.dlatent_avg
        x = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8).to(like).requires_grad_()
        mean, logvar = each.encode(x)
        given = [m.to(like) for m in maps] if noise == "sample" else [noise] * 4
        image = each.decoder(each.styles(mean), given, 1, None)
        (image.square().mean() + logvar.mean()).backward()
        found.append({"mean": mean, "logvar": logvar, "image": image, "x": x.grad})
        found[-1] |= {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
    assert len(launches) == 2 * 2 * (2 + 2) and found[0].keys() == found[1].keys()
    for name, want in found[1].items():
        close(found[0][name], want.detach().cpu(), 1e-4)
