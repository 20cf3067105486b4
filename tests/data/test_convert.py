"""One picture of any kind becomes 8-bit square pixels, resized once."""

import io

import numpy as np
import pytest
from image_files import encoded, picture
from PIL import Image

from sivae_fast.data.convert import FILTERS, Recipe, convert


def pixels(data, **options):
    result = convert(data, Recipe(**{"resolution": 16} | options))
    assert result.problem is None
    return np.asarray(Image.open(io.BytesIO(result.data)))


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGB", "YCbCr", "LA", "RGBA"])
def test_every_mode_becomes_colour_or_grey(mode):
    image = picture(0, mode=mode)
    kind = "jpeg" if mode in ("CMYK", "YCbCr") else "png"
    data = encoded(image, kind, **({"quality": 95, "subsampling": 0} if kind == "jpeg" else {}))
    opened = Image.open(io.BytesIO(data))
    assert np.array_equal(pixels(data), np.asarray(opened.convert("RGB")))
    assert pixels(data, grey=True).shape == (16, 16)


def test_sixteen_bits_keep_their_upper_half():
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257 + 3
    assert np.array_equal(pixels(encoded(Image.fromarray(deep)), grey=True), (deep >> 8).astype(np.uint8))


def test_sixteen_bit_files_of_small_numbers_are_not_black():
    """Some tools store 8-bit grey levels in 16-bit files."""
    small = np.arange(256, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(pixels(encoded(Image.fromarray(small)), grey=True), small.astype(np.uint8))


def test_deeper_levels_than_there_are_become_black_or_white():
    wide = np.array([[-5, 0, 70_000, 65_535]] * 4, np.int32)
    data = encoded(Image.fromarray(wide), "tiff")
    assert pixels(data, resolution=4, grey=True)[0].tolist() == [0, 0, 255, 255]


def test_alpha_lies_on_the_background():
    image = Image.new("RGBA", (16, 16), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 8, 16))
    assert pixels(encoded(image))[0, 0].tolist() == [255, 255, 255]
    assert pixels(encoded(image), background="black")[0, 0].tolist() == [0, 0, 0]
    assert pixels(encoded(image))[0, 15].tolist() == [200, 0, 0]
    assert pixels(encoded(image.convert("LA")), grey=True)[0, [0, 15]].tolist() == [255, 60]
    transparent = image.convert("RGB").quantize(4)
    index = transparent.getpixel((0, 0))
    assert pixels(encoded(transparent, transparency=index))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed(orientation):
    """The numpy form of the eight orientations of the EXIF standard (tag 274)."""
    turns = [
        lambda a: a,
        lambda a: a[:, ::-1],
        lambda a: np.rot90(a, 2),
        lambda a: a[::-1],
        lambda a: a.transpose(1, 0, 2),
        lambda a: np.rot90(a, -1),
        lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        lambda a: np.rot90(a, 1),
    ]
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(picture(0), "png", exif=exif)
    assert np.array_equal(pixels(data), turns[orientation - 1](np.asarray(picture(0))))


@pytest.mark.parametrize("filter", FILTERS)
def test_resizing_is_antialiased(filter):
    """Stripes finer than the result become their mean, not stripes of another width."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    result = pixels(encoded(Image.fromarray(stripes)), filter=filter)[:, 1:-1].astype(int)
    assert np.abs(result - 127).max() <= 3


def test_other_formats_than_those_of_photographs_are_not_tried():
    """Some decoders of Pillow start programs or were never hardened against files of strangers."""
    for kind in ("ppm", "pcx", "ico", "tga"):
        assert convert(encoded(picture(0), kind), Recipe(16)).problem == "not a picture", kind


def test_box_is_the_mean():
    """Within one level: Pillow rounds between its two passes."""
    fine = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    means = fine.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(pixels(encoded(Image.fromarray(fine)), filter="box") - means).max() < 1


def test_crop_takes_the_centre_and_fit_shows_all():
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:48] = (0, 200, 0)
    data = encoded(Image.fromarray(wide))
    # The filter sees the neighbours outside the square, as it should: the margins are left out here.
    assert (pixels(data)[:, 3:-3] == (0, 200, 0)).all()
    fitted = pixels(data, fit="fit", background="white")
    assert (fitted[:4] == 255).all() and (fitted[12:] == 255).all()
    assert (pixels(data, fit="fit", background="black")[:4] == 0).all()
    tall = encoded(Image.fromarray(wide.transpose(1, 0, 2)))
    assert (pixels(tall)[3:-3] == (0, 200, 0)).all()
    line = pixels(encoded(Image.new("RGB", (200, 1), "black")), fit="fit")
    assert [(row == 0).all() for row in line].count(True) == 1
    assert fitted[8, 0].tolist() == [0, 0, 0] and fitted[8, 8].tolist() == [0, 200, 0]
    stretched = pixels(data, fit="stretch")
    assert stretched[0, 0].tolist() == [0, 0, 0] and stretched[0, 8].tolist() == [0, 200, 0]


def test_an_odd_centre_is_cut_between_pixels():
    """A picture that is symmetric stays so: the centre of 21 columns lies in the middle of one."""
    ramp = np.abs(np.arange(21) - 10)[None, :, None] * np.full((16, 21, 3), 20)
    result = pixels(encoded(Image.fromarray(ramp.astype(np.uint8))), resolution=8).astype(int)
    assert np.abs(result - result[:, ::-1]).max() <= 1


def test_the_right_size_is_left_untouched():
    assert np.array_equal(pixels(encoded(picture(3))), np.asarray(picture(3)))
    assert np.array_equal(pixels(encoded(picture(3)), resolution=None), np.asarray(picture(3)))


def test_enlarging_is_reported():
    assert convert(encoded(picture(0, 8, 40)), Recipe(16)).enlarged
    assert not convert(encoded(picture(0, 8, 40)), Recipe(16, fit="fit")).enlarged
    assert not convert(encoded(picture(0, 16, 40)), Recipe(16)).enlarged


def test_jpeg_keeps_full_colour_resolution():
    data = convert(encoded(picture(0)), Recipe(16, format="jpeg", quality=95)).data
    image = Image.open(io.BytesIO(data))
    assert image.format == "JPEG"
    assert all(layer[1:3] == (1, 1) for layer in image.layer)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(picture(0))).mean() < 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"just text", "not a picture"),
        (b"", "not a picture"),
        (encoded(picture(0, 64, 64), "jpeg")[:-300], "truncated"),
        (encoded(picture(0, 64, 64))[:200], "truncated"),
        (encoded(Image.fromarray(np.zeros((16, 16), np.float32)), "tiff"), "floating-point pixels"),
    ],
)
def test_bad_files_give_a_reason(data, reason):
    result = convert(data, Recipe(16))
    assert reason in result.problem
    assert result.data == b""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 100}, "resolution must be a power of two from 4 to 4096, got 100"),
        ({"resolution": 2}, "resolution must be a power of two from 4 to 4096, got 2"),
        ({"resolution": 16, "fit": "cut"}, "fit must be one of crop, fit, stretch, got 'cut'"),
        ({"resolution": 16, "filter": "nearest"}, "filter must be one of lanczos, .*, got 'nearest'"),
        ({"resolution": 16, "format": "gif"}, "format must be one of png, jpeg, got 'gif'"),
        ({"resolution": 16, "quality": 0}, r"quality must lie in 1 \.\.\. 100, got 0"),
        ({"resolution": 16, "background": "sand"}, "background must be a colour .* got 'sand'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)
    with pytest.raises(TypeError, match=r"resolution must be an integer, got 16\.0"):
        Recipe(16.0)
