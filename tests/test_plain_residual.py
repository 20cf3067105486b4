"""Nine iterations of the training step against the published ones written out, float64, equal draws."""

import copy
import runpy
from pathlib import Path

import pytest
import torch

from sivae_fast.draws import Draws, Rows
from sivae_fast.models.residual import ResidualModel
from sivae_fast.objectives import SoftIntroVAE
from sivae_fast.training.step import Step, posterior_surrogate

PlainResidual = runpy.run_path(str(Path(__file__).parents[1] / "bench/plain_residual.py"))["PlainResidual"]
SMALL = {"resolution": 8, "channels": 3, "widths": (8, 16), "latent_size": 4}
BATCH = 6


def both(bootstrap, gamma_r, schedule):
    torch.manual_seed(0)
    model = ResidualModel(**SMALL, lagged_decoder=bootstrap).double().train()
    twin = copy.deepcopy(model)
    clock = {"images": 0}

    def draw(name, like):
        draws = Draws(7, clock["images"], Rows.all(BATCH))
        return draws.stream(name).normal(*like.shape, dtype=torch.float64)

    target = twin.target_decoder if bootstrap else twin.decoder
    plain = PlainResidual(twin.encoder, twin.decoder, target, (1.0, 0.5, 32.0), gamma_r, draw)
    objective = SoftIntroVAE(beta_rec=1.0, beta_kl=0.5, beta_neg=32.0, scale=1 / 192, gamma_r=gamma_r)
    return model, twin, plain, Step(model, objective, schedule=schedule), clock


def run_step(step, optimizers, x, images, warm_up):
    draws = Draws(7, images, Rows.all(BATCH))
    encoder, decoder = optimizers
    for optimizer in optimizers:
        optimizer.zero_grad()
    if warm_up:
        loss, posterior, cut = step.vae_phase(x, draws)
        loss.loss.backward()
        posterior_surrogate(posterior, cut).backward()
        encoder.step()
        decoder.step()
        return loss.loss.item()
    encoder_loss, shared = step.encoder_phase(x, draws)
    encoder_loss.loss.backward()
    encoder.step()
    decoder.zero_grad()
    decoder_loss = step.decoder_phase(x, draws, shared)
    decoder_loss.loss.backward()
    decoder.step()
    return encoder_loss.loss.item(), decoder_loss.loss.item()


@pytest.mark.parametrize("schedule", ["published", "minimal"])
@pytest.mark.parametrize(("bootstrap", "gamma_r"), [(False, 1e-8), (False, 0.5), (True, 1.0)])
def test_nine_iterations_follow_the_published_losses(bootstrap, gamma_r, schedule):
    model, twin, plain, step, clock = both(bootstrap, gamma_r, schedule)
    modules = model.encoder, model.decoder
    optimizers = [torch.optim.Adam(module.parameters(), lr=2e-4) for module in modules]
    data = torch.rand(9, BATCH, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for i, x in enumerate(data):
        clock["images"], warm_up = i * BATCH, i < 2
        expected = plain.warm_up(x) if warm_up else plain.iteration(x, 4)
        got = run_step(step, optimizers, x, clock["images"], warm_up)
        torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-9, atol=0)
        if bootstrap and i in (3, 6):  # the end of an epoch
            model.end_of_epoch(1)
            twin.end_of_epoch(1)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10, msg=name)


def test_the_published_schedule_makes_every_published_pass():
    model, twin, plain, step, _ = both(False, 1e-8, "published")
    optimizers = [torch.optim.Adam(module.parameters(), lr=2e-4) for module in (model.encoder, model.decoder)]
    x = torch.rand(BATCH, 3, 8, 8, dtype=torch.float64)
    plain.iteration(x, 4)
    run_step(step, optimizers, x, 0, False)
    for net in (model, twin):
        assert net.encoder.main[1].num_batches_tracked == 5
        assert net.decoder.main.res_in_4.bn1.num_batches_tracked == 8
