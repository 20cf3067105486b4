"""A trained model with all that its use needs, whatever it is a model of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from sivae_fast.checkpoint import load
from sivae_fast.config import Config
from sivae_fast.contract import Model, checked_seed, described
from sivae_fast.draws import Draws, Rows
from sivae_fast.evaluation import batchnorm
from sivae_fast.progress import progress_bar

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
#: Batches that batch norm is recalibrated with.
CALIBRATION = 32


class Trained:
    """What `Inference` (images) and `CloudInference` (point clouds) share: batches, precision, batch norm.

    model: on its device and at its level. config, images: what it was trained with, and how far.
    weights: "averaged" or "raw", said beside every number.
    batch: items in one pass; the noise of stochastic decoders and recalibrated batch norm depend on it, other
        results do not.
    batch_norm: "running", "batch" or "recalibrated" (see `evaluation.batchnorm`) for models that have it;
        None takes `default_batch_norm`. Recalibrated: the encoder with the training data, the decoder with
        their posterior means for what was encoded, and with prior samples for samples.
    data: where the data of the run are, if not where the run found them.
    Raises ValueError for options that do not fit.
    """

    #: Values of model.kind that the class takes, and what batch_norm is where it is not given.
    kinds: tuple[str, ...] = ()
    default_batch_norm = "recalibrated"

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
        check_kind(config, self.kinds)
        has_batch_norm = bool(batchnorm.batch_norms(model))
        if batch_norm is not None and not has_batch_norm:
            raise ValueError(f"batch_norm is {batch_norm!r}: this model has no batch norm")
        self.model, self.config, self.images = model.eval(), config, images
        self.device = next(model.parameters()).device
        self.weights, self.precision, self.autocast = weights, precision, PRECISIONS[precision]
        self.batch, self.show = batch, show
        self.data_path = data
        self.batch_norm = None
        if has_batch_norm:
            self.batch_norm = batch_norm or self.default_batch_norm
        self._encoder_is_ready = self.batch_norm != "recalibrated"
        self._decoder_takes: bool | None = None  # what it is calibrated for: encoded latents, or the prior's
        self._decoder_statistics: dict[bool, batchnorm.Statistics] = {}

    @classmethod
    def load(cls, path: str | os.PathLike, *, averaged: bool = True, device: str = "auto", **options):
        """The model of a run folder, checkpoint or snapshot; further options as the constructor.

        averaged: the averaged weights, where there are any; False takes those of the optimizer.
        device: "auto" is the GPU where there is one. Raises CheckpointError, naming the file, for what is no
        model or lacks those weights, ValueError for a device that this machine does not have.
        """
        model = load(path, averaged, pick_device(device))
        return cls(model, model.config, model.images, weights=model.facts["weights"], **options)

    @property
    def described(self) -> dict[str, object]:
        """What belongs beside every number and picture of this model."""
        facts = {"images": self.images, "weights": self.weights, "precision": self.precision, **self.size}
        facts |= {"batch_norm": self.batch_norm} if self.batch_norm else {}
        # Its statistics are then those of batches.
        return facts | ({"batch": self.batch} if self.batch_norm in ("batch", "recalibrated") else {})

    @property
    def size(self) -> dict[str, int]:
        """Of what the model makes, by the name of its unit."""
        raise NotImplementedError

    @property
    def calibration_size(self) -> int:
        """Items of a batch that batch norm is recalibrated with: one alone has no variance across items."""
        return max(2, self.batch)

    def calibration_batches(self) -> Iterable[Tensor]:
        """Batches of training data as the model takes them, for the encoder's batch norm."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Brings batch norm into its mode, for those who encode and decode with the model itself."""
        self._calibrate_encoder()
        self._calibrate_decoder(encoded=True)

    def casting(self) -> torch.autocast:
        """The context in which the model computes with this precision, for those who call it themselves."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def prior(self, count: int, seed: int) -> Tensor:
        """Prior samples [count, Z]: the same for the same seed on every device and at every batch size."""
        generator = torch.Generator().manual_seed(checked_seed(seed))
        return torch.randn(count, self.model.latent_size, generator=generator) * self.model.prior_std

    def _check_latents(self, z: Tensor) -> None:
        """Raises ValueError where z is no tensor of finite floats [N, Z], N at least 1."""
        self._check_floats("z", z, self.model.latent_size, hint=": latents of a model that diverged are not")

    def _check_floats(self, name: str, x: Tensor, *shape: int, hint: str = "") -> None:
        fits = isinstance(x, Tensor) and x.is_floating_point() and tuple(x.shape[1:]) == shape
        if not fits or not len(x):
            size = ", ".join(map(str, ("N", *shape)))
            raise ValueError(f"{name} is {described(x)}, must be a tensor of floats [{size}], N at least 1")
        if not x.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity, must be finite{hint}")

    def style_options(self, option: str, value, default) -> dict:
        """{option: value} where it is not the default; ValueError where the model has no styles."""
        if value == default:
            return {}
        if self.config.model.kind != "style":
            raise ValueError(
                f"{option}={value}: this model is of kind {self.config.model.kind}, styles need style"
            )
        return {option: value}

    def map(self, body: Callable, rows: Tensor, title: str, seed: int = 0) -> Tensor:
        """body(rows of a batch on the device, stream) for all rows, float32 on the CPU."""
        return torch.cat([x.float().cpu() for x in self._batches(body, rows, title, seed)])

    @torch.no_grad()
    def _batches(self, body: Callable, rows: Tensor, title: str, seed: int) -> Iterator[Tensor]:
        statistics = batchnorm.batch_statistics(self.model) if self.batch_norm == "batch" else nullcontext()
        with statistics, progress_bar(len(rows), title, self.show and len(rows) > self.batch) as bar:
            for start in range(0, len(rows), self.batch):
                part = rows[start : start + self.batch]
                part = part.float() if part.is_floating_point() else part  # images are bytes
                stream = Draws(seed, start, Rows.all(len(part)), self.device).stream(title)
                with self.casting():
                    out = body(part.to(self.device), stream)
                yield out
                bar.update(len(part))

    def _calibrate_encoder(self) -> None:
        if not self._encoder_is_ready:
            if not batchnorm.recalibrate_encoder(self.model, self.calibration_batches()):
                raise ValueError(
                    "batch_norm is 'recalibrated', which needs 2 items of training data: give more, or "
                    "'running' or 'batch'"
                )
            self._encoder_is_ready = True

    def _calibrate_decoder(self, encoded: bool) -> None:
        """For latents that were encoded, or else for the prior's: the decoder's maps differ between them."""
        if self.batch_norm != "recalibrated" or self._decoder_takes == encoded:
            return
        decoder = nn.ModuleList(self.model.decoder_modules())
        if encoded in self._decoder_statistics:
            batchnorm.set_statistics(decoder, self._decoder_statistics[encoded])
        else:
            batchnorm.recalibrate_decoder(self.model, self._latents(encoded))
            self._decoder_statistics[encoded] = batchnorm.statistics(decoder)
        self._decoder_takes = encoded

    def _latents(self, encoded: bool) -> Iterator[Tensor]:
        """Batches to calibrate the decoder with."""
        if not encoded:
            return batchnorm.prior_batches(self.model, CALIBRATION, self.calibration_size, device=self.device)
        self._calibrate_encoder()
        return (self.model.encode(batch).mean for batch in self.calibration_batches())

    def _where_the_data_are(self) -> str | os.PathLike | None:
        """None is the made set of data that have one. Raises ValueError for what is not there any more."""
        path = self.data_path or self.config.data.path
        if path is not None and not Path(path).exists():
            raise ValueError(
                f"the data of the run are needed, and {path} does not exist: give data=PATH (--data PATH)"
            )
        return path


def named_set(path: str | os.PathLike | None) -> dict[str, str]:
    """What a record says of the set at `path` that it was measured on in place of the run's own: its name."""
    return {} if path is None else {"data": Path(path).resolve().name}


def check_kind(config: Config, kinds: tuple[str, ...]) -> None:
    """Raises ValueError for a model.kind that is none of `kinds`."""
    if config.model.kind not in kinds:
        *others, last = kinds
        accepted = f"{', '.join(others)} and {last}" if others else last
        raise ValueError(f"model.kind is {config.model.kind}: this takes {accepted} models")


def batch_norm_is_measured_anew(model: Model) -> bool:
    """Whether commands measure the batch norm of a model of `load` anew, unless told otherwise: the model
    itself has the running statistics of training, which for images can look broken."""
    return bool(batchnorm.batch_norms(model)) and model.config.model.kind in ("residual", "own")


def pick_device(name: str) -> torch.device:
    """The device of that name, "auto" the GPU where there is one. ValueError for what is not there."""
    gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    names = ["cpu", *["cuda"][:gpus], *(f"cuda:{i}" for i in range(gpus))]
    if str(name) not in names:
        raise ValueError(f"device is {str(name)!r}, this machine has {', '.join(['auto', *names])}")
    return torch.device(name)
