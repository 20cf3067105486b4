"""Runs tests/kernels/triton_cases under Triton's interpreter, which a process has to choose before it
starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run natively, marked gpu")
@pytest.mark.parametrize(
    "file", sorted(Path(__file__).parent.glob("triton_cases/test_*.py")), ids=lambda f: f.stem
)
def test_under_the_interpreter(file):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
