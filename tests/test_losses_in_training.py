"""The losses inside autocast, gradient accumulation and DistributedDataParallel."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sivae_fast import Posterior, SoftIntroVAE, Term

OBJECTIVE = {"beta_rec": 0.5, "beta_kl": 0.8, "beta_neg": 2.0, "scale": 0.05}


class Networks(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(12, 8), nn.Linear(4, 12)

    def forward(self, x, noise):
        """Terms of an encoder phase, all passes in one call."""
        objective = SoftIntroVAE(**OBJECTIVE)
        posterior = Posterior(*self.encoder(x).chunk(2, 1))
        rec = self.decoder(objective.reparameterize(posterior, noise))
        seen = Posterior(*self.encoder(rec).chunk(2, 1))
        rec_rec = self.decoder(seen.mean)
        return Term(x, rec, posterior), Term(rec, rec_rec, seen)


@pytest.fixture
def networks():
    torch.manual_seed(0)
    return Networks()


def batch(samples=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 12, generator=generator), torch.randn(samples, 4, generator=generator)


def loss_of(networks, x, noise):
    real, rec = networks(x, noise)
    return SoftIntroVAE(**OBJECTIVE).encoder(real, rec, rec).loss


def gradients(networks):
    return [parameter.grad for parameter in networks.parameters()]


def test_under_autocast_the_loss_is_that_of_the_rounded_outputs(networks):
    x, noise = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        real, rec = networks(x, noise)
        inside = SoftIntroVAE(**OBJECTIVE).encoder(real, rec, rec)
    outside = SoftIntroVAE(**OBJECTIVE).encoder(real, rec, rec)
    assert real.prediction.dtype == torch.bfloat16 and inside.loss.dtype == torch.float32
    assert torch.equal(inside.loss, outside.loss)
    inside.loss.backward()
    exact = copy.deepcopy(networks)
    exact.zero_grad()
    loss_of(exact, x, noise).backward()
    for got, want in zip(gradients(networks), gradients(exact), strict=True):
        assert (got - want).norm() < 0.03 * want.norm()


def test_accumulated_micro_batches_are_the_batch(networks):
    x, noise = batch()
    whole = copy.deepcopy(networks)
    loss_of(whole, x, noise).backward()
    for rows in (slice(0, 4), slice(4, 8)):
        (loss_of(networks, x[rows], noise[rows]) / 2).backward()
    for got, want in zip(gradients(networks), gradients(whole), strict=True):
        torch.testing.assert_close(got, want)


def test_under_distributed_data_parallel(networks):
    x, noise = batch()
    alone = copy.deepcopy(networks)
    loss_of(alone, x, noise).backward()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        loss_of(DistributedDataParallel(networks), x, noise).backward()
    finally:
        dist.destroy_process_group()
    for got, want in zip(gradients(networks), gradients(alone), strict=True):
        assert torch.equal(got, want)
