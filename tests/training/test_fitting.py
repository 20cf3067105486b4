"""train.batch=auto and train.micro_batch=auto, with a memory that is full above so many numbers of input."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch

from sivae_fast.checkpoint import CheckpointError, load_newest
from sivae_fast.config import ConfigError, load_config, make_config
from sivae_fast.run import read_stats
from sivae_fast.training import fitting, memory
from sivae_fast.training.loop import train
from sivae_fast.training.step import Step
from tests.training.conftest import ROOT, TINY, environment

#: Rank, world and device of a process by itself.
ALONE = 0, 1, torch.device("cpu")


def fill(monkeypatch, numbers: int, error: type = torch.OutOfMemoryError, words: str = "") -> list[int]:
    """From now on a pass over more than `numbers` runs out of memory; gives the images of all passes."""
    passes, whole = [], Step.encoder_phase

    def encoder_phase(step, x, draws):
        passes.append(len(x))
        if x.numel() > numbers:
            raise error(words or f"{x.numel()} numbers")
        return whole(step, x, draws)

    monkeypatch.setattr(Step, "encoder_phase", encoder_phase)
    monkeypatch.setattr(fitting, "limited", lambda *_: contextlib.nullcontext())
    return passes


@pytest.fixture
def growing(image_folder, tmp_path):
    """growing(name, overrides): the tiny style model for 16 images of 4x4 pixels and 8 of 8x8."""

    def made(name: str, *overrides: str):
        tiny = {**TINY, "data.path": image_folder, "run.folder": tmp_path / name, "train.warmup_images": 0}
        tiny |= {"growth.images_per_level": 16, "train.images": 24}
        written = [f"{key}={value}" for key, value in tiny.items()]
        return load_config(ROOT / "launch" / "configs" / "quickstart.yaml", [*written, *overrides])

    return made


@pytest.fixture
def residual(image_folder, tmp_path):
    """residual(name, train, norm): a small model of one size, 8x8 pixels (192 numbers an image)."""

    def made(name: str, norm: str = "group", **train):
        return make_config(
            {
                "model": {"kind": "residual", "resolution": 8, "widths": [4], "latent_size": 4, "norm": norm},
                "data": {"path": str(image_folder), "loader": "torch"},
                "train": {"images": 32, **train},
                "engine": {"kind": "torch"},
                "run": {"folder": str(tmp_path / name), "tick": 8, "checkpoint": 16},
            }
        )

    return made


def batch_of(run):
    return load_config(run / "config.yaml").train.batch


def assert_same(one, two) -> None:
    (a, state_a), (b, state_b) = (load_newest(run / "checkpoints") for run in (one, two))
    assert state_a["images"] == state_b["images"] and state_a["tick"] == state_b["tick"]
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    timing = ("time", "_seconds", "_per_second", "memory")
    ticks = [
        [{k: v for k, v in tick.items() if not any(t in k for t in timing)} for tick in read_stats(run)]
        for run in (one, two)
    ]
    assert ticks[0] and ticks[0] == ticks[1]


def test_found_batch_trains_as_the_same_batch_by_hand(growing, monkeypatch, caplog):
    """4x4 pixels fill the memory at 16 images, 8x8 at 4; finding that out leaves no trace."""
    fill(monkeypatch, 800)
    caplog.set_level("INFO", "sivae_fast")
    before = torch.get_rng_state()
    found = train(growing("found", "train.batch=auto", "train.recompute=true"))
    assert torch.equal(before, torch.get_rng_state())
    assert batch_of(found) == (16, 4)
    assert "train.batch=auto: 16, 4 fits; the learning rate stays" in caplog.text
    assert_same(found, train(growing("hand", "train.batch=[16,4]", "train.recompute=true")))


def test_resumed_run_keeps_its_batch_where_memory_differs(residual, monkeypatch):
    fill(monkeypatch, 8 * 192)
    whole = train(residual("whole", batch="auto"))
    first = train(residual("parts", batch="auto", images=16))
    assert batch_of(whole) == batch_of(first) == 8
    monkeypatch.undo()
    passes = fill(monkeypatch, 10_000)
    assert train(residual("parts", batch="auto")) == first
    assert passes == [8, 8]  # nothing was tried
    assert_same(whole, first)


def test_a_damaged_configuration_of_the_run_is_named_and_removed_costs_nothing(residual, monkeypatch):
    """The error is not about the file of --config; without the file, the checkpoint knows the batch."""
    fill(monkeypatch, 8 * 192)
    run = train(residual("run", batch="auto", images=16))
    monkeypatch.undo()
    passes = fill(monkeypatch, 10_000)
    for content, why in ((b"", "it is empty"), (b"train: {batch: 8", r"not valid YAML: .*")):
        (run / "config.yaml").write_bytes(content)
        said = rf"^{run}/config\.yaml, the configuration of this run, cannot be used \({why}\): bring it back"
        with pytest.raises(CheckpointError, match=said):
            train(residual("run", batch="auto"))
    (run / "config.yaml").unlink()
    assert train(residual("run", batch="auto")) == run
    assert batch_of(run) == 8 and passes == [8, 8]


def test_libraries_say_in_their_own_words_that_memory_is_missing(residual, monkeypatch):
    words = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    fill(monkeypatch, 8 * 192, RuntimeError, words)
    assert batch_of(train(residual("found", batch="auto"))) == 8
    monkeypatch.undo()
    fill(monkeypatch, 8 * 192, RuntimeError, "CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train(residual("other", batch="auto"))


def test_found_micro_batch_leaves_the_batch_as_it_is(residual, monkeypatch):
    fill(monkeypatch, 5 * 192)
    found, by_hand = (
        residual("found", batch=12, micro_batch="auto"),
        residual("hand", batch=12, micro_batch=4),
    )
    run = train(found)
    section = load_config(run / "config.yaml").train
    assert (section.batch, section.micro_batch) == (12, 4)
    assert by_hand.identity() == found.identity()
    assert_same(run, train(by_hand))


def test_micro_batch_of_every_level(growing, monkeypatch):
    fill(monkeypatch, 8 * 48)
    made = fitting.fitted(growing("levels", "train.micro_batch=auto", "train.batch=[16,12]"), *ALONE)
    assert made.train.batch == (16, 12) and made.train.micro_batch == (8, 2)
    assert make_config(made.to_dict()) == made


def test_batch_and_micro_batch_together(residual, monkeypatch):
    """A run whose batch was found goes on where less fits, by smaller passes."""
    fill(monkeypatch, 8 * 192)
    run = train(residual("run", batch="auto", micro_batch="auto", images=8))
    section = load_config(run / "config.yaml").train
    assert (section.batch, section.micro_batch) == (8, 8)
    monkeypatch.undo()
    fill(monkeypatch, 2 * 192)
    assert train(residual("run", batch="auto", micro_batch="auto", images=16)) == run
    section = load_config(run / "config.yaml").train
    assert (section.batch, section.micro_batch) == (8, 2)


@pytest.mark.parametrize("name, numbers, batch", [("2spirals", 30, 8), ("rings", 9, 4), ("rings", 999, 128)])
def test_points_in_the_plane(monkeypatch, name, numbers, batch):
    """2 numbers a point; never more points than the run has."""
    fill(monkeypatch, numbers)
    settings = [f"data.name={name}", "model.width=8", "train.batch=auto", "train.images=128"]
    config = load_config(ROOT / "launch" / "configs" / "density-8gaussians.yaml", settings)
    assert fitting.fitted(config, *ALONE).train.batch == batch


def test_swapped_pairs_stay_together(monkeypatch):
    """Three images would fit, but have no pairs."""
    settings = ["model.swapped_fakes=true", "train.batch=12", "train.micro_batch=auto", "model.width=2"]
    config = load_config(ROOT / "launch" / "configs" / "translation_small.yaml", settings)
    fill(monkeypatch, 3 * config.model.channels * config.model.resolution**2)
    assert fitting.fitted(config, *ALONE).train.micro_batch == 2


def test_ranks_agree_on_what_fits_all(image_folder, tmp_path):
    """Rank 0 has memory for 8 images of 8x8, rank 1 for 2: neither waits for the other, both train 2."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, pytest\n"
        "from sivae_fast.config import load_config\n"
        "from sivae_fast.training.loop import train\n"
        "from tests.training.test_fitting import fill\n"
        "fill(pytest.MonkeyPatch(), 1536 if os.environ['RANK'] == '0' else 400)\n"
        "train(load_config(sys.argv[1], sys.argv[2:]))\n"
    )
    tiny = {**TINY, "data.path": image_folder, "run.folder": tmp_path / "runs", "train.batch": "auto"}
    tiny |= {"engine.kind": "deepspeed", "growth.images_per_level": 0, "train.images": 16}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [program, ROOT / "launch" / "configs" / "quickstart.yaml"]
    command += [f"{key}={value}" for key, value in tiny.items()]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    where = {**environment(), "PYTHONPATH": path}
    done = subprocess.run(command, env=where, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (tmp_path / "runs").glob("*-*")
    assert batch_of(run) == 4 and load_newest(run / "checkpoints")[1]["images"] == 16


@pytest.mark.parametrize("option", ["batch", "micro_batch"])
def test_a_cpu_has_nothing_to_fill(residual, option):
    with pytest.raises(ConfigError, match=rf"train.{option}=auto fills the memory of a GPU.*give a number"):
        train(residual("cpu", **{option: "auto"}))


@pytest.mark.parametrize("option", ["batch", "micro_batch"])
def test_nothing_fits(residual, monkeypatch, option):
    fill(monkeypatch, 40)
    with pytest.raises(ConfigError, match=r"auto.* at level 0 not even the smallest pass fits"):
        train(residual("none", **{option: "auto"}))


def test_what_auto_does_not_go_with(growing, residual, monkeypatch):
    with pytest.raises(ConfigError, match=r"train\.batch=auto and train\.micro_batch=4 exclude each other"):
        growing("both", "train.batch=auto", "train.micro_batch=4")
    fill(monkeypatch, 10_000)
    hinge = ["objective.kind=introvae", "objective.margin=5.0", "train.micro_batch=auto"]
    with pytest.raises(ConfigError, match=r"train\.micro_batch=auto: with objective\.hinge=batch"):
        train(growing("hinge", *hinge))
    with pytest.raises(ConfigError, match=r"train\.micro_batch=auto: with batch statistics"):
        train(residual("statistics", norm="batch", micro_batch="auto"))


def test_limit_is_nine_tenths_of_what_is_free_and_is_taken_back(monkeypatch):
    """A GPU of 100 bytes of which 60 are free and PyTorch holds 20; 10 are for someone else."""
    set_to = [1.0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: set_to[-1])
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: set_to.append(share)
    )
    with (
        pytest.raises(ZeroDivisionError),
        memory.limited(torch.device("cuda"), "train.batch=auto", 0.9, reserved=10),
    ):
        raise ZeroDivisionError
    assert set_to == [1.0, pytest.approx(0.62), 1.0]


@pytest.mark.gpu
def test_batch_is_found_on_a_gpu(growing, monkeypatch):
    """With 1 % of the memory, so that it is filled soon; what was found trains, and the limit is gone."""
    monkeypatch.setattr(fitting, "SHARE", 0.01)
    wide = ["model.start_channels=64", "model.max_channels=512", "train.images=100000", "run.tick=100000"]
    config = growing("gpu", "train.batch=auto", *wide, "growth.images_per_level=0")
    found = fitting.fitted(config, 0, 1, torch.device("cuda", 0))
    assert found.train.batch >= 4 and torch.cuda.get_per_process_memory_fraction() == 1.0
    run = train(growing("gpu", "train.batch=auto", "growth.images_per_level=0"))
    assert load_newest(run / "checkpoints")[1]["images"] >= 24
