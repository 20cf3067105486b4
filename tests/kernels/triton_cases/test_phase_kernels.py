"""Both launches of a phase against the definition in float64."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sivae_fast.kernels import _phase_triton
from sivae_fast.kernels.introspective import phase
from sivae_fast.kernels.reference import RECONSTRUCTIONS, Member, Source
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
QUICK = settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking is too slow in the interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def agrees(sources, members=SOFT_MEMBERS, rows=SOFT, upstream=1.0, wrt=None, **options):
    """Loss, statistics and every gradient of the kernels agree with float64; returns them."""
    sources = leaves(sources)
    device = distinct(sources)[0].device
    weights = table(rows, device)
    loss, statistics = phase(sources, members, weights, **options)
    assert loss.dtype == statistics.dtype == torch.float32 and not statistics.requires_grad
    tensors = distinct(sources)
    gradients = torch.autograd.grad(loss * upstream, tensors)
    want_loss, want_statistics, want = exact(sources, members, weights, upstream, **options)
    close(loss, want_loss, 2e-6)
    for got_row, want_row in zip(statistics.flatten(0, 1), want_statistics.flatten(0, 1), strict=True):
        close(got_row, want_row, 4e-6)
    for tensor, got, expected in zip(tensors, gradients, want, strict=True):
        assert got.dtype == tensor.dtype
        close(got, expected, ROUNDING[tensor.dtype])
    return loss, statistics, gradients


@pytest.mark.parametrize("elements", [1, 7, 4551, 196608])
def test_sizes(device, elements):
    agrees(chain((3 if elements < 10**5 else 1, elements), 5, device=device), rows=soft(elements))


@pytest.mark.parametrize("kind", RECONSTRUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_and_dtypes(device, kind, dtype):
    sources = chain((2, 3, 5, 7), 9, dtype, device)
    if kind == "bce":
        sources = mapped(sources, lambda t: t.sigmoid() if t.dim() == 4 else t)
    if kind == "bce_logits":
        sources = [source._replace(target=torch.rand_like(source.target)) for source in sources]
    agrees(sources, rows=soft(200), upstream=4096.0, reconstruction=kind, huber_delta=0.7)


@pytest.mark.parametrize(("members", "rows"), MEMBERS.values(), ids=MEMBERS)
def test_members(device, members, rows):
    agrees(chain((5, 11), 6, device=device)[: len(members)], members, rows)


def test_any_number_of_fake_sources(device):
    sources = chain((3, 20), 4, device=device) + chain((3, 20), 4, device=device, seed=1)[1:]
    rows = [SOFT[0], *([0.2, 0.3, weight, 0.02] for weight in (0.1, 0.2, 0.15, 0.05))]
    agrees(sources, (Member.LINEAR, *[Member.EXPONENTIAL] * 4), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_in_any_order_of_memory(device, dtype):
    sources, weights = leaves(chain((2, 30), 5, device=device)), table(SOFT, device).to(dtype)
    columns = weights.t().contiguous().t()
    assert not columns.is_contiguous()
    for single in (False, True):
        want, got = (phase(sources, SOFT_MEMBERS, w, single_launch=single)[0] for w in (weights, columns))
        assert torch.equal(got, want)


def test_parts_that_are_left_out(device):
    real, rec, fake = chain((4, 33), 3, device=device)
    errors = torch.rand(4, device=device)
    agrees([real._replace(mean=None, logvar=None), rec._replace(target=None, prediction=None), fake])
    agrees([Source(error=errors, mean=real.mean, logvar=real.logvar), rec, fake])
    agrees(
        [
            Source(error=errors.to(torch.bfloat16)),
            *(Source(None, None, s.mean, s.logvar) for s in (rec, fake)),
        ]
    )


@pytest.mark.parametrize("prior_std", [0.2, 3.0])
def test_prior_and_clamp(device, prior_std):
    agrees(chain((3, 8), 40, device=device), prior_std=prior_std, bounds=(-0.5, 0.5))


def test_gradients_are_written_only_where_needed(device):
    sources = chain((2, 10), 3, device=device)
    rec_rec, mean = sources[1].prediction.requires_grad_(), sources[2].mean.requires_grad_()
    loss, _ = phase(sources, SOFT_MEMBERS, table(SOFT, device))
    loss.backward()
    want = dict(zip(map(id, distinct(sources)), exact(sources, SOFT_MEMBERS, table(SOFT))[2], strict=True))
    close(rec_rec.grad, want[id(rec_rec)], 4e-6)
    close(mean.grad, want[id(mean)], 4e-6)
    assert all(
        tensor.grad is None for tensor in distinct(sources) if tensor is not rec_rec and tensor is not mean
    )


@pytest.mark.parametrize("layout", ["channels last", "transposed", "sliced", "offset", "expanded", "mixed"])
def test_layouts(device, layout):
    change = {
        "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
        "transposed": lambda t: t.mT.contiguous().mT,
        "sliced": lambda t: (
            torch.stack([t, t], 1)[:, 1] if t.dim() == 4 else torch.cat([t, t], 1)[:, : t.shape[1]]
        ),
        "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
        "expanded": lambda t: t[:1].expand_as(t),
        "mixed": lambda t: (
            t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 and t.mean() > 0 else t
        ),
    }[layout]
    sources = mapped(chain((2, 3, 4, 6), 8, device=device), change)
    gradients = {}
    for run in (sources, mapped(sources, torch.clone)):
        run = mapped(run, lambda t: t.detach().requires_grad_())
        loss, _ = phase(run, SOFT_MEMBERS, table(SOFT, device))
        gradients[id(run)] = torch.autograd.grad(loss, distinct(run))
        want = exact(run, SOFT_MEMBERS, table(SOFT))[2]
        for got, expected in zip(gradients[id(run)], want, strict=True):
            close(got, expected, 4e-6)


@pytest.mark.parametrize("upstream", [0.0, -3.0, 1e-6, 65536.0])
def test_upstream_gradients(device, upstream):
    agrees(chain((2, 9), 4, device=device), upstream=upstream)


def test_upstream_gradient_in_other_forms(device):
    sources = leaves(chain((2, 9), 4, device=device))
    tensors = distinct(sources)
    loss, _ = phase(sources, SOFT_MEMBERS, table(SOFT, device))
    plain = torch.autograd.grad(loss, tensors, retain_graph=True)
    again = torch.autograd.grad(loss, tensors, retain_graph=True)
    stretched = torch.autograd.grad(loss.expand(3).mean(), tensors, retain_graph=True)
    coarse = torch.autograd.grad(loss.to(torch.bfloat16) * 2, tensors)
    for first, second, third, fourth in zip(plain, again, stretched, coarse, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(third, first, rtol=1e-6, atol=0)
        torch.testing.assert_close(fourth, 2 * first)


def test_gradients_of_half_precision_survive_the_coefficients(device):
    """Coefficients of 1e-9 vanish in fp16 unless the loss scale is multiplied in before rounding."""
    rows = [[1e-9, 0, 0, 0], [0.1, 512.0, 0.25, 1e-5], [0.1, 512.0, 0.25, 1e-5]]
    agrees(chain((2, 64), 4, torch.float16, device), rows=rows, upstream=65536.0)


def test_results_are_the_same_bits(device):
    runs = []
    for _ in range(2):
        sources = leaves(chain((3, 9000), 50, device=device))
        loss, statistics = phase(sources, SOFT_MEMBERS, table(SOFT, device))
        runs.append([loss, statistics, *torch.autograd.grad(loss, distinct(sources))])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_extremes(device):
    real, rec, fake = chain((2, 12), 4, device=device)
    same = real._replace(
        prediction=real.target.clone(), mean=torch.zeros_like(real.mean), logvar=torch.zeros_like(real.mean)
    )
    wide = rec._replace(logvar=torch.full_like(rec.logvar, 80.0))
    narrow = fake._replace(logvar=torch.full_like(fake.logvar, -80.0))
    agrees([same, wide, narrow])  # exp(-q u) underflows to 0 for `wide`
    loss, statistics, _ = agrees([same] * 3)
    assert statistics[:2].abs().max() == 0 and loss == 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["target", "prediction", "mean", "logvar"])
def test_non_finite_inputs_show_in_their_statistic(device, value, part):
    sources = [Source(*(t.clone() for t in s[:4])) for s in chain((3, 10), 4, device=device)]
    getattr(sources[1], part)[2, 3] = value
    loss, statistics = phase(sources, SOFT_MEMBERS, table(SOFT, device))
    row = 0 if part in ("target", "prediction") else 1
    bad = ~statistics.isfinite()
    if part == "logvar" and value < 0:
        assert bad[1, 1, 2]
    assert bad[row, 1].tolist() == [False, False, True]
    assert not bad[:, [0, 2]].any() and not bad[1 - row].any()
    assert loss.isnan() if value != value else True


def test_targets_outside_the_unit_interval_show(device):
    real = chain((3, 10), 4, device=device)[0]
    target = real.target.sigmoid()
    target[1, 4] = 1.01
    for kind in ("bce", "bce_logits"):
        source = real._replace(target=target, prediction=real.prediction.sigmoid())
        _, statistics = phase([source], SOFT_MEMBERS[:1], table(SOFT[:1], device), reconstruction=kind)
        assert statistics[0, 0].isnan().tolist() == [False, True, False]


@given(
    samples=st.integers(1, 4),
    elements=st.integers(1, 300),
    latents=st.integers(1, 70),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16])] * 2),
    offset=st.integers(0, 3),
    seed=st.integers(0, 1000),
    upstream=st.sampled_from([0.0, -2048.0, 4096.0]),
)
@QUICK
def test_anything(device, samples, elements, latents, dtypes, offset, seed, upstream):
    """Any sizes, dtypes mixed within a pair, misaligned storage."""

    def moved(tensor, dtype):
        whole = torch.zeros(tensor.numel() + offset, device=tensor.device, dtype=dtype)
        return whole[offset:].view(tensor.shape).copy_(tensor)

    real, rec, fake = chain((samples, elements), latents, device=device, seed=seed)
    target, prediction = moved(real.target, dtypes[0]), moved(real.prediction, dtypes[1])
    sources = [real._replace(target=target, prediction=prediction), rec._replace(target=prediction), fake]
    agrees(sources, rows=soft(elements), upstream=upstream)


def test_launches(device, monkeypatch):
    """One launch reduces a phase, one writes its gradients."""
    launched = []
    for name in ("reduce_kernel", "apply_kernel"):
        kernel = getattr(_phase_triton, name)
        counted = type(
            "Counted", (), {"__getitem__": lambda self, grid, k=kernel, n=name: launched.append(n) or k[grid]}
        )
        monkeypatch.setattr(_phase_triton, name, counted())
    agrees(chain((2, 50), 4, device=device))
    assert launched == ["reduce_kernel", "apply_kernel"]
