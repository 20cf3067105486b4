"""The networks through torch.compile."""

from __future__ import annotations

import torch

from sivae_fast.contract import Model


def compile_networks(model: Model) -> None:
    """Compiles the networks of both sides when they are first called, anew for each way of calling them."""
    import torch._functorch.config as compiler

    # The minimal schedule goes through the decoder's graph twice; by default its buffers serve once.
    compiler.donated_buffer = False
    for network in [*model.encoder_modules(), *model.decoder_modules()]:
        network.compile()


def forget_compiled() -> None:
    """To be called when another level is trained: the number of kept variants is limited."""
    torch.compiler.reset()
