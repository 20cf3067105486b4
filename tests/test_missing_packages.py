"""A package that one function needs and that is not installed: the error says which and how to get it.

Readers of .mat and .h5 files, POT, LPIPS, video, DALI, DeepSpeed and the Hub have theirs beside their other
tests.
"""

import subprocess
import sys

import pytest
import torch

from sivae_fast.data.prepare import prepare
from sivae_fast.evaluation import features, likelihood
from sivae_fast.export import _pack_onnx


def test_svhn_needs_scipy(tmp_path, monkeypatch):
    (tmp_path / "svhn").mkdir()
    (tmp_path / "svhn" / "train_32x32.mat").touch()
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"\(SVHN\) needs scipy: pip install 'sivae-fast\[eval\]'"):
        prepare(tmp_path / "svhn", tmp_path / "set.zip", progress=False)
    assert not (tmp_path / "set.zip").exists()


def test_auroc_needs_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"needs scikit-learn: pip install 'sivae-fast\[eval\]'"):
        likelihood.auroc(torch.zeros(2), torch.ones(2))


def test_inception_features_need_torch_fidelity(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_weights_file", lambda weights: tmp_path)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match=r"need torch-fidelity and torchvision .* 'sivae-fast\[eval\]'"):
        features.load_features("inception")


def test_onnx_needs_three_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"ONNX needs a package that is missing .*onnxscript"):
        _pack_onnx(None, [], [])


@pytest.mark.parametrize(
    ("package", "code", "message"),
    [
        ("yaml", "import sivae_fast; sivae_fast.load", "load needs a package that is missing"),
        (
            "PIL",
            "from sivae_fast.cli import main; main(['prepare', 'a', 'b.zip'])",
            "error: a package is missing",
        ),
        ("yaml", "from sivae_fast.cli import main; main(['doctor'])", "error: a package is missing"),
        ("yaml", "from launch.train import main; main(['--dry-run'])", "error: a package is missing"),
    ],
)
def test_what_the_toolkit_needs_is_in_one_extra(package, code, message):
    code = f"import sys; sys.modules[{package!r}] = None; {code}"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stderr
    last = said.splitlines()[-1]
    assert message in last and package in last and "pip install 'sivae-fast[train" in last
