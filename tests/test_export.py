"""Exported encoders and decoders give what PyTorch gives."""

from __future__ import annotations

import builtins
import errno
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from sivae_fast import export as exporting
from sivae_fast import files
from sivae_fast.checkpoint import load, save_snapshot
from sivae_fast.config import make_config
from sivae_fast.export import _difference, export
from sivae_fast.systems import make_model

STYLE = {"kind": "style", "resolution": 8, "start_channels": 4, "latent_size": 8, "mapping_layers": 2}
MODELS = {
    "style": STYLE,
    "residual": {"kind": "residual", "resolution": 8, "widths": (4, 8), "latent_size": 3},
    "pointnet": {"kind": "pointnet", "points": 12, "latent_size": 4},
    "mlp": {"kind": "mlp", "width": 8},
    "two_encoder": {"kind": "two_encoder", "resolution": 8, "width": 4, "class_size": 5, "content_size": 3},
}


def snapshot(path, settings, **growth) -> str:
    error = {"reconstruction": "chamfer" if settings["kind"] == "pointnet" else "sse"}
    data = {"pointnet": {"kind": "pointclouds", "points": 12}, "mlp": {"kind": "density"}}
    data |= {"two_encoder": {"kind": "factors"}}
    data = data.get(settings["kind"], {"kind": "images"})
    config = make_config({"model": settings, "objective": error, "data": data, "growth": growth})
    model = make_model(config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "bias" in name or "noise" in name or "const" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_snapshot(path / "model.safetensors", model, config, 0)
    return path / "model.safetensors"


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ["mlp", *(pytest.param(kind, marks=SLOW) for kind in MODELS if kind != "mlp")]
)
def test_torch_programs_run_without_the_package(tmp_path, kind):
    source = snapshot(tmp_path, MODELS[kind])
    encoder, decoder = export(source, tmp_path / "out", format="torch")
    model = load(source)
    z = torch.randn(5, model.latent_size)
    options = {"noise": "none"} if kind == "style" else {}
    with torch.no_grad():
        x = model.decode(z, **options)
        torch.testing.assert_close(torch.export.load(decoder).module()(z), x, rtol=1e-5, atol=1e-5)
        mean, logvar = torch.export.load(encoder).module()(x)
    torch.testing.assert_close(mean, model.encode(x).mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logvar, model.encode(x).logvar, rtol=1e-5, atol=1e-5)


def test_a_growing_model_is_exported_at_the_level_that_it_reached(tmp_path):
    """Here the first of two, 4x4 pixels."""
    source = snapshot(tmp_path, STYLE, images_per_level=1000)
    encoder, decoder = export(source, tmp_path / "out", format="torch")
    model = load(source)
    with torch.no_grad():
        x = torch.export.load(decoder).module()(torch.randn(2, 8))
        mean, _ = torch.export.load(encoder).module()(x)
        assert x.shape == (2, 3, 4, 4)
        torch.testing.assert_close(mean, model.encode(x).mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "noise"),
    [
        ("style", "bump"),
        pytest.param("style", "none", marks=SLOW),
        *(pytest.param(kind, "none", marks=SLOW) for kind in MODELS if kind != "style"),
    ],
)
def test_onnx_files_run_in_onnxruntime(tmp_path, kind, noise):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    source = snapshot(tmp_path, MODELS[kind])
    encoder, decoder = export(source, tmp_path / "out", noise=noise)
    model = load(source)
    z = torch.randn(4, model.latent_size)
    options = {"noise": noise} if kind == "style" else {}
    with torch.no_grad():
        x = model.decode(z, **options)
        posterior = model.encode(x)
    session = runtime.InferenceSession(decoder, providers=["CPUExecutionProvider"])
    (image,) = session.run(["x_hat"], {"z": z.numpy()})
    np.testing.assert_allclose(image, x.numpy(), rtol=0, atol=1e-5)
    session = runtime.InferenceSession(encoder, providers=["CPUExecutionProvider"])
    mean, logvar = session.run(["posterior_mean", "posterior_logvar"], {"x": x.numpy()})
    np.testing.assert_allclose(mean, posterior.mean.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(logvar, posterior.logvar.numpy(), rtol=0, atol=1e-5)


def test_an_export_that_differs_is_not_kept(tmp_path, monkeypatch):
    source = snapshot(tmp_path, MODELS["mlp"])
    right = exporting._run_torch
    monkeypatch.setattr(exporting, "_run_torch", lambda content, x: [y + 0.001 for y in right(content, x)])
    with pytest.raises(RuntimeError, match=r"encoder\.pt2 differs from PyTorch by 0\.001"):
        export(source, tmp_path / "out", format="torch")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_in_one_line_and_nothing_is_left(tmp_path, monkeypatch):
    source = snapshot(tmp_path, MODELS["mlp"])
    written = []

    def full(descriptor):
        written.append(descriptor)
        if len(written) > 1:  # the decoder does not fit any more
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    message = re.escape(f"no space left on the disk while writing {tmp_path / 'out'}; nothing was written")
    with pytest.raises(OSError, match=message + "$"):
        export(source, tmp_path / "out", format="torch")
    assert written and not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_the_command_says_no_more_than_what_it_made(tmp_path, form):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    out, suffix = tmp_path / "out", "onnx" if form == "onnx" else "pt2"
    command = ["export", str(snapshot(tmp_path, MODELS["mlp"])), str(out), "--format", form]
    done = subprocess.run([sys.executable, "-m", "sivae_fast.cli", *command], capture_output=True, text=True)
    assert done.stdout == f"{out / 'encoder'}.{suffix}\n{out / 'decoder'}.{suffix}\n"
    said = [re.sub(r"[\d.e-]+ of", "", line) for line in done.stderr.splitlines()]
    assert said == [f"{name}.{suffix} is within  PyTorch" for name in ("encoder", "decoder")]


def test_wrong_options_and_missing_packages_are_named(tmp_path, monkeypatch):
    source = snapshot(tmp_path, MODELS["mlp"])
    with pytest.raises(ValueError, match="format is 'tflite', must be one of onnx, torch"):
        export(source, tmp_path, format="tflite")
    with pytest.raises(ValueError, match="noise is 'sample', must be one of none, bump"):
        export(source, tmp_path, noise="sample")
    with pytest.raises(ValueError, match="noise=bump: this model is of kind mlp, noise needs style"):
        export(source, tmp_path, noise="bump")
    real = builtins.__import__

    def without_onnx(name, *args, **kwargs):
        if name.startswith("onnx"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_onnx)
    with pytest.raises(ImportError, match="pip install onnx onnxscript onnxruntime"):
        export(source, tmp_path / "out")


@pytest.mark.parametrize("broken", [1, 3])
def test_nan_is_not_equal_to_anything(broken):
    run = lambda content, x: [np.full((len(x), 2), np.nan if len(x) == broken else 0, np.float32)]
    assert np.isnan(_difference(torch.nn.Identity(), (2,), broken, run, b""))


def test_a_target_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "picture.png").touch()
    monkeypatch.setattr(exporting, "load", None)
    with pytest.raises(OSError, match=r"picture\.png"):
        export(tmp_path / "run", tmp_path / "picture.png")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
