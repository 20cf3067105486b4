"""Settings of the process that training makes."""

import sys
from pathlib import Path

import pytest
import torch

from sivae_fast.config import Config
from sivae_fast.training import device, iteration
from sivae_fast.training.device import prepare

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(autouse=True)
def as_pytorch_has_it(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def test_cudnn_chooses_by_trying_on_a_gpu_alone(monkeypatch):
    kept = []
    monkeypatch.setattr(device, "keep_freed_memory", lambda: kept.append(True))
    prepare(torch.device("cpu"))
    assert kept and not torch.backends.cudnn.benchmark
    prepare(torch.device("cuda"))
    assert len(kept) == 1 and torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def config(kind, precision, objective="soft_introvae"):
    data = {"mlp": "density", "residual": "images"}[kind]
    sections = {"model": {"kind": kind}, "data": {"kind": data}, "objective": {"kind": objective}}
    return Config.model_validate({**sections, "train": {"precision": precision}})


@pytest.mark.parametrize(
    ("kind", "place", "multiplies", "found"),
    [
        ("mlp", "cpu", True, "bf16"),
        ("mlp", "cpu", False, "fp32"),
        ("mlp", "cuda", True, "fp32"),
        ("residual", "cpu", True, "fp32"),
    ],
)
def test_auto_lowers_where_that_was_measured(monkeypatch, kind, place, multiplies, found):
    monkeypatch.setattr(device, "multiplies_bf16", lambda: multiplies)
    assert device.precision(config(kind, "auto"), torch.device(place)) == found


def test_auto_lowers_no_objective_that_was_not_measured_enough(monkeypatch):
    monkeypatch.setattr(device, "multiplies_bf16", lambda: True)
    assert device.precision(config("mlp", "auto", "vae"), torch.device("cpu")) == "fp32"


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_a_precision_that_is_asked_for_is_kept(asked):
    assert device.precision(config("mlp", asked), torch.device("cpu")) == asked


@pytest.mark.parametrize(
    ("machine", "avx512_bf16", "amx", "found"),
    [
        ("x86_64", True, False, True),
        ("AMD64", False, True, True),
        ("x86_64", False, False, False),
        ("aarch64", False, False, True),
    ],
)
def test_a_processor_multiplies_bfloat16_by_its_own_instructions(
    monkeypatch, machine, avx512_bf16, amx, found
):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(device.platform, "machine", lambda: machine)
    assert device.multiplies_bf16() == found
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not device.multiplies_bf16()


def test_it_is_told_before_there_is_a_network(monkeypatch):
    def no_model(config):
        raise InterruptedError

    seen = []
    monkeypatch.setattr(iteration, "prepare", seen.append)
    monkeypatch.setattr(iteration, "make_model", no_model)
    with pytest.raises(InterruptedError):
        iteration.Iteration(None, (3, 8, 8), 0, 1, torch.device("cuda"))
    assert seen == [torch.device("cuda")]


def test_the_step_bench_gives_all_its_trainers_the_same(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    step = __import__("step")
    seen = []
    monkeypatch.setattr(step, "prepare", seen.append)
    monkeypatch.setattr(step, "differences", lambda device: ({}, {"float64": "they differ"}))
    monkeypatch.setattr(sys, "argv", ["step.py"])
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit, match="no timing"):
            step.main()
    finally:
        torch.set_num_threads(threads)
        for name in ("step", "plain_trainer", "plain_style", "measure"):
            sys.modules.pop(name, None)
    assert len(seen) == 1
