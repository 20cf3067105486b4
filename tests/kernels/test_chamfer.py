"""Chamfer distance: the definition against float64 brute force, the operator's contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sivae_fast.kernels.chamfer import chamfer


def clouds(batch, n, m, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, k, 3, generator=generator, dtype=torch.float64).mul(0.2).to(dtype) for k in (n, m)
    ]


def brute(x, y):
    squares = (x.double()[:, :, None] - y.double()[:, None]).square().sum(-1)
    return squares.amin(2).sum(1) + squares.amin(1).sum(1)


def test_known_pair():
    pair, single = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]]), torch.zeros(1, 1, 3)
    assert chamfer(pair, single).item() == 1
    assert chamfer(single, pair).item() == 1
    assert chamfer(pair, single, "mean").item() == 0.5


@pytest.mark.parametrize("tile", [1, 100])
def test_clouds_larger_than_a_tile(monkeypatch, tile):
    monkeypatch.setattr("sivae_fast.kernels.chamfer._TILE", tile)
    x, y = clouds(2, 70, 40)
    torch.testing.assert_close(chamfer(x, y).double(), brute(x, y), rtol=1e-6, atol=0)


@given(n=st.integers(1, 200), m=st.integers(1, 200), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_brute_force(n, m, seed):
    x, y = clouds(2, n, m, seed=seed)
    torch.testing.assert_close(chamfer(x, y).double(), brute(x, y), rtol=1e-6, atol=0)


def test_brute_force_at_full_size():
    x, y = clouds(2, 2048, 2048)
    torch.testing.assert_close(chamfer(x, y).double(), brute(x, y), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float(dtype):
    x, y = clouds(2, 300, 200, dtype)
    error = chamfer(x, y.requires_grad_())
    assert error.dtype == torch.float32
    torch.testing.assert_close(error.double(), brute(x, y).detach(), rtol=1e-6, atol=0)
    error.sum().backward()
    assert y.grad.dtype == dtype


def test_far_from_the_origin_it_stays_exact_and_non_negative():
    x, _ = clouds(1, 64, 1)
    x = x + 1000
    assert chamfer(x, x.clone()).item() == 0
    y = x + 2**-10
    torch.testing.assert_close(chamfer(x, y).double(), brute(x, y), rtol=1e-6, atol=0)


def test_strides_and_mean():
    x, y = clouds(3, 70, 50)
    published = x.transpose(1, 2).contiguous()  # channel first, as the published networks hold clouds
    assert torch.equal(chamfer(published.transpose(1, 2), y), chamfer(x, y))
    same = chamfer(x[:, :50], y)
    torch.testing.assert_close(chamfer(x[:, :50], y, "mean"), same / 50)


def test_gradcheck_and_both_gradients():
    x, y = (cloud.requires_grad_() for cloud in clouds(2, 17, 40, torch.float64))
    assert torch.autograd.gradcheck(chamfer, (x, y))
    assert torch.autograd.gradcheck(lambda a, b: chamfer(a, b, "mean"), (x, y))


def test_gradient_equals_autograd_of_brute_force():
    x, y = (cloud.requires_grad_() for cloud in clouds(3, 300, 120))
    weight = torch.tensor([1.0, -2.0, 0.0])
    got = torch.autograd.grad(chamfer(x, y), (x, y), weight)
    want = torch.autograd.grad(brute(x, y), (x, y), weight.double())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)


def test_operator_contract_and_compiler():
    x, y = (cloud.requires_grad_() for cloud in clouds(2, 9, 5))
    torch.library.opcheck(torch.ops.sivae_fast.chamfer.default, (x, y))
    half = clouds(2, 9, 5, torch.bfloat16)
    torch.library.opcheck(torch.ops.sivae_fast.chamfer.default, half, test_utils="test_faketensor")
    eager = torch.autograd.grad(chamfer(x, y).mean(), (x, y))
    compiled = torch.compile(lambda a, b: chamfer(a, b).mean(), fullgraph=True, backend="aot_eager")
    for g, w in zip(torch.autograd.grad(compiled(x, y), (x, y)), eager, strict=True):
        assert torch.equal(g, w)


def test_second_derivative_is_refused():
    x, y = (cloud.requires_grad_() for cloud in clouds(1, 4, 4))
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(chamfer(x, y).sum(), x, create_graph=True)


def test_a_bad_coordinate_shows_in_its_row_alone():
    x, y = clouds(2, 40, 30)
    x[0, 7, 1] = float("nan")
    error = chamfer(x, y)
    assert error[0].isnan() and error[1].isfinite()


@pytest.mark.parametrize(
    ("x", "y", "error", "words"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), ValueError, r"shape \[2, 3, 4\]"),
        (torch.zeros(2, 0, 3), torch.zeros(2, 3, 3), ValueError, r"points > 0"),
        (torch.zeros(2, 3, 3), torch.zeros(3, 3, 3), ValueError, "2 clouds against 3"),
        (torch.zeros(2, 3, 3), torch.zeros(2, 3, 3).double(), TypeError, "one dtype"),
        (
            torch.zeros(2, 3, 3).long(),
            torch.zeros(2, 3, 3).long(),
            TypeError,
            "x is torch.int64: accepted are fp16",
        ),
    ],
)
def test_bad_input(x, y, error, words):
    with pytest.raises(error, match=words):
        chamfer(x, y)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="reduction='max'"):
        chamfer(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), "max")
