"""Networks under the rules of autocast on a GPU, which makes float32 of more than autocast on a CPU does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sivae_fast.draws import Rows, Stream
from sivae_fast.models.residual import ResidualModel
from sivae_fast.models.style import StyleModel
from sivae_fast.models.two_encoder import TwoEncoderModel

MODELS = {
    "style": lambda: StyleModel(32, start_channels=8, max_channels=16, latent_size=16, mapping_layers=2),
    "residual": lambda: ResidualModel(32, widths=(8, 16), latent_size=16),
    "residual, group norm": lambda: ResidualModel(32, widths=(8, 16), latent_size=16, norm="group"),
    "two encoders": lambda: TwoEncoderModel(32, class_size=8, content_size=8, width=4),
}


@pytest.fixture
def gpu_rules():
    """Autocast on the CPU takes float32 for what PyTorch's header names for a GPU."""
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    names = re.findall(r"_\((\w+)\)", re.search(r"define AT_FORALL_FP32\(_\)(.*?)\n\n", header, re.DOTALL)[1])
    assert {"group_norm", "upsample_nearest2d"} <= {*names}
    library = torch.library.Library("aten", "IMPL")
    for name in names:
        library.impl(name, _wide(getattr(torch.ops.aten, name).default), "AutocastCPU")
    yield
    library._destroy()


def _wide(operator):
    below = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def run(*args, **kwargs):
        wide = (a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
        with torch._C._ExcludeDispatchKeyGuard(below):
            return operator(*wide, **kwargs)

    return run


class Operands(TorchDispatchMode):
    """Records what convolutions and pointwise operations on maps are given in float32."""

    def __init__(self):
        super().__init__()
        self.wide = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("add", "leaky_relu", "lerp", "convolution", "upsample_nearest2d"):
            maps = [t for t in args if isinstance(t, torch.Tensor) and t.ndim == 4 and t.shape[2] > 4]
            if any(t.dtype == torch.float32 for t in maps):
                self.wide.append((name, tuple(maps[0].shape)))
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize(("name", "blend"), [*((name, 1.0) for name in MODELS), ("style", 0.5)])
def test_maps_stay_in_half_precision(name, blend, gpu_rules):
    torch.manual_seed(0)
    model = MODELS[name]()
    if name == "style":
        model.set_level(3, blend)
    x = torch.rand(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16), Operands() as seen:
        posterior = model.encode(x)
        image = model.decode(posterior.mean.float(), Stream(0, Rows.all(4)))
    assert image.dtype == torch.bfloat16
    assert not seen.wide
    image.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
