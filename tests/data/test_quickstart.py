"""The pictures of the quickstart: made once, by whoever comes first."""

import errno
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from sivae_fast.data.archive import ImageSet
from sivae_fast.data.painting import HEIGHT, WIDTH, paint
from sivae_fast.data.quickstart import ensure_quickstart


def test_a_picture_is_a_function_of_its_number():
    first, again, other = (np.asarray(paint(n)) for n in (3, 3, 4))
    assert first.shape == (HEIGHT, WIDTH, 3)
    assert np.array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 5


def test_pictures_are_varied_and_well_exposed():
    pictures = np.stack([np.asarray(paint(n)) for n in range(60)]).astype(float)
    means = pictures.mean((1, 2))
    assert means.std(0).min() > 20
    assert (pictures.std((1, 2)).mean(1) > 15).all()
    assert (pictures == 0).mean() < 0.02 and (pictures == 255).mean() < 0.02


def test_the_set_is_prepared_like_anybodys(tmp_path):
    path = ensure_quickstart(tmp_path / "sets", 32, count=12, progress=False)
    images = ImageSet(path)
    assert (len(images), images.resolution, images.channels) == (12, 32, 3)
    assert images.manifest["source"] == "lakes"
    assert len(list((tmp_path / "sets" / "lakes").rglob("*.jpg"))) == 12
    larger = ensure_quickstart(tmp_path / "sets", 64, count=12, progress=False)
    assert ImageSet(larger).resolution == 64


def _ensure(folder, queue):
    path = ensure_quickstart(folder, 16, count=40, progress=False)
    queue.put((str(path), len(ImageSet(path)), path.stat().st_mtime_ns))


def test_processes_that_come_together_make_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_ensure, args=(tmp_path / "sets", queue)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    found = {queue.get(timeout=60) for _ in ranks}
    for rank in ranks:
        rank.join()
    assert len(found) == 1
    assert found.pop()[1] == 40


def test_an_interrupted_painting_starts_again(tmp_path):
    (tmp_path / "lakes.partial").mkdir()
    (tmp_path / "lakes.partial" / "half.jpg").write_bytes(b"half")
    assert len(ImageSet(ensure_quickstart(tmp_path, 16, count=8, progress=False))) == 8


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*lakes\.partial/00/lake-0000\.jpg'"):
        ensure_quickstart(tmp_path, 16, count=2, progress=False)
