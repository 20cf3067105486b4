"""What only a GPU can show: graphs, streams, synchronisation, memory, and the single launch under stress."""

import os

import pytest
import torch

from sivae_fast import Posterior, SoftIntroVAE, Term
from sivae_fast.kernels import _single_triton
from sivae_fast.kernels.blur import blur
from sivae_fast.kernels.introspective import phase
from sivae_fast.kernels.mlp import mlp
from sivae_fast.kernels.rgb import from_rgb, to_rgb
from sivae_fast.kernels.style import activate_normalize
from tests.kernels.losses import ROUNDING, SOFT_MEMBERS, chain, close, distinct, exact, leaves, soft, table

pytestmark = pytest.mark.gpu
SHAPE, LATENTS = (3, 256, 256), 512
ELEMENTS = 3 * 256 * 256
LAUNCHES = int(os.environ.get("SIVAE_STRESS", 100_000))


def objective(**options):
    weights = {"beta_rec": 1.0, "beta_kl": 0.5, "beta_neg": 4.0, "scale": 1 / ELEMENTS, "gamma_r": 0.0}
    return SoftIntroVAE(**weights, **options).cuda()


def terms(samples, seed=0, dtype=torch.bfloat16):
    sources = leaves(chain((samples, *SHAPE), LATENTS, dtype, "cuda", seed))
    return [Term(s.target, s.prediction, Posterior(s.mean, s.logvar)) for s in sources], distinct(sources)


@pytest.mark.parametrize("single", [False, True], ids=["two launches", "single launch"])
@pytest.mark.parametrize("samples", [1, 4, 33])
def test_full_size(samples, single):
    sources = leaves(chain((samples, *SHAPE), LATENTS, torch.bfloat16, "cuda"))
    weights = table(soft(ELEMENTS), "cuda")
    results = []
    for _ in range(3):
        loss, statistics = phase(sources, SOFT_MEMBERS, weights, single_launch=single)
        results.append([loss.detach(), statistics, *torch.autograd.grad(loss, distinct(sources))])
    assert all(torch.equal(a, b) for run in results[1:] for a, b in zip(results[0], run, strict=True))
    want, want_statistics, gradients = exact(sources, SOFT_MEMBERS, weights)
    close(results[0][0], want, 2e-6)
    close(results[0][1], want_statistics, 4e-6)
    for got, expected in zip(results[0][2:], gradients, strict=True):
        close(got, expected, ROUNDING[got.dtype])


def test_no_phase_waits_for_the_device():
    loss = objective()
    batch, tensors = terms(2)
    loss.encoder(*batch)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss.beta_neg = 7.0
        made, statistics = loss.encoder(*batch)
        z = loss.reparameterize(batch[0].posterior, torch.zeros_like(batch[0].posterior.mean))
        torch.autograd.grad(made + z.sum(), tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(values.is_cuda for values in statistics.values())


@pytest.mark.parametrize("single", [False, True], ids=["two launches", "single launch"])
def test_a_captured_graph_follows_inputs_and_weights(single):
    loss = objective(single_launch=single)
    batch, tensors = terms(4)
    run = lambda: (lambda made: (made.loss, *torch.autograd.grad(made.loss, tensors)))(loss.encoder(*batch))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed, beta_neg in ((1, 4.0), (2, 9.0)):
        with torch.no_grad():
            for tensor, new in zip(tensors, terms(4, seed)[1], strict=True):
                tensor.copy_(new)
        loss.beta_neg = beta_neg
        graph.replay()
        for got, want in zip(captured, run(), strict=True):
            assert torch.equal(got, want)


def test_compiled_by_inductor():
    loss = objective()

    def total(batch):
        return loss.encoder(*batch).loss + loss.decoder(*batch).loss

    compiled = torch.compile(total, fullgraph=True)
    batch, tensors = terms(4)
    for value in (4.0, 11.0):
        loss.beta_neg = value
        with torch._dynamo.config.patch(error_on_recompile=value != 4.0):
            got = compiled(batch)
        want = total(batch)
        torch.testing.assert_close(got, want)
        pairs = zip(torch.autograd.grad(got, tensors), torch.autograd.grad(want, tensors), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b)


def test_under_autocast_images_stay_as_they_are():
    batch, tensors = terms(2)
    loss = objective()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        made = loss.encoder(*batch).loss
    assert made.dtype == torch.float32 and torch.equal(made, loss.encoder(*batch).loss)
    assert torch.autograd.grad(made, tensors)[0].dtype == torch.bfloat16


def test_little_is_kept_between_the_passes():
    batch, _ = terms(16)
    loss = objective()
    loss.encoder(*batch)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    made = loss.encoder(*batch)
    held = torch.cuda.memory_allocated() - before
    assert held <= 1024 * 16 and made.loss.requires_grad


def test_few_launches():
    from torch.profiler import ProfilerActivity, profile

    batch, tensors = terms(4)
    loss = objective()
    torch.autograd.grad(loss.encoder(*batch).loss, tensors)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        torch.autograd.grad(loss.encoder(*batch).loss, tensors)
        torch.cuda.synchronize()
    launched = [e.name for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) <= 5, launched  # clear, reduce, apply; autograd's gradient of ones


class Stress:
    """Single launches whose losses and gradients are held against the first ones, on the device."""

    def __init__(self):
        loss = objective(single_launch=True)
        batch, self.tensors = terms(6)
        self.run = lambda: loss.encoder(*batch).loss
        self.first = self._results()
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def _results(self):
        loss = self.run()
        return [loss.detach(), *torch.autograd.grad(loss, self.tensors[2:3])]

    def once(self):
        for got, want in zip(self._results(), self.first, strict=True):
            self.wrong += (got != want).any()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("graphed", [False, True], ids=["calls", "graph replays"])
def test_single_launch_under_stress(graphed):
    """SIVAE_STRESS launches each way while another stream keeps the device busy: no hang, no wrong bit."""
    stress = Stress()
    stress.once()
    busy, matrix = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    step, calls = stress.once, LAUNCHES
    if graphed:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                stress.once()
        step, calls = graph.replay, calls // 10
    for i in range(calls):
        if i % 50 == 0:
            with torch.cuda.stream(busy):
                matrix @ matrix
        step()
    torch.cuda.synchronize()
    assert stress.wrong.item() == 0


@pytest.mark.timeout(1200)
def test_single_launches_of_several_streams_under_stress():
    """SIVAE_STRESS launches, each of which takes room that the others need for the sample they began."""
    streams = [torch.cuda.Stream(priority=priority) for priority in (0, -1) * 4]
    stresses = [Stress() for _ in streams]
    torch.cuda.synchronize()
    for _ in range(LAUNCHES // len(streams)):
        for stream, stress in zip(streams, stresses, strict=True):
            with torch.cuda.stream(stream):
                stress.once()
    torch.cuda.synchronize()
    assert all(stress.wrong.item() == 0 for stress in stresses)


def test_what_programs_leave_is_written_by_the_last_one(monkeypatch):
    stress = Stress()
    monkeypatch.setattr(_single_triton, "LOOKS", 0)
    stress.once()
    assert stress.wrong.item() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_the_current_one():
    sources = leaves(chain((2, 50), 4, device="cuda:1"))
    loss, _ = phase(sources, SOFT_MEMBERS, table(soft(50), "cuda:1"))
    close(loss, exact(sources, SOFT_MEMBERS, table(soft(50)))[0], 2e-6)


class MapChain:
    """The style model's pointwise chain in bf16 at one of its sizes.

    No argument of the leaky ReLU is so near zero that it could round to the other sign: one of them among 17
    million puts a gradient off by more than rounding does.
    """

    def __init__(self, channels=64, side=256, batch=4):
        torch.manual_seed(0)
        new = lambda *size: torch.randn(size, device="cuda")
        x = new(batch, channels, side, side).bfloat16().contiguous(memory_format=torch.channels_last)
        bias, weight, noise = new(channels), new(channels), new(batch, 1, side, side)
        argument = x.double() + bias[:, None, None] + weight[:, None, None].double() * noise
        x = torch.where(argument.abs() < 1e-5, x + 1, x)
        style = new(batch, 2 * channels)
        self.given = {"x": x, "bias": bias, "noise": noise, "weight": weight, "style": style}
        self.wanted = [t.requires_grad_() for name, t in self.given.items() if name != "noise"]
        self.by = [torch.randn_like(x), new(batch, channels), new(batch, channels)]

    def run(self):
        outputs = activate_normalize(**self.given, eps=1e-5)
        return [*outputs, *torch.autograd.grad(outputs, self.wanted, self.by)]

    def exact(self):
        given = {n: t.detach().double().requires_grad_(n != "noise") for n, t in self.given.items()}
        outputs = activate_normalize(**given, eps=1e-5)
        wanted = [t for name, t in given.items() if name != "noise"]
        return [*outputs, *torch.autograd.grad(outputs, wanted, [b.double() for b in self.by])]


@pytest.mark.parametrize(("channels", "side"), [(64, 256), (128, 128), (512, 32), (512, 4)])
def test_map_chains(channels, side):
    chain = MapChain(channels, side)
    first, second = chain.run(), chain.run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for got, want in zip(first, chain.exact(), strict=True):
        close(got, want.detach().cpu(), 2 * ROUNDING[got.dtype])


def test_no_map_chain_waits_for_the_device():
    chain = MapChain()
    chain.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chain.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_map_chain_follows_its_inputs():
    chain = MapChain(128, 64)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        chain.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain.run()
    with torch.no_grad():
        chain.given["x"].mul_(-0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, chain.run(), strict=True))


def test_a_map_chain_compiled_by_inductor():
    chain = MapChain(64, 64)
    compiled = torch.compile(lambda given: activate_normalize(**given, eps=1e-5), fullgraph=True)
    outputs = compiled(chain.given)
    found = [*outputs, *torch.autograd.grad(outputs, chain.wanted, chain.by)]
    assert all(torch.equal(a, b) for a, b in zip(found, chain.run(), strict=True))


def test_a_map_chain_keeps_its_input_alone():
    chain = MapChain()
    chain.run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y, *moments = activate_normalize(**chain.given, eps=1e-5)
    held = torch.cuda.memory_allocated() - before
    assert held <= 1.01 * y.numel() * y.element_size() and moments[0].requires_grad


def value_and_gradients(run, given):
    given = [t.detach().requires_grad_() for t in given]
    y = run(*given)
    upstream = torch.linspace(-1, 1, y.numel(), device="cuda").bfloat16().view(y.shape)
    return [y, *torch.autograd.grad(y, given, upstream.to(y))]


@pytest.mark.parametrize(("channels", "side"), [(64, 256), (128, 128), (512, 32), (512, 4)])
def test_map_layers(channels, side):
    """The blur and both layers between images and features: float64's values, the same bits, no waiting."""
    torch.manual_seed(0)
    new = lambda *size: torch.randn(size, device="cuda").bfloat16()
    wide, image = (new(4, c, side, side).contiguous(memory_format=torch.channels_last) for c in (channels, 3))
    for run, given in (
        (blur, [wide]),
        (from_rgb, [image, new(channels, 3, 1, 1).float(), new(channels).float()]),
        (to_rgb, [wide, new(3, channels, 1, 1).float(), new(3).float()]),
    ):
        first = value_and_gradients(run, given)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = value_and_gradients(run, given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        exact = value_and_gradients(run, [t.double() for t in given])
        for got, want in zip(first, exact, strict=True):
            close(got, want.detach().cpu(), 4 * ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("rows", [512, 1024])
def test_the_network_of_a_density(rows):
    torch.manual_seed(0)
    sizes = [(256, 2), *[(256, 256)] * 3, (4, 256)]
    weights = [torch.randn(size, device="cuda") * (2 / size[1]) ** 0.5 for size in sizes]
    given = [
        torch.randn(rows, 2, device="cuda"),
        *weights,
        *(torch.randn(len(w), device="cuda") for w in weights),
    ]

    def run(x, *parameters):
        return mlp(x, parameters[:5], parameters[5:], x.dtype)

    first, second = (value_and_gradients(run, given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for got, want in zip(first, value_and_gradients(run, [t.double() for t in given]), strict=True):
        close(got, want.detach().cpu(), 1e-4)  # units near zero switch
