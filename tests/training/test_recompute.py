"""Recomputed activations: the same update, less memory."""

import copy

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from sivae_fast.config import ConfigError, make_config
from sivae_fast.draws import Draws, Rows
from sivae_fast.models.style import StyleModel
from sivae_fast.objectives import SoftIntroVAE
from sivae_fast.training.recompute import recompute
from sivae_fast.training.step import Step


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = StyleModel(16, start_channels=4, max_channels=8, latent_size=8, mapping_layers=2).double()
    with torch.no_grad():  # a constant map before an instance norm would amplify rounding
        model.decoder.const.normal_()
    return model


def update(model, **options):
    """Gradients of one iteration."""
    objective = SoftIntroVAE(beta_rec=0.5, beta_kl=0.3, beta_neg=4.0, scale=0.01)
    step = Step(model, objective, **options)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    draws = Draws(0, 0, Rows.all(4))
    loss, shared = step.encoder_phase(x, draws)
    loss.loss.backward()
    step.decoder_phase(x, draws, shared).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def bytes_kept(model):
    """What a reconstruction keeps for its backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.decode(model.encode(torch.zeros(4, 3, 16, 16, dtype=torch.float64)).mean)
    return sum(kept.values())


@pytest.mark.parametrize("options", [{}, {"share_forward": False}, {"schedule": "published"}], ids=str)
def test_same_gradients(model, options):
    kept = update(copy.deepcopy(model), **options)
    recompute(model.recomputable_modules())
    again = update(model, **options)
    assert kept.keys() == again.keys()
    for name in kept:
        torch.testing.assert_close(again[name], kept[name], rtol=1e-12, atol=1e-15)


def test_less_is_kept(model):
    before = bytes_kept(model)
    recompute(model.recomputable_modules())
    assert bytes_kept(model) < 0.4 * before


def test_a_copy_of_a_recomputing_model_is_its_own(model):
    recompute(model.recomputable_modules())
    other = copy.deepcopy(model)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before = model.encode(x).mean
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert torch.equal(model.encode(x).mean, before) and not torch.equal(other.encode(x).mean, before)


def test_other_models_refuse_it():
    with pytest.raises(ConfigError, match=r"train\.recompute=true needs model\.kind=style"):
        make_config({"model": {"kind": "mlp"}, "train": {"recompute": True}, "data": {"kind": "density"}})
