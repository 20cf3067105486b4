"""A short name for the contents of a file or folder, to tell whether two copies are the same."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import zipfile
from collections.abc import Iterator
from pathlib import Path

from sivae_fast.data.archive import Folder

PIECE = 1 << 20
PIECES = 64


def fingerprint(path: Path) -> str:
    """Number of files, size and a digest over names, sizes and contents.

    Sets of up to 64 MiB are read whole. Of larger ones 64 pieces of 1 MiB, evenly spread, are read; of a zip
    also the checksums of all its members. Raises OSError for what cannot be read.
    """
    files = [path] if path.is_file() else [path / name for name in Folder(path).names]
    sizes = [file.stat().st_size for file in files]
    digest = hashlib.sha256()
    for file, size in zip(files, sizes, strict=True):
        name = "" if path.is_file() else file.relative_to(path).as_posix()
        digest.update(f"{name}\0{size}\0".encode())
        if (file == path or file.suffix == ".zip") and zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                digest.update("".join(f"{m.filename}\0{m.CRC}\0" for m in archive.infolist()).encode())
    for piece in _pieces(files, sizes):
        digest.update(piece)
    total = sum(sizes)
    said = f"{total / (1 << 30):.2f} GiB" if total >= 1 << 28 else f"{total / (1 << 20):.2f} MiB"
    return f"{len(files):,} file{'s' if len(files) != 1 else ''}, {said}, digest {digest.hexdigest()[:12]}"


def _pieces(files: list[Path], sizes: list[int]) -> Iterator[bytes]:
    """Contents at evenly spread places of all files laid end to end."""
    total = sum(sizes)
    ends = list(itertools.accumulate(sizes))
    count = min(PIECES, -(-total // PIECE))
    for i in range(count):
        place = i * PIECE if total <= PIECES * PIECE else i * (total - PIECE) // (PIECES - 1)
        left = min(PIECE, total - place)
        index = bisect.bisect_right(ends, place)
        while left > 0:
            offset = place - (ends[index] - sizes[index])
            with open(files[index], "rb") as file:
                file.seek(offset)
                piece = file.read(min(left, sizes[index] - offset))
            if not piece and sizes[index] > offset:
                raise OSError(f"{files[index]} became shorter while it was read")
            yield piece
            place, left, index = place + len(piece), left - len(piece), index + 1
