"""What models offer to training, evaluation and the commands, and data to the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sivae_fast.draws import Draws, Rows, Stream


class Posterior(NamedTuple):
    """Diagonal Gaussian q(z|x)."""

    mean: Tensor  # [B, Z]
    logvar: Tensor  # [B, Z], natural logarithm of the variance


class Model(nn.Module):
    """An encoder and a decoder around a Gaussian prior N(0, prior_std^2 I) on Z numbers.

    A new system subclasses this, sets `latent_size` and gives `encode`, `decode` and the two lists of
    modules; all else has a default. `stream` carries the random numbers of one pass; None draws from torch's
    own generator.
    """

    latent_size: int
    prior_std: float = 1.0
    #: True where `decode_fake` runs another decoder than `decode` (the bootstrap variant).
    lagged_decoder: bool = False
    #: True where rows of a batch influence each other (batch norm): passes must then not be joined.
    uses_batch_statistics: bool = False
    #: True where `encode` takes a stream as its second argument and draws from it while training.
    random_encoder: bool = False
    #: Names of the fakes that training makes beside reconstructions and prior samples.
    further_fakes: tuple[str, ...] = ()

    def encode(self, x: Tensor) -> Posterior:
        raise NotImplementedError

    def decode(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        """x_hat for latents [B, Z]."""
        raise NotImplementedError

    def generate(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        """x_hat for latents [B, Z] drawn from the prior; differs from `decode` where a model mixes styles."""
        return self.decode(z, stream)

    def decode_fake(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        """Reconstruction of a fake from latents [B, Z]; the bootstrap variant has a lagged decoder here."""
        return self.decode(z, stream)

    def further_latents(self, z: Tensor) -> Sequence[Tensor]:
        """Latents [B, Z] of each of `further_fakes`, made of posterior draws z [B, Z] of a batch."""
        return ()

    @torch.no_grad()
    def sample(self, count: int, seed: int = 0) -> Tensor:
        """`count` x_hat of the prior, without style mixing; the same latents for the same seed everywhere."""
        check_count(count)
        seed = checked_seed(seed)
        z = torch.randn(count, self.latent_size, generator=torch.Generator().manual_seed(seed))
        where = next(self.parameters())
        return self.decode(z.to(where) * self.prior_std, Stream(seed, Rows.all(count), where.device))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, seed: int = 0) -> Tensor:
        """x_hat of the posterior mean of x [B, ...]; `seed` is for decoders that add noise."""
        return self.decode(self.encode(x).mean, Stream(checked_seed(seed), Rows.all(len(x)), x.device))

    def check_rows(self, name: str, x: Tensor, *shape: int | str) -> None:
        """Raises ValueError where x is no tensor [B, *shape] of the model's floats; a word is any size
        but 0.

        Under autocast, all floats pass that it converts: not float64.
        """
        fits = isinstance(x, Tensor) and x.ndim == 1 + len(shape) and x.is_floating_point()
        sizes = zip(x.shape[1:], shape, strict=True) if fits else ()
        fits = fits and all(a > 0 if isinstance(b, str) else a == b for a, b in sizes)
        own = next(self.parameters()).dtype
        if fits and x.dtype != own:
            fits = torch.float64 not in (x.dtype, own) and torch.is_autocast_enabled(x.device.type)
        if not fits:
            size = ", ".join(map(str, ("B", *shape)))
            kind = str(own).removeprefix("torch.")
            is_bytes = len(shape) == 3 and getattr(x, "dtype", None) == torch.uint8  # of images
            hint = ": Inference takes bytes" if is_bytes else ""
            raise ValueError(f"{name} is {described(x)}, must be a {kind} tensor [{size}]{hint}")

    def encoder_modules(self) -> Iterable[nn.Module]:
        """The modules that the encoder phase trains."""
        raise NotImplementedError

    def decoder_modules(self) -> Iterable[nn.Module]:
        """The modules that the decoder phase trains; with the encoder's they hold every trained parameter."""
        raise NotImplementedError

    def recomputable_modules(self) -> Iterable[nn.Module]:
        """Modules that may run again in the backward pass in place of keeping their activations.

        They draw nothing and change nothing (no batch norm); none in a model that is small anyway.
        """
        return ()

    def learning_rate_factors(self) -> dict[str, float]:
        """Factor on the learning rate by parameter name; names left out have 1 (equalised learning rate)."""
        return {}

    def end_of_epoch(self, epoch: int) -> None:
        """Called in training when `epoch` = 1, 2, ... passes over the data are complete."""

    def set_level(self, lod: int, blend: float) -> None:
        """Progressive growing: the level in use and its fade (0 to 1); one-size models ignore it."""


class TrainingData(Protocol):
    """What the training loop asks of data; a place in it is a number of images seen."""

    input_shape: tuple[int, ...]  # of one item as the model takes it at full size

    def __len__(self) -> int:
        """Items in an epoch."""

    def checksum(self) -> str:
        """Equal where the items are: ranks compare it."""

    def batches(
        self, start: int, batch_at: Callable[[int], int], rank: int = 0, world: int = 1
    ) -> Iterator[Any]:
        """This rank's rows of every batch from `start` on, endless; batch_at: the size of that at a place."""

    def to_input(self, batch: Any, draws: Draws, lod: int, blend: float | Tensor) -> Tensor:
        """What the model encodes, on draws.device; batch: of `batches`; lod, blend: of `Model.set_level`."""

    def fixed(self, count: int) -> Tensor:
        """The first `count` items of a fixed order, as the model takes them at full size."""

    def close(self) -> None:
        """Gives back files, threads and memory."""


def check_count(count: int) -> None:
    """Raises ValueError for what is no number of samples."""
    if not isinstance(count, Integral) or count < 1:
        raise ValueError(f"count is {count!r}, must be a whole number, at least 1")


def checked_seed(seed: int) -> int:
    """`seed` as Python has it. Raises ValueError for what torch's generators do not take."""
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}, must be a whole number from 0 to 2^64 - 1")
    return int(seed)


def described(value: object) -> str:
    """The type of a value, for messages, and its dtype and shape where it has them."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return f"{kind} of {value.dtype}, {list(value.shape)}" if hasattr(value, "shape") else kind
