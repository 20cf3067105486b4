"""The image set of the quickstart: painted mountain lakes, made in seconds, the same on every machine."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

from sivae_fast.data.painting import paint
from sivae_fast.data.parallel import cores, ordered
from sivae_fast.data.prepare import prepare
from sivae_fast.files import locked, make_folder
from sivae_fast.progress import progress_bar

COUNT = 2000


def ensure_quickstart(
    folder: str | os.PathLike, resolution: int = 32, *, count: int = COUNT, progress: bool = True
) -> Path:
    """The path of the prepared quickstart set below `folder`, made at the first call by one process.

    The pictures are JPEG files in `folder`/lakes, prepared like anybody's at `resolution`.
    """
    folder = Path(folder)
    make_folder(folder)
    prepared = folder / f"lakes-{resolution}.zip"
    with locked(folder):
        if not prepared.exists():
            pictures = folder / "lakes"
            if not pictures.exists():
                _paint_all(pictures, count, progress)
            prepare(pictures, prepared, resolution=resolution, progress=progress)
    return prepared


def _paint_all(dest: Path, count: int, progress: bool) -> None:
    unfinished = dest.with_name(dest.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    with progress_bar(count, "paint", progress) as bar:
        for index, data in ordered(_jpeg, ((k, k) for k in range(count)), count, cores()):
            file = unfinished / f"{index // 500:02d}" / f"lake-{index:04d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                file.write_bytes(data)
            except OSError as error:  # of a full disk does not say where it is
                raise OSError(error.errno, error.strerror, str(file)) from None
            bar.update()
    unfinished.rename(dest)


def _jpeg(index: int) -> bytes:
    buffer = io.BytesIO()
    paint(index).save(buffer, "jpeg", quality=92, subsampling=0)
    return buffer.getvalue()
