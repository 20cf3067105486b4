"""The Triton Chamfer kernels without a GPU: under the interpreter, and compiled ahead of time."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

INTERPRETED = """
import torch
from sivae_fast.kernels import _chamfer_triton as kernels
from sivae_fast.kernels.chamfer import reference, reference_pull

empty = torch.empty
def poisoned(*shape, **options):
    made = empty(*shape, **options)
    return made.fill_(float("nan") if made.is_floating_point() else -7)
kernels.torch.empty = poisoned

torch.manual_seed(0)
for n, m, dtype in ((1, 1, torch.float32), (7, 130, torch.float32), (200, 65, torch.bfloat16)):
    x = torch.randn(2, 3, n).mul(0.2).to(dtype).transpose(1, 2)
    y = torch.randn(2, m, 3).mul(0.2).to(dtype)
    sums, *indices = kernels.forward(x, y)
    exact, *nearest = reference(x.double(), y.double())
    torch.testing.assert_close(sums.double(), exact, rtol=1e-6, atol=0)
    for got, want, count in zip(indices, nearest, (m, n)):
        assert got.dtype == torch.int32 and 0 <= got.min() and got.max() < count
        assert dtype == torch.bfloat16 or torch.equal(got, want)
    for toward, back in (torch.randn(2, 2).unbind(1), torch.full((1,), 0.3).expand(2, 2).unbind(0)):
        got = kernels.pull(toward, back, x, y, *indices)
        want = reference_pull(toward.double(), back.double(), x.double(), y.double(), *indices)
        assert got.dtype == dtype
        bound = 1e-6 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)
x[0, 3, 1] = float("nan")
sums = kernels.forward(x, y)[0]
assert sums[0].sum().isnan() and sums[1].isfinite().all()
for far in (float("inf"), -float("inf")):
    for place in ((0,), (0, 1), (0, 1, 2)):
        x, y = torch.rand(2, 70, 3), torch.rand(2, 40, 3)
        x[0, 3, list(place)] = far
        sums = kernels.forward(x, y)[0]
        assert sums[0, 0] == float("inf")
        torch.testing.assert_close(sums, reference(x, y)[0])
x[0, 3] = torch.tensor([far, -far, 0.0])
assert kernels.forward(x, y)[0][0, 0] == float("inf")

# The operator sends tensors to the kernels, float64 to the definition.
from sivae_fast.kernels import _launch
from sivae_fast.kernels.chamfer import chamfer
_launch.INTERPRET = True
sent = []
for name in ("forward", "pull"):
    kernel = getattr(kernels, name)
    setattr(kernels, name, lambda *a, kernel=kernel, name=name: (sent.append(name), kernel(*a))[1])
for dtype, want in ((torch.float32, ["forward", "pull", "pull"]), (torch.float64, [])):
    x, y = (torch.randn(2, n, 3, dtype=dtype).requires_grad_() for n in (5, 9))
    squares = (x[:, :, None] - y[:, None]).square().sum(3)
    exact = torch.autograd.grad((squares.amin(2).sum(1) + squares.amin(1).sum(1)).sum(), (x, y))
    torch.testing.assert_close(torch.autograd.grad(chamfer(x, y).sum(), (x, y)), exact)
    assert sent == want
    sent.clear()
"""


def test_interpreter_against_float64():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(("name", "registers"), [("nearest_kernel", 168), ("pull_kernel", 208)])
def test_compiled_ahead_of_time_within_budget(name, registers, target):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sivae_fast.kernels import _chamfer_triton as kernels

    kernel = getattr(kernels, name)
    pointers = dict.fromkeys(("x", "y", "gradient", "partial", "toward", "back"), "*fp32")
    pointers |= dict.fromkeys(("index_x", "index_y"), "*i32")
    constants = {"ROWS": kernels.ROWS, "COLUMNS": kernels.COLUMNS}
    signature = {a: "constexpr" if a in constants else pointers.get(a, "i32") for a in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget(*target),
        options={"num_warps": kernels.WARPS},
    )
    if target[0] == "hip":
        spills = re.findall(r"\.(?:vgpr|sgpr)_spill_count: +(\d+)", compiled.asm["amdgcn"])
        assert spills and not any(int(count) for count in spills)
        return
    assert ".f64" not in compiled.asm["ptx"]
    usage = resources(compiled.asm["cubin"])
    assert usage["STACK"] == 0 and usage["LOCAL"] == 0
    assert usage["REG"] <= registers


def resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        listing = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}


@pytest.mark.gpu
def test_on_a_gpu():
    import torch

    from sivae_fast.kernels.chamfer import chamfer

    torch.manual_seed(0)
    x, y = (torch.randn(8, k, 3).mul(0.2) for k in (2048, 1500))
    exact = [cloud.double().requires_grad_() for cloud in (x, y)]
    got = [cloud.cuda().requires_grad_() for cloud in (x, y)]
    want, error = chamfer(*exact), chamfer(*got)
    torch.testing.assert_close(error.double().cpu(), want, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(want.mean(), exact)
    first = torch.autograd.grad(error.mean(), got, retain_graph=True)
    for g, again, w in zip(first, torch.autograd.grad(error.mean(), got), wanted, strict=True):
        assert torch.equal(g, again)
        torch.testing.assert_close(g.double().cpu(), w, rtol=1e-5, atol=1e-8)


@pytest.mark.gpu
def test_more_clouds_than_a_grid_has_rows():
    import torch

    from sivae_fast.kernels.chamfer import chamfer

    x, y = torch.rand(2, 70_000, 2, 3, device="cuda").unbind()
    squares = (x[:, :, None] - y[:, None]).square().sum(3)
    torch.testing.assert_close(chamfer(x, y), squares.amin(2).sum(1) + squares.amin(1).sum(1))
