"""Fixtures that more than one room uses."""

import os

# pytest -n: tests share the cores, and so do the programs that they start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch


def pytest_configure(config):
    asked = config.option.markexpr.replace("not gpu", "")
    if asked and "gpu" not in asked:
        # Training takes a GPU that it sees, and other tests hold it against the CPU, some to the bit.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that torch hands out uninitialised holds NaN (or -7), so that an unwritten output shows."""

    def poison(make):
        def made(*args, **options):
            tensor = make(*args, **options)
            with torch.no_grad():  # some are made with requires_grad
                return tensor.fill_(float("nan") if tensor.is_floating_point() else -7)

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
