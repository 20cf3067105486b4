"""The plain iterations of the benches on tensors without data, as tests/training/test_device_only.py has it.

A tensor of another device fails there as it would fail on a GPU. Reading back, too, except by `.item()`, with
which some of the published iterations end: those are counted.
"""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from sivae_fast.draws import Draws, Rows
from sivae_fast.models.residual import ResidualModel
from sivae_fast.models.style import StyleModel
from tests.training.test_device_only import META, NoNumbers, no_autocast  # noqa: F401

BENCH = Path(__file__).parents[1] / "bench"
BATCH = 4


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for name in ("memory", "step", "plain", "plain_residual", "plain_trainer", "plain_style", "measure"):
        sys.modules.pop(name, None)


@pytest.fixture
def read_back(monkeypatch):
    """The meta tensors that `.item()` was called for."""
    found, item = [], torch.Tensor.item

    def counted(tensor):
        if tensor.device != META:
            return item(tensor)  # the optimizers' own count of steps
        found.append(tensor)
        return 0.0

    monkeypatch.setattr(torch.Tensor, "item", counted)
    return found


def empty_normal(name, like):
    return torch.empty_like(like)


def test_density(bench, read_back):
    with META:
        net = bench("plain").density_2d(normal=empty_normal)
        x = torch.empty(BATCH, 2)
    for iteration, losses in ((net.vae, 1), (net.soft, 2)):
        for _ in range(2):
            read_back.clear()
            iteration(x)
            assert len(read_back) == losses


@pytest.mark.parametrize("bootstrap", [False, True])
def test_residual(bench, read_back, bootstrap):
    options = {"resolution": 8, "channels": 3, "widths": (8, 16), "latent_size": 4}
    model = ResidualModel(**options, lagged_decoder=bootstrap).to(META)
    target = model.target_decoder if bootstrap else model.decoder
    plain = bench("plain_residual").PlainResidual(
        model.encoder, model.decoder, target, (1.0, 0.5, 32.0), 1e-8, empty_normal
    )
    x = torch.empty(BATCH, 3, 8, 8, device=META)
    for iteration, losses in ((plain.warm_up, 1), (lambda x: plain.iteration(x, 4), 2)):
        for _ in range(2):
            read_back.clear()
            iteration(x)
            assert len(read_back) == losses


STYLE = ["plain", "published schedule", "minimal, decoding twice", "minimal", "minimal, recomputing"]


def iterate_style(bench, name, blend):
    providers = bench("step").providers(META)
    assert set(STYLE) >= set(providers)
    make = providers.get(name) or bench("memory").PROVIDERS[name]
    model = StyleModel(8, start_channels=4, max_channels=8, latent_size=8, mapping_layers=2)
    model.set_level(1, blend)
    iteration = make(model if name == "plain" else model.to(META))  # the plain networks are moved when filled
    x = torch.empty(BATCH, 3, 8, 8, device=META)
    for _ in range(2):  # the second one has the optimizers' state
        iteration(x, Draws(0, 0, Rows.all(BATCH), META, NoNumbers))


@pytest.mark.parametrize("name", STYLE)
@pytest.mark.parametrize("blend", [1.0, 0.5])
def test_style(bench, name, blend):
    iterate_style(bench, name, blend)


def test_a_tensor_of_another_device_is_found(bench, monkeypatch):
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *sizes, device=None: arange(*sizes))
    with pytest.raises(RuntimeError, match="meta"):
        iterate_style(bench, "plain", 1.0)
