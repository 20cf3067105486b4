"""The single-launch form: the same losses, statistics and gradients as the definition, once.

The interpreter runs programs one after the other, as a device would that has room for one: all but the last
of a sample have to leave, and a program that waited for the others would never end.
"""

import pytest
import torch

from sivae_fast.kernels import _single_triton
from sivae_fast.kernels.introspective import phase
from sivae_fast.kernels.reference import Member, Source
from tests.kernels.losses import (
    MEMBERS,
    ROUNDING,
    SOFT,
    SOFT_MEMBERS,
    chain,
    close,
    distinct,
    exact,
    leaves,
    mapped,
    soft,
    table,
)

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Names of the single-launch functions that ran."""
    ran = []
    original = _single_triton.value_and_gradients
    monkeypatch.setattr(
        _single_triton, "value_and_gradients", lambda *given: ran.append("single") or original(*given)
    )
    return ran


def agrees(launches, sources, members=SOFT_MEMBERS, rows=SOFT, upstream=1.0, **options):
    sources = leaves(sources)
    weights = table(rows, distinct(sources)[0].device)
    loss, statistics = phase(sources, members, weights, single_launch=True, **options)
    assert launches == ["single"]
    gradients = torch.autograd.grad(loss * upstream, distinct(sources))
    want_loss, want_statistics, want = exact(sources, members, weights, upstream, **options)
    close(loss, want_loss, 2e-6)
    close(statistics, want_statistics, 4e-6)
    for tensor, got, expected in zip(distinct(sources), gradients, want, strict=True):
        assert got.dtype == tensor.dtype and got.stride() == tensor.stride()
        close(got, expected, (2 if upstream != 1 else 1) * ROUNDING[tensor.dtype])


@pytest.mark.parametrize("elements", [1, 7, 4551, 3 * 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes(device, launches, elements, dtype):
    agrees(launches, chain((3, elements), 5, dtype, device), rows=soft(elements))


@pytest.mark.parametrize("upstream", [-0.5, 0.0, 64.0])
def test_upstream_gradients(device, launches, upstream):
    agrees(launches, chain((2, 3, 4, 5), 5, device=device), upstream=upstream)


@pytest.mark.parametrize(
    ("members", "rows"),
    [pytest.param(*pair, id=name) for name, pair in MEMBERS.items() if Member.BATCH_HINGE not in pair[0]],
)
def test_members(device, launches, members, rows):
    agrees(launches, chain((5, 11), 6, device=device)[: len(members)], members, rows)


def test_parts_and_layouts(device, launches):
    real, rec, fake = mapped(
        chain((2, 3, 4, 5), 5, device=device),
        lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    )
    errors = torch.rand(2, device=device)
    sources = [Source(error=errors, mean=real.mean, logvar=real.logvar), rec, Source(None, None, *fake[2:4])]
    agrees(launches, sources)


def test_two_launches_take_over(device, launches):
    """float16, a hinge of the batch mean, and no gradient wanted: the same results by two launches."""
    half = leaves(chain((2, 9), 4, torch.float16, device))
    phase(half, SOFT_MEMBERS, table(SOFT, device), single_launch=True)[0].backward()
    sources = leaves(chain((2, 9), 4, device=device))
    members, rows = MEMBERS["batch hinge"]
    phase(sources, members, table(rows, device), single_launch=True)[0].backward()
    with torch.no_grad():
        phase(sources, SOFT_MEMBERS, table(SOFT, device), single_launch=True)
    assert launches == []


def test_gradients_are_handed_out_once(device):
    sources = leaves(chain((2, 9), 4, device=device))
    loss, _ = phase(sources, SOFT_MEMBERS, table(SOFT, device), single_launch=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="single_launch=True allows one backward pass"):
        loss.backward()
    loss, _ = phase(sources, SOFT_MEMBERS, table(SOFT, device), single_launch=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss, distinct(sources), create_graph=True)


def test_both_forms_agree(device):
    """Not to the bit: with gradients to write, blocks are smaller and sums grouped otherwise."""
    results = []
    for single in (False, True):
        sources = leaves(chain((3, 9000), 50, device=device))
        loss, statistics = phase(sources, SOFT_MEMBERS, table(SOFT, device), single_launch=single)
        results.append([loss, statistics, *torch.autograd.grad(loss, distinct(sources))])
    for one, other in zip(*results, strict=True):
        close(one, other.detach().cpu().double(), 1e-6)
