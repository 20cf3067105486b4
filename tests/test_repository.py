"""What holds for the repository as a whole: import rules, style, and losses that need torch alone."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import conftest

ROOT = Path(__file__).parents[1]


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def beside_python(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def test_imports_follow_the_rooms():
    done = run(beside_python("lint-imports"), "--no-cache")
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("arguments", [["check", "."], ["format", "--check", "."]])
def test_style(arguments):
    done = run(beside_python("ruff"), *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_losses_need_torch_alone():
    """The losses and the models import and run where nothing but torch and numpy is installed."""
    blocked = (
        "deepspeed nvidia pydantic yaml safetensors PIL tqdm triton matplotlib scipy sklearn tensorboard"
    )
    code = f"""
import sys
for name in {blocked.split()!r}:
    sys.modules[name] = None
import torch, sivae_fast
from sivae_fast.models.mlp import MLPModel
from sivae_fast.models.style import StyleModel
model = MLPModel()
x = torch.randn(4, 2)
posterior = model.encode(x)
objective = sivae_fast.VAE(beta_rec=1.0, beta_kl=1.0)
z = objective.reparameterize(posterior, torch.randn(4, 2))
objective.vae(sivae_fast.Term(x, model.decode(z), posterior)).loss.backward()
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_readme_table_is_that_of_the_result_files():
    done = run(sys.executable, "bench/table.py", "--check")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("marks", "devices"),
    [
        ("not slow and not gpu and not cluster", ""),
        ("slow", ""),
        ("gpu", "0"),
        ("gpu and not slow", "0"),
        ("", "0"),
    ],
)
def test_only_tests_marked_gpu_see_one(marks, devices, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace(markexpr=marks)))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == devices
