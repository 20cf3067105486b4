"""The Triton kernels against float64: natively on a GPU, else under Triton's interpreter on CPU tensors.

Triton decides between the two when it is imported, so without a GPU these tests run in a process of their
own, started by tests/kernels/test_interpreter.py.
"""

import os

import pytest
import torch

NATIVE = torch.cuda.is_available()
if not NATIVE and os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items):
    for item in items:
        if NATIVE and "triton_cases" in item.path.parts:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device(monkeypatch):
    """Where tensors go to run the Triton kernels."""
    if NATIVE:
        # The convolutions between the kernels are not what is held against float64 here.
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        return "cuda"
    from sivae_fast.kernels import _launch

    monkeypatch.setattr(_launch, "INTERPRET", True)
    return "cpu"
