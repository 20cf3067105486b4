"""Readers of images with known class and content, on small archives in the original formats."""

import gzip
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from sivae_fast.data.factors import FactorImages, load_factors
from sivae_fast.data.made_images import CLASSES, CONTENTS, made_images
from sivae_fast.draws import Draws, Rows

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def made():
    return load_factors(None, 16)


def test_made_pictures(made):
    assert made.images.shape == (CLASSES * CONTENTS, 16, 16, 3)
    assert made.classes.unique().tolist() == list(range(CLASSES))
    assert made.contents.bincount().tolist() == [CLASSES] * CONTENTS
    assert np.array_equal(made_images(16).reshape(-1, 16, 16, 3), made.images.numpy())
    assert 0.08 < made.test.float().mean() < 0.12
    assert made.classes[made.test].unique().numel() == CLASSES
    assert made.contents[~made.test].unique().numel() == CONTENTS


def test_class_is_shape_and_colour_and_content_is_place(made):
    pictures = made.images.view(CLASSES, CONTENTS, 16, 16, 3).float()
    background = pictures.median(1).values.median(0).values
    away = (pictures - background).abs().sum(-1)
    centre = (away.sum(2) * torch.arange(16)).sum(-1) / away.sum((2, 3))
    across = centre.view(CLASSES, 11, 7).mean((0, 2))
    assert (across.diff() > 0.4).all()
    red, blue = (pictures[colour::6].mean((0, 1, 2, 3)) for colour in (0, 4))
    assert red[0] - red[2] > blue[0] - blue[2] + 5


def test_find(made):
    found = made.find(torch.tensor([3, 0]), torch.tensor([5, 76]))
    assert found.tolist() == [3 * CONTENTS + 5, 76]
    assert made.find(torch.tensor([99, 1]), torch.tensor([0, -1])).tolist() == [-1, -1]
    assert made.find(torch.tensor([0, 0]), torch.tensor([CONTENTS, CONTENTS - 1])).tolist() == [-1, 76]


def write_cars(folder, cars=12, azimuths=3, elevations=2):
    savemat = pytest.importorskip("scipy.io").savemat
    folder.mkdir()
    views = RNG.integers(0, 256, (cars, 8, 8, 3, azimuths, elevations), np.uint8)
    for i, car in enumerate(views):
        savemat(folder / f"car_{i:03}_mesh.mat", {"im": car})
    return views


def test_cars3d(tmp_path):
    views = write_cars(tmp_path / "cars")
    cars = load_factors(tmp_path, 8)
    assert cars.images.shape == (72, 8, 8, 3) and cars.images.dtype == torch.uint8
    inner = cars.find(torch.tensor([4]), torch.tensor([1 * 2 + 1]))
    assert np.array_equal(cars.images[inner[0]].numpy(), views[4, :, :, :, 1, 1])
    number = cars.find(torch.tensor([4]), torch.tensor([2 * 2 + 1]))
    assert np.array_equal(cars.images[number[0]].numpy(), views[4, :, :, :, 2, 1])
    assert cars.classes[cars.test].unique().tolist() == [9]
    small = load_factors(tmp_path, 4)
    want = views[4, :, :, :, 2, 1].reshape(4, 2, 4, 2, 3).mean((1, 3))
    assert np.abs(small.images[number[0]].numpy() - want).max() <= 1


def test_bad_cars(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    savemat(tmp_path / "a.mat", {"im": np.zeros((4, 4), np.uint8)})
    with pytest.raises(ValueError, match=r"a\.mat holds .*\[4, 4\].*accepted is im"):
        load_factors(tmp_path)
    savemat(tmp_path / "a.mat", {"im": np.zeros((4, 8, 3, 2, 2), np.uint8)})
    with pytest.raises(ValueError, match=r"a\.mat holds .*\[4, 8, 3, 2, 2\].*accepted is im \[R, R"):
        load_factors(tmp_path)
    for content in (b"not MATLAB" * 99, b""):
        (tmp_path / "a.mat").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.mat: not a MATLAB file"):
            load_factors(tmp_path)


def norb(array, magic, pad=0):
    sizes = [*array.shape, *[1] * pad]
    return struct.pack(f"<{2 + len(sizes)}i", magic, array.ndim, *sizes) + array.tobytes()


def write_norb(folder, part="smallnorb-5x2-training", zipped=False):
    dat = RNG.integers(0, 256, (40, 2, 6, 6), np.uint8)
    cat = (np.arange(40, dtype="<i4") // 8) % 5
    info = np.stack([np.zeros(40), np.zeros(40), 2 * (np.arange(40) % 8), np.zeros(40)], 1).astype("<i4")
    for kind, content in (
        ("dat", norb(dat, 0x1E3D4C55)),
        ("cat", norb(cat, 0x1E3D4C54, pad=2)),
        ("info", norb(info, 0x1E3D4C54, pad=1)),
    ):
        name = f"{part}-{kind}.mat" + ".gz" * zipped
        (folder / name).write_bytes(gzip.compress(content) if zipped else content)
    return dat


@pytest.mark.parametrize("zipped", [False, True])
def test_smallnorb(tmp_path, zipped):
    dat = write_norb(tmp_path, zipped=zipped)
    write_norb(tmp_path, "smallnorb-5x2-testing", zipped=zipped)
    found = load_factors(tmp_path, 6)
    assert found.images.shape == (160, 6, 6, 1)
    assert len(found.classes.unique()) == 5 * 2 and found.contents.unique().tolist() == list(range(8))
    training = found.images[80:].numpy()  # testing comes first by name
    assert np.array_equal(training[:40, :, :, 0], dat[:, 0]) and np.array_equal(
        training[40:, :, :, 0], dat[:, 1]
    )


@pytest.mark.parametrize(
    ("dat", "magic"),
    [(np.zeros((40, 2, 6, 6), "<i4"), 0x1E3D4C54), (np.zeros((40, 2, 6, 4), "u1"), 0x1E3D4C55)],
)
def test_smallnorb_with_other_pictures(tmp_path, dat, magic):
    write_norb(tmp_path)
    (tmp_path / "smallnorb-5x2-training-dat.mat").write_bytes(norb(dat, magic))
    with pytest.raises(ValueError, match=r"dat, cat and info are .*: accepted is uint8 \[n, 2, R, R\]"):
        load_factors(tmp_path, 6)


@pytest.mark.parametrize("column", [0, 1, 3], ids=["instance", "elevation", "lighting"])
def test_smallnorb_of_other_instances_elevations_and_lighting_is_of_other_classes(tmp_path, column):
    write_norb(tmp_path)
    info = np.stack([np.zeros(40), np.zeros(40), 2 * (np.arange(40) % 8), np.zeros(40)], 1).astype("<i4")
    info[20:, column] = 1
    (tmp_path / "smallnorb-5x2-training-info.mat").write_bytes(norb(info, 0x1E3D4C54, pad=1))
    found = load_factors(tmp_path, 6)
    assert len(found.classes.unique()) == 2 * 6  # the category in the middle is split
    assert found.contents.unique().tolist() == list(range(8))


def test_smallnorb_without_its_factors(tmp_path):
    write_norb(tmp_path)
    (tmp_path / "smallnorb-5x2-readme.txt").write_text("no part of the set")
    info = tmp_path / "smallnorb-5x2-training-info.mat"
    whole = info.read_bytes()
    info.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"info\.mat has \d+ bytes"):
        load_factors(tmp_path, 6)
    info.write_bytes(b"x" * 50)
    with pytest.raises(ValueError, match=r"info\.mat: not a matrix"):
        load_factors(tmp_path, 6)
    info.unlink()
    with pytest.raises(ValueError, match=r"training-info\.mat .* is missing"):
        load_factors(tmp_path, 6)


def test_shapes3d(tmp_path):
    h5py = pytest.importorskip("h5py")
    images = RNG.integers(0, 256, (20, 4, 4, 3), np.uint8)
    labels = np.stack([np.arange(20) // 4 / 10, *[np.zeros(20)] * 4, np.arange(20) % 4 * 5.0 - 30], 1)
    with h5py.File(tmp_path / "3dshapes.h5", "w") as file:
        file["images"], file["labels"] = images, labels
    found = load_factors(tmp_path / "3dshapes.h5", 4)
    assert np.array_equal(found.images.numpy(), images)
    assert found.find(torch.tensor([2]), torch.tensor([3])).tolist() == [11]
    for column in range(5):  # each of the hues, the scale and the shape tells a class
        labels = np.zeros((20, 6))
        labels[:, column], labels[:, 5] = np.arange(20) // 4, np.arange(20) % 4
        with h5py.File(tmp_path / "one.h5", "w") as file:
            file["images"], file["labels"] = images, labels
        assert load_factors(tmp_path / "one.h5", 4).classes.tolist() == labels[:, column].tolist()
    with h5py.File(tmp_path / "bad.h5", "w") as file:
        file["images"] = images
    with pytest.raises(ValueError, match=r"holds images \[20, 4, 4, 3\]: accepted are images"):
        load_factors(tmp_path / "bad.h5")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((20, 4, 4, 3), np.uint8), np.zeros((15, 6)), r"labels \[15, 6\]: accepted are images"),
        (np.zeros((20, 3, 4, 4), np.uint8), np.zeros((20, 6)), r"images \[20, 3, 4, 4\], .*: accepted are"),
        (np.zeros((20, 4, 8, 3), np.uint8), np.zeros((20, 6)), r"images \[20, 4, 8, 3\], .*: accepted are"),
        (np.zeros((20, 4, 4), np.uint8), np.zeros((20, 6)), r"images \[20, 4, 4\], .*: accepted are"),
        (np.zeros((0, 4, 4, 3), np.uint8), np.zeros((0, 6)), r"images \[0, 4, 4, 3\], .*: accepted are"),
        (np.zeros((20, 4, 4, 3)), np.zeros((20, 6)), "images are float64, accepted is uint8"),
    ],
)
def test_bad_shapes3d(tmp_path, images, labels, message):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"], file["labels"] = images, labels
    with pytest.raises(ValueError, match=message):
        load_factors(tmp_path / "a.h5", 4)


def test_kth(tmp_path):
    for name in (
        "person02_handwaving_d4_uncomp",
        "person10_handwaving_d4_uncomp",
        "person10_boxing_d1_uncomp",
    ):
        (tmp_path / name).mkdir()
        for i in range(5):
            frame = np.full((12, 16), 20 * i, np.uint8)
            frame[:, :2] = frame[:, -2:] = 255
            Image.fromarray(frame).save(tmp_path / name / f"{i:02}.png")
    found = load_factors(tmp_path, 6)
    assert found.images.shape == (10, 6, 6, 1) and found.images.max() == 80  # the margins are cut off
    assert found.classes.tolist() == [0] * 5 + [1] * 5 and (found.contents == -1).all()
    assert (found.find(torch.tensor([0]), torch.tensor([-1])) == -1).all()
    for video in list(tmp_path.glob("*handwaving*")):
        video.rename(tmp_path / video.name.replace("handwaving", "running"))
    with pytest.raises(ValueError, match="handwaving_d4"):
        load_factors(tmp_path)


def test_kth_frames_that_cannot_be_read_or_stand_upright(tmp_path):
    video = tmp_path / "person01_handwaving_d4"
    video.mkdir()
    frame = np.zeros((16, 12), np.uint8)
    frame[:2] = frame[-2:] = 255
    Image.fromarray(frame).save(video / "0.png")
    (video / "._0.png").write_bytes(b"hidden, as macOS leaves it")
    assert load_factors(tmp_path, 6).images.max() == 0  # the margins are cut off here, too
    for content in (b"text", (video / "0.png").read_bytes()[:-30]):
        (video / "1.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"person01_handwaving_d4/1\.png cannot be decoded"):
            load_factors(tmp_path, 6)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    (tmp_path / "car.mat").write_bytes(b"MATLAB")
    (tmp_path / "3dshapes.h5").write_bytes(b"HDF")
    for name in ("scipy", "scipy.io", "h5py"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=r"car\.mat: reading \.mat needs scipy: pip install 'sivae-fast\[eval"
    ):
        load_factors(tmp_path)
    with pytest.raises(
        ImportError, match=r"3dshapes\.h5: reading HDF5 needs h5py: pip install 'sivae-fast\[ev"
    ):
        load_factors(tmp_path / "3dshapes.h5")


def test_images_without_factors(tmp_path):
    """Training images alone, in a folder or a zip, do not tell class and content."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    for path in (tmp_path, tmp_path / "images.zip"):
        with pytest.raises(ValueError, match=r"data\.path=.*: accepted are a folder with the \.mat files"):
            load_factors(path)


def test_damaged_archives(tmp_path):
    pytest.importorskip("h5py")
    (tmp_path / "a.h5").write_bytes(b"no HDF5 at all")
    with pytest.raises(ValueError, match=r"a\.h5: not an HDF5 archive"):
        load_factors(tmp_path / "a.h5")
    write_norb(tmp_path, zipped=True)
    dat = tmp_path / "smallnorb-5x2-training-dat.mat.gz"
    whole = dat.read_bytes()
    for content in (whole[:-30], whole[:10] + b"\xff" * 20):
        dat.write_bytes(content)
        with pytest.raises(ValueError, match=r"dat\.mat\.gz: not a complete gzip file"):
            load_factors(tmp_path, 6)


def test_nothing_known(tmp_path):
    with pytest.raises(ValueError, match="accepted are a folder with the"):
        load_factors(tmp_path)
    with pytest.raises(ValueError, match=r"cars\.zip: accepted"):
        load_factors(tmp_path / "cars.zip")


def test_training_data_contract(made):
    data = FactorImages(made, seed=1)
    assert data.input_shape == (3, 16, 16) and len(data) == int((~made.test).sum())
    whole = data.batches(64, lambda n: 8)
    parts = [data.batches(64, lambda n: 8, rank, 2) for rank in range(2)]
    batch = next(whole)
    assert torch.equal(batch, torch.cat([next(part) for part in parts]))
    x = data.to_input(batch, Draws(0, 64, Rows.all(8)), 0, 1.0)
    torch.testing.assert_close(x, batch.permute(0, 3, 1, 2) / 255)
    assert data.fixed(3).shape == (3, 3, 16, 16) and torch.equal(data.fixed(3), data.fixed(3))
    torch.testing.assert_close(data.fixed(3), data.first(3).permute(0, 3, 1, 2) / 255)
