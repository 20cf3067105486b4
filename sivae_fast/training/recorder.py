"""What training leaves behind: ticks, metrics, pictures, checkpoints, snapshots, each at its interval."""

from __future__ import annotations

import contextlib
import logging
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from sivae_fast.checkpoint import (
    CheckpointError,
    remove_after,
    run_config,
    save_checkpoint,
    save_snapshot,
    snapshot_images,
)
from sivae_fast.config import Config
from sivae_fast.files import plain
from sivae_fast.progress import Progress
from sivae_fast.run import Run, naming_folder, read_metrics
from sivae_fast.systems import save_picture
from sivae_fast.training.agreement import check_parameters, everywhere, of_first_rank, on_all_ranks
from sivae_fast.training.averaging import averaged_buffers
from sivae_fast.training.evaluator import Evaluator, is_best

logger = logging.getLogger("sivae_fast")

#: Parts of a metric's record without which two values cannot be compared.
_SAME = ("resolution", "features", "mirrored", "rounded")


class Recorder:
    """Opens or finds the run folder and writes into it; ranks other than 0 only take part in collectives.

    `marks` holds the image counter at which each kind of record is next due. It is part of a checkpoint, so
    that a resumed run keeps the marks of an uninterrupted one.
    """

    def __init__(self, trainer):
        self._trainer, config = trainer, trainer.config
        self._every = {
            "tick": config.run.tick,
            "samples": config.run.samples,
            "checkpoint": config.run.checkpoint,
            "snapshot": config.run.snapshot,
        }
        if config.evaluate.every:
            self._every["evaluate"] = config.evaluate.every
        self.marks = {kind: _next_mark(trainer.images, every) for kind, every in self._every.items()}
        # Before there is a run folder: what is missing shows here rather than hours later.
        make = lambda: Evaluator(config, trainer.device) if config.evaluate.every else None
        self._evaluator = on_all_ranks(make)
        self._run = on_all_ranks(lambda: self._open() if trainer.rank == 0 else None)
        self.folder = Path(of_first_rank(str(self._run.folder) if self._run else ""))
        self.checkpoints = self.folder / "checkpoints"
        self._progress: Progress | None = None
        self._tick_images = 0
        self._unsaved: OSError | None = None
        self._left_from: int | None = None  # images beyond which weights are of a course that was left

    def start(self, resumed: bool) -> None:
        """The first tick's pictures; after a checkpoint was restored: drops what lies beyond it."""
        trainer = self._trainer
        self._begin()
        if self._run is None:
            return
        self._run.truncate_after(trainer.images)
        trainer.data.fixed(1)  # fails here rather than hours later
        if not resumed:
            logger.info("run folder %s", self.folder)
            self._save_samples()

    def went_back(self) -> None:
        """After training returned to a checkpoint: drops what is of the course that was left, else a later
        start would go on from there. What a full disk keeps is dropped before more of its kind is written."""
        self._begin()
        if self._run is None:
            return
        self._left_from = self._trainer.images
        with self._going_on("removal of later checkpoints"):
            self._remove_left()
        with self._going_on("removal of later statistics"):
            self._run.truncate_after(self._trainer.images)

    def _begin(self) -> None:
        """The clocks of this part of the run."""
        trainer = self._trainer
        self._tick_images = trainer.images
        for kind, every in self._every.items():  # new or shorter than when the run was saved: from now on
            mark = _next_mark(trainer.images, every)
            self.marks[kind] = min(self.marks.get(kind, mark), mark)
        if self._run:
            self._progress = Progress(trainer.config.train.images, trainer.images)

    def after_iteration(self, stopped: bool) -> None:
        """Writes whatever is due; `stopped` makes a checkpoint due. Collective where something is.

        A full disk does not end training: it goes on, and raises OSError only where the last state is lost.
        """
        trainer = self._trainer
        images = trainer.images
        finished = images >= trainer.config.train.images
        due = {kind for kind in self._every if images >= self.marks[kind]}
        if "tick" not in due and not finished:
            due.discard("evaluate")  # its results go into the line of a tick
        for kind in due:
            self.marks[kind] = _next_mark(images, self._every[kind])
        if "tick" in due or finished:
            self._write_tick(evaluate="evaluate" in due or finished)
        elif self._progress and self._progress.due():  # else each iteration would spend 0.1 ms on the memory
            self._show(tick=False)
        if "samples" in due or finished:
            self._write("pictures", self._save_samples)
        if "checkpoint" in due or finished or stopped:
            self._save_checkpoint(planned="checkpoint" in due)
        if "snapshot" in due or finished:
            self._write("snapshot", self._save_snapshot)
        if finished or stopped:
            # Together, since launchers end the rank that saves where others have ended before it.
            on_all_ranks(self._check_saved)

    def close(self) -> None:
        if self._progress:
            self._progress.clear()
        if self._run:
            self._run.close()

    def _open(self) -> Run:
        config, identity = self._trainer.config, self._trainer.identity
        with naming_folder(config.run.folder):
            folder = Run.to_resume(config.run.folder, config.run.name, identity, config.run.new)
            if folder is None:
                _say_what_differs(config)
                return Run.create(config.run.folder, config.run.name, config.to_dict(), identity)
            run = Run.open(folder)
            run.write_config(config.to_dict())
            return run

    def _write_tick(self, evaluate: bool) -> None:
        trainer = self._trainer
        started = time.perf_counter()
        values = trainer.read_meter()
        check_parameters(trainer.model)
        trainer.guard.check_tick(values, trainer.lod, trainer.images)
        trainer.step_seconds += time.perf_counter() - started  # a GPU still has to catch up here
        trainer.meter.clear()
        measured = self._evaluate() if evaluate and self._evaluator else {}
        if self._run is None:
            return
        stage = trainer.stage
        seconds = trainer.step_seconds + trainer.data_seconds
        gained = trainer.images - self._tick_images
        record = {
            "images": trainer.images,
            **values,
            "lod": stage.lod,
            "blend": stage.blend,
            "batch": stage.batch,
            "learning_rate": stage.learning_rate,
            "images_per_second": gained / seconds if seconds else None,
            "step_seconds": trainer.step_seconds,
            "data_seconds": trainer.data_seconds,
            "memory_bytes": _memory(trainer.device),
            **measured,
        }
        with self._going_on("statistics"):
            self._run.stats(record)
        self._show(tick=True, note=_note(values, stage))
        trainer.step_seconds = trainer.data_seconds = 0.0
        self._tick_images = trainer.images

    def _evaluate(self) -> dict[str, float]:
        """Metric files and log; returns the values as a tick has them. Collective."""
        trainer, started = self._trainer, time.perf_counter()
        weights = "averaged" if trainer.average else "raw"
        with averaged_buffers(trainer.model):
            records = self._evaluator.measure(self._model(), trainer.stage, trainer.images, weights)
            seconds = time.perf_counter() - started
            if self._run:
                with self._going_on("best snapshot"):
                    self._keep_best(records)
        if self._run is None:
            return {}
        for name, record in records.items():
            with self._going_on(name):
                self._run.metric(name, record)
        shown = ", ".join(f"{name} {record['value']:.5g}" for name, record in records.items())
        self._progress.clear()
        logger.info(
            "evaluated at %s images in %.0f s: %s", f"{trainer.images:,}", seconds, shown or "nothing"
        )
        self._progress.skip(seconds)
        return {f"metric/{name}": record["value"] for name, record in records.items()}

    def _show(self, tick: bool, note: str = "") -> None:
        trainer = self._trainer
        iterations = max(1, (trainer.images - self._tick_images) // trainer.stage.batch)
        self._progress.show(
            trainer.images,
            trainer.step_seconds / iterations,
            trainer.data_seconds / iterations,
            _memory(trainer.device),
            note,
            tick,
        )

    def _save_samples(self) -> None:
        trainer = self._trainer
        save_picture(trainer.config, self._run.sample_path(trainer.images), self._model(), trainer.data)

    def _save_checkpoint(self, planned: bool) -> None:
        trainer = self._trainer
        trainer.read_meter()  # never saves weights that have diverged
        tensors, state = trainer.checkpoint(planned)
        self._unsaved = None
        try:
            if self._run:
                self._remove_left()
                save_checkpoint(self.checkpoints, trainer.images, tensors, state, trainer.config.run.keep)
        except OSError as error:
            self._unsaved, before = error, trainer.guard.checkpoint
            kept = "there is none before" if before is None else f"the one at {before} images is whole"
            logger.error("checkpoint at %s images not saved: %s; %s", trainer.images, error, kept)
        if everywhere(self._unsaved is None):  # all ranks count returns to the same checkpoint
            trainer.guard.saved(trainer.images, planned)

    def _remove_left(self) -> None:
        if self._left_from is not None:
            remove_after(self.checkpoints, self._left_from)
            for path in self.folder.glob("best-*.safetensors"):
                if (snapshot_images(path) or 0) > self._left_from:
                    path.unlink()
            self._left_from = None

    def _check_saved(self) -> None:
        if self._unsaved:
            raise self._unsaved

    def _keep_best(self, records: dict[str, dict]) -> None:
        """A snapshot where the first of the metrics is better than all that were measured alike.

        Those before the snapshot that is there are no better than it or, where a return to a checkpoint
        removed one, a best that nobody has any more.
        """
        name = self._trainer.config.measured[0]
        if name not in records:
            return
        path = self.folder / f"best-{name}.safetensors"
        since, known = snapshot_images(path), read_metrics(self.folder).get(name, ())
        alike = lambda record: [record.get(key) for key in _SAME]
        rivals = [record for record in known if since is not None and record["images"] >= since]
        values = [record["value"] for record in rivals if alike(record) == alike(records[name])]
        if is_best(name, records[name]["value"], values):
            self._save_snapshot(path)

    def _save_snapshot(self, path: Path | None = None) -> None:
        trainer = self._trainer
        path = path or self.folder / "snapshots" / f"{trainer.images:010d}.safetensors"
        weights = "averaged" if trainer.average else "raw"
        save_snapshot(path, self._model(), trainer.config, trainer.images, weights=weights)

    def _write(self, what: str, save: Callable[[], None]) -> None:
        """save() on rank 0, with what the model has of all ranks. Collective."""
        with averaged_buffers(self._trainer.model), self._going_on(what):
            if self._run:
                save()

    @contextlib.contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.error("%s at %s images not written: %s", what, self._trainer.images, error)

    def _model(self):
        trainer = self._trainer
        model = trainer.average.model() if trainer.average else trainer.model
        model.set_level(trainer.stage.lod, trainer.stage.blend)
        return model


def _next_mark(images: int, every: int) -> int:
    return (images // every + 1) * every


def _say_what_differs(config: Config) -> None:
    """A run of this name and of other settings is not resumed: whoever expects that learns why."""
    before = None if config.run.new else Run.find(config.run.folder, config.run.name)
    if before is None:
        return
    differing = []
    with contextlib.suppress(CheckpointError):
        there = run_config(before)
        differing = _differing(config, there) if there else []
    what = "; ".join(differing[:5]) or "it is of another version"
    logger.info("a new run, since %s has other settings: %s", before, what)


def _differing(here: Config, there: Config) -> list[str]:
    """The settings of `here` with which a run of `there` would not be resumed."""
    found = []
    for section in type(here).model_fields:
        now, before = getattr(here, section), getattr(there, section)
        if type(now) is not type(before):
            found.append(f"{section}.kind={now.kind}, there {before.kind}")
            continue
        for key in type(now).model_fields:
            value, old = getattr(now, key), getattr(before, key)
            changed = there.model_copy(update={section: before.model_copy(update={key: value})})
            if value != old and changed.identity() != there.identity():
                found.append(f"{section}.{key}={plain(value)}, there {plain(old)}")  # YAML has no tuples
    return found


def _note(values: dict[str, float], stage) -> str:
    names = ("rec_real", "kl_real", "kl_rec", "kl_fake")
    shown = [f"{name} {values[name]:.4g}" for name in names if name in values]
    return "  ".join([f"level {stage.lod}", *shown])


def _memory(device: torch.device) -> int:
    """Peak bytes: of the GPU's tensors, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
