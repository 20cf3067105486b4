"""Decoding with NVIDIA DALI: our sampler says what, DALI's threads (or the GPU) decode it ahead of time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from sivae_fast.data.archive import ImageSet

#: A pipeline decodes up to this many images at once; larger batches are put together from several runs.
PIECE = 64
#: Runs decoded ahead of the one in use.
AHEAD = 2


def trouble(device: torch.device | str = "cpu") -> str | None:
    """Why DALI cannot be used on `device`; None where it can."""
    try:
        from nvidia.dali import Pipeline, fn
    except (ImportError, OSError) as error:
        return f"NVIDIA DALI is not installed ({error})"
    device = torch.device(device)
    if device.type == "cuda":
        try:
            pipeline = Pipeline(1, 1, _index(device))
            with pipeline:
                pipeline.set_outputs(fn.constant(idata=0, device="gpu"))
            pipeline.run()
        except RuntimeError as error:
            return f"NVIDIA DALI does not work on {device} ({str(error).strip().splitlines()[-1]})"
    return None


def _index(device: torch.device) -> int | None:
    """DALI's number of a device, None for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


class DaliDecoder:
    """Decodes in `workers` threads of DALI; on a CUDA device the GPU decodes what it can (JPEG)."""

    def __init__(self, images: ImageSet, workers: int, device: torch.device | str = "cpu"):
        self.images, self.workers, self.device = images, workers, torch.device(device)
        self._readers = ThreadPoolExecutor(workers, thread_name_prefix="read")

    def stream(self, requests: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """The images of each array of indices [n]: uint8 [n, R, R, C]. Raises ValueError naming a file."""
        lengths: deque[int] = deque()
        fed: deque[np.ndarray] = deque()
        pipeline = self._build(self._feed(_cut(requests, lengths), fed))
        pieces: list[Tensor] = []
        gpu = self.device.type == "cuda"
        while True:
            try:
                # On a GPU the pixels belong to the stream that trains: nothing waits for the host.
                (decoded,) = pipeline.run(torch.cuda.current_stream(self.device)) if gpu else pipeline.run()
            except StopIteration:
                return
            except RuntimeError as error:
                raise self._explain(fed, error) from None
            pieces.append(self._to_torch(decoded, fed.popleft()))
            if sum(map(len, pieces)) == lengths[0]:
                lengths.popleft()
                yield pieces[0] if len(pieces) == 1 else torch.cat(pieces)
                pieces = []

    def _feed(self, pieces: Iterable[np.ndarray], fed: deque[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """The files of each piece as DALI wants them, read ahead; `fed` keeps which images DALI is at."""
        ahead: deque = deque()
        for piece in pieces:
            ahead.append((piece, [self._readers.submit(self._read, int(i)) for i in piece]))
            if len(ahead) > AHEAD:
                yield _files(*ahead.popleft(), fed)
        while ahead:
            yield _files(*ahead.popleft(), fed)

    def _read(self, index: int) -> bytes:
        data = self.images.read(index)
        if self.images.channels == 1:
            self.images.check(index, data)
        return data

    def _build(self, files: Iterator[list[np.ndarray]]):
        from nvidia.dali import Pipeline, fn, types

        pipeline = Pipeline(PIECE, self.workers, _index(self.device), prefetch_queue_depth=AHEAD)
        with pipeline:
            encoded = fn.external_source(source=files, dtype=types.UINT8, ndim=1, batch=True)
            pipeline.set_outputs(
                fn.decoders.image(
                    encoded,
                    device="mixed" if self.device.type == "cuda" else "cpu",
                    output_type=types.RGB if self.images.channels == 3 else types.GRAY,
                    jpeg_fancy_upsampling=True,
                )
            )
        pipeline.build()
        return pipeline

    def _to_torch(self, decoded, indices: np.ndarray) -> Tensor:
        side, channels = self.images.resolution, self.images.channels
        for index, shape in zip(indices, decoded.shape(), strict=True):
            if tuple(shape) != (side, side, channels):
                self.images.decode(int(index))
        # Outputs of DALI's default execution model own their memory: no copy is needed.
        return torch.from_dlpack(decoded.as_tensor())

    def _explain(self, fed: deque[np.ndarray], error: RuntimeError) -> Exception:
        """The error to raise for a failed run: DALI does not say which image it failed on, Pillow does."""
        suspects = [int(i) for piece in fed for i in piece]
        for index in suspects:
            try:
                self.images.decode(index)
            except ValueError as found:
                return found
        names = ", ".join(self.images.name(i) for i in suspects[:3])
        cause = [line for line in str(error).splitlines() if line.strip()]
        return RuntimeError(
            f"DALI failed on one of {len(suspects)} images of {self.images.path} ({names}, ...) that Pillow "
            f"can read: {cause[-2:]}; the loader 'torch' does without DALI"
        )

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)


def _cut(requests: Iterable[np.ndarray], lengths: deque[int]) -> Iterator[np.ndarray]:
    """The requests in pieces that fit one run; `lengths` keeps how many images belong together."""
    for indices in requests:
        lengths.append(len(indices))
        yield from np.array_split(indices, -(-len(indices) // PIECE))


def _files(piece: np.ndarray, reads: list, fed: deque[np.ndarray]) -> list[np.ndarray]:
    fed.append(piece)
    return [np.frombuffer(read.result(), np.uint8) for read in reads]
