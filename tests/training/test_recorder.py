"""What a run leaves behind, when, and how it goes on from there: a small network for points in the plane."""

import errno
import itertools
from types import SimpleNamespace

import pytest
import torch

from sivae_fast.checkpoint import load_newest, part, save_checkpoint
from sivae_fast.config import make_config
from sivae_fast.run import read_stats
from sivae_fast.training import loop, recorder, resume
from sivae_fast.training.agreement import RanksDiffer
from sivae_fast.training.engine import TorchEngine
from sivae_fast.training.guard import Diverged
from sivae_fast.training.loop import Trainer, train
from sivae_fast.training.resume import restore


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr(recorder, "save_picture", lambda config, path, *about: path.touch())


@pytest.fixture
def run(tmp_path):
    """run(images, ...) trains, or goes on, by 8 images an iteration and gives the run folder."""

    def trained(images: int, every: dict | None = None, **sections):
        never = dict.fromkeys(("tick", "samples", "checkpoint", "snapshot"), 10**6)
        values = {
            "model": {"kind": "mlp", "width": 8, "hidden_layers": 1},
            "data": {"kind": "density"},
            "train": {"images": images, "batch": 8, "warmup_images": 16},
            "engine": {"kind": "torch"},
            "run": {"folder": str(tmp_path / "runs"), "keep": 9, **never, **(every or {})},
        }
        return train(make_config({**values, **sections}))

    return trained


@pytest.fixture
def spoilt(monkeypatch):
    """spoilt(position): the batch at this position of the sequence is not finite."""
    iterate = Trainer.iterate

    def spoil(at: int) -> None:
        wrong = lambda trainer, x: x * float("nan") if trainer.position == at else x
        monkeypatch.setattr(Trainer, "iterate", lambda self, x, *more: iterate(self, wrong(self, x), *more))

    return spoil


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def written(folder, ending: str) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob(f"*.{ending}"))


def test_everything_is_written_at_its_interval_and_at_the_end(run):
    """None of the intervals is a whole number of batches: what is late does not delay what follows."""
    every = {"tick": 20, "samples": 30, "checkpoint": 50, "snapshot": 36}
    for images in (68, 108):
        folder = run(images, every)
    assert [line["images"] for line in read_stats(folder)] == [24, 40, 64, 72, 80, 104, 112]
    assert written(folder / "samples", "png") == [0, 32, 64, 72, 96, 112]
    assert written(folder / "checkpoints", "json") == [56, 72, 104, 112]
    assert written(folder / "snapshots", "safetensors") == [40, 72, 112]
    assert load_newest(folder / "checkpoints", planned=True)[1]["images"] == 104


@pytest.fixture
def seconds(monkeypatch):
    """One goes by between looks at the clock: for the data, for the step, and for the meter of a tick."""
    clock = itertools.count()
    for module in (loop, recorder):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))


def test_times_of_a_tick_are_its_own(run, seconds, monkeypatch):
    shown = []
    monkeypatch.setattr(recorder.Progress, "show", lambda self, *given: shown.append(given))
    for images in (40, 64):
        folder = run(images, {"tick": 16})
    before = 0
    for line, (images, step, data, *_) in zip(read_stats(folder), shown, strict=True):
        iterations, before = (line["images"] - before) // 8, line["images"]
        assert (line["data_seconds"], line["step_seconds"]) == (iterations, iterations + 1)
        assert line["images_per_second"] == pytest.approx(8 * iterations / (2 * iterations + 1))
        assert (images, step, data) == (line["images"], (iterations + 1) / iterations, 1.0)
        assert 2**26 < line["memory_bytes"] < 2**40
    assert before == 64


def test_the_time_of_a_course_that_was_left_is_not_counted(run, seconds, spoilt, caplog):
    spoilt(24)
    _, line = read_stats(run(32, {"tick": 16, "checkpoint": 16}, guard={"rollbacks": 1}))
    assert (line["images"], line["data_seconds"], line["step_seconds"]) == (32, 2, 3)
    assert "Went back from 32 to 16 images" in caplog.text and "What helps" not in caplog.text


def test_weights_that_have_diverged_are_not_saved(run, spoilt, tmp_path):
    spoilt(8)
    with pytest.raises(Diverged):
        run(64, {"checkpoint": 16})
    assert not list(tmp_path.glob("runs/*/checkpoints/*"))


@pytest.mark.parametrize(("module", "kind"), [(recorder, "tick"), (resume, "checkpoint")])
def test_ranks_that_have_drifted_apart_write_nothing(run, monkeypatch, tmp_path, module, kind):
    def drifted(model):
        raise RanksDiffer("the ranks have drifted apart")

    monkeypatch.setattr(module, "check_parameters", drifted)
    with pytest.raises(RanksDiffer):
        run(64, {kind: 16})
    assert not list(tmp_path.glob("runs/*/checkpoints/*")) and not list(tmp_path.glob("runs/*/stats.jsonl"))


def test_a_checkpoint_has_the_sums_of_the_unfinished_tick(run):
    """Of all ranks together too: another number of them may go on."""
    _, state = load_newest(run(24, {"tick": 1000, "checkpoint": 16}) / "checkpoints", planned=True)
    assert state["images"] == 16 and state["tick"]["kl_real"][1] == 16
    assert state["tick_of_ranks"] == [state["tick"]]


def test_a_tick_that_a_stop_interrupts_is_as_without_it(run, monkeypatch, tmp_path):
    values = lambda folder: [(line["images"], line["kl_real"]) for line in read_stats(folder)]
    whole = values(run(48, {"tick": 32, "folder": str(tmp_path / "whole")}))
    monkeypatch.setattr(loop.Stopper, "asked", lambda self, iteration: iteration == 2)
    parts = run(48, {"tick": 32})
    assert not values(parts)
    run(48, {"tick": 32})
    assert values(parts) == whole and len(whole) == 2


def test_what_a_rank_had_of_its_own_is_for_the_same_number_of_ranks(run, monkeypatch):
    checkpoints, found = run(16) / "checkpoints", []
    tensors, state = load_newest(checkpoints)
    name = next(iter(part(tensors, "model")))
    together, own = tensors[f"model/{name}"], tensors[f"model/{name}"] + 1
    look = lambda trainer: restore(trainer) and found.append(trainer.model.state_dict()[name].clone())
    monkeypatch.setattr(Trainer, "run", look)
    for ranks in (1, 2):
        kept = {**state, "ranks": ranks}
        del kept["sha256"]
        save_checkpoint(checkpoints, 16, {**tensors, f"rank0/{name}": own}, kept, keep=1)
        run(32)
    assert torch.equal(found[0], own) and torch.equal(found[1], together)


def test_engines_learn_of_restored_weights(run, monkeypatch):
    """ZeRO has copies of them."""
    told = []
    monkeypatch.setattr(TorchEngine, "parameters_changed", lambda self: told.append(self))
    run(16)
    assert not told
    run(32)
    assert len(told) == 2


def test_a_checkpoint_that_was_not_saved_is_made_up_for_by_the_next(run, monkeypatch):
    save, results = recorder.save_checkpoint, iter([full_disk])
    monkeypatch.setattr(recorder, "save_checkpoint", lambda *given: next(results, save)(*given))
    assert written(run(32, {"checkpoint": 16}) / "checkpoints", "json") == [32]


def test_a_stop_whose_state_cannot_be_saved_is_an_error(run, monkeypatch):
    monkeypatch.setattr(recorder, "save_checkpoint", full_disk)
    monkeypatch.setattr(loop.Stopper, "asked", lambda self, iteration: iteration == 2)
    with pytest.raises(OSError, match="No space left"):
        run(64)


def test_a_run_whose_configuration_is_damaged_hinders_no_other(run, caplog):
    (run(8) / "config.yaml").write_text("train: [")
    assert run(8, objective={"beta_neg": 3.0}).name.startswith("00001")
    assert "has other settings: it is of another version" in caplog.text


def test_the_line_on_a_terminal_is_ended(run, monkeypatch):
    ended = []
    monkeypatch.setattr(recorder.Progress, "clear", lambda self: ended.append(self))
    run(8)
    assert ended
