"""Introspective variational autoencoders, trained fast.

The losses need torch alone and are loaded when first used:

    from sivae_fast import SoftIntroVAE, Term, Posterior
"""

from importlib import import_module

_LOSSES = {
    "Model": "contract",
    "Posterior": "contract",
    **dict.fromkeys(
        ["IntroVAE", "LinearIntroVAE", "Loss", "SoftIntroVAE", "Term", "VAE", "check_statistics"],
        "objectives",
    ),
    **dict.fromkeys(["gaussian_kl", "reparameterize", "sample_and_kl"], "kernels.gaussian"),
    "reconstruction_error": "kernels.reconstruction",
}
_MODELS = {  # need more than torch
    "Inference": "inference",
    "CloudInference": "inference_clouds",
    "load": "checkpoint",
    "pull": "hub",
    "push": "commands.publish",
}
_HOME = _LOSSES | _MODELS
__all__ = [*_LOSSES]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'sivae_fast' has no attribute {name!r}")
    try:
        module = import_module(f"sivae_fast.{_HOME[name]}")
    except ModuleNotFoundError as error:
        if name in _LOSSES:
            raise
        raise ImportError(
            f"{name} needs a package that is missing ({error}): pip install 'sivae-fast[train]'"
        ) from error
    return getattr(module, name)
