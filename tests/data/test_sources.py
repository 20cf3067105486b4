"""Folders, zips and tars of pictures, as other programs make them: nothing is left out in silence."""

import gc
import io
import json
import os
import tarfile
import warnings

import pytest
from image_files import encoded, picture, write_folder, write_zip
from PIL import Image

from sivae_fast.data.archive import Folder, ImageSet, Zip
from sivae_fast.data.prepare import prepare
from sivae_fast.data.sources import Files, Tar, part
from sivae_fast.data.tfrecord import RecordFile

QUIET = {"resolution": 16, "progress": False, "workers": 1}


def pictures(count=4):
    return {f"{i}.png": encoded(picture(i, 20, 24)) for i in range(count)}


def pack(path, folder, names, prefix=""):
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.add(folder / name, prefix + name)
    return path


def test_gif_files_are_pictures(tmp_path):
    frames = [picture(i, 16, 16, "P") for i in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "gif", save_all=True, append_images=frames[1:])
    source = write_folder(tmp_path / "in", {"a.gif": buffer.getvalue(), "b.GIF": encoded(frames[1], "gif")})
    manifest = prepare(source, tmp_path / "out", **QUIET)
    assert (manifest.images, manifest.skipped) == (2, [])
    with Image.open(io.BytesIO(buffer.getvalue())) as first:  # of an animation
        assert (ImageSet(tmp_path / "out").decode(0) == first.convert("RGB")).all()


def test_the_held_out_pictures_are_the_last_by_name(tmp_path):
    source = Folder(write_folder(tmp_path / "in", pictures()))
    test, train = (part(source, split, 1) for split in ("test", "train"))
    assert (test.names, test.split) == (["3.png"], "test")
    assert (train.names, train.split) == (["0.png", "1.png", "2.png"], "train")
    for count in (0, 4):
        with pytest.raises(ValueError, match="--hold-out must lie between 0 and the 4 pictures"):
            part(source, "train", count)


def test_the_key_of_a_source_changes_with_names_sizes_and_labels(tmp_path):
    label = {"dataset.json": json.dumps({"labels": [["0.png", 1]]}).encode()}
    sets = {"same": {}, "more": {"4.png": b"4"}, "size": {"0.png": b"0"}, "label": label}
    keys = {Files(Folder(write_folder(tmp_path / n, pictures() | extra))).key for n, extra in sets.items()}
    assert len(keys) == 4
    with open(os.fsencode(tmp_path / "same") + b"/\xff.png", "wb"):  # a name that is no UTF-8
        pass
    assert Files(Folder(tmp_path / "same")).key not in keys


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives_made_of_the_folder_itself(tmp_path, kind):
    """`tar cf in.tar .` calls its members ./name."""
    labels = json.dumps({"labels": [[f"{i}.png", i] for i in range(4)]}).encode()
    files = pictures() | {"dataset.json": labels, ".hidden.png": b"x"}
    path = tmp_path / f"in.{kind}"
    if kind == "zip":
        write_zip(path, {f"./{name}": data for name, data in files.items()})
    else:
        pack(path, write_folder(tmp_path / "in", files), files, "./")
    manifest = prepare(path, tmp_path / "out", **QUIET)
    assert (manifest.images, manifest.skipped) == (4, [])
    assert ImageSet(tmp_path / "out").labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [Zip, Tar, RecordFile])
def test_a_file_is_closed_with_what_reads_it(tmp_path, kind):
    path = tmp_path / "a-r03.tfrecords"
    if kind is Tar:
        pack(path, write_folder(tmp_path / "in", pictures()), pictures())
    elif kind is Zip:
        write_zip(path, pictures())
    else:
        path.write_bytes(b"")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        kind(path)
        gc.collect()
    assert not seen


def test_a_second_name_of_a_file_is_in_the_tar(tmp_path):
    source = write_folder(tmp_path / "in", pictures(2))
    os.link(source / "0.png", source / "2.png")
    manifest = prepare(
        pack(tmp_path / "in.tar", source, sorted(os.listdir(source))), tmp_path / "out", **QUIET
    )
    assert manifest.images == 3
    images = ImageSet(tmp_path / "out")
    assert images.read(0) == images.read(2)


def test_a_damaged_header_is_not_the_end_of_a_tar(tmp_path):
    path = pack(tmp_path / "in.tar", write_folder(tmp_path / "in", pictures()), sorted(pictures()))
    with tarfile.open(path) as archive:
        third = archive.getmember("2.png").offset
    whole = path.read_bytes()
    for damaged in (whole[:third] + b"x" + whole[third + 1 :], whole[: third + 100]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"in\.tar is not a readable tar file"):
            prepare(path, tmp_path / "out", **QUIET)


def test_a_damaged_compressed_tar(tmp_path):
    source = write_folder(tmp_path / "in", {f"{i}.png": os.urandom(5000) for i in range(4)})
    path = tmp_path / "in.tar.xz"
    with tarfile.open(path, "w:xz") as archive:
        archive.add(source, "in")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(8) + whole[len(whole) // 2 + 8 :])
    with pytest.raises(ValueError, match=r"in\.tar\.xz is not a readable tar file"):
        Tar(path)


def test_the_held_out_part_of_a_tar_is_that_of_the_folder(tmp_path):
    source = write_folder(tmp_path / "in", pictures(6))
    pack(tmp_path / "in.tar", source, [f"{i}.png" for i in (5, 2, 0, 3, 1, 4)])
    sets = []
    for path in (source, tmp_path / "in.tar"):
        prepare(path, tmp_path / "out", split="test", hold_out=2, **QUIET)
        images = ImageSet(tmp_path / "out")
        sets.append({images.read(i) for i in range(len(images))})
        (tmp_path / "out").rename(tmp_path / f"{path.name}-done")
    assert sets[0] == sets[1] and len(sets[0]) == 2


def test_labels_that_are_not_found_are_spoken_of(tmp_path, caplog):
    """A zip of a folder has the folder's name before each file."""
    files = {f"in/{name}": data for name, data in pictures(2).items()} | {"in/dataset.json": b"{}"}
    prepare(write_zip(tmp_path / "in.zip", files), tmp_path / "out", **QUIET)
    assert f"labels are left out: in/dataset.json of {tmp_path / 'in.zip'} does not lie at" in caplog.text


def test_a_link_to_nothing_is_skipped_by_name(tmp_path):
    source = write_folder(tmp_path / "in", pictures())
    (source / "x.png").symlink_to(tmp_path / "gone.png")
    manifest = prepare(source, tmp_path / "out", allow_bad=0.2, **QUIET)
    assert manifest.images == 4
    assert manifest.skipped == [["x.png", "No such file or directory"]]
