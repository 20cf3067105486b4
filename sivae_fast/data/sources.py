"""What `prepare` reads: a folder (nested), a zip, or a tar of pictures of any kind."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sivae_fast.data.archive import LABELS, MANIFEST, Folder, Zip, is_hidden, is_image_name


class Source:
    """Pictures with names in a fixed order.

    `names` are the items that should be pictures, `others` files that are none. `labels` maps names to
    classes or vectors where the source has them. `key` changes when the content of the source does.
    `size` is the side of all pictures where they have one, `grey` whether they have one channel, `split`
    which part of a set they are.
    """

    names: list[str]
    others: list[str]
    labels: dict[str, object]
    key: str
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
        self.names = [n for n in names if is_image_name(n) and keep(n)]
        self.others = [n for n in names if not is_image_name(n)]
        self.labels = self._labels()
        listing = "".join(f"{n}\0{files.size(n)}\n" for n in self.names)
        self.key = hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()

    def items(self, skip: set[int]) -> Iterator[tuple[int, bytes | OSError]]:
        for index, name in enumerate(self.names):
            if index not in skip:
                try:
                    yield index, self._files.read(name)
                except OSError as error:
                    yield index, error

    def _labels(self) -> dict[str, object]:
        if LABELS not in self._files.names:
            return {}
        try:
            return dict(json.loads(self._files.read(LABELS)).get("labels") or {})
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{LABELS} of {self._files.path} holds no list of [name, label]: {error}"
            ) from None


class Tar:
    """The members of a tar file in their own order: a compressed one can only be read forward."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._tar = tarfile.open(path)  # noqa: SIM115 - lives as long as this object
            members = [m for m in self._tar.getmembers() if m.isfile() and not is_hidden(m.name)]
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"{path} is not a readable tar file: {error}") from None
        self._members = {m.name: m for m in members}
        self.names = list(self._members)

    def size(self, name: str) -> int:
        return self._members[name].size

    def read(self, name: str) -> bytes:
        """The bytes of one member. Raises OSError."""
        try:
            return self._tar.extractfile(self._members[name]).read()
        except (tarfile.TarError, EOFError) as error:
            raise OSError(str(error)) from None


def part(files: Folder | Zip | Tar, split: str, hold_out: int) -> Files:
    """The split "test", the last `hold_out` pictures in the order of the names, or "train", the others."""
    pictures = [name for name in files.names if is_image_name(name)]
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
