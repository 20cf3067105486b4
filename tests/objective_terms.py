"""What tests of the objectives compute losses of."""

import torch

from sivae_fast import Posterior, Term


def batch(seed=0, dtype=torch.float64, samples=4):
    """Real, rec and fake terms of an encoder phase, x -> rec -> rec_rec and fake -> rec_fake."""
    generator = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(samples, *shape, generator=generator, dtype=dtype).requires_grad_()
    x, rec, rec_rec, fake, rec_fake = (new(3, 4, 4) for _ in range(5))
    posteriors = [Posterior(new(6), new(6)) for _ in range(3)]
    pairs = ((x, rec), (rec, rec_rec), (fake, rec_fake))
    return [Term(*pair, posterior) for pair, posterior in zip(pairs, posteriors, strict=True)]


def same(loss, want):
    torch.testing.assert_close(loss.loss, want, rtol=1e-12, atol=0)
