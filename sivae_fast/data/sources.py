"""What `prepare` reads: a folder (nested), a zip, or a tar of pictures of any kind."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import tarfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sivae_fast.data.archive import (
    LABELS,
    MANIFEST,
    Folder,
    Zip,
    is_hidden,
    is_image_name,
    plain_name,
    read_labels,
)

log = logging.getLogger(__name__)


class Source:
    """Pictures with names in a fixed order.

    `names` are the items that should be pictures, `others` files that are none. `labels` maps names to
    classes or vectors where the source has them. `key` changes with the names, sizes and labels of the
    pictures, `changed` is when the last of them was written, where `key` does not tell their content.
    `size` is the side of all pictures where they have one, `grey` whether they have one channel, `split`
    which part of a set they are.
    """

    names: list[str]
    others: list[str]
    labels: dict[str, object]
    key: str
    changed: float = 0.0
    size: int | None = None
    grey: bool = False
    split: str | None = None

    def items(self, skip: set[int]) -> Iterator[tuple[int, bytes | np.ndarray | OSError]]:
        """(index into names, content) in order: a file's bytes, uint8 pixels, or the error met in reading."""
        raise NotImplementedError


class Files(Source):
    """The pictures in a folder, zip or tar, those whose names `keep` accepts."""

    def __init__(self, files: Folder | Zip | Tar, keep: Callable[[str], bool] = lambda name: True):
        self._files = files
        names = [n for n in files.names if Path(n).name not in (LABELS, MANIFEST)]
        self.names = [n for n in names if is_picture_name(n) and keep(n)]
        self.others = [n for n in names if not is_picture_name(n)]
        self.labels = read_labels(files)
        if deeper := [n for n in files.names if n != LABELS and Path(n).name == LABELS]:
            log.warning("labels are left out: %s of %s does not lie at the top", deeper[0], files.path)

    @property
    def changed(self) -> float:
        return self._files.changed(self.names)

    @functools.cached_property
    def key(self) -> str:
        listing = "".join(f"{n}\0{self._files.size(n)}\n" for n in self.names)
        if self.labels:
            listing += json.dumps(self.labels)
        return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()

    def items(self, skip: set[int]) -> Iterator[tuple[int, bytes | OSError]]:
        for index, name in enumerate(self.names):
            if index not in skip:
                try:
                    yield index, self._files.read(name)
                except OSError as error:
                    yield index, error


def is_picture_name(name: str) -> bool:
    """Whether a file should be a picture: what a set may hold, and GIF files, which need converting."""
    return is_image_name(name) or name.lower().endswith(".gif")


class _Header(tarfile.TarInfo):
    """Refuses a damaged header, which tarfile takes for the end of the archive."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if any(buf):  # zeros are the end
                raise tarfile.ReadError(str(error)) from None
            raise


class Tar:
    """The members of a tar file in their own order: a compressed one can only be read forward."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._tar = tarfile.open(path, tarinfo=_Header)  # noqa: SIM115 - lives as long as this object
            weakref.finalize(self, self._tar.close)
            # Of two names of one file tar stores the second as a link.
            members = [m for m in self._tar.getmembers() if m.isfile() or m.islnk()]
        except Exception as error:  # each compression has errors of its own
            raise ValueError(f"{path} is not a readable tar file: {error}") from None
        self._members = {n: m for m in members if not is_hidden(n := plain_name(m.name))}
        self.names = list(self._members)

    def size(self, name: str) -> int:
        return self._members[name].size

    def changed(self, names: list[str]) -> float:
        return self.path.stat().st_mtime

    def read(self, name: str) -> bytes:
        """The bytes of one member. Raises OSError."""
        try:
            return self._tar.extractfile(self._members[name]).read()
        except Exception as error:  # each compression has errors of its own
            raise OSError(str(error)) from None


def part(files: Folder | Zip | Tar, split: str, hold_out: int) -> Files:
    """The split "test", the last `hold_out` pictures in the order of the names, or "train", the others."""
    pictures = sorted(name for name in files.names if is_picture_name(name))  # a tar has an order of its own
    if split not in ("train", "test"):
        raise ValueError(f"--split must be train or test, got {split!r}")
    if not 0 < hold_out < len(pictures):
        raise ValueError(
            f"--hold-out must lie between 0 and the {len(pictures)} pictures of {files.path}, got {hold_out}"
        )
    last = set(pictures[-hold_out:])
    source = Files(files, keep=lambda name: (name in last) == (split == "test"))
    source.split = split
    return source
