"""The bench of the small systems times nothing whose losses are not those of the plain iteration."""

import importlib
import json
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sivae_fast.training import graphs
from tests.training.emulated import EmulatedRecorder

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("small")
    for name in ("small", "plain", "measure"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["density", "residual"])
def test_captured_losses_are_the_plain_ones(small, name, monkeypatch, tmp_path):
    monkeypatch.setattr(graphs, "CudaRecorder", EmulatedRecorder)
    monkeypatch.setattr(small, "contenders", lambda device: {"graphs": ["train.graphs=true"]})
    assert max(small.largest_differences(small.System(name, tmp_path, torch.device("cpu")))) < 1e-5


def test_another_loss_is_noticed_and_not_timed(small, monkeypatch, tmp_path):
    density = small.density_2d
    monkeypatch.setattr(small, "density_2d", lambda **options: density(beta_kl=3.0, **options))
    monkeypatch.setattr(small, "measure", lambda system, _: {"timed": system.name})
    out, threads = tmp_path / "small.json", torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["small.py", "--out", str(out)])
    try:
        with pytest.raises(SystemExit, match="no timing"):
            small.main()
    finally:
        torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    assert set(found["refused"]) == {"density"} and found["systems"]["residual"]["timed"] == "residual"


def test_a_compiled_plain_iteration_is_timed_if_it_has_the_same_losses(small, monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    options = SimpleNamespace(seconds=0.01, rounds=1)
    forms = {"plain, compiled": {"backend": "eager"}, "plain, broken": {"backend": "no such backend"}}
    monkeypatch.setattr(small, "compiled", lambda device: forms)
    for name in small.SYSTEMS:
        system = small.System(name, tmp_path, cpu)
        found = small.measure(system, options)
        assert set(found["ratio_to_plain"]) == {"plain", "plain, compiled", "eager"}
        assert set(found["refused"]) == {"plain, broken"}
    plain = system.plain
    monkeypatch.setattr(
        system, "plain", lambda trainer, of=None: (lambda *_: (1.0, 1.0)) if of else plain(trainer)
    )
    with closing(system.trainer()) as trainer, pytest.raises(ValueError, match="losses"):
        x = system.input(trainer, next(trainer._batches()))
        small.compiled_plain(system, trainer, x, {"backend": "eager"})


def test_a_result_names_every_contender(small, monkeypatch, tmp_path):
    threads, out = torch.get_num_threads(), tmp_path / "small.json"
    monkeypatch.setattr(sys, "argv", ["small.py", "--rounds", "1", "--seconds", "0.01", "--out", str(out)])
    try:
        small.main()
    finally:
        torch.set_num_threads(threads)
    for system in json.loads(out.read_text())["systems"].values():
        assert set(system["ratio_to_plain"]) == {"plain", "eager"} and max(system["losses_differ_by"]) < 1e-5
