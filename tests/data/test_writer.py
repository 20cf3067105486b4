"""Image sets as they are written, and what is left of one that was torn."""

import zipfile

import pytest
from image_files import everything

from sivae_fast.data.writer import FolderWriter, ZipWriter


def test_a_zip_of_more_than_65535_members(tmp_path):
    writer = ZipWriter(tmp_path / "many.zip")
    for i in range(66000):
        writer.add(f"{i}.png", b"%d" % i)
    writer.finish()
    writer.close()
    with zipfile.ZipFile(tmp_path / "many.zip") as archive:
        assert len(archive.namelist()) == 66000
        assert archive.read("65999.png") == b"65999"


def test_a_zip_of_more_than_four_gigabytes(tmp_path):
    """A hole in the file stands in for the gigabytes."""
    writer = ZipWriter(tmp_path / "large.zip")
    writer.add("first.png", b"one")
    writer._file.seek(2**32 + 5)
    writer.add("last.png", b"two")
    writer.finish()
    writer.close()
    with zipfile.ZipFile(tmp_path / "large.zip") as archive:
        assert [archive.read(n) for n in archive.namelist()] == [b"one", b"two"]


@pytest.mark.parametrize("cut", [1, 20, 33, 45, 60])
def test_a_torn_zip_keeps_its_whole_members(tmp_path, cut):
    writer = ZipWriter(tmp_path / "set.zip")
    for i in range(3):
        writer.add(f"{i}.png", b"content %d" % i)
    writer.close()
    data = (tmp_path / "set.zip").read_bytes()
    (tmp_path / "set.zip").write_bytes(data[:-cut])
    again = ZipWriter(tmp_path / "set.zip")
    assert list(again.done) == (["0.png", "1.png"] if cut < 45 else ["0.png"])
    again.close()


def test_a_member_of_a_torn_zip_that_was_not_all_on_the_disk_is_written_again(tmp_path):
    """After a loss of power a file can have its length and zeros in place of what was written last."""
    writer = ZipWriter(tmp_path / "set.zip")
    writer.add("0.png", b"content 0")
    writer.add("1.png", b"content 1")
    writer.close()
    data = (tmp_path / "set.zip").read_bytes()
    (tmp_path / "set.zip").write_bytes(data[:-9] + bytes(9))
    again = ZipWriter(tmp_path / "set.zip")
    assert list(again.done) == ["0.png"]
    again.add("1.png", b"content 1")
    again.finish()
    again.close()
    assert everything(tmp_path / "set.zip") == {"0.png": b"content 0", "1.png": b"content 1"}


def test_a_torn_folder_keeps_its_whole_files(tmp_path):
    writer = FolderWriter(tmp_path / "set")
    writer.add("a/0.png", b"whole")
    (tmp_path / "set" / "a" / "1.png.tmp").write_bytes(b"ha")
    assert list(FolderWriter(tmp_path / "set").done) == ["a/0.png"]
    assert not list((tmp_path / "set").rglob("*.tmp"))
