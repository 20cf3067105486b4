"""Installs the package `sivae_fast`; the folder kernels/ becomes `sivae_fast.kernels`."""

from pathlib import Path

from setuptools import find_packages, setup

losses = ["torch>=2.8", "numpy"]
train = [
    "deepspeed>=0.17",
    "nvidia-dali-cuda130; platform_system == 'Linux'",
    "pillow",
    "psutil",
    "pydantic>=2.7",
    "pyyaml",
    "safetensors>=0.4",
    "tensorboard",
    "tqdm",
]
evaluate = ["matplotlib", "scipy", "scikit-learn", "h5py", "POT"]  # also readers of .mat and .h5
image_metrics = ["torch-fidelity", "torchmetrics"]  # need torchvision
video = ["av"]
export = ["onnx", "onnxscript", "onnxruntime"]
hub = ["huggingface_hub>=1.0"]
tests = [
    "pytest",
    "pytest-benchmark",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "ruff",
    "import-linter",
]
# triton: torch brings its own where there is a GPU
develop = ["triton", *tests, *evaluate, *video, *export, *hub]

setup(
    name="sivae-fast",
    version="0.1.0",
    description="Fast and trusted training of introspective variational autoencoders",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["sivae_fast.kernels", *find_packages(include=["sivae_fast", "sivae_fast.*"])],
    package_dir={"sivae_fast.kernels": "kernels"},
    install_requires=losses,
    extras_require={
        "train": train,
        "eval": evaluate + image_metrics,
        "video": video,
        "export": export,
        "hub": hub,
        "dev": develop,
    },
    entry_points={"console_scripts": ["sivae-fast = sivae_fast.cli:main"]},
)
