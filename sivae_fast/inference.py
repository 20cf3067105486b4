"""A trained image model ready for use: level, batches, precision, draws and batch norm are taken care of."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from sivae_fast.contract import check_count, checked_seed, described
from sivae_fast.data.archive import Folder, ImageSet, is_image_name, is_zip
from sivae_fast.data.convert import Recipe, flatten
from sivae_fast.data.factors import Factors, load_factors
from sivae_fast.figures import to_uint8
from sivae_fast.systems import image_path
from sivae_fast.trained import CALIBRATION, Trained

IMAGE_MODELS = ("style", "residual", "two_encoder", "own")


class Inference(Trained):
    """An image model with all that its use needs; `Inference.load` has it from a run folder or a file.

    The arguments are those of `Trained`. Images go in and come out as uint8, on the CPU. ValueError for what
    is no tensor of the shape and type that a function takes.
    """

    kinds = IMAGE_MODELS

    @property
    def value_range(self) -> tuple[float, float]:
        """Of the pixels that the model was trained on."""
        kind = getattr(self.config.data, "value_range", "unit")  # images with factors are never signed
        return (0.0, 1.0) if kind == "unit" else (-1.0, 1.0)

    @property
    def resolution(self) -> int:
        """Pixels of a side of the images that the model makes now (growing models: at their level)."""
        return getattr(self.model, "resolution", self.config.model.resolution)

    @property
    def size(self) -> dict[str, int]:
        return {"resolution": self.resolution}

    def encode(self, images: Tensor) -> Tensor:
        """Posterior means [N, Z] of uint8 images [N, C, R, R], on the CPU."""
        self._check_images(images)
        self._calibrate_encoder()
        encode = lambda rows, _: self.model.encode(self.to_input(rows)).mean
        return self.map(encode, images, "encode")

    def decode(self, z: Tensor, seed: int = 0, truncation: float = 1.0, **options) -> Tensor:
        """uint8 images [N, C, r, r] of latents [N, Z]; truncation and further options as of `decoded`."""
        self._check_latents(z)
        return torch.cat(list(self.decoded(z, seed, truncation, **options)))

    def sample(self, count: int, seed: int = 0, truncation: float = 1.0, **style) -> Tensor:
        """uint8 images [count, C, r, r] of prior samples; truncation and `style` as of `decoded`."""
        check_count(count)
        return self.decode(self.prior(count, seed), seed, truncation, **style)

    def reconstruct(self, images: Tensor, seed: int = 0, **style) -> Tensor:
        """uint8 reconstructions [N, C, r, r] of uint8 images [N, C, R, R], from the posterior mean; `style`
        as of `decoded`."""
        return self.decode(self.encode(images), seed, encoded=True, **style)

    def decoded(
        self,
        z: Tensor,
        seed: int = 0,
        truncation: float = 1.0,
        *,
        noise: str = "sample",
        mixing: bool = False,
        round_down: bool = False,
        encoded: bool = False,
    ) -> Iterator[Tensor]:
        """As `decode`, batch by batch, for sets that one does not want to hold.

        encoded: the latents were made of images (or lie between such), by which batch norm is recalibrated.
        truncation (0 or more), noise: of style models, see `StyleModel.decode`. mixing: their style mixing,
        by which a batch as a whole takes its finer styles from second latents, as in training.
        round_down: to the 8 bits below, not to the nearest.
        """
        options = self._truncation(truncation)
        options |= self.style_options("noise", noise, "sample")
        mixed = self.style_options("mixing", mixing, False)
        decode = self.model.generate if mixed else self.model.decode
        self._calibrate_decoder(encoded)
        body = lambda rows, stream: decode(rows, stream, **options, **mixed)
        return self._mapped(body, z, "decode", seed, round_down)

    def from_styles(self, styles: Tensor, seed: int = 0, truncation: float = 1.0) -> Tensor:
        """uint8 images of styles [N, 2(lod + 1), Z] (style models); truncation as of `decoded`."""
        self.style_options("styles", True, False)
        self._truncation(truncation)
        self._check_floats("styles", styles, 2 * (self.model.lod + 1), self.model.latent_size)
        body = lambda rows, stream: self.model.synthesize(rows, stream, truncation=truncation)
        return torch.cat(list(self._mapped(body, styles, "decode", seed)))

    def styles(self, z: Tensor) -> Tensor:
        """Styles [N, 2(lod + 1), Z] of latents [N, Z] (style models)."""
        self.style_options("styles", True, False)
        self._check_latents(z)
        return self.map(lambda rows, _: self.model.styles(rows), z, "styles")

    def _truncation(self, truncation: float) -> dict:
        if not 0 <= truncation < math.inf:
            raise ValueError(
                f"truncation is {truncation}, must be 0 or more: 1 changes nothing, 0 is the average"
            )
        return self.style_options("truncation", truncation, 1.0)

    def to_input(self, images: Tensor) -> Tensor:
        """uint8 [N, C, R, R] as the model sees it, at its present level, on its device."""
        x = images.to(self.device).float()
        if x.shape[-1] > self.resolution:
            x = F.avg_pool2d(x, x.shape[-1] // self.resolution)
        low, high = self.value_range
        return x * ((high - low) / 255) + low

    def to_pixels(self, x: Tensor, round_down: bool = False) -> Tensor:
        """The model's output as uint8 on the CPU."""
        return to_uint8(x, self.value_range, round_down=round_down)

    def _check_images(self, images: Tensor) -> None:
        side, channels = self.resolution, self.config.model.channels
        is_image = isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4
        sides = set(images.shape[2:]) if is_image else set()
        fits = len(sides) == 1 and max(sides) >= side and max(sides) % side == 0
        if not fits or images.shape[1] != channels or not len(images):
            full = self.config.model.resolution
            raise ValueError(
                f"images is {described(images)}, must be a uint8 tensor [N, {channels}, {full}, {full}], "
                "N at least 1"
            )

    def _mapped(
        self, body: Callable, rows: Tensor, title: str, seed: int, round_down: bool = False
    ) -> Iterator[Tensor]:
        for x in self._batches(body, rows, title, seed):
            yield self.to_pixels(x, round_down)

    def calibration_batches(self) -> Iterator[Tensor]:
        pictures = self.training_images(CALIBRATION * self.calibration_size)
        parts = pictures.split(self.calibration_size)
        return (self.to_input(part) for part in parts if len(part) > 1)

    def own_images(self, count: int, seed: int = 0) -> Tensor:
        """At most `count` images of the run's data, uint8 [n, C, R, R]: the first ones that it was trained on
        or, of sets with class and content, test images drawn from `seed`.

        Raises ValueError where they are not there, and for a count below 1.
        """
        check_count(count)
        if self.config.data.kind != "factors":
            return self.training_images(count)
        factors = self.factors()
        test = factors.images[factors.test]
        generator = torch.Generator().manual_seed(checked_seed(seed))
        chosen = torch.randperm(len(test), generator=generator)[:count]
        return test[chosen].permute(0, 3, 1, 2).contiguous()

    def factors(self) -> Factors:
        """The set with class and content of each image (two_encoder models), read from the files.

        Raises ValueError for a set that is not there or has another number of channels than the model.
        """
        path = self._where_the_data_are()
        found = load_factors(path, self.resolution)
        channels = found.images.shape[3]
        if channels != self.config.model.channels:
            raise ValueError(
                f"{path} holds images of {channels} channels, the model takes {self.config.model.channels}"
            )
        return found

    def training_images(self, count: int) -> Tensor:
        """The first `count` images of the training set, uint8. Raises ValueError where it is not there."""
        if self.config.data.kind == "factors" and self.data_path is None:
            factors = self.factors()
            return factors.images[~factors.test][:count].permute(0, 3, 1, 2).contiguous()
        return self.read([self.training_set()], count)

    def training_set(self) -> str | os.PathLike:
        """Where the training images are; those of the quickstart are made if need be.

        Raises ValueError where that is not known (a snapshot holds no path) or no longer true.
        """
        kind = self.config.data.kind
        if self.data_path is None and kind != "images":
            raise ValueError(f"data.kind={kind} is no image set: give data=PATH (--data PATH)")
        if self.data_path is None and self.config.data.path is None:
            raise ValueError(
                "the training images are needed, and a snapshot does not say where they are: give data=PATH "
                "(--data PATH)"
            )
        path = Path(self.data_path or image_path(self.config, self.show))
        if not path.exists():
            raise ValueError(
                f"the training images are needed, and {path} does not exist: give data=PATH (--data PATH)"
            )
        return path

    def read(
        self, sources: Sequence[str | os.PathLike], count: int | None = None, resize: bool = False
    ) -> Tensor:
        """uint8 [N, C, R, R] of picture files, or of image sets (folders, zips), at the model's full size.

        count: at most so many of each set. resize: scale the centre square where sizes differ, also in a
        folder of photographs that is no set.
        Raises ValueError naming the file that cannot be read or does not fit, and for a count below 1.
        """
        if count is not None:
            check_count(count)
        found: list[np.ndarray] = []
        for source in map(Path, sources):
            names = Folder(source).names if resize and source.is_dir() else []
            if files := [source / name for name in names if is_image_name(name)][:count]:
                found += [self._read_fitted(path, resize) for path in files]
            elif source.is_dir() or (source.is_file() and is_zip(source)):
                images = ImageSet(source, any_size=True)
                chosen = range(len(images))[:count]
                named = ((f"{images.name(i)} of {source}", images.decode(i)) for i in chosen)
                found += [self._fitted(name, pixels, resize) for name, pixels in named]
            else:
                found.append(self._read_fitted(source, resize))
        if not found:
            raise ValueError("no pictures are given")
        return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()

    def _read_fitted(self, path: Path, resize: bool) -> np.ndarray:
        return self._fitted(path, _read_file(path, self.config.model.channels == 1), resize)

    def _fitted(self, name, pixels: np.ndarray, resize: bool) -> np.ndarray:
        side, channels = self.config.model.resolution, self.config.model.channels
        height, width, own = pixels.shape
        if (height, width) != (side, side):
            if not resize:
                raise ValueError(
                    f"{name} has {width}x{height} pixels, the model takes {side}x{side}: give resize "
                    "(--resize), or run `sivae-fast prepare`"
                )
            image = Image.fromarray(pixels.squeeze(2) if own == 1 else pixels)
            fitted = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
            pixels = np.asarray(fitted).reshape(side, side, own)
        if own == channels:
            return pixels
        if own == 1:
            return pixels.repeat(channels, axis=2)
        raise ValueError(f"{name} is in colour, the model takes grey images")


def _read_file(path: Path, grey: bool) -> np.ndarray:
    try:
        with Image.open(path) as opened:
            image = flatten(ImageOps.exif_transpose(opened), Recipe(None, grey=grey))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it does not exist" if not path.exists() else f"it is no readable picture ({error})"
        raise ValueError(f"{path} cannot be used: {reason}") from None
    return np.asarray(image).reshape(image.height, image.width, -1)
