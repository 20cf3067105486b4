"""Every launch compiled for GPUs that are not here: no spills, no doubles, 16-byte accesses, register
ceilings.

The launchers run on CPU tensors with the kernels replaced by recorders; what they would have launched is
compiled for each target, with the specialisation that Triton itself would choose.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from sivae_fast.kernels._batch import Batch, Formula
from sivae_fast.kernels.reference import RECONSTRUCTIONS, Member

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from sivae_fast.kernels import (  # noqa: E402
    _blur_triton,
    _mlp_triton,
    _parts_triton,
    _phase_triton,
    _rgb_triton,
    _single_triton,
    _style_triton,
)

MODULES = (
    _blur_triton,
    _mlp_triton,
    _parts_triton,
    _phase_triton,
    _rgb_triton,
    _single_triton,
    _style_triton,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Registers a thread: of the usual bf16 encoder phase, and of anything else.
REGISTERS = {
    "reduce_kernel": (48, 128),
    "apply_kernel": (64, 128),
    "single_kernel": (128, 128),
    "scale_kernel": (40, 40),
    "error_kernel": (32, 56),
    "error_gradient_kernel": (40, 64),
    "sample_kernel": (104, 104),
    "sample_gradient_kernel": (96, 96),
    "moments_kernel": (96, 96),
    "normalize_kernel": (104, 128),
    "gradient_sums_kernel": (96, 128),
    "gradient_kernel": (152, 152),
    "blur_kernel": (64, 64),
    "widen_kernel": (96, 96),
    "narrow_kernel": (248, 192),
    "shares_kernel": (152, 168),
    "forward_kernel": (128, 176),
    "backward_kernel": (152, 152),
    "weights_kernel": (255, 96),
}
#: Other compilers spend registers otherwise: there the kernels have to compile.
BUDGETED = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 7)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SAMPLES, LATENTS = 4, 512


@pytest.fixture(params=TARGETS)
def compiled(request, monkeypatch):
    """A function that compiles the launches of a call for the target: [(kernel name, artifact), ...]."""
    target = TARGETS[request.param]
    ghost = type("Ghost", (), {"get_current_target": lambda self: target})()
    ghost.get_current_device = ghost.get_current_stream = lambda *_: 0
    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: launches.append((self.kernel, args, options))

    for module in MODULES:
        for name in REGISTERS:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Recorder(getattr(module, name)))

    def compile_call(call):
        launches.clear()
        monkeypatch.setattr(torch.version, "hip", "6" if request.param == "gfx942" else None)
        call()
        driver = triton.runtime.driver
        monkeypatch.setattr(driver, "_active" if "_active" in vars(driver) else "active", ghost)
        try:
            artifacts = []
            for kernel, args, options in launches:
                kernel.device_caches.clear()
                artifacts.append((kernel.__name__, kernel.warmup(*args, grid=(1,), **options)))
                kernel.device_caches.clear()
        finally:
            monkeypatch.undo()
        return request.param, artifacts

    return compile_call


def phase_launches(dtype, members=(0, 1, 1), kind="sse", elements=196608, everything=False, single=False):
    """Both launches of an encoder phase x -> rec -> rec_rec, fake -> rec_fake, or of one source alone."""
    images = [torch.zeros(SAMPLES, elements, dtype=dtype) for _ in range(5)]
    latents = [torch.zeros(SAMPLES, LATENTS) for _ in range(3)]
    layout = [(members[0], 0, 1, 0, -1), (members[-1], 1, 2, 1, -1), (members[-1], 3, 4, 2, -1)]
    batch = Batch(images, latents, latents, [], tuple(number for row in layout for number in row))
    formula = Formula.of(kind, 1.0, 1.0, float("-inf"), float("inf"))
    needs = [True] * 11 if everything else [False, True, True, False, True, *[True] * 6]
    if single:
        gradients = _single_triton.value_and_gradients(batch, torch.zeros(4, 3), needs, formula)[2]
        _single_triton.scale_(gradients[1:2], torch.ones(()))
        return
    _, _, coefficients = _phase_triton.reduce(batch, torch.zeros(4, 3), formula)
    _phase_triton.apply(batch, coefficients, torch.ones(()), needs, formula)


def sample_launches(dtype, noise=True, prior=False):
    mean = torch.zeros(SAMPLES, LATENTS, dtype=dtype)
    inputs = mean, mean, mean if noise else None, None if noise else torch.zeros(1, dtype=torch.int64)
    priors = (mean, mean) if prior else (None, None)
    numbers = (0.0, float("-inf"), float("inf"))
    _, kl = _parts_triton.sample(*inputs, priors, numbers)
    needs = (True, True, noise, prior, prior)
    _parts_triton.sample_gradients(*inputs, priors, mean, kl, needs, numbers)


def error_launches(dtype, kind):
    pair = torch.zeros(2, SAMPLES, 196608, dtype=dtype).unbind()
    error = _parts_triton.errors(*pair, kind, 1.0)
    _parts_triton.error_gradients(*pair, error, (True, True), kind, 1.0)


def style_launches(dtype, shape, decoder=True, last=True):
    """All launches of a decoder's chain, or of an encoder's: no noise, no style, gradients of the moments."""
    form = torch.channels_last if last else torch.contiguous_format
    x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=form)
    b, c, h, w = shape
    channel = torch.zeros(c)
    noise, weight = (torch.zeros(b, 1, h, w), channel) if decoder else (None, None)
    inputs = x, noise, weight, channel, torch.zeros(b, 2 * c) if decoder else None
    y, *moments, kept = _style_triton.forward(*inputs, 1e-8, 0.2)
    by = (y, None, None) if decoder else (y, *moments)
    _style_triton.backward(*by, *inputs, kept, 0.2, (True, decoder, True, decoder))


def within_budget(result, wide=(), ceiling=1, stack=0):
    target, artifacts = result
    for name, artifact in artifacts if BUDGETED else ():
        if target == "gfx942":
            listing = artifact.asm["amdgcn"]
            counts = dict(
                re.findall(r"\.(\w+_spill_count|private_segment_fixed_size|vgpr_count): +(\d+)", listing)
            )
            assert counts["vgpr_spill_count"] == counts["sgpr_spill_count"] == "0", name
            assert counts["private_segment_fixed_size"] == "0", name
            assert int(counts["vgpr_count"]) <= REGISTERS[name][1], (name, counts)
            assert "_f64" not in listing, name
            loads, stores = (bool(re.search(rf"_{op}_(dwordx4|b128)", listing)) for op in ("load", "store"))
        else:
            listing, usage = artifact.asm["ptx"], resources(artifact.asm["cubin"])
            assert usage["STACK"] <= stack and usage["LOCAL"] == 0, (name, usage)
            assert usage["REG"] <= REGISTERS[name][ceiling], (name, usage)
            assert ".f64" not in listing, name
            assert not re.search(r"(atom|red)\.\S*\.(f16|f32|bf16)", listing), name
            loads, stores = (bool(re.search(rf"{op}\.global\S*\.v4\.b32", listing)) for op in ("ld", "st"))
        assert loads >= (name in wide), name
        assert stores >= (name in wide and name not in ONLY_REDUCE), name


ONLY_REDUCE = ("reduce_kernel", "error_kernel", "moments_kernel", "gradient_sums_kernel")


def resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        listing = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}


IMAGES = ("reduce_kernel", "apply_kernel", "error_kernel", "error_gradient_kernel")


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoder_phase(compiled, dtype):
    ceiling = 1 if dtype == "fp32" else 0
    within_budget(compiled(lambda: phase_launches(DTYPES[dtype])), IMAGES, ceiling)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_single_launch(compiled, dtype):
    target, launches = compiled(lambda: phase_launches(DTYPES[dtype], single=True))
    if target == "gfx942":
        launches = launches[1:]  # the single launch is for NVIDIA: on AMD it spills scalar registers
    within_budget((target, launches), ("single_kernel", "scale_kernel"))


@pytest.mark.parametrize("kind", RECONSTRUCTIONS)
def test_every_error_in_a_phase(compiled, kind):
    within_budget(compiled(lambda: phase_launches(torch.bfloat16, kind=kind, everything=True)), IMAGES)


@pytest.mark.parametrize("member", Member)
def test_every_member(compiled, member):
    within_budget(compiled(lambda: phase_launches(torch.bfloat16, members=(0, int(member)))), IMAGES)


@pytest.mark.parametrize("elements", [7, 4551])
def test_sizes_that_do_not_divide(compiled, elements):
    within_budget(compiled(lambda: phase_launches(torch.bfloat16, elements=elements)))


@pytest.mark.parametrize(
    ("dtype", "kind"), [*(("bf16", kind) for kind in RECONSTRUCTIONS), ("fp16", "sse"), ("fp32", "sse")]
)
def test_errors(compiled, dtype, kind):
    within_budget(compiled(lambda: error_launches(DTYPES[dtype], kind)), IMAGES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"noise": False}, {"prior": True}], ids=["noise", "seed", "prior"])
def test_samples(compiled, dtype, options):
    wide = ("sample_kernel", "sample_gradient_kernel")
    within_budget(compiled(lambda: sample_launches(DTYPES[dtype], **options)), wide)


MAPS = ("moments_kernel", "normalize_kernel", "gradient_sums_kernel", "gradient_kernel")
CHAINS = {
    "64 at 256x256": (2, 64, 256, 256),
    "512 at 32x32": (2, 512, 32, 32),
    "512 at 4x4": (2, 512, 4, 4),
    "96 at 37x41": (2, 96, 37, 41),
    "one sample of 64 at 64x64": (1, 64, 64, 64),
    "one sample of 512 at 4x4": (1, 512, 4, 4),
}


@pytest.mark.parametrize("decoder", [True, False], ids=["decoder", "encoder"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", CHAINS.values(), ids=CHAINS)
def test_style_chains(compiled, shape, dtype, decoder):
    target, launches = compiled(lambda: style_launches(DTYPES[dtype], shape, decoder))
    assert len(launches) == (4 if shape[2] * shape[3] > 1024 else 2)
    within_budget((target, launches), MAPS, 1 if dtype == "fp32" else 0)


def test_style_chains_of_contiguous_maps(compiled):
    within_budget(compiled(lambda: style_launches(torch.bfloat16, (2, 64, 256, 256), last=False)), MAPS)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 64, 64), (1, 1, 64, 64)])
def test_style_chains_of_one(compiled, shape):
    """Triton makes arguments of 1 numbers of Python, which have no `.to`."""
    compiled(lambda: style_launches(torch.float32, shape))


def test_style_chains_of_odd_maps(compiled):
    target, launches = compiled(lambda: style_launches(torch.bfloat16, (2, 5, 37, 41)))
    if target != "gfx942":  # scalar registers spill there; maps of the model have channels by the dozen
        within_budget((target, launches))


def test_other_batches_and_larger_maps_take_the_same_kernels(compiled):
    shapes = ((8, 64, 64, 64), (16, 64, 64, 64), (3, 64, 128, 128))
    _, launches = compiled(lambda: [style_launches(torch.bfloat16, shape) for shape in shapes])
    assert len(launches) == 12 and len({(name, artifact.hash) for name, artifact in launches}) == 4


FEW = {name: CHAINS[name] for name in ("64 at 256x256", "96 at 37x41", "one sample of 512 at 4x4")}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", FEW.values(), ids=FEW)
def test_blur(compiled, shape, dtype):
    x = torch.zeros(shape, dtype=DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
    within_budget(compiled(lambda: _blur_triton.blur(x, 4.0)), ("blur_kernel",))


def rgb_launches(dtype, shape, colors=3):
    """Both layers between images and features, both ways, with every gradient."""
    b, c, h, w = shape
    features, image = (
        torch.zeros(b, k, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for k in (c, colors)
    )
    weight, bias = torch.zeros(c, colors).t(), torch.zeros(c)
    _rgb_triton.widen(image, weight, bias, 0.04, features)
    _rgb_triton.narrow(features, weight, None, image, image, (bias, 0.04))
    _rgb_triton.shares(features, image, weight, (bias, 0.04))
    weight = torch.zeros(colors, c)
    _rgb_triton.narrow(features, weight, torch.zeros(colors), image)
    _rgb_triton.widen(image, weight, None, 1.0, features)
    _rgb_triton.shares(features, image)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", FEW.values(), ids=FEW)
def test_between_images_and_features(compiled, shape, dtype):
    target, launches = compiled(lambda: rgb_launches(DTYPES[dtype], shape))
    if target != "gfx942":  # scalar registers spill there
        within_budget((target, launches), ceiling=1 if dtype == "fp32" else 0)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("width", [256, 96])
def test_small_networks(compiled, dtype, width):
    """The networks of the densities: four ReLU layers."""
    sizes = [(width, 2), *[(width, width)] * 3, (4, width)]
    weights, biases = [torch.zeros(size) for size in sizes], [torch.zeros(size[0]) for size in sizes]
    x = torch.zeros(512, 2)

    def call():
        y, hidden = _mlp_triton.forward(x, weights, biases, DTYPES[dtype])
        _mlp_triton.backward(y, x, weights, hidden, True, True)

    # Some compilers put a handful of bytes on the stack.
    within_budget(compiled(call), ceiling=1 if dtype == "fp32" else 0, stack=16)
