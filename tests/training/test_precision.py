"""Training under bf16 autocast follows float32."""

import functools

import pytest
import torch

from sivae_fast.draws import Draws, Rows
from sivae_fast.models.style import StyleModel
from sivae_fast.objectives import SoftIntroVAE
from sivae_fast.training.engine import make_engine
from sivae_fast.training.optim import make_optimizer, set_learning_rate
from sivae_fast.training.step import Step

BATCH, ITERATIONS, WINDOW = 8, 200, 20


def blobs(count: int = 64) -> torch.Tensor:
    """Images [count, 3, 8, 8] in [-1, 1]: a bright blob on a dark ground, place and colour at random."""
    generator = torch.Generator().manual_seed(0)
    place = torch.rand(count, 2, 1, 1, generator=generator) * 5 + 1.5
    colour = torch.rand(count, 3, 1, 1, generator=generator)
    rows, columns = torch.arange(8.0)[:, None], torch.arange(8.0)[None, :]
    distance = (rows - place[:, 0]) ** 2 + (columns - place[:, 1]) ** 2
    return 1.5 * colour * torch.exp(-distance / 4)[:, None] - 0.8


def trained(autocast: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Means over windows of 20 iterations of what a run of 200 reports."""
    torch.manual_seed(0)
    model = StyleModel(8, start_channels=8, max_channels=16, latent_size=8, mapping_layers=2)
    objective = SoftIntroVAE(beta_rec=1.0, beta_kl=0.2, beta_neg=64.0, scale=8e-3)
    step = Step(model, objective, autocast=autocast)
    optimizer = functools.partial(make_optimizer, betas=(0.0, 0.99), published_eps=True)
    engines = [make_engine(model, side, optimizer, kind="torch") for side in ("encoder", "decoder")]
    for engine in engines:
        set_learning_rate(engine.optimizer, 0.002)
    images, found = blobs(), []
    for i in range(ITERATIONS):
        draws = Draws(0, i * BATCH, Rows.all(BATCH))
        x = images[torch.arange(i * BATCH, (i + 1) * BATCH) % len(images)]
        loss, shared = step.encoder_phase(x, draws)
        engines[0].backward(loss.loss)
        engines[0].step()
        decoder_loss = step.decoder_phase(x, draws, shared).loss
        engines[1].backward(decoder_loss)
        engines[1].step()
        row = {"loss_encoder": loss.loss.detach(), "loss_decoder": decoder_loss.detach()}
        found.append(row | {name: values.mean() for name, values in loss.statistics.items()})
    return {name: torch.stack([row[name] for row in found]).view(-1, WINDOW).mean(1) for name in found[0]}


@pytest.fixture(scope="module")
def runs():
    return trained(None), trained(torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "band"), [("rec_real", 0.05), ("loss_encoder", 0.05), ("loss_decoder", 0.05), ("kl_real", 0.25)]
)
def test_two_hundred_iterations_follow_float32(runs, name, band):
    """Largest relative difference of any window; the KL is what both networks fight over and wanders most."""
    full, half = (run[name] for run in runs)
    assert torch.isfinite(half).all()
    worst = ((half - full).abs() / full.abs()).max()
    assert worst < band
