"""From any folder, zip or tar to an image set: complete or not there at all."""

import errno
import io
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
from image_files import encoded, everything, picture, write_folder, write_zip

from sivae_fast.data import prepare as prepare_module
from sivae_fast.data.archive import ImageSet
from sivae_fast.data.prepare import check_set, prepare
from sivae_fast.data.writer import ZipWriter
from sivae_fast.files import locked

QUIET = {"resolution": 16, "progress": False, "workers": 1}


def pictures(count=8):
    return {f"{'ab'[i % 2]}/{i}.png": encoded(picture(i, 20 + i, 24)) for i in range(count)}


def write_tar(path, files):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("dest", ["out.zip", "out"])
@pytest.mark.parametrize("source", ["folder", "zip", "tar", "tar.gz"])
def test_every_source_to_every_destination(tmp_path, source, dest):
    files = dict(sorted(pictures().items()))
    path = tmp_path / f"in.{source}"
    {"folder": write_folder, "zip": write_zip}.get(source, write_tar)(path, files)
    manifest = prepare(path, tmp_path / dest, **QUIET)
    images = ImageSet(tmp_path / dest)
    assert (len(images), images.resolution, images.channels) == (8, 16, 3)
    assert images.names[0] == "00000/img00000000.png"
    assert images.manifest == json.loads(json.dumps(manifest.__dict__))
    reference = prepare(write_folder(tmp_path / "same", files), tmp_path / "same.zip", **QUIET)
    assert manifest.checksum == reference.checksum
    assert not list(tmp_path.glob("*.partial"))
    check_set(tmp_path / dest, progress=False)


def test_the_manifest_says_how_it_was_made_and_where_nothing(tmp_path):
    source = write_folder(tmp_path / "in", pictures() | {"torn.jpg": encoded(picture(0), "jpeg")[:-100]})
    manifest = prepare(source, tmp_path / "out.zip", filter="box", allow_bad=0.2, **QUIET)
    assert manifest.recipe["filter"] == "box"
    assert (manifest.images, manifest.channels, manifest.source) == (8, 3, "in")
    assert [name for name, _ in manifest.skipped] == ["torn.jpg"]
    assert set(manifest.versions) == {"sivae-fast", "pillow"}
    assert str(tmp_path) not in json.dumps(manifest.__dict__)
    names = zipfile.ZipFile(tmp_path / "out.zip").namelist()
    assert names[-1] == "manifest.json"


def test_equal_inputs_give_equal_files_whatever_the_number_of_workers(tmp_path):
    source = write_folder(tmp_path / "in", pictures(40))
    prepare(source, tmp_path / "one.zip", **QUIET)
    prepare(source, tmp_path / "two.zip", **QUIET | {"workers": 2})
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_labels_follow_their_pictures(tmp_path):
    files = pictures(4)
    labels = json.dumps({"labels": [[name, int(name[2])] for name in files]}).encode()
    torn = {"a/0.png": files["a/0.png"][:40]}
    source = write_folder(tmp_path / "in", files | {"dataset.json": labels} | torn)
    prepare(source, tmp_path / "out", allow_bad=0.5, **QUIET)
    assert ImageSet(tmp_path / "out").labels.tolist() == [2, 1, 3]


def test_text_and_torn_files_are_named_counted_and_skipped(tmp_path, caplog):
    bad = {"notes.txt": b"hello", "b/torn.jpg": encoded(picture(0, 64, 64), "jpeg")[:-300], "c.png": b"text"}
    source = write_folder(tmp_path / "in", pictures(200) | bad)
    with pytest.raises(ValueError, match=r"3 of 203 files .*\(1\.5%\).*more than --allow-bad 0\.01") as error:
        prepare(source, tmp_path / "out.zip", **QUIET | {"resolution": 4})
    assert all(name in str(error.value) for name in bad)
    assert not (tmp_path / "out.zip").exists()
    with caplog.at_level(logging.INFO):
        manifest = prepare(source, tmp_path / "out.zip", allow_bad=0.02, **QUIET | {"resolution": 4})
    assert {name for name, _ in manifest.skipped} == set(bad)
    assert "200 images, 3 files skipped" in caplog.text
    assert len(ImageSet(tmp_path / "out.zip")) == 200


def test_below_one_per_cent_needs_no_flag(tmp_path):
    source = write_folder(tmp_path / "in", pictures(120) | {"notes.txt": b"hello"})
    assert prepare(source, tmp_path / "out.zip", **QUIET | {"resolution": 4}).images == 120


def _die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_ends_in_words(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "in", pictures(40))
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "convert", _die)
        with pytest.raises(OSError, match=r"a worker process was killed .* with fewer --workers, it goes on"):
            prepare(source, tmp_path / "out.zip", **QUIET | {"workers": 2})
    assert prepare(source, tmp_path / "out.zip", **QUIET).images == 40


@pytest.mark.parametrize("dest", ["out.zip", "out"])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, dest, after):
    source, dest = write_folder(tmp_path / "in", pictures()), tmp_path / dest
    converted = []

    def convert(data, recipe, interrupt):
        if len(converted) == interrupt:
            raise KeyboardInterrupt
        converted.append(data)
        return original(data, recipe)

    original = prepare_module.convert
    monkeypatch.setattr(prepare_module, "convert", lambda d, r: convert(d, r, after))
    with pytest.raises(KeyboardInterrupt):
        prepare(source, dest, **QUIET)
    assert not dest.exists()
    with pytest.raises(ValueError, match=r"no image set at .*is an unfinished one: run the same"):
        ImageSet(dest)
    monkeypatch.setattr(prepare_module, "convert", lambda d, r: convert(d, r, -1))
    prepare(source, dest, **QUIET)
    assert len(converted) == len(set(converted)) == 8
    prepare(source, tmp_path / f"whole{dest.suffix}", **QUIET)
    assert everything(dest) == everything(tmp_path / f"whole{dest.suffix}")


@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_a_killed_run_goes_on(tmp_path, dest):
    source, dest = write_folder(tmp_path / "in", pictures()), tmp_path / dest
    program = (
        "import os, signal; from sivae_fast.data import prepare as p; one = p.convert\n"
        "def convert(data, recipe):\n"
        "    convert.n = getattr(convert, 'n', 0) + 1\n"
        "    if convert.n == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return one(data, recipe)\n"
        f"p.convert = convert; p.prepare({str(source)!r}, {str(dest)!r}, resolution=16, workers=1)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not dest.exists()
    prepare(source, dest, **QUIET)
    prepare(source, tmp_path / f"whole{dest.suffix}", **QUIET)
    assert everything(dest) == everything(tmp_path / f"whole{dest.suffix}")


def test_killing_a_run_with_workers_leaves_no_process_that_holds_the_place(tmp_path):
    source = write_folder(tmp_path / "in", pictures(300))
    program = (
        "import time; from sivae_fast.data import convert as c, prepare as p; one = c.convert\n"
        "p.convert = lambda data, recipe: time.sleep(0.01) or one(data, recipe)\n"
        f"p.prepare({str(source)!r}, {str(tmp_path / 'out.zip')!r}, resolution=16, workers=2, progress=False)"
    )
    run = subprocess.Popen([sys.executable, "-c", program])
    written = tmp_path / "out.zip.partial" / "images"
    while not written.exists() or not written.stat().st_size:
        assert run.poll() is None
        time.sleep(0.02)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 20
    while True:
        try:
            with locked(written.parent, wait=False):
                break
        except BlockingIOError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    prepare(source, tmp_path / "out.zip", **QUIET)
    prepare(source, tmp_path / "whole.zip", **QUIET)
    assert (tmp_path / "out.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()


@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, dest):
    """The limit on file sizes stands in for a full disk: writes fail in the middle of an image."""
    source, dest = write_folder(tmp_path / "in", pictures()), tmp_path / dest
    limit = 5000 if dest.suffix else 700
    program = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}))\n"
        "from sivae_fast.data.prepare import prepare\n"
        f"prepare({str(source)!r}, {str(dest)!r}, resolution=16, workers=1, progress=False)"
    )
    run = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert "File too large while writing to" in last and "run the same command again" in last
    assert "Exception ignored" not in run.stderr
    assert not dest.exists()
    prepare(source, dest, **QUIET)
    prepare(source, tmp_path / f"whole{dest.suffix}", **QUIET)
    assert everything(dest) == everything(tmp_path / f"whole{dest.suffix}")


def test_a_full_disk_while_the_lists_are_written(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "in", pictures())

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ZipWriter, "finish", full)
        with pytest.raises(OSError, match=r"No space left on device .*8 finished images"):
            prepare(source, tmp_path / "out.zip", **QUIET)
    assert not (tmp_path / "out.zip").exists()
    prepare(source, tmp_path / "out.zip", **QUIET)
    assert len(everything(tmp_path / "out.zip")) == 9


@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_a_run_that_ended_before_the_last_step_goes_on(tmp_path, monkeypatch, dest):
    """All was written, the lists, too: they are no images of the set."""
    labels = json.dumps({"labels": [[name, 1] for name in pictures(3)]}).encode()
    source = write_folder(tmp_path / "in", pictures(3) | {"dataset.json": labels})
    whole = prepare(source, tmp_path / f"whole-{dest}", grey=True, **QUIET)

    def ended(*_):
        raise OSError(errno.EIO, "the machine stopped")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the machine stopped"):
        patch.setattr(os, "rename", ended)
        prepare(source, tmp_path / dest, grey=True, **QUIET)
    assert prepare(source, tmp_path / dest, grey=True, **QUIET) == whole
    assert (whole.images, whole.channels) == (3, 1)
    assert ImageSet(tmp_path / dest).labels.tolist() == [1, 1, 1]


def test_labels_of_some_pictures_are_left_out_and_the_set_opens(tmp_path, caplog):
    labels = json.dumps({"labels": [[next(iter(pictures(3))), 1]]}).encode()
    source = write_folder(tmp_path / "in", pictures(3) | {"dataset.json": labels})
    prepare(source, tmp_path / "out", **QUIET)
    assert ImageSet(tmp_path / "out").labels is None
    assert "labels left out: only 1 of 3 images have one" in caplog.text


def test_the_name_says_whether_it_is_a_zip(tmp_path):
    source = write_folder(tmp_path / "in", pictures(2))
    prepare(source, tmp_path / "OUT.ZIP", **QUIET)
    assert zipfile.is_zipfile(tmp_path / "OUT.ZIP")
    (tmp_path / "folder.zip").mkdir()
    with pytest.raises(ValueError, match=r"folder\.zip exists and was not made from this source"):
        prepare(source, tmp_path / "folder.zip", **QUIET)
    assert not (tmp_path / "folder.zip.partial").exists()


def test_another_recipe_or_source_starts_over(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "in", pictures())
    with monkeypatch.context() as patch:
        patch.setattr(ZipWriter, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path / "out.zip", **QUIET)
    prepare(source, tmp_path / "out.zip", **QUIET | {"resolution": 8})
    assert ImageSet(tmp_path / "out.zip").resolution == 8


def test_the_same_command_again_changes_nothing_and_another_is_refused(tmp_path):
    source = write_folder(tmp_path / "in", pictures())
    first = prepare(source, tmp_path / "out.zip", **QUIET)
    before = os.stat(tmp_path / "out.zip").st_mtime_ns
    assert prepare(source, tmp_path / "out.zip", **QUIET) == first
    assert os.stat(tmp_path / "out.zip").st_mtime_ns == before
    with pytest.raises(ValueError, match=r"out\.zip exists and was not made from this source by this recipe"):
        prepare(source, tmp_path / "out.zip", **QUIET | {"filter": "box"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("precious")
    with pytest.raises(ValueError, match="other exists and was not made"):
        prepare(source, tmp_path / "other", **QUIET)
    assert (tmp_path / "other" / "file").read_text() == "precious"


def test_labels_that_came_later_are_not_left_out_in_silence(tmp_path):
    source = write_folder(tmp_path / "in", pictures(2))
    prepare(source, tmp_path / "out.zip", **QUIET)
    labels = {"labels": [[name, 1] for name in pictures(2)]}
    (source / "dataset.json").write_text(json.dumps(labels))
    with pytest.raises(ValueError, match=r"out\.zip exists and was not made from this source"):
        prepare(source, tmp_path / "out.zip", **QUIET)


@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_a_picture_that_changed_but_for_its_size(tmp_path, caplog, monkeypatch, dest):
    source, dest = write_folder(tmp_path / "in", {"a.bmp": encoded(picture(0), "bmp")}), tmp_path / dest
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "_write_lists", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(source, dest, **QUIET)
    (source / "a.bmp").write_bytes(encoded(picture(1), "bmp"))
    later = time.time() + 10
    os.utime(source / "a.bmp", (later, later))
    prepare(source, dest, **QUIET)
    assert (ImageSet(dest).decode(0) == np.asarray(picture(1))).all()  # not what the first run left
    prepare(source, dest, **QUIET)
    assert caplog.messages[-1:] == [f"files of in were written after {dest}: delete it if they changed"]


def test_two_writers_of_one_set_are_kept_apart(tmp_path):
    source = write_folder(tmp_path / "in", pictures())
    (tmp_path / "out.zip.partial").mkdir()
    with (
        locked(tmp_path / "out.zip.partial"),
        pytest.raises(ValueError, match=r"another process is writing .*out\.zip at this moment"),
    ):
        prepare(source, tmp_path / "out.zip", **QUIET)
    prepare(source, tmp_path / "out.zip", **QUIET)


def test_a_writer_that_cleared_its_place_away_at_this_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "make_folder", lambda place: None)
    with pytest.raises(ValueError, match=r"another process is writing .*out\.zip at this moment"):
        prepare(write_folder(tmp_path / "in", pictures(2)), tmp_path / "out.zip", **QUIET)


@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_a_set_that_another_process_finished_in_the_meantime(tmp_path, monkeypatch, dest):
    source = write_folder(tmp_path / "in", pictures())
    made = prepare(source, tmp_path / dest, **QUIET)
    looks = [lambda *_: None, prepare_module._finished]
    monkeypatch.setattr(prepare_module, "_finished", lambda *job: looks.pop(0)(*job))
    monkeypatch.setattr(prepare_module, "_convert_all", None)  # is not called
    assert prepare(source, tmp_path / dest, **QUIET) == made
    assert not (tmp_path / f"{dest}.partial").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "there is no source at .*in"),
        ({}, r"no pictures in .*in \(0 other files\)"),
        ({"a.txt": b"x", "b.csv": b"y"}, r"no pictures in .*in \(2 other files\)"),
        (
            {"a.png": b"x", "b.csv": b"y"},
            "none of the 2 files in .* is a readable picture, for example a.png: not a p",
        ),
        ({"a.png": encoded(picture(0)), "dataset.json": b"[1]"}, r"dataset\.json .* holds no list"),
    ],
)
def test_sources_that_are_none(tmp_path, files, message):
    if files is not None:
        (tmp_path / "in").mkdir()
        write_folder(tmp_path / "in", files)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "in", tmp_path / "out.zip", **QUIET)


def test_a_file_that_is_no_archive(tmp_path):
    (tmp_path / "in.zip").write_text("text")
    with pytest.raises(ValueError, match=r"in\.zip is neither a folder nor a whole zip or tar file"):
        prepare(tmp_path / "in.zip", tmp_path / "out.zip", **QUIET)


def test_bad_options_are_named(tmp_path):
    source = write_folder(tmp_path / "in", pictures(2))
    for options, message in (
        ({"allow_bad": 1.5}, r"--allow-bad must lie in 0 \.\.\. 1, got 1\.5"),
        ({"filter": "none"}, "--filter must be one of lanczos, bicubic"),
        ({"workers": 0}, "--workers must be at least 1, got 0"),
        ({"resolution": 48}, "--resolution must be a power of two from 4 to 4096, got 48"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(source, tmp_path / "out.zip", **QUIET | options)
    with pytest.raises(ValueError, match="out lies inside its source"):
        prepare(source, source / "out", **QUIET)


def test_damage_after_the_fact_is_found(tmp_path):
    source = write_folder(tmp_path / "in", pictures())
    prepare(source, tmp_path / "out", **QUIET)
    victim = tmp_path / "out" / "00000" / "img00000003.png"
    victim.write_bytes(encoded(picture(99)))
    with pytest.raises(ValueError, match=r"1 of 8 images of .*out are damaged:\n  00000/img00000003\.png is"):
        check_set(tmp_path / "out", progress=False)


def test_an_image_of_another_name_is_not_one_that_was_prepared(tmp_path):
    prepare(write_folder(tmp_path / "in", pictures()), tmp_path / "out", **QUIET)
    images = tmp_path / "out" / "00000"
    (images / "img00000003.png").rename(images / "other.png")
    with pytest.raises(ValueError, match=r"1 of 8 .*\n  00000/other\.png is not the file that was prepared"):
        check_set(tmp_path / "out", progress=False)


def test_all_damaged_images_are_named_also_those_that_are_met_when_the_set_is_opened(tmp_path):
    source = write_folder(tmp_path / "in", pictures())
    prepare(source, tmp_path / "out", **QUIET)
    for i, data in ((0, b"text"), (3, encoded(picture(99, 16, 16))), (7, encoded(picture(7, 16, 16))[:-40])):
        (tmp_path / "out" / "00000" / f"img{i:08d}.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"3 of 8 images of .*out are damaged:") as error:
        check_set(tmp_path / "out", progress=False)
    first, second, third = str(error.value).splitlines()[1:]
    assert first == f"  00000/img00000000.png of {tmp_path / 'out'} cannot be decoded (not a picture)"
    assert second == "  00000/img00000003.png is not the file that was prepared"
    assert "img00000007.png" in third and "cannot be decoded" in third


def test_what_is_no_set_is_not_listed_file_by_file(tmp_path):
    source = write_folder(tmp_path / "in", pictures())
    with pytest.raises(ValueError, match=r"^a/0\.png of .* is not square"):
        check_set(source, progress=False)


def test_the_verdict_on_a_whole_set_says_what_was_compared(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = write_folder(tmp_path / "in", pictures())
    prepare(source, tmp_path / "out", **QUIET)
    check_set(tmp_path / "out", progress=False)
    assert caplog.messages[-1].endswith("out: 8 images, none damaged; all as the manifest says")
    (tmp_path / "out" / "manifest.json").unlink()
    check_set(tmp_path / "out", progress=False)
    assert caplog.messages[-1].endswith(
        "out: 8 images, none damaged; there is no manifest to compare them with"
    )


def test_the_advice_on_a_damaged_picture_works(tmp_path):
    """Also in a set so small that one is more than the share that is skipped without asking."""
    source = write_folder(tmp_path / "in", {f"{i}.png": encoded(picture(i)) for i in range(5)})
    (source / "3.png").write_bytes(b"text")
    with pytest.raises(
        ValueError, match=r"3\.png .* cannot be decoded \(not a picture\); remove it, or"
    ) as error:
        ImageSet(source)
    assert "--allow-bad SHARE" in str(error.value)
    assert prepare(source, tmp_path / "out", allow_bad=0.2, **QUIET).images == 4


@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_a_set_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, dest):
    """What a machine that loses its power finds is what was synced."""
    source, synced = write_folder(tmp_path / "in", pictures(2)), []
    monkeypatch.setattr(os, "sync", lambda: synced.append((tmp_path / dest).exists()))
    size = lambda descriptor: synced.append(os.fstat(descriptor).st_size)
    monkeypatch.setattr(os, "fsync", size)
    prepare(source, tmp_path / dest, **QUIET)
    assert synced == [(tmp_path / dest).stat().st_size if dest == "out.zip" else False]
