"""Displacement and hue, image by image, against plain definitions."""

import colorsys

import numpy as np
import pytest
import torch
from image_files import encoded, picture, png_zip, write_folder

from sivae_fast.data import pixels
from sivae_fast.data.augment import shift_hue, shift_pixels
from sivae_fast.data.loader import ImageLoader
from sivae_fast.draws import Draws, Rows


def colours(count=6, size=8, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8))


def test_shift_moves_whole_pixels_and_fills_white():
    batch = colours(4)
    moved = shift_pixels(batch, torch.tensor([0, 2, -3, 0]), torch.tensor([0, 0, 1, -8]))
    assert torch.equal(moved[0], batch[0])
    assert torch.equal(moved[1, 2:], batch[1, :-2]) and (moved[1, :2] == 255).all()
    assert torch.equal(moved[2, :-3, 1:], batch[2, 3:, :-1])
    assert (moved[2, -3:] == 255).all() and (moved[2, :, 0] == 255).all()
    assert (moved[3] == 255).all()


def test_hue_against_colorsys():
    x = torch.rand(3, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, 0] = 0.4  # grey has no hue
    x[0, :, 0, 1] = torch.tensor([1.0, 1.0, 0.0])
    turn = torch.tensor([0.0, 0.3, -0.45], dtype=torch.float64)
    found = shift_hue(x, turn)
    for i in range(3):
        for pixel, result in zip(x[i].flatten(1).T.tolist(), found[i].flatten(1).T.tolist(), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*pixel)
            assert result == pytest.approx(colorsys.hsv_to_rgb((h + turn[i].item()) % 1, s, v), abs=1e-12)


def test_the_monsters_recipe():
    batch, draws = colours(64, 128), Draws(0, 0, Rows.all(64))
    options = {"flip": False, "signed": False}
    plain = pixels.to_input(batch, draws, **options)
    moved = pixels.to_input(batch, draws, shift=5 / 128, **options)
    numbers = 2 * draws.stream("data/augment").uniform(64, 3) - 1
    down, right = (numbers[:, :2] * 5).round().long().unbind(1)
    assert set(down.tolist()) == set(right.tolist()) == set(range(-5, 6))
    whole = torch.ones(64, 3, 138, 138)
    for i in range(64):
        whole[i, :, 5 + down[i] : 133 + down[i], 5 + right[i] : 133 + right[i]] = plain[i]
    assert torch.equal(moved, whole[:, :, 5:133, 5:133])
    turned = pixels.to_input(batch, draws, shift=5 / 128, hue=0.5, **options)
    torch.testing.assert_close(turned, shift_hue(moved, 0.5 * numbers[:, 2]), rtol=0, atol=1e-6)
    assert torch.equal(pixels.to_input(batch, None, shift=5 / 128, hue=0.5, **options), plain)


def test_ranks_augment_as_one_process_does():
    batch, rows = colours(12), Rows.all(12)
    whole = pixels.to_input(batch, Draws(0, 5, rows), shift=0.2, hue=0.5)
    parts = [
        pixels.to_input(batch[4 * r : 4 * r + 4], Draws(0, 5, rows.part(r, 3)), shift=0.2, hue=0.5)
        for r in range(3)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_the_loader_passes_it_on_and_names_bad_values(tmp_path):
    path = png_zip(tmp_path / "set.zip")
    data = ImageLoader(path, shift=0.1, hue=0.5, signed=False)
    batch = next(data.batches(0, lambda n: 6))
    draws = Draws(0, 0, Rows.all(6))
    expected = pixels.to_input(batch, draws, shift=0.1, hue=0.5, signed=False)
    assert torch.equal(data.to_input(batch, draws, 2, 1.0), expected)
    data.close()
    with pytest.raises(ValueError, match=r"shift must lie in 0 \.\.\. 0\.5, got 5"):
        ImageLoader(path, shift=5)
    with pytest.raises(ValueError, match=r"hue must lie in 0 \.\.\. 0\.5, got -0\.1"):
        ImageLoader(path, hue=-0.1)
    grey = write_folder(tmp_path / "grey", {"0.png": encoded(picture(0, mode="L"))})
    with pytest.raises(ValueError, match=r"hue=0\.2 needs colour images"):
        ImageLoader(grey, hue=0.2)
