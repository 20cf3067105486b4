"""The step bench times nothing that does not compute the published update."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("step")
    for name in ("step", "plain_trainer", "plain_style", "measure"):
        sys.modules.pop(name, None)


def test_all_providers_compute_the_published_update(step):
    assert step.largest_difference() < 1e-10


def test_a_different_update_is_noticed_and_not_timed(step, monkeypatch):
    kl = lambda posterior: 0.5 * (posterior.logvar.exp() + posterior.mean.square() - posterior.logvar).sum(1)
    monkeypatch.setattr(step.PlainTrainer.encoder_loss.__globals__["kl"], "__code__", kl.__code__)
    assert step.largest_difference() > 1e-3  # the constant 1 matters inside the exponential
    monkeypatch.setattr(sys, "argv", ["step.py"])
    monkeypatch.setattr(step, "measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="no timing"):
        step.main()


def test_a_result_names_every_provider(step, monkeypatch, tmp_path):
    threads = torch.get_num_threads()
    out = tmp_path / "step.json"
    arguments = ["--resolution", "8", "--start-channels", "4", "--batches", "2", "4", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["step.py", *arguments, "--out", str(out)])
    try:
        step.main()
    finally:
        torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    assert set(found["ratio_to_plain"]) == set(step.providers(torch.device("cpu")))
    assert len(found["rows"]) == 2 * len(found["best"])
