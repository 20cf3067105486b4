"""What the process is told before it trains on a device."""

from __future__ import annotations

import torch

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
