"""The folder of one training run: its number, lock, config, statistics, events and log.

The folder can be moved as it is. Only `config.yaml` (where the data were) and `log.txt` know of this machine.
Only rank 0 holds a `Run`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sivae_fast.files import append_line, keep_lines, lock, make_folder, plain, read_lines, write_text

logger = logging.getLogger("sivae_fast")

_FOLDER = re.compile(r"(\d{5,})-(.+)")
#: What is written beside a file of a run before it takes its place; other commands have files of other names.
_UNFINISHED = re.compile(
    r"\.(config\.yaml|run\.json|stats\.jsonl|metric-\w+\.jsonl|best-\w+\.safetensors|\d{10,}\.\w+)\.\d+\.tmp"
)
_locks: set[Any] = set()


def _release_in_child() -> None:
    # A forked loader worker that outlives a killed run would otherwise hold the lock for it.
    while _locks:
        _locks.pop().close()


os.register_at_fork(after_in_child=_release_in_child)


def check_name(name: str) -> None:
    """Raises ValueError for what cannot be the name of a run."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"run.name={name!r}: accepted are letters, digits, '.', '_' and '-', first a letter or digit"
        )


def launch_name() -> str:
    """The same at every restart by a launcher, and of no other launch; "" where nothing says so.

    That of the environment's SIVAE_LAUNCH, else of torchrun, whose agent makes one folder of logs for itself.
    """
    logs = re.search(r"([^/]+)/attempt_\d+/\d+/error\.json$", os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    return os.environ.get("SIVAE_LAUNCH") or (logs[1] if logs else "")


def remove_unfinished(folder: Path) -> None:
    """Removes what a kill left of a file that was being written to `folder`, a run folder or a part of one.

    For the process that trains the run alone, which is the only one to write files of these names.
    """
    for path in folder.glob(".*.tmp"):
        if not _UNFINISHED.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def naming_folder(root: str | os.PathLike) -> Iterator[None]:
    """Makes errors of the disk name the option `run.folder`, whose value is `root`."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        where = f"{error.filename}: " if error.filename and str(error.filename) != str(root) else ""
        raise OSError(f"run.folder={root}: {where}{why}") from error


class RunInUse(RuntimeError):
    """The run folder belongs to a live process."""


class Run:
    """An open, locked run folder; use `Run.create` or `Run.open`, in a with block or with `close`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = _acquire(folder)
        for part in (folder, *(folder / name for name in ("checkpoints", "snapshots", "samples"))):
            remove_unfinished(part)
        self._beyond: int | None = None  # images beyond which statistics are still to be dropped
        self._events: Events | None = None
        self._log = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        self._log.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
        )
        # The console has the line; where the disk is full, it would have a traceback for each of them.
        self._log.handleError = lambda record: None
        logger.addHandler(self._log)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)

    @classmethod
    def create(cls, root: str | os.PathLike, name: str, config: dict, config_hash: str = "") -> Run:
        """A new folder `root/NNNNN-name`, numbered one above the highest there, with `config.yaml` in it.

        `config_hash` is what `Run.find` looks for: a hash of the fields that may not change on resume.
        Raises ValueError for a name that is no plain file name, OSError where the folder cannot be made.
        """
        check_name(name)
        root = Path(root)
        make_folder(root)
        while True:
            folder = root / f"{max(_numbers(root), default=-1) + 1:05d}-{name}"
            with contextlib.suppress(FileExistsError):  # another run took the number: look again
                folder.mkdir()
                break
        try:
            (folder / "samples").mkdir()
            facts = {"name": name, "config_hash": config_hash, "launch": launch_name()}
            write_text(folder / "run.json", json.dumps(facts) + "\n")
            run = cls(folder)
        except OSError:  # on a full disk, each start would leave a folder with nothing in it
            shutil.rmtree(folder, ignore_errors=True)
            raise
        run.write_config(config)
        return run

    @classmethod
    def open(cls, path: str | os.PathLike) -> Run:
        """The existing run at `path`. FileNotFoundError if it is none, RunInUse while a live run has it."""
        folder = Path(path)
        if not (folder / "run.json").is_file():
            raise FileNotFoundError(f"{folder} is not a run folder: it has no run.json")
        return cls(folder)

    @staticmethod
    def find(root: str | os.PathLike, name: str, config_hash: str = "", launch: str = "") -> Path | None:
        """The newest folder under `root` that `create` made with this name and hash, or None.

        config_hash, launch: "" is any. What cannot be read is passed over; where the hash counts, with a
        warning.
        """
        wanted = {"name": name, "config_hash": config_hash, "launch": launch}
        wanted = {key: value for key, value in wanted.items() if value}
        found = []
        for folder in Path(root).glob(f"*-{name}"):
            match = _FOLDER.fullmatch(folder.name)
            if match and match[2] == name and wanted.items() <= _facts(folder, say=bool(config_hash)).items():
                found.append((int(match[1]), folder))
        return max(found)[1] if found else None

    @staticmethod
    def to_resume(root: str | os.PathLike, name: str, config_hash: str, new: bool) -> Path | None:
        """The folder with which a start goes on; None where it makes a new one.

        new: as run.new; goes on with what an earlier start of this launch made, and nothing else.
        """
        launch = launch_name() if new else ""
        return None if new and not launch else Run.find(root, name, config_hash, launch)

    def write_config(self, config: dict) -> None:
        """Write the resolved configuration to `config.yaml`."""
        import yaml

        write_text(self.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    def stats(self, record: dict[str, Any]) -> None:
        """One tick: a line of `stats.jsonl` and TensorBoard scalars at step `record["images"]`."""
        self._truncate()
        record = plain(record)
        append_line(self.folder / "stats.jsonl", {**record, "time": round(time.time(), 3)})
        if self._events is None:
            self._events = Events(self.folder, record["images"])
        self._events.scalars(record["images"], record)

    def metric(self, name: str, record: dict[str, Any]) -> None:
        """One line of `metric-<name>.jsonl`; `record` has at least `images` and `value`."""
        self._truncate()
        append_metric(self.folder, name, record)

    def truncate_after(self, images: int) -> None:
        """On resume at `images`: drop statistics and metrics beyond it and any half-written last line.

        Where this raises OSError, as on a full disk, the next line to be written tries again before it.
        """
        if self._events is not None:  # the next file tells TensorBoard to forget what lies beyond
            self._events.close()
            self._events = None
        self._beyond = images if self._beyond is None else min(images, self._beyond)
        self._truncate()

    def _truncate(self) -> None:
        if self._beyond is None:
            return
        for path in (self.folder / "stats.jsonl", *self.folder.glob("metric-*.jsonl")):
            keep_lines(path, self._beyond)
        self._beyond = None

    def sample_path(self, images: int) -> Path:
        """Where the picture grid after `images` images goes."""
        (self.folder / "samples").mkdir(exist_ok=True)
        return self.folder / "samples" / f"{images:010d}.png"

    def close(self) -> None:
        """Flush and close every file and give the lock back. Harmless when called twice."""
        if self._events is not None:
            self._events.close()
            self._events = None
        logger.removeHandler(self._log)
        with contextlib.suppress(OSError):  # as in Events.close
            self._log.close()
        _locks.discard(self._lock)
        self._lock.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def append_metric(folder: str | os.PathLike, name: str, record: dict[str, Any]) -> None:
    """Append to `folder/metric-<name>.jsonl`: the same file from training and from a command beside it."""
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"metric name {name!r}: lower-case letters, digits and '_' are accepted")
    append_line(Path(folder) / f"metric-{name}.jsonl", record)


def read_stats(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The ticks of a run, oldest first."""
    return read_lines(Path(folder) / "stats.jsonl")


def read_metrics(folder: str | os.PathLike) -> dict[str, list[dict[str, Any]]]:
    """The records of every metric of a run by its name."""
    paths = sorted(Path(folder).glob("metric-*.jsonl"))
    return {path.stem.removeprefix("metric-"): read_lines(path) for path in paths}


def _numbers(root: Path) -> list[int]:
    return [int(match[1]) for path in root.iterdir() if (match := _FOLDER.fullmatch(path.name))]


def _facts(folder: Path, say: bool) -> dict[str, Any]:
    """What `run.json` of a folder says; {} where it has none. say: warns of one that cannot be read."""
    path = folder / "run.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(facts, dict):
            return facts
        error = "it holds no facts"
    except FileNotFoundError:
        return {}  # its start was cut short, or it is another folder
    except (OSError, ValueError) as caught:
        error = caught
    if say:
        logger.warning("%s is passed over: %s cannot be read (%s)", folder, path.name, error)
    return {}


def _acquire(folder: Path):
    """The kernel drops this lock with the process that holds it, so that none is ever stale."""
    held = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (as long as the run)
    try:
        lock(held, folder)
    except BlockingIOError:
        held.seek(0)
        holder = held.read().strip()
        held.close()
        raise RunInUse(
            f"{folder} is in use by a live run (process {holder}): stop it first, or start a new run"
        ) from None
    held.truncate(0)
    held.write(f"{os.getpid()}\n")
    held.flush()
    _locks.add(held)
    return held


class Events:
    """TensorBoard scalars, record by record: the package's own writer puts the host in the file name."""

    _missing_said = False

    def __init__(self, folder: Path, images: int):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            self._writer = None
            if not Events._missing_said:
                Events._missing_said = True
                logger.info(
                    "no TensorBoard events: tensorboard is not installed (stats.jsonl has the numbers)"
                )
            return
        self._proto = event_pb2, summary_pb2
        number = len(list(folder.glob("events.out.tfevents.*")))
        path = folder / f"events.out.tfevents.{number:05d}"
        self._file = open(path, "xb")  # noqa: SIM115 (closed in close)
        self._writer = RecordWriter(self._file)
        try:
            self._write(file_version="brain.Event:2")
        except OSError:  # the next tick tries again, with a file of the same number
            self.close()
            path.unlink(missing_ok=True)
            raise
        if number:  # a resumed run: TensorBoard forgets what an earlier file has from here on
            self._write(step=images, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def scalars(self, images: int, values: dict[str, Any]) -> None:
        if self._writer is None:
            return
        _, summary = self._proto
        numbers = [(key, value) for key, value in values.items() if isinstance(value, (int, float))]
        points = [
            summary.Summary.Value(tag=key, simple_value=value) for key, value in numbers if key != "images"
        ]
        self._write(step=images, summary=summary.Summary(value=points))

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):  # what does not fit on the disk was said when it was written
                self._writer.close()

    def _write(self, **fields) -> None:
        event, _ = self._proto
        self._writer.write(event.Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()
