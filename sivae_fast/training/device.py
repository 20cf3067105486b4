"""What the process is told before it trains on a device."""

from __future__ import annotations

import platform

import torch

from sivae_fast.config import Config
from sivae_fast.training.memory import keep_freed_memory


def prepare(device: torch.device) -> None:
    """To be called before the first convolution: cuDNN keeps what it has chosen for a shape.

    Float32 is as PyTorch has it: on a GPU, convolutions in TF32 and products of matrices in float32.
    """
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        # A level has few shapes, each met many thousand times: trying all algorithms once pays. The eager
        # iterations before a capture try them, in the threads that a captured one uses.
        torch.backends.cudnn.benchmark = True


def precision(config: Config, device: torch.device) -> str:
    """Either "fp32" or "bf16": `train.precision`, or what its "auto" means on this device.

    It means bf16 where it was measured to be faster and to learn as well: for a Soft-IntroVAE of fully
    connected networks on a processor that multiplies bfloat16.
    """
    asked = config.train.precision
    if asked != "auto":
        return asked
    measured = (config.model.kind, config.objective.kind, device.type) == ("mlp", "soft_introvae", "cpu")
    return "bf16" if measured and multiplies_bf16() else "fp32"


def multiplies_bf16() -> bool:
    """Whether the processor has instructions for products of bfloat16 and PyTorch uses them.

    oneDNN's own answer is yes for every AVX-512, also where it has to multiply in float32.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
