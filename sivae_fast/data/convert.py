"""One picture of any kind to one training image: 8 bits, square, resized once with a good filter."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor, ImageOps

from sivae_fast.data.archive import reason

FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
FITS = ("crop", "fit", "stretch")
FORMATS = {"png": ".png", "jpeg": ".jpg"}
#: The only decoders that are tried on files of unknown origin.
_READABLE = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")


@dataclass(frozen=True)
class Recipe:
    """How pictures become training images.

    `resolution` None keeps the size. `fit`: "crop" takes the centre square, "fit" shows the whole picture
    on a square of `background`, "stretch" ignores the proportions. `filter` is always antialiased. `format`
    "png" or "jpeg" (with `quality`, full colour resolution). `grey` stores one channel.
    """

    resolution: int | None
    fit: str = "crop"
    filter: str = "lanczos"
    format: str = "png"
    quality: int = 95
    grey: bool = False
    background: str = "white"

    def __post_init__(self):
        size = self.resolution
        if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
            raise TypeError(f"--resolution must be an integer, got {size!r}")
        if size is not None and (not 4 <= size <= 4096 or size & (size - 1)):
            raise ValueError(f"--resolution must be a power of two from 4 to 4096, got {size}")
        for option, value, accepted in (
            ("fit", self.fit, FITS),
            ("filter", self.filter, FILTERS),
            ("format", self.format, FORMATS),
        ):
            if value not in accepted:
                raise ValueError(f"--{option} must be one of {', '.join(accepted)}, got {value!r}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality must lie in 1 ... 100, got {self.quality}")
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(
                f"--background must be a colour like white or #ff8800, got {self.background!r}"
            ) from None


@dataclass(frozen=True)
class Converted:
    """The outcome for one picture: its encoded bytes, or the reason why there are none."""

    data: bytes = b""
    enlarged: bool = False
    problem: str | None = None


def convert(picture: bytes | np.ndarray, recipe: Recipe) -> Converted:
    """A training image of a file's bytes or of uint8 pixels [H, W] or [H, W, 3]; bad data does not raise."""
    try:
        image = flatten(open_picture(picture), recipe)
    except Exception as error:  # what a damaged file makes a decoder raise is anybody's guess
        return Converted(problem=reason(error))
    shown = max(image.size) if recipe.fit == "fit" else min(image.size)
    enlarged = recipe.resolution is not None and shown < recipe.resolution
    return Converted(encode(resize(image, recipe), recipe), enlarged)


def open_picture(picture: bytes | np.ndarray) -> Image.Image:
    """The decoded picture, turned upright as its EXIF orientation says."""
    if not isinstance(picture, bytes):
        return Image.fromarray(picture)
    with Image.open(io.BytesIO(picture), formats=_READABLE) as opened:
        opened.load()
        return ImageOps.exif_transpose(opened)


def flatten(image: Image.Image, recipe: Recipe) -> Image.Image:
    """The picture with 8 bits a channel, laid on the background: mode RGB, or L where `grey`."""
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        # 16 bits keep their upper half, as decoders of 16-bit colour PNG do.
        image = Image.fromarray((deep >> 8 if deep.max() > 255 else deep).clip(0, 255).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, recipe.background)
        image = Image.alpha_composite(ground, image)
    return image.convert("L" if recipe.grey else "RGB")


def resize(image: Image.Image, recipe: Recipe) -> Image.Image:
    """The picture as a square of the recipe's resolution, resampled at most once."""
    width, height = image.size
    side = recipe.resolution or min(width, height)
    if image.size == (side, side):
        return image
    resample = FILTERS[recipe.filter]
    if recipe.fit == "stretch":
        return image.resize((side, side), resample)
    if recipe.fit == "crop":
        short = min(width, height)
        left, top = (width - short) / 2, (height - short) / 2
        if side == short:
            return image.crop((int(left), int(top), int(left) + side, int(top) + side))
        return image.resize((side, side), resample, box=(left, top, left + short, top + short))
    scale = side / max(width, height)
    inner = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), resample)
    square = Image.new(image.mode, (side, side), recipe.background)
    square.paste(inner, ((side - inner.size[0]) // 2, (side - inner.size[1]) // 2))
    return square


def encode(image: Image.Image, recipe: Recipe) -> bytes:
    buffer = io.BytesIO()
    if recipe.format == "png":
        # Uncompressed as StyleGAN's tools write it: twice the size, decoded 1.4 to 1.7 times as fast.
        image.save(buffer, "png", compress_level=0)
    else:
        image.save(buffer, "jpeg", quality=recipe.quality, subsampling=0)
    return buffer.getvalue()
