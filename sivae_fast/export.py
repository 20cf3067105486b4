"""Encoders and decoders for use without this package: ONNX files and `torch.export` programs."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sivae_fast.checkpoint import load
from sivae_fast.contract import Model
from sivae_fast.files import filling, write_bytes
from sivae_fast.inference import IMAGE_MODELS
from sivae_fast.trained import batch_norm_is_measured_anew

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
    before either is written.

    format: "onnx" (run by onnxruntime) or "torch" (`torch.export`, loads with torch alone).
    noise: of the style model's decoder: "none", or "bump", what the published one has in place of noise.
    Raises ValueError for unknown options, ImportError where packages are missing, RuntimeError where an
    exported network differs from PyTorch's by more than 1e-4, OSError where the files cannot be written; in
    all cases `dest` is as it was.
    """
    for name, value, accepted in (("format", format, FORMATS), ("noise", noise, NOISES)):
        if value not in accepted:
            raise ValueError(f"{name} is {value!r}, must be one of {', '.join(accepted)}")
    with filling(dest):  # what cannot be written is told before the work
        pass
    model = load(source, averaged=averaged).requires_grad_(False)
    kind = model.config.model.kind
    if noise != "none" and kind != "style":
        raise ValueError(f"noise={noise}: this model is of kind {kind}, noise needs style")
    if batch_norm_is_measured_anew(model):
        logger.warning(
            "batch norm is exported with the running statistics of training, which can give worse pictures "
            "than `sivae-fast sample` does"
        )
    options = {"noise": noise} if kind == "style" else {}
    networks = {
        "encoder": (
            _Encode(model),
            _input_shape(model),
            ["x"],
            ["posterior_mean", "posterior_logvar"],
        ),
        "decoder": (_Decode(model, options), (model.latent_size,), ["z"], ["x_hat"]),
    }
    pack, run, suffix = (
        (_pack_onnx, _run_onnx, ".onnx") if format == "onnx" else (_pack_torch, _run_torch, ".pt2")
    )
    files: dict[str, bytes] = {}
    for name, (network, shape, inputs, outputs) in networks.items():
        with _quiet():
            content = pack(_program(network, shape), inputs, outputs)
        difference = np.max([_difference(network, shape, count, run, content) for count in (1, 3)])
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"{name}{suffix} differs from PyTorch by {difference:.2g}, more than {TOLERANCE}"
            )
        logger.info("%s%s is within %.1g of PyTorch", name, suffix, difference)
        files[f"{name}{suffix}"] = content
    with filling(dest) as folder:
        for name, content in files.items():
            write_bytes(folder / name, content)
    return [Path(dest) / name for name in files]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters tell of their work: the comparison with PyTorch says whether it is right."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


def _input_shape(model: Model) -> tuple[int, ...]:
    settings = model.config.model
    if settings.kind in IMAGE_MODELS:
        # The model's own: growing ones may have been stopped at a lower level than they are made for.
        return settings.channels, model.resolution, model.resolution
    if settings.kind == "pointnet":
        return settings.points, 3
    return (2,)  # points in the plane


def _example(shape: tuple[int, ...], count: int) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(count)) * 2 - 1


def _program(network: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():  # strict: takes len(z) for the free size that it is
        return torch.export.export(network, (_example(shape, 2),), dynamic_shapes=({0: batch},), strict=True)


def _pack_onnx(program, inputs: list[str], outputs: list[str]) -> bytes:
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
    return exported.model_proto.SerializeToString()


def _run_onnx(content: bytes, x: Tensor) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


def _pack_torch(program, inputs: list[str], outputs: list[str]) -> bytes:
    file = io.BytesIO()  # PyTorch's own writer aborts the process where the disk is full
    torch.export.save(program, file)
    return file.getvalue()


def _run_torch(content: bytes, x: Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        results = torch.export.load(io.BytesIO(content)).module()(x)
    return [result.numpy() for result in (results if isinstance(results, tuple) else (results,))]


def _difference(network: nn.Module, shape: tuple[int, ...], count: int, run, content: bytes) -> float:
    x = _example(shape, count)
    with torch.no_grad():
        expected = network(x)
    expected = expected if isinstance(expected, tuple) else (expected,)
    worst = []
    for ours, theirs in zip(expected, run(content, x), strict=True):
        ours = ours.numpy()
        worst.append(np.abs(ours - theirs).max() / max(1.0, np.abs(ours).max()))
    return float(np.max(worst))  # NaN where one is, which is within no tolerance
