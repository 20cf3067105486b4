"""Nodes die, disks fill, ranks differ: nothing is lost, and nothing goes wrong without a word."""

import errno
import hashlib
import json
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from PIL import Image

from bench.fault_scenarios import ELASTIC, PROGRAM, SCENARIOS, SETTINGS, Bench, Launch, assert_same
from bench.soak import soak
from sivae_fast import checkpoint, files, run
from sivae_fast.checkpoint import CheckpointError, load_checkpoint, load_newest
from sivae_fast.config import load_config, make_config
from sivae_fast.data.archive import ImageSet
from sivae_fast.data.held import Held
from sivae_fast.files import append_line, read_lines
from sivae_fast.training import agreement, recorder
from sivae_fast.training.agreement import RankFailed, RanksDiffer
from sivae_fast.training.guard import Diverged, Guard
from sivae_fast.training.loop import Trainer, train
from tests.training.conftest import ROOT

#: Those that are quick enough for every run of the tests.
QUICK = ("other_settings", "killed_rank")
MOUNTS = ("read_only_checkpoints", "full_disk")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SCENARIOS]
)
def test_scenario(bench, name, tmp_path):
    if name in MOUNTS:
        mount = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small file system needs root")
        subprocess.run(["umount", str(tmp_path)], check=True)
    row = SCENARIOS[name](bench)
    assert row["seconds"] < 120 and 0 <= row["images_lost"] <= 80


@pytest.mark.slow
def test_the_loop_of_the_page_starts_a_killed_run_again(bench, tmp_path):
    """As it is written there, but for the program that waits."""
    (loop,) = re.findall(r"`(for i in .*? done)`", (ROOT / "docs" / "faults.md").read_text())
    settings = {**SETTINGS, "data.path": bench.images, "run.name": "looped"}
    command = [sys.executable, str(PROGRAM), *(f"{key}={value}" for key, value in settings.items())]
    place = bench.place("looped")
    place.mkdir()
    (tmp_path / "sleep").write_text(f"#!/bin/sh\necho $1 >> {tmp_path}/slept\n")
    (tmp_path / "sleep").chmod(0o755)
    fault = {"kind": "kill", "rank": 0, "images": 80, "events": str(place / "events.jsonl")}
    environment = {"FAULT": json.dumps(fault), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    bash = ["bash", "-c", loop.replace("COMMAND", shlex.join(command))]
    assert Launch([(bash, environment)], place).wait() == [0]
    steps = [line for line in read_lines(place / "events.jsonl") if line["event"] == "iteration"]
    assert len({step["process"] for step in steps}) == 2
    assert (tmp_path / "slept").read_text() == "10\n"
    bench.assert_as_undisturbed("looped", ranks=1)


@pytest.mark.parametrize(
    "agent",
    [str(ELASTIC), pytest.param("-mtorch.distributed.run", marks=pytest.mark.slow)],
    ids=["elastic", "torchrun"],
)
def test_run_new_begins_one_run_under_an_agent_that_starts_ranks_again(bench, tmp_path, agent):
    settings = {**SETTINGS, "data.path": bench.images, "run.folder": tmp_path / "runs", "run.new": "true"}
    options = ["--standalone", "--max-restarts", "1"]
    command = [sys.executable, agent, *options, str(PROGRAM), *(f"{k}={v}" for k, v in settings.items())]
    fault = {"kind": "kill", "rank": 0, "images": 80, "events": str(tmp_path / "events.jsonl")}
    for number in range(2):  # the second launch is undisturbed: a fault happens once
        assert Launch([(command, {"FAULT": json.dumps(fault)})], tmp_path).wait() == [0]
        assert len(list((tmp_path / "runs").iterdir())) == number + 1
    assert_same(*(tmp_path / "runs").iterdir())


@pytest.fixture
def training(image_folder, tmp_path):
    """training(name, **overrides) runs in this process and gives the run folder."""

    def run(name: str, **overrides):
        settings = {**SETTINGS, "data.path": image_folder, "run.folder": tmp_path / name, "run.name": name}
        settings |= {key.replace("__", "."): value for key, value in overrides.items()}
        written = [f"{key}={value}" for key, value in settings.items()]
        return train(load_config(ROOT / "launch" / "configs" / "quickstart.yaml", written))

    return run


@pytest.fixture
def spoilt(monkeypatch):
    """spoilt(position, factor): the images at this position of the sequence are multiplied."""

    def spoil(at: int, factor: float) -> None:
        iterate = Trainer.iterate

        def faulty(trainer, x, stage, *streams):
            iterate(trainer, x * factor if trainer.position == at else x, stage, *streams)

        monkeypatch.setattr(Trainer, "iterate", faulty)

    return spoil


def test_rollback_leaves_the_images_out_and_resumes_exactly(training, spoilt, caplog):
    """NaN strikes the run twice after the same checkpoint, and stops fall on all sides of it."""
    spoilt(80, float("nan"))
    spoilt(128, float("nan"))  # after the first return, position 128 is at 96 images
    whole = training("whole", guard__rollbacks=2)
    assert "kl_real is not finite" in caplog.text and "Went back from 96 to 64 images" in caplog.text
    assert "Went back from 112 to 96 images" in caplog.text
    assert load_newest(whole / "checkpoints")[1]["guard"]["skipped"] == 48
    for images in (80, 96, 112, 160):
        parts = training("parts", train__images=images, guard__rollbacks=2)
    assert_same(whole, parts)


def test_ranks_end_together_once_the_last_checkpoint_is_there(training, monkeypatch):
    """A launcher may end the rank that saves where the others have ended before it."""
    events, together, save = [], recorder.on_all_ranks, recorder.save_checkpoint
    monkeypatch.setattr(recorder, "save_checkpoint", lambda *given: events.append("saved") or save(*given))
    monkeypatch.setattr(recorder, "on_all_ranks", lambda ask: events.append("together") or together(ask))
    training("ended", train__images=96)
    assert events[-2:] == ["saved", "together"]


def test_without_locks_a_run_starts_and_says_so(training, monkeypatch, caplog):
    def refused(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refused)
    folder = training("unlocked", train__images=16)
    assert f"{folder}: locks are not to be had here (No locks available)" in caplog.text
    assert load_newest(folder / "checkpoints")[1]["images"] == 16


def test_a_checkpoint_from_before_a_return_is_not_gone_on_from(training, spoilt, monkeypatch):
    """Stopped at 96, gone back to 64 from the NaN after it, stopped again at 80."""
    spoilt(112, float("nan"))
    settings = {"guard__rollbacks": 1, "run__checkpoint": 64, "run__keep": 1}
    whole = training("whole", **settings)
    training("parts", train__images=96, **settings)
    advance = Trainer._advance

    def stopped(trainer, batches):
        advance(trainer, batches)
        if trainer.images == 80 and trainer.guard.skipped:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_advance", stopped)
    parts = training("parts", **settings)
    assert sorted(path.stem for path in parts.glob("checkpoints/*.json")) == ["0000000064", "0000000080"]
    monkeypatch.setattr(Trainer, "_advance", advance)
    assert_same(whole, training("parts", **settings))


def test_a_full_disk_does_not_end_a_rollback(training, spoilt, monkeypatch, caplog):
    """What is of the course that was left goes before the next line and the next checkpoint are written."""
    spoilt(112, float("nan"))
    settings = {"guard__rollbacks": 1, "run__checkpoint": 64, "run__keep": 10}
    whole = training("whole", **settings)
    training("parts", train__images=96, **settings)
    refused = []

    def once(owner, name, concerned):
        work = getattr(owner, name)

        def full(path, *more):
            if name not in refused and concerned(path, *more):
                refused.append(name)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return work(path, *more)

        monkeypatch.setattr(owner, name, full)

    once(run, "keep_lines", lambda path, images: images == 64)
    once(checkpoint, "_remove", lambda path: True)
    parts = training("parts", **settings)
    assert refused == ["_remove", "keep_lines"]
    assert "removal of later statistics at 64 images not written" in caplog.text
    assert_same(whole, parts)
    assert sorted(int(path.stem) for path in parts.glob("checkpoints/*.json")) == [64, 128, 160]


def test_a_checkpoint_that_was_not_saved_has_no_returns_of_its_own(training, spoilt, monkeypatch):
    """Else a run whose disk is full would go back to the one before for ever."""
    save = recorder.save_checkpoint

    def full(folder, images, *more):
        if images > 64:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(folder, images, *more)

    for at in (96, 144):  # right after the checkpoints at 96 images, before and after the return to 64
        spoilt(at, float("nan"))
    monkeypatch.setattr(recorder, "save_checkpoint", full)
    with pytest.raises(Diverged, match="The checkpoint at 64 images is from before"):
        training("full", guard__rollbacks=1)


def test_as_many_rollbacks_as_allowed_then_advice(training, spoilt):
    for at in (80, 112):  # strikes again right after the return to 64
        spoilt(at, float("nan"))
    with pytest.raises(Diverged, match=r"a higher objective.beta_neg"):
        training("none")
    with pytest.raises(Diverged, match="kl_real is not finite at level 1"):
        training("one", guard__rollbacks=1, run__checkpoint=64)
    folder = training("two", guard__rollbacks=2, run__checkpoint=64)
    assert load_newest(folder / "checkpoints")[1]["images"] == 160


def test_rollback_takes_the_checkpoint_of_a_stop_where_there_is_no_other(training, spoilt, caplog):
    spoilt(48, float("nan"))
    training("stopped", train__images=32, run__checkpoint=1000)
    training("stopped", run__checkpoint=1000, guard__rollbacks=1)
    assert "Went back from 64 to 32 images" in caplog.text


def test_divergence_before_any_checkpoint_stops(training, spoilt):
    spoilt(16, float("nan"))
    with pytest.raises(Diverged, match=r"not finite .*\. There is no checkpoint yet$"):
        training("early", guard__rollbacks=5)


def test_a_model_of_one_size_has_no_level():
    advice = r"^training diverged: kl_real is not finite after 48 images \(beta_neg"
    with pytest.raises(Diverged, match=advice):
        Guard(make_config({"model": {"kind": "mlp"}, "data": {"kind": "density"}})).check_finite(
            {"kl_real": float("nan"), "loss_encoder": 1.0}, 0, 48
        )


def test_advice_fits_the_phase_and_the_checkpoints(training, spoilt):
    spoilt(80, float("nan"))
    with pytest.raises(Diverged, match=r"higher objective\.beta_neg .* The checkpoint at 64 images is from"):
        training("game", run__checkpoint=32)
    with pytest.raises(
        Diverged, match=r"as a plain VAE\. What helps is a lower optim\.learning_rate"
    ) as error:
        training("warmup", train__warmup_images=160)
    assert "higher" not in str(error.value)
    training("resumed", train__images=80)
    with pytest.raises(Diverged, match="The checkpoint at 80 images is from before"):
        training("resumed", train__images=160)


def test_spike_goes_back(training, spoilt, caplog):
    spoilt(128, 30.0)
    folder = training("spike", guard__rollbacks=1, guard__spike=20)
    assert "rec_real rose to" in caplog.text and "more than guard.spike=20.0 times" in caplog.text
    assert "Went back from 144 to 128 images" in caplog.text
    assert max(line["rec_real"] for line in read_lines(folder / "stats.jsonl")) < 500
    spoiled = training("spoiled")
    assert max(line["rec_real"] for line in read_lines(spoiled / "stats.jsonl")) > 5000


def test_spike_is_told_from_the_median_of_whole_ticks():
    guard = Guard(make_config({"guard": {"spike": 3}}))
    for error in (10.0, 11.0, 100.0):  # too few ticks to tell
        guard.check_tick({"rec_real": error, "kl_real": 1.0}, 0, 0)
    guard.check_tick({"rec_real": 32.0, "kl_real": 2.9}, 0, 0)
    with pytest.raises(Diverged, match=r"kl_real rose to 3.1, more than guard.spike=3.0 times 1"):
        guard.check_tick({"rec_real": 10.0, "kl_real": 3.1}, 0, 0)
    again = Guard(make_config({"guard": {"spike": 3}}))
    again.restore(json.loads(json.dumps(guard.state())))
    with pytest.raises(Diverged, match=r"rec_real rose to 90, more than guard.spike=3.0 times 21.5"):
        again.check_tick({"rec_real": 90.0, "kl_real": 1.0}, 0, 0)
    again.new_level()
    again.check_tick({"rec_real": 400.0, "kl_real": 1.0}, 1, 0)


def test_every_difference_is_named(monkeypatch):
    ranks = [{"a": "1", "b": "2"}, {"a": "1", "b": "2"}, {"a": "3", "c": "4"}]
    monkeypatch.setattr(agreement, "_gather", lambda facts: ranks)
    with pytest.raises(RanksDiffer) as caught:
        agreement.check_same(ranks[0])
    assert "rank 2 has a=3, rank 0 has 1; rank 2 has b=absent, rank 0 has 2" in str(caught.value)
    assert "rank 2 has c=4, rank 0 has absent" in str(caught.value) and "rank 1" not in str(caught.value)
    monkeypatch.setattr(agreement, "_gather", lambda facts: [facts] * 3)
    agreement.check_same(ranks[0])


def test_where_things_lie_may_differ_between_ranks_and_nothing_else():
    places = lambda at, number: {
        "data": {"path": at, "workers": number, "cache_gib": number},
        "evaluate": {"data": at, "weights": at},
        "run": {"folder": at},
    }
    here, there = make_config(places("/a", 1)), make_config(places("/b", 2))
    facts = agreement.program_facts(here, "torch", 0)
    assert facts == agreement.program_facts(there, "torch", 0)
    engines = [("torch", 0), ("deepspeed", 0), ("deepspeed", 1)]
    assert len({str(agreement.program_facts(here, *engine)) for engine in engines}) == 3
    other = agreement.program_facts(make_config({"run": {"tick": 5}}), "torch", 0)
    assert [key for key in facts if facts[key] != other[key]] == ["run.tick"]
    assert facts["source file kernels/gaussian.py"] and facts["source file sivae_fast/training/loop.py"]


def test_what_fails_on_one_rank_fails_on_all(monkeypatch):
    def fails():
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        agreement.on_all_ranks(fails)
    monkeypatch.setattr(agreement, "_gather", lambda text: [text, "no such file"])
    with pytest.raises(RankFailed, match="rank 1 failed: no such file"):
        agreement.on_all_ranks(lambda: 3)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_checksums_tell_image_sets_apart(image_folder, tmp_path, kind):
    def packed(name: str, folder) -> ImageSet:
        return ImageSet(shutil.make_archive(tmp_path / name, "zip", folder) if kind == "zip" else folder)

    same, other = (shutil.copytree(image_folder, tmp_path / name) for name in ("same", "other"))
    Image.new("RGB", (8, 8)).save(other / "017.png")
    sums = [packed(folder.name + "-set", folder).checksum() for folder in (image_folder, same, other)]
    assert sums[0] == sums[1] != sums[2]
    (same / "000.png").rename(same / "0000.png")
    assert packed("renamed", same).checksum() != sums[0]


def test_checksums_tell_held_items_apart():
    items = torch.arange(300.0).view(100, 3)
    assert Held(items).checksum() == Held(items.clone()).checksum() != Held(items + 1).checksum()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(training):
    folder = training("run", train__images=64)
    for path in (folder / "checkpoints").glob("*.safetensors"):
        path.write_bytes(b"")
    kept = (folder / "stats.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used .*: bring a whole one"):
        training("run", train__images=80)
    assert (folder / "stats.jsonl").read_bytes() == kept and kept.count(b"\n") == 4
    (folder / "checkpoints").rename(folder / "damaged")
    assert load_newest(training("run", train__images=80) / "checkpoints")[1]["images"] == 80


def test_a_run_that_is_not_resumed_says_why(training, caplog):
    folder = training("run", train__images=16)
    assert "a new run" not in caplog.text
    changes = {"train__seed": 7, "run__tick": 32, "model__mapping_layers": 1, "optim__betas": "[0.5,0.99]"}
    training("run", train__images=16, **changes)
    said = "model.mapping_layers=1, there 2; train.seed=7, there 0; "
    said += "optim.betas=[0.5, 0.99], there [0.9, 0.99]"
    assert f"a new run, since {folder} has other settings: {said}" in caplog.messages
    caplog.clear()
    training("run", train__images=16, run__new="true")
    training("run", train__images=32, run__tick=32)
    assert "a new run" not in caplog.text
    facts = json.loads((folder / "run.json").read_text())
    for path in folder.parent.glob("*/run.json"):
        path.write_text(json.dumps({**facts, "config_hash": "of another version"}))
    training("run", train__images=16)
    assert "has other settings: it is of another version" in caplog.text


def test_settings_of_another_kind_are_said_without_a_warning(recwarn):
    style, residual = make_config({}), make_config({"model": {"kind": "residual"}, "run": {"tick": 5}})
    assert recorder._differing(residual, style) == ["model.kind=residual, there style"]
    assert not recwarn.list


def test_changed_data_are_said_on_resume(training, image_folder, tmp_path, caplog):
    folder = shutil.copytree(image_folder, tmp_path / "mine")
    training("run", data__path=folder, train__images=32)
    assert "changed since the checkpoint" not in caplog.text
    (folder / "039.png").unlink()
    training("run", data__path=folder, train__images=48)
    assert "items in the data changed since the checkpoint: 39, was 40" in caplog.text


def test_a_last_state_that_cannot_be_saved_is_an_error(training, monkeypatch, caplog):
    import safetensors.torch

    def full(values, path, metadata):
        raise OSError(errno.ENOSPC, "No space left on device")

    training("run", train__images=32)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        training("run", train__images=80)
    assert "No space left on device; the one at 32 images is whole" in caplog.text
    assert "; there is none before" not in caplog.text
    with pytest.raises(OSError, match="No space left"):
        training("first", train__images=32)
    assert "checkpoint at 32 images not saved: [Errno 28] No space left on device; there is none before" in (
        caplog.text
    )
    for what in ("checkpoint at 64 images not saved", "checkpoint at 80 images not saved", "snapshot at 80"):
        assert what in caplog.text


def test_a_line_that_does_not_fit_leaves_no_part_of_it(tmp_path, monkeypatch):
    path, write = tmp_path / "stats.jsonl", os.write
    append_line(path, {"images": 1})
    monkeypatch.setattr(files.os, "write", lambda descriptor, line: write(descriptor, line[:5]))
    with pytest.raises(OSError, match="no space left"):
        append_line(path, {"images": 2})
    monkeypatch.undo()
    append_line(path, {"images": 3})
    assert read_lines(path) == [{"images": 1}, {"images": 3}]


def test_what_a_kill_left_half_written_is_removed(training):
    """By the next start, and nothing that another command may be writing."""
    folder = training("run", train__images=32)
    left = ["checkpoints/.0000000048.safetensors.77.tmp", "snapshots/.0000000048.safetensors.77.tmp"]
    left += [".config.yaml.77.tmp", ".metric-fid.jsonl.77.tmp", "samples/.0000000048.png.77.tmp"]
    kept = [".README.md.77.tmp", ".model.safetensors.77.tmp", "samples/.mine.png.77.tmp"]
    for name in (*left, *kept):
        (folder / name).write_bytes(b"half")
    (folder / ".best-fid.safetensors.77.tmp").mkdir()
    (folder / ".best-fid.safetensors.77.tmp" / ".tmpAbC123").write_bytes(b"half")
    training("run", train__images=32)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob(".*.tmp")) == sorted(kept)


def test_checkpoints_hold_nothing_of_this_machine(training, image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-of-somebody")
    for owner, name in ((socket, "gethostname"), (platform, "node")):
        monkeypatch.setattr(owner, name, lambda: "host-of-somebody")
    folder = training("run")
    found = [path for part in ("checkpoints", "snapshots") for path in (folder / part).iterdir()]
    assert len(found) >= 3
    for path in found:
        content = path.read_bytes()
        for private in (
            b"of-somebody",
            str(tmp_path).encode(),
            str(image_folder).encode(),
            b"/home",
            b"/tmp",
        ):
            assert private not in content, path


def test_resuming_unpickles_nothing(training, monkeypatch):
    training("run", train__images=32)

    def refuse(*arguments, **options):
        raise AssertionError("something was unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    assert load_newest(training("run", train__images=64) / "checkpoints")[1]["images"] == 64


def test_a_pickle_in_place_of_the_tensors_is_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    path = tmp_path / "0000000010.safetensors"
    torch.save({"model/a": Harm()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps({"format": "sivae-fast 1", "sha256": digest}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.slow
def test_a_short_soak_ends_as_the_undisturbed_run(tmp_path):
    found = soak(tmp_path, seconds=75, every=8, seed=1)
    assert len(found["faults"]) >= 2 and found["images"] > 800


def test_the_table_of_the_page_is_that_of_the_results():
    command = [sys.executable, str(ROOT / "bench" / "faults.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
