"""The options of the objectives: what is refused, what may change and when."""

import copy

import pytest
import torch

from sivae_fast import VAE, IntroVAE, SoftIntroVAE
from tests.objective_terms import batch, same

GOOD = {"beta_rec": 1.0, "beta_kl": 1.0, "beta_neg": 1.0, "scale": 1.0}
WRONG = {
    "negative": ({"beta_kl": -1.0}, "beta_kl is -1.0, must not be negative"),
    "infinite": ({"beta_neg": float("inf")}, "beta_neg is inf, must be a finite number"),
    "text": ({"beta_rec": "1"}, "beta_rec is '1', must be a finite number"),
    "zero scale": ({"scale": 0}, "scale is 0, must be positive"),
    "alpha": ({"alpha": -2.0}, "alpha is -2.0, must be positive"),
    "prior": ({"prior_std": 0.0}, "prior_std is 0.0, must be positive"),
    "reconstruction": (
        {"reconstruction": "mse"},
        "reconstruction is 'mse', must be one of sse, l1, huber, bce",
    ),
    "tensor": (
        {"beta_neg": torch.tensor(3.0)},
        r"beta_neg is tensor\(3.\), must be a finite number: float\(beta_neg\)",
    ),
    "clamp of one": (
        {"logvar_clamp": 3},
        r"logvar_clamp is 3, must be \(low, high\) with low < high, or None",
    ),
    "clamp of text": ({"logvar_clamp": "ab"}, r"logvar_clamp is 'ab', must be \(low, high\)"),
    "fakes without weights": ({"fakes": ["a", "b"]}, r"fakes is \['a', 'b'\], must be weights by name"),
    "clamp": ({"logvar_clamp": (2.0, -2.0)}, r"logvar_clamp is \(2.0, -2.0\), must be \(low, high\)"),
    "fakes": ({"fakes": {"fake": 0.4}}, "fakes is {'fake': 0.4}, must hold weights that sum to 1"),
    "fakes that nearly sum to 1": ({"fakes": {"fake": 0.99}}, "must hold weights that sum to 1"),
    "a fake called real": ({"fakes": {"rec": 0.5, "real": 0.5}}, "and no source 'real'"),
}


@pytest.mark.parametrize(("option", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options(option, message):
    with pytest.raises(ValueError, match=message):
        SoftIntroVAE(**{**GOOD, **option})


@pytest.mark.parametrize("option", ["prior_sd", "priorstd", "logvar_clip", "margin", "prior_mean", "hinge"])
def test_an_unknown_option_is_refused(option):
    """Accepted without a word, it would leave the run with the default."""
    with pytest.raises(
        TypeError, match=f"{option} is no option of SoftIntroVAE, accepted are .* prior_std, "
    ):
        SoftIntroVAE(**GOOD, **{option: 0.3})
    objective = SoftIntroVAE(**GOOD)
    with pytest.raises(AttributeError):
        setattr(objective, option, 0.3)


def test_options_of_other_objectives_are_refused():
    hinge = {"beta_rec": 1, "beta_kl": 1, "beta_neg": 1, "margin": 1}
    for option in ("scale", "alpha"):
        with pytest.raises(TypeError, match=f"{option} is no option of IntroVAE, accepted are .* hinge"):
            IntroVAE(**hinge, **{option: 0.25})
    with pytest.raises(
        TypeError, match="beta_neg is no option of VAE, accepted are beta_rec, beta_kl, prior"
    ):
        VAE(beta_neg=2.0)
    with pytest.raises(AttributeError, match="beta_neg is no option of VAE"):
        VAE().beta_neg = 2.0
    with pytest.raises(AttributeError, match="hinge of an objective cannot be changed"):
        IntroVAE(**hinge).hinge = "batch"


def test_options_can_be_changed_within_their_bounds():
    objective = SoftIntroVAE(**GOOD)
    with pytest.raises(AttributeError, match="beta_negg is no option of SoftIntroVAE, accepted are beta_rec"):
        objective.beta_negg = 5.0
    with pytest.raises(AttributeError, match="fakes of an objective cannot be changed"):
        objective.fakes = {"fake": 1.0}
    with pytest.raises(ValueError, match="prior_std is -3, must be positive"):
        objective.prior_std = -3
    objective.prior_std = 0.3
    same(objective.vae(batch()[0]), SoftIntroVAE(**GOOD, prior_std=0.3).vae(batch()[0]).loss)
    assert copy.deepcopy(objective).eval().prior_std == 0.3


def test_wrong_changes_leave_the_old_weight():
    objective = SoftIntroVAE(**GOOD)
    with pytest.raises(ValueError, match=r"beta_neg is nan"):
        objective.beta_neg = float("nan")
    assert objective.beta_neg == 1.0
    with pytest.raises(ValueError, match="hinge is 'all', must be one of sample, batch"):
        IntroVAE(beta_rec=1, beta_kl=1, beta_neg=1, margin=1, hinge="all")
