"""What `prepare` reads: a folder (nested), a zip, or a tar of pictures of any kind."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sivae_fast.data.archive import LABELS, MANIFEST, Folder, Zip, is_hidden, is_image_name


class Source:
    """Pictures with names in a fixed order.

    `names` are the items that should be pictures, `others` files that are none. `labels` maps names to
    classes or vectors where the source has them. `key` changes when the content of the source does.
    """

    names: list[str]
    others: list[str]
    labels: dict[str, object]
    key: str

    def items(self, skip: set[int]) -> Iterator[tuple[int, bytes | np.ndarray | OSError]]:
        """(index into names, content) in order: a file's bytes, uint8 pixels, or the error met in reading."""
        raise NotImplementedError


class Files(Source):
    """The pictures in a folder, zip or tar."""

    def __init__(self, files: Folder | Zip | Tar):
        self._files = files
        names = [n for n in files.names if Path(n).name not in (LABELS, MANIFEST)]
        self.names = [n for n in names if is_image_name(n)]
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
        try:
            return self._tar.extractfile(self._members[name]).read()
        except (tarfile.TarError, EOFError) as error:
            raise OSError(str(error)) from None


def open_source(path: Path) -> Source:
    """The source at `path`. Raises ValueError where there is none or it holds no pictures."""
    if not path.exists():
        raise ValueError(f"there is no source at {path}: a folder, zip or tar of pictures is needed")
    if path.is_dir():
        files = Folder(path)
    elif zipfile.is_zipfile(path):
        files = Zip(path)
    elif tarfile.is_tarfile(path):
        files = Tar(path)
    else:
        raise ValueError(f"{path} is neither a folder nor a zip or tar file")
    source = Files(files)
    if not source.names:
        raise ValueError(f"no pictures in {path} ({len(source.others)} other files)")
    return source
