"""Settings of the process that training makes."""

import sys
from pathlib import Path

import pytest
import torch

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
    monkeypatch.setattr(step, "differences", lambda device: {"float64": (1.0, 0.0)})
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
