import errno
import os
import stat

import pytest
import torch

from sivae_fast import files


def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError, match="stop"), files.atomic(path, "w") as file:
        file.write("new")
        raise RuntimeError("stop")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"no space left.*a\.bin; the previous file is unchanged") as caught:
        files.write_bytes(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="nothing was written"):
        files.write_bytes(tmp_path / "b.bin", b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_file_is_on_the_disk_before_its_name_and_then_the_name(tmp_path, monkeypatch):
    """What a machine that loses its power finds is what was synced, in this order."""
    path, synced, sync = tmp_path / "a.txt", [], os.fsync

    def note(descriptor):
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append(("names", path.exists()) if folder else (os.fstat(descriptor).st_size, path.exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    files.write_text(path, "text")
    assert synced == [(4, False), ("names", True)]


def test_a_folder_gets_all_files_or_none(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "folder"
    with files.filling(folder) as place:
        files.write_text(place / "a.txt", "a")
        assert not (folder / "a.txt").exists()
    for mistake in (RuntimeError("stop"), OSError(errno.ENOSPC, "No space left on device")):
        with pytest.raises(type(mistake)) as caught, files.filling(folder) as place:
            files.write_text(place / "a.txt", "b")
            files.write_text(place / "b.txt", "b")
            raise mistake
        assert os.listdir(folder) == ["a.txt"] and (folder / "a.txt").read_text() == "a"
    full = f"no space left on the disk while writing {folder}; nothing was written"
    assert caught.value.strerror == full
    with pytest.raises(RuntimeError, match="stop"), files.filling(tmp_path / "other") as place:
        files.write_text(place / "a.txt", "a")
        raise RuntimeError("stop")
    assert not (tmp_path / "other").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError, match="stop"), files.filling(tmp_path / "empty"):
        raise RuntimeError("stop")
    assert (tmp_path / "empty").is_dir()


def test_errors_name_the_file_that_was_asked_for(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.txt"
    files.write_text(path, "the folder is made")

    def refuse(name, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(name))

    monkeypatch.setattr(files, "open", refuse, raising=False)  # root may write everywhere
    with pytest.raises(PermissionError) as caught:
        files.write_text(path, "b")
    assert str(caught.value) == f"[Errno 13] Permission denied: '{path}'"
    monkeypatch.setattr(files.Path, "mkdir", refuse)
    with pytest.raises(PermissionError) as caught, files.filling(path.parent):
        pass
    assert str(caught.value) == f"[Errno 13] Permission denied: '{path.parent}'"


def test_only_plain_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(FileExistsError, match=f"{path.name} is there already and no plain file"):
            files.write_text(path, "a")
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "a").write_bytes(b"kept")
    (tmp_path / "broken").symlink_to("nowhere")
    for file in (tmp_path / "a", tmp_path / "broken"):
        for path in (file, file / "b" / "c"):
            for refuse in (files.make_folder, files.check_folder):
                with pytest.raises(FileExistsError, match=f"^{path} cannot be a folder: {file} is not one$"):
                    refuse(path)
        with pytest.raises(FileExistsError, match=f"^{file} cannot be a folder"):
            files.write_text(file / "b.txt", "text")
        with pytest.raises(FileExistsError, match=f"^{file} cannot be a folder"), files.filling(file):
            pass
    assert (tmp_path / "a").read_bytes() == b"kept"
    files.check_folder(tmp_path / "new" / "newer")
    assert not (tmp_path / "new").exists()
    files.make_folder(tmp_path / "new" / "newer")
    assert (tmp_path / "new" / "newer").is_dir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=f"{tmp_path} does not allow it"):
        files.check_folder(tmp_path / "new")


def test_the_name_changes_hands_only_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    with files.atomic(path, "w") as file:
        file.write("x" * 100_000)
        file.flush()
        assert not path.exists()
    assert path.stat().st_size == 100_000


def test_lines_round_trip_and_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    files.append_line(path, {"images": 1, "loss": torch.tensor(0.5), "nan": float("nan"), "v": torch.ones(2)})
    files.append_line(path, {"images": 2, "loss": 0.25})
    with open(path, "ab") as file:
        file.write(b'{"images": 3, "lo')
    first, second = files.read_lines(path)
    assert first == {"images": 1, "loss": 0.5, "nan": None, "v": [1.0, 1.0]}
    assert second["images"] == 2
    assert files.read_lines(tmp_path / "missing.jsonl") == []


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"images": 1}\n{"ima\n{"images": 3}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: not JSON"):
        files.read_lines(path)


def test_keep_lines_drops_what_lies_beyond(tmp_path):
    path = tmp_path / "log.jsonl"
    for images in (100, 200, 300):
        files.append_line(path, {"images": images})
    with open(path, "ab") as file:
        file.write(b'{"images": 150')
    files.keep_lines(path, 200)
    files.append_line(path, {"images": 250})
    assert [record["images"] for record in files.read_lines(path)] == [100, 200, 250]


def test_lines_that_cannot_be_dropped_all_stay(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    for images in (100, 200):
        files.append_line(path, {"images": images})
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"no space left.*log\.jsonl; the previous file is unchanged"):
        files.keep_lines(path, 100)
    assert path.read_bytes() == before
