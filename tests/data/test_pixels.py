"""From stored bytes to what the model sees, and back."""

import numpy as np
import pytest
import torch

from sivae_fast.data import pixels
from sivae_fast.draws import Draws, Rows


def batch_of(count=6, size=16, channels=3):
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (count, size, size, channels), np.uint8)
    )


def reference(batch, resolution, blend, mirrored, signed):
    """The definition, in float64, one step at a time."""
    x = batch.permute(0, 3, 1, 2).double()
    halve = lambda t: (t[..., ::2, ::2] + t[..., 1::2, ::2] + t[..., ::2, 1::2] + t[..., 1::2, 1::2]) / 4
    while x.shape[-1] > resolution:
        x = halve(x)
    x = torch.stack([t.flip(2) if m else t for t, m in zip(x, mirrored, strict=True)])
    x = x / 127.5 - 1 if signed else x / 255
    coarse = halve(x).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return blend * x + (1 - blend) * coarse


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("resolution", [4, 8, 16])
def test_against_the_definition(resolution, blend, signed):
    batch, draws = batch_of(), Draws(3, 64, Rows.all(6))
    mirrored = (draws.stream("data").uniform(6) < 0.5).tolist()
    assert 0 < sum(mirrored) < 6
    x = pixels.to_input(batch, draws, resolution=resolution, blend=blend, signed=signed)
    expected = reference(batch, resolution, blend, mirrored, signed)
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=3e-7)


def test_means_are_exact():
    x = pixels.to_input(batch_of(size=256), None, resolution=4, signed=False)
    means = batch_of(size=256).double().reshape(6, 4, 64, 4, 64, 3).mean((2, 4)).permute(0, 3, 1, 2)
    assert torch.equal(x, means.float() / 255)


def test_ranks_mirror_as_one_process_does():
    batch = batch_of(12)
    whole = pixels.to_input(batch, Draws(0, 5, Rows.all(12)))
    parts = [
        pixels.to_input(batch[4 * r : 4 * r + 4], Draws(0, 5, Rows.all(12).part(r, 3))) for r in range(3)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_no_mirroring_without_flip_or_draws():
    batch = batch_of()
    plain = pixels.to_input(batch, None)
    assert torch.equal(pixels.to_input(batch, Draws(0, 0, Rows.all(6)), flip=False), plain)


def test_a_resolution_that_is_no_halving_is_named():
    with pytest.raises(ValueError, match="resolution 32 is no halving of the images' 16"):
        pixels.to_input(batch_of(), None, resolution=32)
