"""Gradients averaged over ranks while the backward pass still makes others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

#: Of gradients in one all-reduce: enough to use a link's bandwidth, few enough to begin early.
BUCKET_BYTES = 25 << 20


class Reduction:
    """Means over ranks of the gradients of one network, in buckets that are sent as soon as they are full.

    parameters: in the order of the forward pass. Buckets hold those that had a gradient in the iteration
    before, from the last one on, as a backward pass makes them, and are sent in this order: every rank sends
    the same, whatever its timing. What else has a gradient is sent at the end; which parameters have one must
    be the same on all ranks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self._parameters = [*parameters][::-1]
        self._buckets: list[list[nn.Parameter]] = []
        self._bucket_of: dict[nn.Parameter, int] = {}
        self._missing: list[int] | None = None  # gradients of each bucket, while the last backward pass runs
        self._next = 0  # bucket to be sent
        self._sent: list[tuple[dist.Work, Tensor, list[Tensor]]] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._made)

    def begin(self) -> None:
        """The backward pass that follows is the last one before `finish`."""
        self._missing = [len(bucket) for bucket in self._buckets]

    def finish(self) -> None:
        """Sends what is left; then all gradients are means over ranks. Collective."""
        self._missing = None
        while self._next < len(self._buckets):
            self._send_next()
        with_gradient = [p for p in self._parameters if p.grad is not None]
        for bucket in _buckets([p for p in with_gradient if p not in self._bucket_of]):
            self._send(bucket)
        for work, flat, gradients in self._sent:
            work.wait()
            flat /= dist.get_world_size()
            torch._foreach_copy_(gradients, flat.split([gradient.numel() for gradient in gradients]))
        self._sent, self._next = [], 0
        if len(with_gradient) != len(self._bucket_of) or any(p not in self._bucket_of for p in with_gradient):
            self._buckets = _buckets(with_gradient)
            self._bucket_of = {p: i for i, bucket in enumerate(self._buckets) for p in bucket}

    def _made(self, parameter: nn.Parameter) -> None:
        if self._missing is None or parameter not in self._bucket_of:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._send_next()

    def _send_next(self) -> None:
        self._send(self._buckets[self._next])
        self._next += 1

    def _send(self, bucket: list[nn.Parameter]) -> None:
        gradients = [_as_it_lies(p.grad) for p in bucket if p.grad is not None]
        if gradients:
            flat = torch.cat(gradients)
            self._sent.append((dist.all_reduce(flat, async_op=True), flat, gradients))


def _as_it_lies(gradient: Tensor) -> Tensor:
    """All numbers in the order of memory, a view: channels-last ones would be copied there and back."""
    order = sorted(range(gradient.dim()), key=gradient.stride, reverse=True)
    return gradient.permute(order).view(-1)


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets, room = [], 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if size > room:
            buckets.append([])
            room = max(BUCKET_BYTES, size)
        buckets[-1].append(parameter)
        room -= size
    return buckets
