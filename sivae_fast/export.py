"""Encoders and decoders for use without this package: ONNX files and `torch.export` programs."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sivae_fast.checkpoint import load
from sivae_fast.config import Config
from sivae_fast.contract import Model

logger = logging.getLogger("sivae_fast")

FORMATS = ("onnx", "torch")
NOISES = ("none", "bump")
#: Largest difference from PyTorch, relative to the largest output where that exceeds 1.
TOLERANCE = 1e-4


class _Encode(nn.Module):
    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self.model.encode(x))


class _Decode(nn.Module):
    def __init__(self, model: Model, options: dict[str, str]):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, z: Tensor) -> Tensor:
        return self.model.decode(z, **self.options)


def export(
    source: str | os.PathLike,
    dest: str | os.PathLike,
    *,
    format: str = "onnx",
    noise: str = "none",
    averaged: bool = True,
) -> list[Path]:
    """Writes encoder and decoder of a snapshot, checkpoint or run as .onnx or .pt2 files into folder `dest`.

    The encoder takes `x` [B, ...] and gives `posterior_mean` and `posterior_logvar` [B, Z]; the decoder takes
    `z` [B, Z] and gives `x_hat` [B, ...]; all float32, B is free. Each file is run and compared with PyTorch
    before it gets its name.

    format: "onnx" (run by onnxruntime) or "torch" (`torch.export`, loads with torch alone).
    noise: of the style model's decoder: "none", or "bump", what the published one has in place of noise.
    Raises ValueError for unknown options, ImportError where packages are missing, RuntimeError where an
    exported network differs from PyTorch's by more than 1e-4.
    """
    for name, value, accepted in (("format", format, FORMATS), ("noise", noise, NOISES)):
        if value not in accepted:
            raise ValueError(f"{name} is {value!r}, must be one of {', '.join(accepted)}")
    model = load(source, averaged=averaged).requires_grad_(False)
    options = {"noise": noise} if model.config.model.kind == "style" else {}
    networks = {
        "encoder": (
            _Encode(model),
            _input_shape(model.config),
            ["x"],
            ["posterior_mean", "posterior_logvar"],
        ),
        "decoder": (_Decode(model, options), (model.latent_size,), ["z"], ["x_hat"]),
    }
    dest = Path(dest)
    dest.mkdir(parents=True, exist_ok=True)
    write, run, suffix = (
        (_write_onnx, _run_onnx, ".onnx") if format == "onnx" else (_write_torch, _run_torch, ".pt2")
    )
    paths = []
    for name, (network, shape, inputs, outputs) in networks.items():
        path = dest / f"{name}{suffix}"
        unproven = dest / f".{name}{suffix}"
        try:
            write(_program(network, shape), unproven, inputs, outputs)
            difference = max(_difference(network, shape, count, run, unproven) for count in (1, 3))
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f"{path.name} differs from PyTorch by {difference:.2g}, more than {TOLERANCE}"
                )
            os.replace(unproven, path)
        finally:
            unproven.unlink(missing_ok=True)
        logger.info("wrote %s, within %.1g of PyTorch", path, difference)
        paths.append(path)
    return paths


def _input_shape(config: Config) -> tuple[int, ...]:
    model = config.model
    if model.kind in ("style", "residual", "two_encoder"):
        return model.channels, model.resolution, model.resolution
    if model.kind == "pointnet":
        return model.points, 3
    return (2,)  # points in the plane


def _example(shape: tuple[int, ...], count: int) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(count)) * 2 - 1


def _program(network: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():  # strict: takes len(z) for the free size that it is
        return torch.export.export(network, (_example(shape, 2),), dynamic_shapes=({0: batch},), strict=True)


def _write_onnx(program, path: Path, inputs: list[str], outputs: list[str]) -> None:
    try:
        import onnxruntime  # noqa: F401 (the file is run before it is kept)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"ONNX needs a package that is missing ({error}): pip install onnx onnxscript onnxruntime"
        ) from error
    exported = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=inputs, output_names=outputs
    )
    exported.save(path)


def _run_onnx(path: Path, x: Tensor) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


def _write_torch(program, path: Path, inputs: list[str], outputs: list[str]) -> None:
    torch.export.save(program, path)


def _run_torch(path: Path, x: Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        results = torch.export.load(path).module()(x)
    return [result.numpy() for result in (results if isinstance(results, tuple) else (results,))]


def _difference(network: nn.Module, shape: tuple[int, ...], count: int, run, path: Path) -> float:
    x = _example(shape, count)
    with torch.no_grad():
        expected = network(x)
    expected = expected if isinstance(expected, tuple) else (expected,)
    worst = 0.0
    for ours, theirs in zip(expected, run(path, x), strict=True):
        ours = ours.numpy()
        worst = max(worst, float(np.abs(ours - theirs).max() / max(1.0, np.abs(ours).max())))
    return worst
