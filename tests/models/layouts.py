"""Maps whose memory is in another order than channels-last, in which a GPU's tensor cores read them."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LAST = torch.channels_last


class Layouts(TorchDispatchMode):
    """Records maps of several channels that are not channels-last, and copies of maps.

    rows: of the maps, where weights do not count.
    """

    def __init__(self, rows: int | None = None):
        super().__init__()
        self.rows, self.wrong = rows, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if self._is_map(result) and (
                "clone" in str(function) or not result.is_contiguous(memory_format=LAST)
            ):
                self.wrong.append((str(function), tuple(result.shape)))
        return results

    def _is_map(self, x) -> bool:
        return (
            isinstance(x, torch.Tensor) and x.ndim == 4 and min(x.shape) > 1 and self.rows in (None, len(x))
        )
