"""Readers of point cloud sets and the training data made of them."""

import math
import struct
import sys

import numpy as np
import pytest
import torch

from sivae_fast.data import ply, pointclouds
from sivae_fast.data.ply import read_ply
from sivae_fast.data.pointclouds import Clouds, PointClouds, load_clouds, turned
from sivae_fast.draws import Draws, Rows

HEADER = """ply
format {0} 1.0
comment made here
element vertex {1}
property uchar red
property {2} x
property {2} y
property {2} z
element face 1
property list uchar int vertex_indices
end_header
"""


def write_ply(path, points, form="binary_little_endian"):
    text = HEADER.format(form, len(points), "double" if form == "binary_big_endian" else "float")
    if form == "ascii":
        body = "".join(f"7 {x!r} {y!r} {z!r}\n" for x, y, z in points.tolist()).encode() + b"3 0 1 2\n"
    else:
        code = "<Bfff" if "little" in form else ">Bddd"
        body = b"".join(struct.pack(code, 7, *p) for p in points.tolist()) + struct.pack("<Biii", 3, 0, 1, 2)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode() + body)


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_ply(tmp_path, form):
    points = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    write_ply(tmp_path / "a.ply", points, form)
    np.testing.assert_array_equal(read_ply(tmp_path / "a.ply"), points)


def test_a_written_ply_is_read_again(tmp_path):
    points = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    ply.write_ply(tmp_path / "a.ply", points)
    np.testing.assert_array_equal(read_ply(tmp_path / "a.ply"), points)
    head, _, body = (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")
    assert head.split(b"\n")[:3] == [b"ply", b"format binary_little_endian 1.0", b"element vertex 20"]
    assert body == points.astype("<f4").tobytes()
    ply.write_ply(tmp_path / "b.ply", points.astype(np.float64)[:, ::-1])
    np.testing.assert_array_equal(read_ply(tmp_path / "b.ply"), points[:, ::-1])
    with pytest.raises(ValueError, match=r"c\.ply: points have shape \[20, 2\], accepted is \[n, 3\]"):
        ply.write_ply(tmp_path / "c.ply", points[:, :2])
    assert not (tmp_path / "c.ply").exists()


def test_bad_ply(tmp_path):
    file = tmp_path / "a.ply"
    file.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"a\.ply: not a \.ply"):
        read_ply(file)
    write_ply(file, np.zeros((9, 3), np.float32))
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"a\.ply: holds 5 vertices, the header promises 9: copy it again"):
        read_ply(file)
    file.write_bytes(b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n1\n")
    with pytest.raises(ValueError, match="lacks"):
        read_ply(file)


def test_a_ply_whose_header_has_the_line_ends_of_windows(tmp_path):
    file, points = tmp_path / "a.ply", np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    ply.write_ply(file, points)
    head, mark, body = file.read_bytes().partition(b"end_header\n")
    file.write_bytes((head + mark).replace(b"\n", b"\r\n") + body)
    np.testing.assert_array_equal(read_ply(file), points)


def test_a_ply_that_does_not_begin_with_its_vertices_is_refused(tmp_path):
    file = tmp_path / "a.ply"
    ply.write_ply(file, np.ones((5, 3), np.float32))
    before = b"element camera 1\nproperty float focus\nelement vertex"
    file.write_bytes(file.read_bytes().replace(b"element vertex", before))
    with pytest.raises(ValueError, match=r"a\.ply: first element is camera: accepted is vertex"):
        read_ply(file)


def test_a_truncated_ascii_ply_is_not_a_shorter_cloud(tmp_path):
    file = tmp_path / "a.ply"
    write_ply(file, np.ones((300, 3), np.float32), "ascii")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[: HEADER.count("\n") + 256]))
    with pytest.raises(ValueError, match=r"a\.ply: holds 256 vertices, the header promises 300: copy it"):
        read_ply(file)


@pytest.mark.parametrize(
    ("text", "by", "message"),
    [
        (b"7 1.0 1.0 1.0\n", b"7 1.0 1.0\n", "vertex 0 has 3 numbers, the header promises 4"),
        (b"7 1.0 1.0 1.0\n", b"7 1.0 one 1.0\n", "could not convert string to float: 'one'"),
        (b"format ascii 1.0", b"format", "the header's line 'format' is not complete"),
        (b"element vertex 5", b"element vertex", "the header's line 'element vertex' is not complete"),
        (b"element vertex 5", b"element vertex -5", "element vertex -5: accepted is a whole number"),
    ],
)
def test_a_bad_ascii_ply_is_told_in_words(tmp_path, text, by, message):
    file = tmp_path / "a.ply"
    write_ply(file, np.ones((5, 3), np.float32), "ascii")
    file.write_bytes(file.read_bytes().replace(text, by, 1))
    with pytest.raises(ValueError, match=rf"a\.ply: {message}"):
        read_ply(file)


@pytest.fixture
def shapenet(tmp_path):
    for folder, count in (("03001627", 40), ("02691156", 20), ("my_shapes", 20)):
        for i in range(count):
            write_ply(tmp_path / folder / f"{i:03}.ply", np.full((8, 3), (i + 1) / 100, np.float32))
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_shapenet_layout_and_splits(shapenet):
    train = load_clouds(shapenet, "train", points=8)
    assert train.names == ("airplane", "chair", "my_shapes")
    assert train.points.shape == (17 + 34 + 17, 8, 3) and train.points.dtype == torch.float32
    assert train.labels.bincount().tolist() == [17, 34, 17]
    chairs = [load_clouds(shapenet, split, classes=("chair",), points=8) for split in pointclouds.SPLITS]
    assert [len(c.points) for c in chairs] == [34, 2, 4]
    order = torch.cat([c.points[:, 0, 0] for c in chairs])
    torch.testing.assert_close(order, torch.arange(1, 41) / 100)
    assert load_clouds(shapenet, classes=("03001627",), points=8).names == ("chair",)
    alone = load_clouds(shapenet / "03001627", "validation", points=8)
    assert alone.names == ("chair",) and torch.equal(alone.points, chairs[1].points)
    with pytest.raises(ValueError, match=r"data\.classes=\['sofa'\]"):
        load_clouds(shapenet / "03001627", classes=("sofa",), points=8)


def test_published_chair_split():
    sizes = [len(pointclouds._part(range(6778), split)) for split in pointclouds.SPLITS]
    assert sizes == [5761, 339, 678]


def test_modelnet_layout(tmp_path):
    h5py = pytest.importorskip("h5py")
    for name, count in (("ply_data_train0", 30), ("ply_data_train1", 10), ("ply_data_test0", 6)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["data"] = np.full((count, 16, 3), 0.5, np.float32)
            file["label"] = (np.arange(count) % 2).astype(np.uint8)[:, None]
    (tmp_path / "shape_names.txt").write_text("sofa\nbench\n")
    sizes = [len(load_clouds(tmp_path, split, points=8).points) for split in pointclouds.SPLITS]
    assert sizes == [38, 2, 6]
    benches = load_clouds(tmp_path, "test", classes=("bench",), points=8)
    assert benches.points.shape == (3, 8, 3) and (benches.points == 0.25).all()
    with h5py.File(tmp_path / "ply_data_test1.h5", "w") as file:
        order = np.arange(6 * 16 * 3, dtype=np.float32).reshape(6, 16, 3)
        file["data"], file["label"] = order, np.arange(6) % 2
    benches = load_clouds(tmp_path, "test", classes=("bench", "sofa"), points=8)
    assert benches.labels.tolist() == [0] * 6 + [1] * 6
    assert np.array_equal(benches.points[3:6], order[1::2, :8] / 2)  # the first points of odd clouds
    with pytest.raises(ValueError, match="sofa, bench"):
        load_clouds(tmp_path, classes=("lamp",), points=8)
    with h5py.File(tmp_path / "ply_data_test0.h5", "w") as file:
        file["clouds"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"holds clouds \[3\]: accepted are data \[n, points, 3\] and label"):
        load_clouds(tmp_path, "test", points=8)


def test_array(tmp_path):
    clouds = np.random.default_rng(0).random((20, 5, 3)).astype(np.float64)
    np.save(tmp_path / "mine.npy", clouds)
    train = load_clouds(tmp_path / "mine.npy", points=5)
    assert train.names == ("mine",)
    torch.testing.assert_close(train.points, torch.from_numpy(clouds[:17]).float())
    np.save(tmp_path / "flat.npy", np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"\[4, 3\]: accepted is \[n, points, 3\]"):
        load_clouds(tmp_path / "flat.npy")
    assert load_clouds(tmp_path / "mine.npy", points=5, classes=("mine",)).names == ("mine",)
    with pytest.raises(
        ValueError, match=r"data\.classes=\['chair'\]: .*mine\.npy is an array without classes"
    ):
        load_clouds(tmp_path / "mine.npy", points=5, classes=("chair",))


def test_clouds_out_of_the_ball_are_warned_of_once(tmp_path, caplog):
    clouds = np.zeros((20, 5, 3), np.float32)
    clouds[3, 2] = 0.3, 0.0, 0.4
    np.save(tmp_path / "a.npy", clouds)
    load_clouds(tmp_path / "a.npy", points=5)
    assert not caplog.messages
    np.save(tmp_path / "a.npy", 1000 * clouds)
    load_clouds(tmp_path / "a.npy", points=5)
    (message,) = caplog.messages
    assert "a.npy: points lie up to 500 from the origin, clouds should lie in a ball of radius 0.5" in message


def test_wrong_number_of_points(tmp_path):
    clouds = np.arange(60, dtype=np.float32).reshape(2, 10, 3)
    np.save(tmp_path / "a.npy", clouds)
    with pytest.raises(
        ValueError,
        match=r"a\.npy\[0\] has 10 points, accepted are 6: train with data\.points=10 .*resample=true",
    ):
        load_clouds(tmp_path / "a.npy", points=6)
    for points in (6, 25):
        got = load_clouds(tmp_path / "a.npy", points=points, resample=True).points[0]
        again = load_clouds(tmp_path / "a.npy", points=points, resample=True).points[0]
        assert got.shape == (points, 3) and torch.equal(got, again)
        assert len(got.unique(dim=0)) == min(points, 10)
        assert {tuple(p) for p in got.tolist()} <= {tuple(p) for p in clouds[0].tolist()}


def test_bad_sets(tmp_path):
    clouds = np.zeros((20, 4, 3), np.float32)
    for wrong in (np.nan, np.inf):
        clouds[3, 2, 1] = wrong
        np.save(tmp_path / "a.npy", clouds)
        message = r"a\.npy\[3\]: a coordinate is not finite, accepted are 4 points"
        with pytest.raises(ValueError, match=message):
            load_clouds(tmp_path / "a.npy", points=4)
    with pytest.raises(ValueError, match="class folders"):
        load_clouds(tmp_path)
    with pytest.raises(ValueError, match=r"archive\.tar"):
        load_clouds(tmp_path / "archive.tar")
    with pytest.raises(ValueError, match="split='val'"):
        load_clouds(None, "val")
    with pytest.raises(ValueError, match="made solids are"):
        load_clouds(None, classes=("boat",))


@pytest.mark.parametrize("kind", [complex, str, bool, [("x", "f4")]])
def test_arrays_of_no_numbers(tmp_path, kind):
    np.save(tmp_path / "a.npy", np.zeros((20, 4, 3)).astype(kind))
    with pytest.raises(ValueError, match=r"a\.npy: not a \.npy array of numbers: it holds"):
        load_clouds(tmp_path / "a.npy", points=4)


def test_arrays_in_another_file_or_with_a_damaged_header(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((20, 4, 3)))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"a\.npy: not a \.npy array of numbers: the magic string"):
        load_clouds(tmp_path / "a.npy", points=4)
    np.save(tmp_path / "a.npy", np.zeros((20, 4, 3)))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes().replace(b"}", b" ", 1))
    with pytest.raises(ValueError, match=r"a\.npy: not a \.npy array of numbers"):
        load_clouds(tmp_path / "a.npy", points=4)


def test_no_class_is_read_twice(tmp_path, shapenet):
    for classes in (("chair", "03001627"), ("chair", "chair")):
        with pytest.raises(ValueError, match=r"data\.classes=\['chair', .*: chair is there twice"):
            load_clouds(shapenet, classes=classes, points=6)
    with pytest.raises(ValueError, match=r"chair is there twice, .*in the made set"):
        load_clouds(None, classes=("chair", "chair"), points=6)


def test_upper_case_names_are_no_others(tmp_path):
    for name in ("a.ply", "b.PLY"):
        ply.write_ply(tmp_path / name, np.zeros((4, 3)))
    (tmp_path / "._a.ply").write_bytes(b"hidden, as macOS leaves it")
    assert len(load_clouds(tmp_path, "train", points=4).points) == 1
    assert len(load_clouds(tmp_path, "test", points=4).points) == 1


@pytest.mark.parametrize(
    ("data", "label", "message"),
    [
        ((20, 6, 3), np.zeros(7, int), r"holds data \[20, 6, 3\], label \[7\]: accepted are data \[n"),
        ((20, 6, 3), np.zeros(40, int), r"label \[40\]: accepted"),
        ((20, 6, 3), 3, r"label \[\]: accepted"),
        ((20, 6, 3), None, r"label \[\]: accepted"),
        ((20, 6, 3), np.arange(20) - 1, "label is -1, classes count from 0"),
        ((20, 6, 3), np.array([b"a"] * 20), "data and label have to be numbers"),
        ((0, 6, 3), np.zeros(0, int), "no clouds in its train split"),
        ((20, 6, 3), np.arange(20) % 3, r"shape_names\.txt names 2 classes, .* have 3"),
    ],
)
def test_modelnet_archives_that_do_not_fit(tmp_path, data, label, message):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "shape_names.txt").write_text("chair\nnight stand\n")
    with h5py.File(tmp_path / "train0.h5", "w") as file:
        file["data"] = np.zeros(data)
        if label is None:
            file.create_group("label")
        else:
            file["label"] = label
    with pytest.raises(ValueError, match=message):
        load_clouds(tmp_path, points=6)


def test_modelnet_archives_of_several_sizes(tmp_path):
    h5py = pytest.importorskip("h5py")
    for i, points in enumerate((8, 6)):
        with h5py.File(tmp_path / f"train{i}.h5", "w") as file:
            file["data"], file["label"] = np.full((10, points, 3), i / 10), np.zeros(10, int)
    assert load_clouds(tmp_path, points=6).points.shape == (19, 6, 3)
    with pytest.raises(ValueError, match="cloud 10 has 6 points, accepted are 8"):
        load_clouds(tmp_path, points=8)


def test_damaged_archives(tmp_path):
    pytest.importorskip("h5py")
    (tmp_path / "ply_data_train0.h5").write_bytes(b"no HDF5 at all")
    with pytest.raises(ValueError, match=r"ply_data_train0\.h5: not an HDF5 archive"):
        load_clouds(tmp_path)
    for content in (b"", b"no array"):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npy: not a \.npy array of numbers"):
            load_clouds(tmp_path / "a.npy")


def test_missing_h5py_is_named(tmp_path, monkeypatch):
    (tmp_path / "ply_data_train0.h5").write_bytes(b"HDF")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(
        ImportError, match=r"train0\.h5: reading HDF5 needs h5py: pip install 'sivae-fast\[eval"
    ):
        load_clouds(tmp_path)


def test_made_set():
    test = load_clouds(None, "test", points=32)
    assert test.names == ("chair", "table", "plane") and len(test.points) == 201
    assert test.points.norm(dim=2).max() <= 0.500001


@pytest.fixture
def data():
    clouds = torch.arange(24, dtype=torch.float32)[:, None, None].expand(24, 6, 3).contiguous()
    return PointClouds(Clouds(clouds, torch.zeros(24).long(), ("a",)), seed=3)


def test_training_data_contract(data):
    assert len(data) == 24 and data.input_shape == (6, 3)
    whole = data.batches(16, lambda n: 8, 0, 1)
    parts = [data.batches(16, lambda n: 8, rank, 2) for rank in range(2)]
    for _ in range(5):
        joined = torch.cat([next(part) for part in parts])
        assert torch.equal(next(whole), joined)
    from_start = data.batches(0, lambda n: 8, 0, 1)
    seen = torch.cat([next(from_start) for _ in range(3)])[:, 0, 0]
    assert sorted(seen.tolist()) == list(range(24))
    other = PointClouds(Clouds(data.items, torch.zeros(24).long(), ("a",)), seed=4)
    assert not torch.equal(next(other.batches(0, lambda n: 24))[:, 0, 0], seen)
    assert torch.equal(other.fixed(5), data.fixed(5))
    assert torch.equal(next(data.batches(16, lambda n: 8))[:, 0, 0], seen[16:])
    assert other.checksum() == data.checksum()
    other.items = torch.cat((data.items[:-1], data.items[:1]))
    assert other.checksum() != data.checksum()
    assert torch.equal(data.fixed(5), data.fixed(5)) and data.fixed(99).shape == (24, 6, 3)
    batch = next(data.batches(0, lambda n: 8, 0, 1))
    assert torch.equal(data.to_input(batch, Draws(0, 0, Rows.all(8))), batch)


def test_rotation():
    cloud = torch.tensor([[[1.0, 0, 5], [0, 2, 6]]])
    torch.testing.assert_close(
        turned(cloud, torch.tensor([math.pi / 2])),
        torch.tensor([[[0.0, 1, 5], [-2, 0, 6]]]),
        atol=1e-6,
        rtol=0,
    )
    clouds = Clouds(torch.rand(8, 4, 3), torch.zeros(8).long(), ("a",))
    data = PointClouds(clouds, rotate=True)
    got = data.to_input(clouds.points, Draws(0, 0, Rows.all(8)))
    torch.testing.assert_close(got.norm(dim=2), clouds.points.norm(dim=2))
    before, after = (torch.atan2(cloud[:, :, 1], cloud[:, :, 0]) for cloud in (clouds.points, got))
    angle = (after - before).remainder(2 * math.pi)
    assert (angle <= math.pi + 1e-5).all() and angle.std() > 0.1
