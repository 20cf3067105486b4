"""Runs tests/kernels/triton_cases under Triton's interpreter, which a process has to choose before it
starts."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
FILES = sorted(Path(__file__).parent.glob("triton_cases/test_*.py"))


def run(file: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def started():
    """Two at a time: nothing else in these tests takes as long."""
    with ThreadPoolExecutor(2) as pool:
        yield {file: pool.submit(run, file) for file in FILES}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run natively, marked gpu")
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_under_the_interpreter(file, started):
    done = started[file].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
