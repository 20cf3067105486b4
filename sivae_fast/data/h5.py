"""Opening HDF5 archives."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path


@contextmanager
def open_h5(path: Path):
    """The archive at `path`, open for reading. Raises ImportError where h5py is missing, ValueError, naming
    the file, for anything that is not such an archive."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{path}: reading HDF5 needs h5py: pip install 'sivae-fast[eval]'") from error
    try:
        archive = h5py.File(path)
    except OSError as error:
        raise ValueError(f"{path}: not an HDF5 archive: {error}") from error
    with archive:
        yield archive


def shape_in(archive, name: str) -> tuple[int, ...]:
    """The shape of the array of this name, () without one."""
    return getattr(archive.get(name), "shape", None) or ()


def contents(archive) -> str:
    """The names and shapes in an archive, in words."""
    return ", ".join(f"{name} {list(shape_in(archive, name))}" for name in archive) or "nothing"
