"""The same command resumes, and a resumed run is the uninterrupted one."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch

from sivae_fast.checkpoint import load_newest
from sivae_fast.training.meter import Meter
from sivae_fast.training.resume import _own_tick
from tests.training.conftest import environment

NOT_COMPARED = {"time", "images_per_second", "step_seconds", "data_seconds", "memory_bytes"}


def stats(folder, name):
    (run,) = (folder / "runs").glob(f"*-{name}")
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in NOT_COMPARED} for line in lines]


def newest(folder, name):
    (run,) = (folder / "runs").glob(f"*-{name}")
    return load_newest(run / "checkpoints")


def assert_same_run(folder, a, b):
    assert stats(folder, a) == stats(folder, b)
    (first, first_state), (second, second_state) = newest(folder, a), newest(folder, b)
    assert first_state["steps"] == second_state["steps"]
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("stop_at", [32, 64], ids=["within a level", "after the level switch"])
def test_resumed_run_is_bit_equal(launch, stop_at):
    """40 images an epoch and 40 a level: both stops fall within an epoch, one behind the switch."""
    launch(run__name="whole")
    launch(run__name="parts", train__images=stop_at)
    launch(run__name="parts")
    assert newest(launch.folder, "parts")[1]["images"] == 80
    assert_same_run(launch.folder, "whole", "parts")


def interrupt(launch, number, after: str, ranks: int = 1, **overrides):
    """Starts a run, sends a signal once a line with `after` appears, returns the exit code."""
    process = subprocess.Popen(
        launch.arguments(ranks, {k.replace("__", "."): v for k, v in overrides.items()}),
        cwd=launch.folder,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if after in line:
            process.send_signal(number)
            break
    process.stderr.read()
    return process.wait(timeout=60)


LONG = {"train__images": 6400, "growth__images_per_level": 800, "run__tick": 160}


def test_sigterm_saves_and_the_same_command_goes_on(launch):
    launch(run__name="whole", **LONG)
    assert interrupt(launch, signal.SIGTERM, "1,120/6,400", run__name="stopped", **LONG) == 0
    saved = newest(launch.folder, "stopped")[1]["images"]
    assert 1120 <= saved < 6400
    launch(run__name="stopped", **LONG)
    assert_same_run(launch.folder, "whole", "stopped")


def test_kill_loses_nothing_older_than_the_last_checkpoint(launch):
    launch(run__name="whole", run__checkpoint=320, **LONG)
    code = interrupt(launch, signal.SIGKILL, "1,120/6,400", run__name="killed", run__checkpoint=320, **LONG)
    assert code == -signal.SIGKILL
    assert newest(launch.folder, "killed")[1]["images"] >= 640
    launch(run__name="killed", run__checkpoint=320, **LONG)
    assert_same_run(launch.folder, "whole", "killed")


def test_resume_on_another_number_of_ranks_and_engine(launch):
    # With moments of its own the game of so small a network makes much of the last bits.
    same = {"average__half_life": 50, "optim__clear_after_warmup": "false"}
    launch(run__name="whole", **same)
    done = launch(run__name="moved", train__images=48, ranks=2, engine__kind="deepspeed", engine__zero=1,
                  **same)  # fmt: skip
    assert "FutureWarning" not in done.stderr  # of what DeepSpeed calls
    launch(run__name="moved", **same)
    (whole, _), (moved, state) = newest(launch.folder, "whole"), newest(launch.folder, "moved")
    assert state["images"] == 80
    for name in whole:
        if name.startswith("model/") and "decoder.blocks.0.bias_1" not in name:
            torch.testing.assert_close(moved[name], whole[name], rtol=1e-3, atol=1e-4)


def test_damaged_checkpoint_falls_back_to_the_one_before(launch):
    launch(run__name="run", run__checkpoint=32)
    (run,) = (launch.folder / "runs").glob("*-run")
    files = sorted((run / "checkpoints").glob("*.safetensors"))
    assert len(files) == 3
    content = bytearray(files[-1].read_bytes())
    content[-100] ^= 255
    files[-1].write_bytes(content)
    done = launch(run__name="run", run__checkpoint=32, train__images=96)
    assert "0000000080.safetensors is damaged (its checksum does not agree); falling back" in done.stderr
    assert "resuming at 64 images" in done.stderr


def test_full_disk_keeps_the_checkpoint_before(launch):
    """A checkpoints folder on a file system of 64 KiB: /dev/full cannot hold a folder, a tiny tmpfs can."""
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    launch(run__name="run", train__images=32)
    (run,) = (launch.folder / "runs").glob("*-run")
    checkpoints = run / "checkpoints"
    size = sum(f.stat().st_size for f in checkpoints.iterdir())
    kept = launch.folder / "kept"
    shutil.copytree(checkpoints, kept)
    options = f"size={(size // 4096 + 8) * 4096}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(checkpoints)])
    if mounted.returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        shutil.copytree(kept, checkpoints, dirs_exist_ok=True)
        done = launch(run__name="run", check=False)
        assert done.returncode == 1 and "error: " in done.stderr
        assert "checkpoint at 80 images not saved" in done.stderr
        assert load_newest(checkpoints)[1]["images"] == 32
    finally:
        subprocess.run(["umount", str(checkpoints)], check=True)


def test_run_in_use_is_refused(launch):
    process = subprocess.Popen(
        launch.arguments(1, {"train.images": 10**7, "run.name": "busy"}),
        cwd=launch.folder,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stderr:
            if "images/s" in line:
                break
        done = launch(run__name="busy", train__images=10**7, check=False)
        assert done.returncode == 1
        assert "is in use by a live run" in done.stderr and "Traceback" not in done.stderr
    finally:
        process.terminate()
        process.stderr.read()
        process.wait(timeout=60)


def test_finished_run_says_so(launch):
    launch(run__name="run")
    started = time.time()
    assert "is finished at 80 images" in launch(run__name="run").stderr
    assert time.time() - started < 60
    assert len(list((launch.folder / "runs").iterdir())) == 1
    launch(run__name="run", run__new="true")
    assert len(list((launch.folder / "runs").iterdir())) == 2


def test_a_shorter_interval_holds_from_the_resume_on(launch):
    launch(run__name="run", train__images=32)
    launch(run__name="run", run__checkpoint=16, run__samples=16)
    (run,) = (launch.folder / "runs").iterdir()
    for part in ("samples", "checkpoints"):
        written = sorted({path.stem for path in (run / part).iterdir()})
        assert written[-3:] == ["0000000048", "0000000064", "0000000080"], part


def test_an_unfinished_tick_goes_on_with_the_sums_of_each_rank():
    """Added up over the ranks and given to one of them, they would round in another order."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(2, 2, 5, generator=generator).mul(9).exp()  # rank, before or after the stop, sample
    through, before, after = ([Meter(torch.device("cpu")) for _ in range(2)] for _ in range(3))
    for rank in range(2):
        for part in parts[rank]:
            through[rank].add({"kl_real": part}, 5)
        before[rank].add({"kl_real": parts[rank, 0]}, 5)
    of_ranks = [meter.of_ranks()[0] for meter in before]
    totals = {"kl_real": (sum(own["kl_real"][0] for own in of_ranks), 10)}
    state = json.loads(json.dumps({"tick": totals, "tick_of_ranks": of_ranks}))
    for rank in range(2):
        after[rank].restore(_own_tick(state, rank, 2))
        after[rank].add({"kl_real": parts[rank, 1]}, 5)
    assert [meter.totals() for meter in after] == [meter.totals() for meter in through]
    assert _own_tick(state, 0, 1) == state["tick"] and _own_tick(state, 2, 3) == {"kl_real": (0.0, 0)}
    assert _own_tick({"tick": {}}, 0, 1) == {}  # of an earlier version
