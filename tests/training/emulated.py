"""CUDA graphs on a CPU: the operators of PyTorch that ran are run again on the same memory, and no Python.

As with a real graph a capture changes nothing, numbers of the host are those of the capture for ever, random
numbers come from the registered generators as they stand at the replay, and what would wait for the device or
copy from the host is refused. So is a replay that would use memory which nobody but the graph still holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.lift_fresh}
INDEXING = {aten.index, aten.index_put, aten.index_put_}


class EmulatedRecorder:
    """In place of `CudaRecorder`."""

    def __init__(self):
        self.graphs: list[EmulatedGraph] = []

    def warm_up(self, body: Callable[[], None]) -> None:
        body()

    def capture(self, body: Callable[[], None], generators: list[torch.Generator]) -> Callable[[], None]:
        graph = EmulatedGraph(generators)
        with graph:
            body()
        graph.finish()
        self.graphs.append(graph)
        return graph.replay


class EmulatedGraph(TorchDispatchMode):
    """Records every operator while it is active; `finish` undoes what they did, `replay` does it again."""

    def __init__(self, generators: list[torch.Generator]):
        super().__init__()
        self.replays = 0
        self._generators = [generator._cdata for generator in generators]
        self._calls: list[tuple[Any, tuple, dict, Any]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        masks = operator.overloadpacket in INDEXING and any(_is_mask(index) for index in args[1])
        if operator.overloadpacket in WAITS or masks:
            raise RuntimeError(f"{operator} waits for the device or copies from the host: not in a graph")
        generator = getattr(kwargs.get("generator"), "_cdata", None)
        if torch.Tag.nondeterministic_seeded in operator.tags and generator not in self._generators:
            raise RuntimeError(f"{operator} draws from a generator that the graph does not know")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            self._keep(tensor)
        outputs = operator(*args, **kwargs)
        places = {_place(tensor) for tensor in given}
        # A view needs no second run, nor has what was written in place to be copied.
        fresh = [
            t if isinstance(t, Tensor) and _place(t) not in places else None for t in tree_leaves(outputs)
        ]
        self._made |= {_place(tensor) for tensor in fresh if tensor is not None}
        if any(t is not None for t in fresh) or operator._schema.is_mutable:
            self._calls.append((operator, args, kwargs, fresh))
        return outputs

    @torch.no_grad()
    def finish(self) -> None:
        """Undoes what was computed, and leaves memory from outside to those who own it, as addresses do."""
        for *_, fresh in self._calls:
            for tensor in fresh:
                if tensor is not None and tensor.is_floating_point():
                    tensor.fill_(float("nan"))
        for tensor, before in self._before.values():
            tensor.copy_(before)
        address = lambda t: _Address(t) if _place(t) in self._before else t.detach()
        self._calls = [
            (operator, *tree_map_only(Tensor, address, (args, kwargs, fresh)))
            for operator, args, kwargs, fresh in self._calls
        ]
        self._before = {}

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for operator, args, kwargs, fresh in self._calls:
            args, kwargs = tree_map_only(_Address, _Address.tensor, (args, kwargs))
            outputs = tree_leaves(operator(*args, **kwargs))
            for kept, again in zip(fresh, outputs, strict=True):
                if kept is not None:
                    kept.copy_(again)

    def _keep(self, tensor: Tensor) -> None:
        place = _place(tensor)
        if place not in self._made and place not in self._before:
            storage = tensor.untyped_storage()
            size = (storage.nbytes() // tensor.element_size(),)
            whole = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, size, (1,))
            self._before[place] = whole, whole.clone()


class _Address:
    """Where a tensor lies, without keeping it there."""

    def __init__(self, tensor: Tensor):
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._form = tensor.storage_offset(), tensor.shape, tensor.stride()
        self._dtype = tensor.dtype

    def tensor(self) -> Tensor:
        if self._storage.expired():
            raise RuntimeError("a graph would use memory that was given back")
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._form)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
