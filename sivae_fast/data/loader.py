"""The training set of images: pixels in the order of the sampler, decoded ahead of time."""

from __future__ import annotations

import functools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from sivae_fast.data import cache, dali, pixels
from sivae_fast.data.archive import ImageSet
from sivae_fast.data.parallel import cores, local_ranks
from sivae_fast.data.sampler import Sampler
from sivae_fast.draws import Draws

log = logging.getLogger(__name__)
#: Batches decoded ahead of the one in use.
AHEAD = 2


class PillowDecoder:
    """Decodes with Pillow in `workers` threads (Pillow leaves the interpreter lock while it decodes)."""

    def __init__(self, images: ImageSet, workers: int, device: torch.device | str = "cpu"):
        self.images, self.pin = images, torch.device(device).type == "cuda"
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def stream(self, requests: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """The images of each array of indices [n]: uint8 [n, R, R, C]. Raises ValueError naming a file."""
        ahead: deque[tuple[Tensor, list[Future]]] = deque()
        try:
            for indices in requests:
                ahead.append(self._submit(indices))
                if len(ahead) > AHEAD:
                    yield _wait(*ahead.popleft())
            while ahead:
                yield _wait(*ahead.popleft())
        finally:
            for _, futures in ahead:
                for future in futures:
                    future.cancel()

    def _submit(self, indices: np.ndarray) -> tuple[Tensor, list[Future]]:
        side = self.images.resolution
        out = torch.empty(
            len(indices), side, side, self.images.channels, dtype=torch.uint8, pin_memory=self.pin
        )
        rows = out.numpy()
        return out, [self._pool.submit(self._decode, rows[k], int(i)) for k, i in enumerate(indices)]

    def _decode(self, row: np.ndarray, index: int) -> None:
        row[:] = self.images.decode(index)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _wait(out: Tensor, futures: list[Future]) -> Tensor:
    for future in futures:
        future.result()
    return out


class ImageLoader:
    """An image set as training data (`contract.TrainingData`).

    `loader` decodes with "dali", with "torch" (Pillow in threads), or "auto": DALI where it is installed.
    `workers` are its threads, by default the rank's share of the cores, at most 8. `cache_gib` is the most
    memory that decoded images may take on `device` (None: a share of what is free; 0: none); a set that does
    not fit is decoded again every epoch. `signed` maps pixels to [-1, 1], else to [0, 1]; `flip` mirrors
    images at random, `shift` and `hue` are the largest random displacement (of the side) and turn of the hue
    (of the circle); `grows` False is for models of one size: any square images, no levels of detail.

    Raises ValueError for options out of range and for sets that cannot be trained on (see ImageSet).
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        loader: str = "auto",
        workers: int | None = None,
        cache_gib: float | None = None,
        flip: bool = True,
        signed: bool = True,
        shift: float = 0.0,
        hue: float = 0.0,
        grows: bool = True,
    ):
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        if cache_gib is not None and cache_gib < 0:
            raise ValueError(f"cache_gib must be 0 or more, got {cache_gib}")
        for name, value in (("shift", shift), ("hue", hue)):
            if not 0 <= value <= 0.5:
                raise ValueError(f"{name} must lie in 0 ... 0.5, got {value}")
        self.device = torch.device(device)
        kind = choose_loader(loader, self.device)
        self.images = ImageSet(path, any_size=not grows)
        if hue and self.images.channels == 1:
            raise ValueError(f"hue={hue} needs colour images, {path} is grey")
        self.signed, self.grows = signed, grows
        self._random = {"flip": flip, "shift": shift, "hue": hue}
        side = self.images.resolution
        self.input_shape = (self.images.channels, side, side)
        self._sampler = Sampler(len(self.images), seed)
        decoder = dali.DaliDecoder if kind == "dali" else PillowDecoder
        self._decoder = decoder(self.images, workers or default_workers(), self.device)
        fits = cache.fits(self.images, self.device, cache_gib)
        self._cache = cache.Cache(self.images, self.device) if fits else None

    def __len__(self) -> int:
        return len(self.images)

    def checksum(self) -> str:
        """Tells whether two ranks, or a run and its checkpoint, have the same images."""
        return self.images.checksum()

    def batches(
        self, start: int, batch_at: Callable[[int], int], rank: int = 0, world: int = 1
    ) -> Iterator[Tensor]:
        """This rank's rows of each batch from `start` images seen on: uint8 [B / world, R, R, C]."""
        requests = self._sampler.requests(start, batch_at, rank, world)
        return self._cache.stream(requests, self._decoder) if self._cache else self._decoder.stream(requests)

    def to_input(self, batch: Tensor, draws: Draws, lod: int, blend: float | Tensor) -> Tensor:
        """What the model encodes: float32 [B, C, r, r] on draws.device, r = 4 * 2^lod (pixels.to_input)."""
        level = {"resolution": 4 << lod, "blend": blend} if self.grows else {}
        return pixels.to_input(batch, draws, signed=self.signed, **level, **self._random)

    def fixed(self, count: int) -> Tensor:
        """The same `count` images in every run, at full size: float32 [count, C, R, R] on the device."""
        chosen = Sampler(len(self.images)).indices(0, count)
        batch = torch.from_numpy(np.stack([self.images.decode(int(i)) for i in chosen]))
        return pixels.to_input(batch, None, signed=self.signed, device=self.device)

    def close(self) -> None:
        self._decoder.close()


@functools.cache
def choose_loader(name: str, device: torch.device) -> str:
    """Which of "dali" and "torch" the name of a loader stands for; says once where "auto" falls back."""
    if name not in ("auto", "dali", "torch"):
        raise ValueError(f"loader must be auto, dali or torch, got {name!r}")
    reason = None if name == "torch" else dali.trouble(device)
    if name == "dali" and reason:
        raise ValueError(
            f"loader=dali: {reason}; `pip install nvidia-dali-cuda130` (or the one for your CUDA version) "
            "installs it, loader=torch does without"
        )
    if reason:
        log.warning("%s: Pillow decodes the images", reason)
    return "torch" if reason or name == "torch" else "dali"


def default_workers() -> int:
    """Decoding threads of one rank: its share of the machine's cores, at most 8."""
    return max(1, min(8, cores() // local_ranks()))
