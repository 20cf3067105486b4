"""Files that are either whole or not there: atomic writes, and lines appended to logs that survive a kill."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger("sivae_fast")


def make_folder(path: str | os.PathLike) -> None:
    """Makes `path` and the folders above it, where missing.

    Raises FileExistsError, naming it, for a file in the way, OSError where the folder cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        check_folder(path)
        raise


def check_folder(path: str | os.PathLike) -> None:
    """The errors of `make_folder`, and PermissionError where nothing could be written, with nothing made."""
    path = Path(path)
    there = next(part for part in (path, *path.parents) if os.path.lexists(part))
    if not there.is_dir():
        raise FileExistsError(f"{path} cannot be a folder: {there} is not one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: {there} does not allow it")


def lock(file: IO | int, path: Path, wait: bool = False) -> None:
    """Locks an open file or folder until it is closed; BlockingIOError where held and not `wait`.

    Some network file systems have no locks: that is said, and work goes on without.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        logger.warning(
            "%s: locks are not to be had here (%s): a second process in the same folder would not be noticed",
            path,
            error.strerror,
        )


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Holds the folder or file `path` for this process alone; BlockingIOError where held and not `wait`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        lock(handle, path, wait)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path` that takes its place only when the block ends without an error.

    The folder is made where it is missing. The data are on the disk before the name changes hands, so a crash
    leaves the old file or the new one. Raises OSError, naming `path`, where the folder cannot be made or
    written or is full, and for what exists and is no plain file; what was there is then unchanged.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode must be 'w' or 'wb', got {mode!r}")
    path = Path(path)
    if path.exists() and not path.is_file():  # to replace /dev/null would be a pity
        raise FileExistsError(f"{path} is there already and no plain file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _told_of(path, temporary):
        try:
            make_folder(path.parent)
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def filling(folder: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` only when the block ends without an error.

    `folder` is made where it is missing; files of other names stay in it. Raises OSError, naming `folder`,
    where it cannot be made or written or is full; it is then as it was.
    """
    folder = Path(folder)
    temporary = folder / f".{os.getpid()}.tmp"  # inside: the folder may be a file system of its own
    missing = not folder.exists()
    with _told_of(folder, temporary):
        try:
            make_folder(folder)
            temporary.mkdir()
            yield temporary
            for path in sorted(temporary.iterdir()):
                os.replace(path, folder / path.name)
            _sync_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # unless there is something in it


@contextlib.contextmanager
def _told_of(path: Path, temporary: Path) -> Iterator[None]:
    """Errors of `temporary` become errors of `path`, the name that was asked for."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "the previous file is unchanged" if path.is_file() else "nothing was written"
            raise OSError(error.errno, f"no space left on the disk while writing {path}; {what}") from error
        if str(error.filename).startswith(str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Atomic replacement of `path` by `data`."""
    with atomic(path) as file:
        file.write(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Atomic replacement of `path` by UTF-8 `text`."""
    with atomic(path, "w") as file:
        file.write(text)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; a file system that refuses to sync a folder costs only durability."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append_line(path: str | os.PathLike, record: dict[str, Any]) -> None:
    """Append one JSON line in a single write. Numbers that JSON cannot hold (NaN, infinity) become null.

    Raises OSError where the disk is full; no part of the line is then in the file.
    """
    line = (json.dumps(plain(record), allow_nan=False) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        written = os.write(descriptor, line)
        if written < len(line):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
            raise OSError(errno.ENOSPC, f"no space left on the disk while writing {path}")
    finally:
        os.close(descriptor)


def read_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a half-written last line is left out, a missing file is empty.

    Raises ValueError naming the line if an earlier one is damaged.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was never finished
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    return records


def keep_lines(path: str | os.PathLike, images: int) -> None:
    """Drop, atomically, the records whose `images` lies beyond `images`, and a half-written last line."""
    path = Path(path)
    if path.exists():
        kept = [record for record in read_lines(path) if record.get("images", 0) <= images]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def plain(value: Any) -> Any:
    """`value` as JSON holds it: tensors and arrays become lists or numbers, NaN and infinity None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # torch and numpy
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
