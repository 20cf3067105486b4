"""Image sets on disk: what is read, and what is refused how."""

import builtins
import json
import os
import pickle
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from image_files import encoded, picture, png_zip, stylegan_names, write_folder, write_zip
from PIL import Image

from sivae_fast.data.archive import ImageSet
from sivae_fast.data.factors import load_factors
from sivae_fast.data.pointclouds import load_clouds
from sivae_fast.data.prepare import prepare


@pytest.fixture
def png_set(tmp_path):
    return png_zip(tmp_path / "set.zip")


def files_of(count=5, size=16, kind="png", **options):
    suffix = ".png" if kind == "png" else ".jpg"
    return {
        n: encoded(picture(i, size, size), kind, **options)
        for i, n in enumerate(stylegan_names(count, suffix))
    }


def test_stylegan_zip_with_stored_png(png_set):
    images = ImageSet(png_set)
    assert (len(images), images.resolution, images.channels, images.labels) == (21, 16, 3, None)
    assert images.name(0) == "00000/img00000000.png"
    for i in range(21):
        assert np.array_equal(images.decode(i), np.asarray(picture(i)))


def test_a_zip_is_read_as_the_folder_whatever_its_order_and_its_extra_fields(tmp_path):
    """As the program zip writes it: in the order of the disk, with times of its own in every header."""
    files = files_of(5)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in reversed(files):
            member = zipfile.ZipInfo(name)
            member.extra = b"UT\5\0\3" + bytes(4)
            archive.writestr(member, files[name])
    packed, plain = ImageSet(tmp_path / "set.zip"), ImageSet(write_folder(tmp_path / "set", files))
    assert packed.names == plain.names
    assert [packed.read(i) for i in range(5)] == [plain.read(i) for i in range(5)]


def test_the_checksum_changes_with_names_and_content(tmp_path):
    files = files_of(70)
    names = list(files)
    renamed = {name.replace("3.png", "3a.png"): data for name, data in files.items()}  # in the same order
    first, inner = (files | {names[i]: encoded(picture(99))} for i in (0, 11))
    sets = {"same": files, "renamed": renamed, "first": first, "inner": inner}
    packed = {name: ImageSet(write_zip(tmp_path / f"{name}.zip", held)) for name, held in sets.items()}
    plain = {name: ImageSet(write_folder(tmp_path / name, held)) for name, held in sets.items()}
    assert len({images.checksum() for images in packed.values()}) == 4
    assert len({images.checksum() for name, images in plain.items() if name != "inner"}) == 3  # 64 are read


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_jpeg_zip_stored_or_deflated(tmp_path, compression):
    files = files_of(kind="jpeg", quality=90)
    images = ImageSet(write_zip(tmp_path / "set.zip", files, compression))
    assert [images.read(i) for i in range(5)] == list(files.values())


def test_nested_folder_ignores_other_and_hidden_files(tmp_path):
    files = {"b/deep/2.png": encoded(picture(2)), "a/1.JPG": encoded(picture(1), "jpeg")}
    junk = {"notes.txt": b"x", ".cache/3.png": b"x", "__MACOSX/a/1.JPG": b"x", "a/.4.png": b"x"}
    images = ImageSet(write_folder(tmp_path / "set", files | junk))
    assert images.names == ["a/1.JPG", "b/deep/2.png"]


def test_links_that_lead_back_are_followed_once(tmp_path):
    path = write_folder(tmp_path / "set", {"a/0.png": encoded(picture(0))})
    (path / "a" / "up").symlink_to(path)
    assert ImageSet(path).names == ["a/0.png"]


def test_labels_of_dataset_json(tmp_path):
    files = files_of(4)
    pairs = [[name, 3 - i] for i, name in enumerate(files)][::-1]  # in an order of its own
    images = ImageSet(
        write_zip(tmp_path / "c.zip", files | {"dataset.json": json.dumps({"labels": pairs}).encode()})
    )
    assert images.labels.tolist() == [3, 2, 1, 0]
    assert images.labels.dtype == np.int64
    vectors = [[name, [i, 0.5]] for i, name in enumerate(files)]
    images = ImageSet(
        write_zip(tmp_path / "v.zip", files | {"dataset.json": json.dumps({"labels": vectors}).encode()})
    )
    assert images.labels.shape == (4, 2)
    none = ImageSet(write_zip(tmp_path / "n.zip", files | {"dataset.json": b'{"labels": null}'}))
    assert none.labels is None


def test_incomplete_labels_name_an_image(tmp_path):
    files = files_of(3)
    pairs = [[name, 0] for name in list(files)[:2]]
    path = write_zip(tmp_path / "set.zip", files | {"dataset.json": json.dumps({"labels": pairs}).encode()})
    with pytest.raises(ValueError, match="no label for 00000/img00000002"):
        ImageSet(path)


def test_labels_that_are_no_whole_numbers_keep_their_values(tmp_path):
    pairs = [[name, i / 4] for i, name in enumerate(files_of(3))]
    files = files_of(3) | {"dataset.json": json.dumps({"labels": pairs}).encode()}
    labels = ImageSet(write_folder(tmp_path / "set", files)).labels
    assert labels.dtype == np.float32 and labels.tolist() == [0, 0.25, 0.5]


@pytest.mark.parametrize(
    "labels", [5, "abc", [1, 2], [[["a"], 1]], [["a", "cat"]], [["a", None]], [["a", [1, 2]], ["b", [1]]]]
)
def test_what_are_no_labels_is_said_by_sets_and_by_prepare(tmp_path, labels):
    """`prepare` would else make a set that cannot be opened."""
    files = files_of(3) | {"dataset.json": json.dumps({"labels": labels}).encode()}
    source = write_folder(tmp_path / "set", files)
    for use in (ImageSet, lambda path: prepare(path, tmp_path / "out", resolution=16, progress=False)):
        with pytest.raises(ValueError, match=r"dataset\.json of .*set holds no list of \[name, label\]"):
            use(source)
    assert not (tmp_path / "out").exists()


def test_grey_colour_and_palette(tmp_path):
    grey = {n: encoded(picture(i, mode="L")) for i, n in enumerate(stylegan_names(3))}
    images = ImageSet(write_folder(tmp_path / "grey", grey))
    assert images.channels == 1
    assert np.array_equal(images.decode(1)[..., 0], np.asarray(picture(1, mode="L")))
    bits = {"0.png": encoded(picture(0, mode="1"))}
    assert set(np.unique(ImageSet(write_folder(tmp_path / "bits", bits)).decode(0))) == {0, 255}
    mixed = {"0.png": encoded(picture(0, mode="L")), "1.png": encoded(picture(1).quantize(16))}
    images = ImageSet(write_folder(tmp_path / "mixed", mixed))
    assert images.channels == 3
    mixed["2.png"] = mixed["0.png"]
    assert ImageSet(write_folder(tmp_path / "mixed", mixed)).channels == 3
    assert np.array_equal(images.decode(0), np.asarray(picture(0, mode="L").convert("RGB")))


def test_colour_among_grey_images_is_never_lost_in_silence(tmp_path):
    """Image 1 of 128 is none of those that are looked at when the set is opened."""
    files = {f"{i:03d}.png": encoded(picture(0, mode="L")) for i in range(128)}
    images = ImageSet(write_folder(tmp_path / "set", files | {"001.png": encoded(picture(1))}))
    assert images.channels == 1
    message = r"001\.png of .*set is stored in colour \(RGB\), .* are grey; run `sivae-fast prepare"
    with pytest.raises(ValueError, match=message):
        images.decode(1)
    with pytest.raises(ValueError, match=message):
        images.check(1, images.read(1))
    images.check(2, images.read(2))


def test_exif_orientation_is_followed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(0), "jpeg", quality=95, exif=exif)
    turned = ImageSet(write_folder(tmp_path / "a", {"0.jpg": data})).decode(0)
    plain = ImageSet(write_folder(tmp_path / "b", {"0.jpg": encoded(picture(0), "jpeg", quality=95)})).decode(
        0
    )
    assert np.array_equal(turned, np.rot90(plain, -1))


def decode_sum(images, index):
    return int(images.decode(index).sum())


def test_one_handle_serves_threads_forks_and_pickles(png_set):
    images = ImageSet(png_set)
    expected = [decode_sum(images, i) for i in range(21)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: decode_sum(images, i % 21), range(210))) == expected * 10
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        assert list(pool.map(decode_sum, [images] * 21, range(21))) == expected
    assert decode_sum(pickle.loads(pickle.dumps(images)), 3) == expected[3]


def test_paths_that_are_no_sets(tmp_path):
    with pytest.raises(ValueError, match=r"there is no image set at .*nowhere"):
        ImageSet(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*empty \(0 other files\)"):
        ImageSet(tmp_path / "empty")
    (tmp_path / "text.zip").write_text("no zip at all")
    with pytest.raises(ValueError, match="neither a folder nor a whole zip file"):
        ImageSet(tmp_path / "text.zip")
    whole = write_zip(tmp_path / "torn.zip", files_of(3)).read_bytes()
    (tmp_path / "torn.zip").write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"torn\.zip"):
        ImageSet(tmp_path / "torn.zip")


@pytest.fixture
def forbidden(monkeypatch, tmp_path):
    """A place that may not be read, also by root, whom modes do not stop."""

    def refusing(function):
        def call(path, *args, **options):
            if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(str(tmp_path)):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return function(path, *args, **options)

        return call

    for owner, name in ((builtins, "open"), (os, "scandir"), (os, "listdir")):
        monkeypatch.setattr(owner, name, refusing(getattr(owner, name)))
    return tmp_path


def test_what_may_not_be_read_is_not_called_empty_or_of_another_kind(forbidden):
    (forbidden / "folder").mkdir()
    (forbidden / "set.zip").touch()
    for name in ("folder", "set.zip"):
        for read in (ImageSet, lambda path: prepare(path, "nowhere", resolution=16)):
            with pytest.raises(ValueError, match=rf"{name} cannot be read: Permission denied"):
                read(forbidden / name)
    for read in (load_clouds, load_factors):
        with pytest.raises(PermissionError, match="folder"):
            read(forbidden / "folder")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": encoded(picture(0, 16, 12))}, r"a\.png .* is not square \(16x12\); .*sivae-fast prepare"),
        (files_of(3) | {"big.png": encoded(picture(0, 32, 32))}, r"big\.png .* is 32x32, others are 16x16"),
        ({"a.png": encoded(picture(0, 20, 20))}, r"a\.png .*20 pixels, which is no power of two; .*prepare"),
        ({"a.png": encoded(Image.new("I;16", (16, 16)))}, r"a\.png .* stored as I;16, not as 8-bit"),
        ({"a.jpg": encoded(picture(0), "jpeg")[:-200]}, r"a\.jpg .* cannot be decoded .*prepare"),
        ({"a.png": b"this is text"}, r"a\.png .* cannot be decoded"),
    ],
)
def test_sets_that_need_preparing_name_the_file(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        ImageSet(write_folder(tmp_path / "set", files)).decode(0)


def test_any_size_allows_sides_that_are_no_power_of_two(tmp_path):
    path = write_folder(tmp_path / "set", {"a.png": encoded(picture(0, 28, 28))})
    assert ImageSet(path, any_size=True).resolution == 28


def test_damage_in_a_zip_is_found_when_it_is_read(png_set):
    data = bytearray(png_set.read_bytes())
    at = data.find(b"img00000007.png")
    data[at + 60] ^= 0xFF
    png_set.write_bytes(data)
    with pytest.raises(ValueError, match=r"img00000007\.png of .*set\.zip cannot be read: wrong checksum"):
        ImageSet(png_set)


def test_a_zip_of_a_version_to_come(png_set):
    data = bytearray(png_set.read_bytes())
    data[data.index(b"PK\1\2") + 6] = 99  # the version that is needed to read it
    png_set.write_bytes(data)
    with pytest.raises(ValueError, match=r"set\.zip is not a readable zip file: zip file version 9\.9"):
        ImageSet(png_set)


def test_a_set_with_missing_images_is_refused(tmp_path):
    manifest = b'{"images": 5, "format": "sivae-fast image set 1"}'
    with pytest.raises(ValueError, match=r"holds 4 images, its manifest\.json says 5"):
        ImageSet(write_folder(tmp_path / "set", files_of(4) | {"manifest.json": manifest}))


@pytest.mark.parametrize("content", [b"3", b"[1]", b'{"images": 5}', b'{"images": [], "format": "webp"}'])
def test_a_manifest_of_another_program_is_none(tmp_path, content):
    images = ImageSet(write_folder(tmp_path / "set", files_of(4) | {"manifest.json": content}))
    assert len(images) == 4 and images.manifest is None
