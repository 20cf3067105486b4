"""The kernels compile with the Triton of every PyTorch that the package allows, not with one alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BESIDE = Path(__file__).with_name("test_ahead_of_time.py")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.4.0", "3.5.1", "3.6.0", "3.8.0", "3.9.0"])
def test_ahead_of_time(tmp_path, version):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path]
    if subprocess.run([*pip, f"triton=={version}"]).returncode:
        pytest.skip(f"triton {version} cannot be installed here")
    command = [sys.executable, "-m", "pytest", BESIDE, "-k", "sm_90", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
