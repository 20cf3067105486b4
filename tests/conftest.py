"""Fixtures that more than one room uses."""

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that torch hands out uninitialised holds NaN (or -7), so that an unwritten output shows."""

    def poison(make):
        def made(*args, **options):
            tensor = make(*args, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -7)

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
