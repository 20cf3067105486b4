"""A trained image model ready for use: level, batches, precision, draws and batch norm are taken care of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from sivae_fast.checkpoint import load
from sivae_fast.config import Config
from sivae_fast.contract import Model
from sivae_fast.data.archive import ImageSet
from sivae_fast.data.convert import Recipe, flatten
from sivae_fast.data.parallel import progress_bar
from sivae_fast.draws import Draws, Rows
from sivae_fast.evaluation import batchnorm
from sivae_fast.figures import to_uint8
from sivae_fast.systems import image_path

IMAGE_MODELS = ("style", "residual")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
#: Batches that batch norm is recalibrated with.
CALIBRATION = 32


class Inference:
    """An image model with all that its use needs; `Inference.load` has it from a run folder or a file.

    model: on its device and at its level. config, images: what it was trained with, and how far.
    batch: images in one pass; the noise of stochastic decoders depends on it, other results do not.
    batch_norm: "running", "batch" or "recalibrated" (see `evaluation.batchnorm`) for models that have it;
        None recalibrates: the encoder with the training images, the decoder with prior samples.
    data: where the training images are, if not where the run found them.
    Raises ValueError for options that do not fit.
    """

    def __init__(
        self,
        model: Model,
        config: Config,
        images: int,
        *,
        weights: str = "averaged",
        precision: str = "fp32",
        batch: int = 64,
        batch_norm: str | None = None,
        data: str | os.PathLike | None = None,
        show: bool = True,
    ):
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}, must be one of {', '.join(PRECISIONS)}")
        if batch < 1:
            raise ValueError(f"batch is {batch}, must be at least 1")
        if batch_norm is not None and batch_norm not in batchnorm.MODES:
            raise ValueError(f"batch_norm is {batch_norm!r}, must be one of {', '.join(batchnorm.MODES)}")
        if config.model.kind not in IMAGE_MODELS:
            raise ValueError(
                f"model.kind is {config.model.kind}: this takes {' and '.join(IMAGE_MODELS)} models"
            )
        self.model, self.config, self.images = model.eval(), config, images
        self.device = next(model.parameters()).device
        self.weights, self.precision, self.autocast = weights, precision, PRECISIONS[precision]
        self.batch, self.show = batch, show
        self.data_path = data
        self.batch_norm = None
        if model.uses_batch_statistics:
            self.batch_norm = batch_norm or "recalibrated"
        self._encoder_is_ready = self._decoder_is_ready = self.batch_norm != "recalibrated"

    @classmethod
    def load(
        cls, path: str | os.PathLike, *, averaged: bool = True, device: str = "auto", **options
    ) -> Inference:
        """The model of a run folder, checkpoint or snapshot; further options as the constructor.

        averaged: the averaged weights; False takes those of the optimizer. device: "auto" is the GPU where
        there is one. Raises CheckpointError, naming the file, for what is no model, ValueError for a device
        that this machine does not have.
        """
        model = load(path, averaged, _device(device))
        weights = "averaged" if averaged else "raw"
        return cls(model, model.config, model.images, weights=weights, **options)

    @property
    def value_range(self) -> tuple[float, float]:
        """Of the pixels that the model was trained on."""
        return (0.0, 1.0) if self.config.data.value_range == "unit" else (-1.0, 1.0)

    @property
    def resolution(self) -> int:
        """Pixels of a side of the images that the model makes now (growing models: at their level)."""
        return getattr(self.model, "resolution", self.config.model.resolution)

    @property
    def described(self) -> dict[str, object]:
        """What belongs beside every number and picture of this model."""
        facts = {"images": self.images, "weights": self.weights}
        facts |= {"precision": self.precision, "resolution": self.resolution}
        return facts | ({"batch_norm": self.batch_norm} if self.batch_norm else {})

    def prepare(self) -> None:
        """Brings batch norm into its mode, for those who call the model itself."""
        self._calibrate_encoder()
        self._calibrate_decoder()

    def casting(self) -> torch.autocast:
        """The context in which the model computes with this precision, for those who call it themselves."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def prior(self, count: int, seed: int) -> Tensor:
        """Prior samples [count, Z]: the same for the same seed on every device and at every batch size."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, self.model.latent_size, generator=generator) * self.model.prior_std

    def encode(self, images: Tensor) -> Tensor:
        """Posterior means [N, Z] of uint8 images [N, C, R, R], on the CPU."""
        self._calibrate_encoder()
        encode = lambda rows, _: self.model.encode(self.to_input(rows)).mean
        return self._map(encode, images, "encode")

    def decode(self, z: Tensor, seed: int = 0, truncation: float = 1.0) -> Tensor:
        """uint8 images [N, C, r, r] of latents [N, Z]."""
        return torch.cat(list(self.decoded(z, seed, truncation)))

    def sample(self, count: int, seed: int = 0, truncation: float = 1.0) -> Tensor:
        """uint8 images [count, C, r, r] of prior samples, without style mixing."""
        return self.decode(self.prior(count, seed), seed, truncation)

    def reconstruct(self, images: Tensor, seed: int = 0) -> Tensor:
        """uint8 reconstructions [N, C, r, r] of uint8 images [N, C, R, R], from the posterior mean."""
        return self.decode(self.encode(images), seed)

    def decoded(self, z: Tensor, seed: int = 0, truncation: float = 1.0) -> Iterator[Tensor]:
        """As `decode`, batch by batch, for sets that one does not want to hold."""
        options = self.style_options("truncation", truncation, 1.0)
        self._calibrate_decoder()
        body = lambda rows, stream: self.model.decode(rows, stream, **options)
        return self._mapped(body, z, "decode", seed)

    def from_styles(self, styles: Tensor, seed: int = 0, truncation: float = 1.0) -> Tensor:
        """uint8 images of styles [N, 2(lod + 1), Z] (style models)."""
        synthesize = self.model.synthesize
        body = lambda rows, stream: synthesize(rows, stream, truncation=truncation)
        return torch.cat(list(self._mapped(body, styles, "decode", seed)))

    def styles(self, z: Tensor) -> Tensor:
        """Styles [N, 2(lod + 1), Z] of latents [N, Z] (style models)."""
        self.style_options("styles", True, False)
        return self._map(lambda rows, _: self.model.styles(rows), z, "styles")

    def style_options(self, option: str, value, default) -> dict:
        """{option: value} where it is not the default; ValueError where the model has no styles."""
        if value == default:
            return {}
        if self.config.model.kind != "style":
            raise ValueError(
                f"{option}={value}: this model is of kind {self.config.model.kind}, styles need style"
            )
        return {option: value}

    def to_input(self, images: Tensor) -> Tensor:
        """uint8 [N, C, R, R] as the model sees it, at its present level, on its device."""
        x = images.to(self.device).float()
        if x.shape[-1] > self.resolution:
            x = F.avg_pool2d(x, x.shape[-1] // self.resolution)
        low, high = self.value_range
        return x * ((high - low) / 255) + low

    def to_pixels(self, x: Tensor) -> Tensor:
        """The model's output as uint8 on the CPU."""
        return to_uint8(x, self.value_range)

    def _mapped(self, body: Callable, rows: Tensor, title: str, seed: int) -> Iterator[Tensor]:
        for x in self._batches(body, rows, title, seed):
            yield self.to_pixels(x)

    def _map(self, body: Callable, rows: Tensor, title: str) -> Tensor:
        return torch.cat([x.float().cpu() for x in self._batches(body, rows, title, 0)])

    @torch.no_grad()
    def _batches(self, body: Callable, rows: Tensor, title: str, seed: int) -> Iterator[Tensor]:
        statistics = batchnorm.batch_statistics(self.model) if self.batch_norm == "batch" else nullcontext()
        with statistics, progress_bar(len(rows), title, self.show and len(rows) > self.batch) as bar:
            for start in range(0, len(rows), self.batch):
                part = rows[start : start + self.batch]
                stream = Draws(seed, start, Rows.all(len(part)), self.device).stream(title)
                with self.casting():
                    out = body(part.to(self.device), stream)
                yield out
                bar.update(len(part))

    def _calibrate_encoder(self) -> None:
        if not self._encoder_is_ready:
            self._encoder_is_ready = True
            pictures = self.training_images(CALIBRATION * self.batch)
            batches = (self.to_input(part) for part in pictures.split(self.batch) if len(part) > 1)
            batchnorm.recalibrate_encoder(self.model, batches)

    def _calibrate_decoder(self) -> None:
        if not self._decoder_is_ready:
            self._decoder_is_ready = True
            latents = batchnorm.prior_batches(self.model, CALIBRATION, self.batch, device=self.device)
            batchnorm.recalibrate_decoder(self.model, latents)

    def training_images(self, count: int) -> Tensor:
        """The first `count` images of the training set, uint8. Raises ValueError where it is not there."""
        return self.read([self.training_set()], count)

    def training_set(self) -> str | os.PathLike:
        """Where the training images are; those of the quickstart are made if need be.

        Raises ValueError where that is not known (a snapshot holds no path) or no longer true.
        """
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

        count: at most so many of each set. resize: scale the centre square where sizes differ.
        Raises ValueError naming the file that cannot be read or does not fit.
        """
        found: list[np.ndarray] = []
        for source in map(Path, sources):
            if source.is_dir() or source.suffix == ".zip":
                images = ImageSet(source, any_size=True)
                chosen = range(min(count or len(images), len(images)))
                found += [self._fitted(images.name(i), images.decode(i), resize) for i in chosen]
            else:
                found.append(
                    self._fitted(source, _read_file(source, self.config.model.channels == 1), resize)
                )
        if not found:
            raise ValueError("no pictures are given")
        return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()

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


def _device(name: str) -> torch.device:
    gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    names = ["cpu", *["cuda"][:gpus], *(f"cuda:{i}" for i in range(gpus))]
    if str(name) not in names:
        raise ValueError(f"device is {str(name)!r}, this machine has {', '.join(['auto', *names])}")
    return torch.device(name)


def _read_file(path: Path, grey: bool) -> np.ndarray:
    try:
        with Image.open(path) as opened:
            image = flatten(ImageOps.exif_transpose(opened), Recipe(None, grey=grey))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it does not exist" if not path.exists() else f"it is no readable picture ({error})"
        raise ValueError(f"{path} cannot be used: {reason}") from None
    return np.asarray(image).reshape(image.height, image.width, -1)
