import io
import logging
import os
import signal
import socket
import subprocess
import sys

import pytest
import yaml

from sivae_fast import files
from sivae_fast import run as run_module
from sivae_fast.files import read_lines
from sivae_fast.run import Events, Run, append_metric, read_metrics, read_stats


def test_folders_are_numbered_one_above_the_highest(tmp_path):
    (tmp_path / "00041-old").mkdir()
    (tmp_path / "notes").mkdir()
    with Run.create(tmp_path, "quickstart", {"a": {"b": [1, 2]}, "c": "ü"}) as run:
        assert run.folder.name == "00042-quickstart"
        assert yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8")) == {
            "a": {"b": [1, 2]},
            "c": "ü",
        }
        assert run.sample_path(1234).parent.is_dir()
    with Run.create(tmp_path, "other", {}) as run:
        assert run.folder.name == "00043-other"


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b", ".hidden"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"run\.name="):
        Run.create(tmp_path, name, {})


def test_find_gives_the_newest_run_of_the_same_name_and_hash(tmp_path):
    folders = []
    for name, digest in [("a", "1"), ("a", "1"), ("a", "2"), ("b-a", "1")]:
        with Run.create(tmp_path, name, {}, digest) as run:
            folders.append(run.folder)
    assert Run.find(tmp_path, "a", "1") == folders[1]
    assert Run.find(tmp_path, "a", "2") == folders[2]
    assert Run.find(tmp_path, "a", "3") is None
    assert Run.find(tmp_path / "missing", "a", "1") is None


def elastic(launch: str, attempt: int) -> dict[str, str]:
    """As torchrun says where a rank leaves its error."""
    return {"TORCHELASTIC_ERROR_FILE": f"/tmp/torchelastic_7f/{launch}/attempt_{attempt}/0/error.json"}


def test_run_new_makes_one_run_a_launch(tmp_path, monkeypatch):
    def start(environment: dict[str, str], new: bool = True) -> str:
        for name in ("SIVAE_LAUNCH", "TORCHELASTIC_ERROR_FILE"):
            monkeypatch.setenv(name, environment.get(name, ""))
        folder = Run.to_resume(tmp_path, "a", "hash", new)
        with Run.open(folder) if folder else Run.create(tmp_path, "a", {}, "hash") as run:
            return run.folder.name[:5]

    assert [start({}), start({}), start({}, new=False)] == ["00000", "00001", "00001"]
    assert [start(elastic("none_x1", attempt)) for attempt in range(3)] == ["00002"] * 3
    assert start(elastic("none_x2", 0)) == "00003"
    assert start(elastic("none_x1", 3)) == "00002"  # not the newest
    assert start({"SIVAE_LAUNCH": "job-7", **elastic("none_x3", 0)}) == "00004"
    assert start({"SIVAE_LAUNCH": "job-7", **elastic("none_x4", 0)}) == "00004"  # the agent is another one
    assert start({"TORCHELASTIC_ERROR_FILE": "/tmp/a/error.json"}) == "00005"  # somebody's own
    assert start({"TORCHELASTIC_ERROR_FILE": "/tmp/a/error.json"}) == "00006"
    assert start({}, new=False) == "00006"
    assert start(elastic("none_x5", 0), new=False) == "00006"  # a launch goes on with what others made


def test_a_run_of_an_earlier_version_is_found(tmp_path):
    (tmp_path / "00000-a").mkdir()
    (tmp_path / "00000-a" / "run.json").write_text('{"name": "a", "config_hash": "1"}\n')
    assert Run.find(tmp_path, "a", "1") == tmp_path / "00000-a"
    assert Run.find(tmp_path, "a", "1", launch="job-7") is None


@pytest.mark.parametrize("content", ['{"name": "a", "conf', "", "[]"])
def test_a_run_that_cannot_be_read_is_said(tmp_path, content, caplog):
    with Run.create(tmp_path, "a", {}, "1") as run:
        (run.folder / "run.json").write_text(content)
    (tmp_path / "00001-a").mkdir()  # of a start that was cut short
    assert Run.find(tmp_path, "a", "1") is None
    (said,) = caplog.messages
    assert said.startswith(f"{run.folder} is passed over: run.json cannot be read (")


def test_a_run_in_use_is_refused_and_free_after_close(tmp_path):
    run = Run.create(tmp_path, "a", {})
    with pytest.raises(RuntimeError, match=rf"00000-a is in use by a live run \(process {os.getpid()}\)"):
        Run.open(run.folder)
    run.close()
    run.close()
    with Run.open(run.folder), pytest.raises(RuntimeError, match=rf"\(process {os.getpid()}\)"):
        Run.open(run.folder)
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        Run.open(tmp_path)


def test_a_killed_run_leaves_no_lock_even_where_its_forked_worker_lives_on(tmp_path):
    script = """
import os, sys, time
from sivae_fast.run import Run
run = Run.create(sys.argv[1], "a", {})
if os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    try:
        with pytest.raises(RuntimeError, match=f"process {process.pid}"):
            Run.open(tmp_path / "00000-a")
        process.kill()
        process.wait()
        os.kill(worker, 0)  # alive
        Run.open(tmp_path / "00000-a").close()
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)
        process.stdout.close()


def test_stats_metrics_and_their_truncation(tmp_path):
    with Run.create(tmp_path, "a", {}) as run:
        for images in (100, 200, 300):
            run.stats({"images": images, "loss": 1 / images})
        run.metric("fid", {"images": 100, "value": 50.0, "snapshot": "s100"})
        append_metric(run.folder, "fid", {"images": 300, "value": 40.0})
    with open(run.folder / "stats.jsonl", "ab") as file:
        file.write(b'{"images": 4')
    with Run.open(run.folder) as run:
        run.truncate_after(200)
        run.stats({"images": 250, "loss": 0.0})
        run.stats({"images": 300, "loss": 0.0})
        assert [line["images"] for line in read_stats(run.folder)] == [100, 200, 250, 300]
        run.truncate_after(250)
    assert [line["images"] for line in read_stats(run.folder)] == [100, 200, 250]
    assert read_metrics(run.folder) == {"fid": [{"images": 100, "value": 50.0, "snapshot": "s100"}]}
    with pytest.raises(ValueError, match="metric name"):
        append_metric(run.folder, "../x", {})


def test_lines_that_could_not_be_dropped_are_before_the_next_one(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with Run.create(tmp_path, "a", {}) as run:
        for images in (100, 200, 300):
            run.stats({"images": images})
        run.metric("fid", {"images": 300, "value": 40.0})

        def fail(*counts):
            with monkeypatch.context() as disk:
                disk.setattr(run_module, "keep_lines", full)
                for images in counts:
                    with pytest.raises(OSError, match="No space"):
                        run.truncate_after(images)

        fail(100, 200)  # the lower one counts: what lies above was left
        run.metric("fid", {"images": 150, "value": 50.0})
        assert [line["images"] for line in read_stats(run.folder)] == [100]
        assert [line["images"] for line in read_metrics(run.folder)["fid"]] == [150]
        fail(50)
        run.stats({"images": 120})
    assert [line["images"] for line in read_stats(run.folder)] == [120]
    assert read_metrics(run.folder)["fid"] == []


def test_a_number_that_another_run_took_in_the_meantime(tmp_path, monkeypatch):
    listed = iter([[], [0]])
    monkeypatch.setattr(run_module, "_numbers", lambda root: next(listed))
    (tmp_path / "00000-a").mkdir()
    with Run.create(tmp_path, "a", {}) as run:
        assert run.folder.name == "00001-a"


def test_tensorboard_reads_the_events_and_forgets_what_a_resumed_run_repeats(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Run.create(tmp_path, "a", {}) as run:
        for images in (100, 200, 300):
            run.stats({"images": images, "loss": float(images), "nan": float("nan")})
    with Run.open(run.folder) as run:
        run.truncate_after(100)
        run.stats({"images": 200, "loss": -1.5, "lod": 2})
        run.truncate_after(100)  # by a running one, after it diverged
        run.stats({"images": 200, "loss": -1.0, "lod": 3})
    events = accumulator.EventAccumulator(str(run.folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(100, 100.0), (200, -1.0)]
    assert [event.value for event in events.Scalars("lod")] == [3.0]
    assert "images" not in events.Tags()["scalars"]


@pytest.fixture
def full(monkeypatch):
    """full(name): files with this in their names are on a disk that is full."""

    def fill(name: str) -> None:
        opened = io.open
        place = lambda path: "/dev/full" if name in str(path) else path
        mode = lambda path, given: given.replace("x", "w") if name in str(path) else given
        opens = lambda path, how="r", *more, **options: opened(place(path), mode(path, how), *more, **options)
        for module in (run_module, files):
            monkeypatch.setattr(module, "open", opens, raising=False)

    return fill


def test_a_full_disk_leaves_no_empty_folders(tmp_path, full):
    full("run.json")
    for _ in range(2):
        with pytest.raises(OSError, match=r"no space left on the disk while writing .*00000-a/run\.json"):
            Run.create(tmp_path, "a", {})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_costs_events_and_log_alone(tmp_path, full, monkeypatch, capfd):
    pytest.importorskip("tensorboard")
    run = Run.create(tmp_path, "a", {})
    full("tfevents")
    for images in (1, 2):
        with pytest.raises(OSError, match="No space left"):
            run.stats({"images": images, "loss": 0.0})
    assert not list(run.folder.glob("events*"))
    monkeypatch.undo()
    run.stats({"images": 3, "loss": 0.0})
    with open("/dev/full", "wb") as disk:
        os.dup2(disk.fileno(), run._events._file.fileno())
        os.dup2(disk.fileno(), run._log.stream.fileno())
    with pytest.raises(OSError, match="No space left"):
        run.stats({"images": 4, "loss": 0.0})
    logging.getLogger("sivae_fast").info("said on the console")
    run.close()
    assert [line["images"] for line in read_stats(run.folder)] == [1, 2, 3, 4]
    assert "Traceback" not in capfd.readouterr().err
    Run.open(run.folder).close()


def test_missing_tensorboard_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    monkeypatch.setattr(Events, "_missing_said", False)
    with caplog.at_level(logging.INFO, "sivae_fast"):
        for name in ("a", "b"):
            with Run.create(tmp_path, name, {}) as run:
                run.stats({"images": 1, "loss": 0.0})
                run.stats({"images": 2, "loss": 0.0})
    assert sum("tensorboard is not installed" in record.message for record in caplog.records) == 1
    assert len(read_lines(run.folder / "stats.jsonl")) == 2


def test_the_log_is_kept_and_nothing_names_this_machine(tmp_path):
    with Run.create(tmp_path, "a", {"seed": 1}, "hash") as run:
        logging.getLogger("sivae_fast").info("level %d reached", 3)
        logging.getLogger("sivae_fast.training").warning("from below")
        run.stats({"images": 1, "loss": 0.0})
    logging.getLogger("sivae_fast").info("after the end")
    log = (run.folder / "log.txt").read_text()
    assert "INFO level 3 reached" in log and "WARNING from below" in log and "after the end" not in log
    for path in run.folder.rglob("*"):
        assert socket.gethostname() not in path.name
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes()
