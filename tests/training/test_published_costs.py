"""Multiply-adds of the published networks and iterations, counted on tensors without data."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sivae_fast.draws import Draws, Rows
from sivae_fast.models.residual import SIZES, ResidualModel
from sivae_fast.models.style import StyleModel
from sivae_fast.objectives import SoftIntroVAE
from sivae_fast.training.step import Step, posterior_surrogate
from tests.training.test_device_only import META, NoNumbers, no_autocast  # noqa: F401

PlainStyle = runpy.run_path(str(Path(__file__).parents[2] / "bench/plain_style.py"))["PlainStyle"]

# G multiply-adds of encoder and decoder for one image, from 4x4 to 256x256, as published.
STYLE = [
    (0.077, 0.039),
    (0.380, 0.342),
    (1.591, 1.553),
    (6.429, 6.391),
    (13.689, 13.651),
    (18.275, 18.236),
    (22.882, 22.844),
]
# Those of the 3x3 convolutions in them that the published networks put before pooling (encoder) or after
# enlarging (decoder), 8x8 to 64x64 (the encoder's first at 4x4); merged with it they take 4/9.
RESAMPLING = [(0.0377, 0.0), (0.151, 0.151), (0.604, 0.604), (2.416, 2.416), (4.832, 4.832)]
# The same for the residual models, and what one iteration takes, plain and with the lagged decoder.
RESIDUAL = {
    "cifar10": (0.142, 0.161),
    "svhn": (0.142, 0.161),
    "mnist": (0.061, 0.097),
    "fmnist": (0.061, 0.097),
    "monsters128": (3.277, 3.125),
    "celeb128": (3.279, 3.126),
    "celeb256": (13.18, 12.57),
    "celeb1024": (21.64, 17.41),
}
RESIDUAL_ITERATIONS = {"cifar10": (4.88, 4.56), "monsters128": (101.7, 95.5), "celeb256": (409.2, 384.1)}


def giga(run) -> float:
    """G multiply-adds of `run()`."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2e9


def printed(value: float, decimals: int):
    """`value` to the last of its printed decimals."""
    return pytest.approx(value, abs=0.6 * 10**-decimals)


def draws() -> Draws:
    return Draws(0, 0, Rows.all(1), META, NoNumbers)


def phases(model, x, gamma_r=1e-8, **options) -> tuple[float, float]:
    """G multiply-adds of the encoder phase and of the decoder phase, backward passes included."""
    objective = SoftIntroVAE(beta_rec=0.1, beta_kl=0.2, beta_neg=512, scale=5e-6, gamma_r=gamma_r)
    step, made = Step(model, objective, schedule="published", **options), []

    def encoder_phase():
        loss, shared = step.encoder_phase(x, draws())
        made.append(shared)
        loss.loss.backward()

    encoder = giga(encoder_phase)
    return encoder, giga(lambda: step.decoder_phase(x, draws(), *made).loss.backward())


def warm_up(model, x) -> None:
    objective = SoftIntroVAE(beta_rec=0.1, beta_kl=0.2, beta_neg=512, scale=5e-6)
    loss, posterior, cut = Step(model, objective).vae_phase(x, draws())
    loss.loss.backward()
    posterior_surrogate(posterior, cut).backward()


@pytest.fixture(scope="module")
def styles():
    """(published form, ours), of the size of the published ones."""
    ours = StyleModel()
    return PlainStyle(ours).to(META), ours.to(META)


def sides(model, x) -> tuple[float, float]:
    z = torch.empty(1, model.latent_size, device=META)
    stream = NoNumbers("", Rows.all(1))
    with torch.no_grad():
        return giga(lambda: model.encode(x)), giga(lambda: model.decode(z, stream))


@pytest.mark.parametrize("lod", range(7))
def test_passes_of_the_style_model(styles, lod):
    plain, ours = styles
    x = torch.empty(1, 3, 4 << lod, 4 << lod, device=META)
    for model in styles:
        model.set_level(lod, 1.0)
    saved = [5 / 9 * sum(side) for side in zip(*RESAMPLING[: lod + 1], strict=True)]
    mappings = (0.00105, 0.0021)
    found, merged = sides(plain, x), sides(ours, x)
    for side in range(2):
        expected = STYLE[lod][side] + mappings[side]
        assert found[side] == printed(expected, 3)
        assert merged[side] == pytest.approx(expected - saved[side], abs=2e-3)


def test_iteration_of_the_style_model(styles):
    plain, _ = styles
    plain.set_level(6, 1.0)
    x = torch.empty(1, 3, 256, 256, device=META)
    encoder, decoder = phases(plain, x, fresh_draws=True)
    assert encoder == pytest.approx(365.6, rel=1e-3)
    assert decoder == pytest.approx(388.3, rel=1e-3)
    assert encoder + decoder == pytest.approx(753.9, rel=1e-3)
    assert giga(lambda: warm_up(plain, x)) == pytest.approx(137.0, rel=1e-3)


def residual(name, **options):
    size = SIZES[name]
    with META:
        model = ResidualModel(**size, **options)
    return model, torch.empty(1, size["channels"], size["resolution"], size["resolution"], device=META)


@pytest.mark.parametrize("name", RESIDUAL)
def test_passes_of_the_residual_model(name):
    decimals = 2 if RESIDUAL[name][0] > 10 else 3
    for found, expected in zip(sides(*residual(name)), RESIDUAL[name], strict=True):
        assert found == printed(expected, decimals)


@pytest.mark.parametrize("name", RESIDUAL_ITERATIONS)
def test_iterations_of_the_residual_model(name):
    plain, bootstrap = RESIDUAL_ITERATIONS[name]
    assert sum(phases(*residual(name))) == pytest.approx(plain, rel=2e-3)
    lagged = phases(*residual(name, lagged_decoder=True), gamma_r=1.0)
    assert sum(lagged) == pytest.approx(bootstrap, rel=2e-3)
    if name == "celeb256":
        assert phases(*residual(name)) == pytest.approx((89.8 + 115.8, 76.7 + 126.9), rel=1e-3)
        assert lagged[1] == pytest.approx(76.7 + 101.8, rel=1e-3)
