"""Iterations captured once as a CUDA graph and replayed: one launch in place of hundreds.

A graph is everything from a batch to the meter: input, both phases with their backward passes, both optimizer
steps, the average. Numbers of the host would be frozen into it, so none may take part but these:

- what changes shapes or which passes there are (level, batch, phase) is the key of a graph;
- coins of streams decide about passes, too: a key has one graph for each way in which its coins fall;
- seeds of streams, and integers drawn from them, are written to the device before every replay. PyTorch's
  generators read seed and offset there, so a replay has the numbers of an eager iteration;
- learning rate, `beta_neg`, fade, step count and sums of the meter live on the device anyway.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from sivae_fast.config import Config, ConfigError
from sivae_fast.draws import Rows, Stream, stream_seed

#: Eager iterations before a capture: they make optimizer state and meter, compile and tune kernels.
WARM_UP = 2

MakeStream = Callable[[str, Rows], Stream]
Body = Callable[[Tensor | Rows, MakeStream], None]


def check_graphs(config: Config, kind: str, world: int, device: torch.device) -> None:
    """Raises ConfigError where train.graphs cannot be had: names what is in the way and what is accepted."""
    train, data = config.train, getattr(config.data, "name", None)
    for setting, accepted, fits in (
        (f"a {device.type} device", "a CUDA GPU", device.type == "cuda"),
        (f"engine.kind={kind}", "torch", kind == "torch"),
        (f"{world} ranks", "one", world == 1),
        (
            f"optim.implementation={config.optim.implementation}",
            "torch",
            config.optim.implementation == "torch",
        ),
        ("train.compile=true", "false", not train.compile),
        (f"train.batch={train.batch}", "numbers", train.batch != "auto"),
        (f"train.micro_batch={train.micro_batch}", "numbers or null", train.micro_batch != "auto"),
        (f"data.name={data}", "a density that does not move", data != "sequential8gaussians"),
    ):
        if train.graphs and not fits:
            raise ConfigError(f"train.graphs=true with {setting}: accepted is {accepted}")


class CudaRecorder:
    """Captures on a stream of its own; all its graphs share their memory, since no two run at a time."""

    def __init__(self):
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, body: Callable[[], None]) -> None:
        """Runs `body` eagerly on the stream on which it is captured later, as autograd needs it."""
        now = torch.cuda.current_stream()
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            body()
        now.wait_stream(self._stream)

    def capture(self, body: Callable[[], None], generators: list[torch.Generator]) -> Callable[[], None]:
        """What replays `body`, which is not run now; its random numbers come from `generators` alone."""
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # Threads that load data may go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            body()
        return graph.replay


class Graphs:
    """The captured iterations of a run with `seed`."""

    def __init__(self, seed: int, device: torch.device):
        self._seed, self._device = seed, device
        self.forget()

    def forget(self) -> None:
        """To be called when tensors that graphs hold are replaced: the optimizers' state."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the last replay may still be running
        self._recorder = CudaRecorder()
        self._kinds: dict[Hashable, list[_Kind]] = {}

    def run(self, key: Hashable, body: Body, batch: Tensor | Rows, images: int) -> None:
        """One iteration: body(batch, make_stream), or the replay of an earlier one that did the same.

        key: equal for iterations that differ in nothing but the batch's values and numbers on the device.
        batch: rows are part of what is frozen, so of the key.
        images: where the iteration stands in the endless sequence of random numbers.
        """
        seed_of = lambda name: stream_seed(self._seed, images, name)
        kinds = self._kinds.setdefault(key, [])
        kind = next((kind for kind in kinds if kind.fits(seed_of)), None)
        if kind is None:
            kind = _Kind(self._recorder, self._device)
            kinds.append(kind)
        kind.run(body, batch, seed_of)


class _Kind:
    """Iterations of one key whose coins fall alike: eager at first, then one graph."""

    def __init__(self, recorder, device: torch.device):
        self._recorder, self._device = recorder, device
        self._streams: list[_Repeated] = []
        self._runs = self._asked = 0
        self._replay = None

    def fits(self, seed_of: Callable[[str], int]) -> bool:
        return all(stream.falls_alike(seed_of(stream.name)) for stream in self._streams if stream.draws)

    def run(self, body: Body, batch: Tensor | Rows, seed_of: Callable[[str], int]) -> None:
        if self._runs == WARM_UP:
            self._capture(body, batch)
        for stream in self._streams:
            if stream.generator or stream.draws:
                stream.prepare(seed_of(stream.name))
        if self._replay is None:
            self._recorder.warm_up(lambda: self._pass(body, batch, seed_of))
        else:
            if isinstance(batch, Tensor):
                self._batch.copy_(batch, non_blocking=True)
            self._replay()
        self._runs += 1

    def _capture(self, body: Body, batch: Tensor | Rows) -> None:
        self._batch = torch.empty_like(batch, device=self._device) if isinstance(batch, Tensor) else batch
        generators = [stream.generator for stream in self._streams if stream.generator]
        self._replay = self._recorder.capture(lambda: self._pass(body, self._batch), generators)

    def _pass(self, body: Body, batch: Tensor | Rows, seed_of: Callable[[str], int] | None = None) -> None:
        """Streams are those of the first pass, in the order in which it asked for them."""
        self._asked = 0

        def make_stream(name: str, rows: Rows) -> Stream:
            if not self._runs:
                self._streams.append(_Repeated(name, seed_of(name), rows, self._device))
                return self._streams[-1]
            stream = self._streams[self._asked]
            if (stream.name, stream.rows) != (name, rows):
                raise RuntimeError(f"stream {name!r} was {stream.name!r} in an iteration of the same key")
            self._asked += 1
            return stream.again()

        body(batch, make_stream)


class _Draw(NamedTuple):
    """A draw on the host: a coin and how it fell, or the bounds of an integer and where its value is kept."""

    probability: float | None = None
    fell: bool | None = None
    bounds: tuple[int, int] | None = None
    kept: Tensor | None = None


class _Repeated(Stream):
    """A stream that many iterations take; their draws on the host are made ahead, in the noted order."""

    def __init__(self, name: str, seed: int, rows: Rows, device: torch.device):
        super().__init__(seed, rows, device)
        self.name = name
        self.draws: list[_Draw] = []
        self._left: list[_Draw] | None = None

    def prepare(self, seed: int) -> None:
        """Numbers of `seed` for an iteration whose coins fall alike."""
        self.restart(seed)
        for draw in self.draws:
            if draw.bounds is None:
                super().coin(draw.probability)
            else:
                draw.kept.fill_(super().integer(*draw.bounds))

    def again(self) -> _Repeated:
        """The stream from its first draw on, with the numbers of the last `prepare`."""
        self._left = [*self.draws]
        return self

    def falls_alike(self, seed: int) -> bool:
        host = random.Random(seed)
        for draw in self.draws:
            if draw.bounds is not None:
                host.randint(*draw.bounds)
            elif (host.random() < draw.probability) != draw.fell:
                return False
        return True

    def coin(self, probability: float) -> bool:
        if self._left is None:
            self.draws.append(_Draw(probability=probability, fell=super().coin(probability)))
            return self.draws[-1].fell
        return self._left.pop(0).fell

    def integer(self, low: int, high: int) -> int:
        raise RuntimeError("a captured iteration would repeat the same integer for ever: draw an index")

    def index(self, low: int, high: int) -> Tensor:
        if self._left is None:
            kept = torch.full((), super().integer(low, high), device=self.device)
            self.draws.append(_Draw(bounds=(low, high), kept=kept))
            return kept
        return self._left.pop(0).kept
