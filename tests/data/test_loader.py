"""Both loaders deliver the same pixels in the order of the sampler, whatever batch, rank or cache."""

import logging
import sys
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_files import encoded, picture, png_zip, stylegan_names, write_folder

from sivae_fast.data import cache, dali
from sivae_fast.data.archive import ImageSet
from sivae_fast.data.cache import Cache
from sivae_fast.data.loader import ImageLoader, choose_loader
from sivae_fast.data.sampler import Sampler
from sivae_fast.draws import Draws, Rows

needs_dali = pytest.mark.skipif(dali.trouble() is not None, reason="no DALI")
LOADERS = [pytest.param("dali", marks=needs_dali), "torch"]


@pytest.fixture
def png_set(tmp_path):
    return png_zip(tmp_path / "set.zip")


def take(path, count, batch_at, start=0, rank=0, world=1, **options):
    loader = ImageLoader(path, workers=2, **options)
    batches = loader.batches(start, batch_at, rank, world)
    found = list(islice(batches, count))
    batches.close()
    loader.close()
    return found


@pytest.mark.parametrize("cache_gib", [0, None])
@pytest.mark.parametrize("loader", LOADERS)
def test_pixels_in_the_samplers_order(png_set, loader, cache_gib):
    batch_at = lambda n: 4 if n < 20 else 30 if n < 100 else 7
    batches = take(png_set, 20, batch_at, start=8, seed=5, loader=loader, cache_gib=cache_gib)
    assert {b.dtype for b in batches} == {torch.uint8}
    assert [len(b) for b in batches[:7]] == [4, 4, 4, 30, 30, 30, 7]
    images = ImageSet(png_set)
    order = Sampler(21, 5).indices(8, 8 + sum(map(len, batches)))
    expected = np.stack([images.decode(int(i)) for i in order])
    assert np.array_equal(torch.cat(batches).numpy(), expected)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_batch_larger_than_a_piece_is_put_together(png_set, loader):
    (batch,) = take(png_set, 1, lambda n: 2 * dali.PIECE + 5, loader=loader, cache_gib=0)
    images = ImageSet(png_set)
    order = Sampler(21).indices(0, len(batch))
    assert np.array_equal(batch.numpy(), np.stack([images.decode(int(i)) for i in order]))


@pytest.mark.parametrize("loader", LOADERS)
def test_colour_among_grey_images_is_named(tmp_path, loader):
    files = {f"{i:03d}.png": encoded(picture(0, mode="L")) for i in range(128)}
    path = write_folder(tmp_path / "set", files | {"001.png": encoded(picture(1))})
    with pytest.raises(ValueError, match=r"001\.png of .*set is stored in colour \(RGB\)"):
        take(path, 1, lambda n: 128, loader=loader, cache_gib=0)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("cache_gib", [0, None])
@pytest.mark.parametrize("loader", LOADERS)
def test_every_image_once_an_epoch_over_the_ranks(tmp_path, loader, cache_gib, world):
    # Each image is one grey level, so that a delivered image says which one it is.
    levels = {f"{i}.png": encoded(picture(0).point(lambda _, i=i: i)) for i in range(24)}
    path = write_folder(tmp_path / "set", levels)
    for epoch in range(3):
        seen = []
        for rank in range(world):
            batches = take(path, 4, lambda n: 6, 24 * epoch, rank, world, loader=loader, cache_gib=cache_gib)
            seen += torch.cat(batches)[:, 0, 0, 0].tolist()
        assert sorted(seen) == list(range(24))


@needs_dali
@pytest.mark.parametrize(
    "stored",
    [
        ("png", "RGB", {}),
        ("png", "RGB", {"compress_level": 0}),
        ("png", "L", {}),
        ("png", "P", {}),
        ("png", "RGBA", {}),
        ("jpeg", "RGB", {"quality": 95, "subsampling": 0}),
        ("jpeg", "RGB", {"quality": 75}),
        ("jpeg", "RGB", {"quality": 90, "progressive": True}),
        ("jpeg", "L", {}),
        ("webp", "RGB", {}),
    ],
    ids=str,
)
def test_dali_decodes_what_pillow_decodes(tmp_path, stored):
    kind, mode, options = stored
    files = {f"{i}.{kind}": encoded(picture(i, 64, 64, mode), kind, **options) for i in range(6)}
    path = write_folder(tmp_path / "set", files)
    ours, theirs = (take(path, 1, lambda n: 6, loader=k, cache_gib=0)[0].float() for k in ("torch", "dali"))
    assert (ours - theirs).abs().mean() <= 1
    if kind == "png":
        assert torch.equal(ours, theirs)


@needs_dali
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize("cache_gib", [0, None])
def test_decoding_on_the_gpu(tmp_path, kind, cache_gib):
    """Another JPEG decoder: the same pixels up to rounding. PNG is lossless."""
    files = {f"{i}.{kind}": encoded(picture(i, 64, 64), kind) for i in range(20)}
    path = write_folder(tmp_path / "set", files)
    batch_at = lambda n: 8 if n < 40 else 30
    ours = take(path, 8, batch_at, loader="torch", cache_gib=cache_gib)
    theirs = take(path, 8, batch_at, loader="dali", cache_gib=cache_gib, device="cuda")
    assert {b.device.type for b in theirs} == {"cuda"}
    difference = (torch.cat(ours).float() - torch.cat(theirs).cpu().float()).abs()
    assert difference.mean() <= (0 if kind == "png" else 1)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("cache_gib", [0, None])
def test_a_corrupt_image_is_named_at_training_time(tmp_path, loader, cache_gib):
    """Only a sample of a large set is looked at when it is opened."""
    files = {n: encoded(picture(i), "jpeg") for i, n in enumerate(stylegan_names(200, ".jpg"))}
    files["00000/img00000001.jpg"] = files["00000/img00000001.jpg"][:-100]
    path = write_folder(tmp_path / "set", files)
    with pytest.raises(
        ValueError, match=r"00000/img00000001\.jpg of .* cannot be decoded .*sivae-fast prepare"
    ):
        take(path, 20, lambda n: 10, loader=loader, cache_gib=cache_gib)


@pytest.mark.parametrize("loader", LOADERS)
def test_an_image_of_another_size_is_named_at_training_time(tmp_path, loader):
    files = {n: encoded(picture(i)) for i, n in enumerate(stylegan_names(200))}
    files["00000/img00000001.png"] = encoded(picture(0, 32, 32))
    path = write_folder(tmp_path / "set", files)
    with pytest.raises(ValueError, match=r"img00000001\.png of .* is 32x32, others are 16x16"):
        take(path, 20, lambda n: 10, loader=loader)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_file_that_vanished_is_named(tmp_path, loader):
    files = {n: encoded(picture(i)) for i, n in enumerate(stylegan_names(30))}
    path = write_folder(tmp_path / "set", files)
    data = ImageLoader(path, loader=loader, workers=1)
    (path / "00000/img00000004.png").unlink()
    with pytest.raises(ValueError, match=r"img00000004\.png of .* cannot be read"):
        list(islice(data.batches(0, lambda n: 10), 3))
    data.close()


class CountingDecoder:
    """Decodes at once, a few requests ahead, and counts how often each image was asked for."""

    def __init__(self, images, ahead):
        self.images, self.ahead, self.counts = images, ahead, np.zeros(len(images), int)

    def stream(self, requests):
        ahead = []
        for indices in requests:
            np.add.at(self.counts, indices, 1)
            ahead.append(torch.from_numpy(np.stack([self.images.decode(int(i)) for i in indices])))
            if len(ahead) > self.ahead:
                yield ahead.pop(0)
        yield from ahead


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("ahead", [0, 3])
def test_the_cache_decodes_each_image_once(png_set, world, ahead):
    images = ImageSet(png_set)
    for rank in range(world):
        decoder, cache = CountingDecoder(images, ahead), Cache(images, torch.device("cpu"))
        requests = lambda rank=rank: Sampler(21, 2).requests(0, lambda n: 6, rank, world)
        epochs = 21 * (world + 1) // 6 + 1
        for batch, indices in zip(
            cache.stream(requests(), decoder), islice(requests(), epochs), strict=False
        ):
            assert np.array_equal(batch.numpy(), np.stack([images.decode(int(i)) for i in indices]))
        assert (decoder.counts == 1).all()


def test_the_cache_survives_a_stream_that_was_left_early(png_set):
    """What was asked for ahead of time but never arrived must be asked for again."""
    images = ImageSet(png_set)
    decoder, cache = CountingDecoder(images, 2), Cache(images, torch.device("cpu"))
    cache._pixels.zero_()  # memory that is given out anew may hold these very images
    requests = lambda: Sampler(21, 2).requests(0, lambda n: 3)
    abandoned = cache.stream(requests(), decoder)
    next(abandoned)
    abandoned.close()
    for batch, indices in zip(islice(cache.stream(requests(), decoder), 20), requests(), strict=False):
        assert np.array_equal(batch.numpy(), np.stack([images.decode(int(i)) for i in indices]))


def test_a_cache_that_does_not_fit_is_left_out(png_set):
    assert ImageLoader(png_set, cache_gib=0)._cache is None
    assert ImageLoader(png_set, cache_gib=21 * 16 * 16 * 3 / 2**30)._cache is not None
    assert ImageLoader(png_set, cache_gib=(21 * 16 * 16 * 3 - 1) / 2**30)._cache is None


def test_files_that_were_read_do_not_fill_the_memory_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("2900\n")
    (tmp_path / "memory.stat").write_text("anon 400\nactive_file 500\ninactive_file 1500\n")
    assert cache.available_memory() == 2100
    (tmp_path / "memory.max").write_text("max\n")
    assert cache.available_memory() > 2100


@needs_dali
@pytest.mark.parametrize(
    ("name", "module"), [("is not installed", None), ("does not work on cuda", RuntimeError("old driver"))]
)
def test_without_dali_auto_falls_back_and_says_so_once(monkeypatch, caplog, name, module):
    def fail(*_, **__):
        raise module

    device = torch.device("cuda" if module else "cpu")
    if module:
        monkeypatch.setattr("nvidia.dali.Pipeline", fail)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    else:
        monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    choose_loader.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [choose_loader("auto", device) for _ in range(2)] == ["torch", "torch"]
    assert caplog.text.count(f"DALI {name}") == 1
    with pytest.raises(ValueError, match=rf"loader=dali: .*{name}.*pip install nvidia-dali.*loader=torch"):
        choose_loader("dali", device)
    choose_loader.cache_clear()


def test_bad_options_are_named(png_set):
    with pytest.raises(ValueError, match="loader must be auto, dali or torch, got 'pil'"):
        ImageLoader(png_set, loader="pil")
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        ImageLoader(png_set, workers=0)
    with pytest.raises(ValueError, match="cache_gib must be 0 or more, got -1"):
        ImageLoader(png_set, cache_gib=-1)


def test_the_contract_of_the_training_loop(png_set):
    data = ImageLoader(png_set, seed=1, loader="torch", workers=1)
    assert data.input_shape == (3, 16, 16)
    assert len(data) == 21
    batch = next(data.batches(0, lambda n: 8, 1, 2))
    x = data.to_input(batch, Draws(1, 0, Rows.all(8).part(1, 2)), 1, 0.25)
    assert x.shape == (4, 3, 8, 8)
    assert x.is_contiguous(memory_format=torch.channels_last)
    fixed = data.fixed(5)
    assert fixed.shape == (5, 3, 16, 16)
    assert torch.equal(fixed, ImageLoader(png_set, seed=2, loader="torch").fixed(5))
    assert data.fixed(30).shape == (30, 3, 16, 16)
    data.close()


def test_a_model_of_one_size_gets_any_size_and_no_levels(tmp_path):
    files = {f"{i}.png": encoded(picture(i, 28, 28, "L")) for i in range(4)}
    data = ImageLoader(write_folder(tmp_path / "set", files), grows=False, signed=False, flip=False)
    batch = next(data.batches(0, lambda n: 4))
    x, other = (data.to_input(batch, Draws(0, n, Rows.all(4)), 0, 0.0) for n in (0, 4))
    assert x.shape == (4, 1, 28, 28) and torch.equal(x, other)  # nothing random
    assert torch.equal((x * 255).round().byte().permute(0, 2, 3, 1), batch)
    assert data.fixed(4).min() >= 0
    data.close()
    with pytest.raises(ValueError, match="a side of 28 pixels, which is no power of two"):
        ImageLoader(tmp_path / "set")


def test_a_level_that_is_faded_in_and_augmentations_reach_the_pixels(png_set):
    def seen(blend=1.0, **options):
        data = ImageLoader(png_set, loader="torch", flip=False, **options)
        batch = next(data.batches(0, lambda n: 8))
        data.close()
        return data.to_input(batch, Draws(0, 0, Rows.all(8)), 2, blend)

    plain, faded = seen(), seen(0.25)
    coarse = F.interpolate(F.avg_pool2d(plain, 2), scale_factor=2)
    torch.testing.assert_close(faded, 0.25 * plain + 0.75 * coarse)
    white = lambda x: int((x.amin(1) > 0.999).sum())
    assert white(seen(shift=0.25)) > white(plain) + 100  # what comes in at the border
    turned = seen(hue=0.25)
    torch.testing.assert_close(turned.amax(1), plain.amax(1))
    assert not torch.equal(turned, plain)
