"""Published image sets, read from small files of exactly the published formats."""

import gzip
import pickle
import struct

import numpy as np
import pytest
from cifar_files import cifar10, colours, python2_pickle, write_tar
from image_files import encoded, picture, write_folder, write_zip

from sivae_fast.data import dali
from sivae_fast.data import prepare as prepare_module
from sivae_fast.data.archive import ImageSet
from sivae_fast.data.prepare import prepare
from sivae_fast.data.tfrecord import RecordFile, masked_crc32c

QUIET = {"progress": False, "workers": 1}


def stored(path):
    images = ImageSet(path, any_size=True)
    return images, np.stack([images.decode(i) for i in range(len(images))])


# --- CIFAR ------------------------------------------------------------------------------------------------


def test_cifar10_as_published(tmp_path):
    pixels, files = cifar10()
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    manifest = prepare(path, tmp_path / "train.zip", **QUIET)
    images, found = stored(tmp_path / "train.zip")
    assert np.array_equal(found, np.concatenate([pixels[f"data_batch_{i}"] for i in range(1, 6)]))
    assert images.labels.tolist() == [n for i in range(5) for n in (i, 9, 0)]
    assert (manifest.split, manifest.skipped, manifest.source) == ("train", [], "cifar-10-python.tar.gz")
    assert prepare(path, tmp_path / "test.zip", split="test", **QUIET).images == 3
    assert np.array_equal(stored(tmp_path / "test.zip")[1], pixels["test_batch"])


def test_cifar10_unpacked_and_resized(tmp_path):
    path = write_folder(tmp_path, cifar10()[1])
    assert prepare(path, tmp_path.with_name("c.zip"), resolution=16, split="test", **QUIET).images == 3
    assert ImageSet(tmp_path.with_name("c.zip")).resolution == 16


def test_cifar100_as_published(tmp_path):
    files = {
        f"cifar-100-python/{name}": python2_pickle(colours(4, seed=i), b"fine_labels", [7, 99, 0, i])
        for i, name in enumerate(("train", "test", "meta"))
    }
    path = write_tar(tmp_path / "cifar-100-python.tar.gz", files)
    prepare(path, tmp_path / "test.zip", split="test", **QUIET)
    images, found = stored(tmp_path / "test.zip")
    assert np.array_equal(found, colours(4, seed=1))
    assert images.labels.tolist() == [7, 99, 0, 1]


class Malicious:
    def __reduce__(self):
        return eval, ("1 + 1",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({b"data": Malicious()}, 2), "data_batch_3 is no readable CIFAR file: it names .*eval"),
        (b"\x80\x02}(garbage", "data_batch_3 is no readable CIFAR file"),
        (None, "lacks data_batch_3 of the train split"),
        (pickle.dumps({b"x": 1}, 2), "data_batch_3 is no readable CIFAR file: it lacks data"),
        (
            pickle.dumps({b"data": np.zeros((2, 9), np.uint8), b"labels": [0, 1]}, 2),
            "data_batch_3 is no readable CIFAR file: cannot reshape",
        ),
        (
            pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}, 2),
            "data_batch_3 is no readable CIFAR file: its pixels are float64, not uint8",
        ),
    ],
)
def test_damaged_cifar(tmp_path, content, message):
    files = cifar10()[1]
    name = "cifar-10-batches-py/data_batch_3"
    files = {k: v for k, v in files.items() if k != name} | ({name: content} if content else {})
    with pytest.raises(ValueError, match=message):
        prepare(write_tar(tmp_path / "c.tar.gz", files), tmp_path / "out.zip", **QUIET)


# --- SVHN -------------------------------------------------------------------------------------------------


def test_svhn_as_published(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    (tmp_path / "svhn").mkdir()
    for seed, name in enumerate(("train", "test")):
        content = {
            "X": colours(4, seed=seed).transpose(1, 2, 3, 0),
            "y": np.array([[1], [10], [9], [5]], np.uint8),
        }
        scipy_io.savemat(tmp_path / "svhn" / f"{name}_32x32.mat", content, do_compression=True)
    for source, split in ((tmp_path / "svhn", "test"), (tmp_path / "svhn" / "test_32x32.mat", None)):
        manifest = prepare(source, tmp_path / f"{split}.zip", split=split, **QUIET)
        images, found = stored(tmp_path / f"{split}.zip")
        assert manifest.split == "test"
        assert np.array_equal(found, colours(4, seed=1))
        assert images.labels.tolist() == [1, 0, 9, 5]
    with pytest.raises(ValueError, match="has the splits train, test; there is no split 'extra'"):
        prepare(tmp_path / "svhn", tmp_path / "extra.zip", split="extra", **QUIET)
    (tmp_path / "svhn" / "train_32x32.mat").write_bytes(b"no matrix")
    with pytest.raises(ValueError, match=r"train_32x32\.mat is no readable SVHN file"):
        prepare(tmp_path / "svhn", tmp_path / "out.zip", **QUIET)


# --- MNIST ------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist(pack=gzip.compress, suffix=".gz"):
    grey = colours(7, 28)[..., 0]
    labels = np.arange(7, dtype=np.uint8)
    files = {
        "train-images-idx3-ubyte": grey[:5],
        "train-labels-idx1-ubyte": labels[:5],
        "t10k-images-idx3-ubyte": grey[5:],
        "t10k-labels-idx1-ubyte": labels[5:],
    }
    return grey, {name + suffix: pack(idx(array)) for name, array in files.items()}


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, ".gz"), (bytes, "")])
def test_mnist_as_published(tmp_path, pack, suffix):
    grey, files = mnist(pack, suffix)
    source = write_folder(tmp_path / "mnist", files)
    manifest = prepare(source, tmp_path / "train.zip", **QUIET)
    images, found = stored(tmp_path / "train.zip")
    assert (images.resolution, images.channels, manifest.channels) == (28, 1, 1)
    assert np.array_equal(found[..., 0], grey[:5])
    assert images.labels.tolist() == [0, 1, 2, 3, 4]
    prepare(source, tmp_path / "test.zip", split="test", resolution=32, grey=False, **QUIET)
    images, _ = stored(tmp_path / "test.zip")
    assert (images.resolution, images.channels, images.labels.tolist()) == (32, 3, [5, 6])


@pytest.mark.parametrize(("resolution", "workers"), [(None, 1), (64, 1), (128, 2)])
def test_small_images_are_not_handed_to_other_processes(tmp_path, monkeypatch, resolution, workers):
    used = []

    def ordered(function, calls, count, workers):
        used.append(workers)
        return original(function, calls, count, 1)

    original = prepare_module.ordered
    monkeypatch.setattr(prepare_module, "ordered", ordered)
    source = write_folder(tmp_path / "mnist", mnist()[1])
    prepare(source, tmp_path / "out.zip", resolution=resolution, **QUIET | {"workers": 2})
    assert used == [workers]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte.gz", b"\x1f\x8bxx", "train-images-idx3-ubyte is no readable IDX file"),
        ("train-images-idx3-ubyte.gz", b"\0\0\x0d\3abcd", "it does not begin like an IDX file of bytes"),
        (
            "train-images-idx3-ubyte.gz",
            mnist(bytes)[1]["train-images-idx3-ubyte.gz"][:-9],
            "no readable IDX file",
        ),
        ("train-labels-idx1-ubyte.gz", None, "lacks train-labels-idx1-ubyte"),
        (
            "train-images-idx3-ubyte.gz",
            b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 20,  # a block of a type that does not exist
            "train-images-idx3-ubyte is no readable IDX file: Error -3",
        ),
        (
            "train-images-idx3-ubyte.gz",
            idx(np.zeros(5, np.uint8)),
            r"train-images-idx3-ubyte .*its array has the shape \[5\], not 3 dimensions",
        ),
        (
            "train-labels-idx1-ubyte.gz",
            idx(np.zeros((5, 28, 28), np.uint8)),
            r"train-labels-idx1-ubyte .*its array has the shape \[5, 28, 28\], not 1 dim",
        ),
        (
            "train-labels-idx1-ubyte.gz",
            idx(np.zeros(3, np.uint8)),
            "5 images but 3 labels in the train split",
        ),
    ],
)
def test_damaged_mnist(tmp_path, name, content, message):
    files = mnist()[1]
    files = {k: v for k, v in files.items() if k != name} | ({name: content} if content else {})
    with pytest.raises(ValueError, match=message):
        prepare(write_folder(tmp_path / "mnist", files), tmp_path / "out.zip", **QUIET)


# --- CelebA and folders with a held-out part -------------------------------------------------------------


def celeba(tmp_path):
    names = [f"{i:06d}.jpg" for i in range(1, 9)]
    files = {f"img_align_celeba/{n}": encoded(picture(i, 18, 22), "jpeg") for i, n in enumerate(names)}
    root = tmp_path / "celeba"
    root.mkdir()
    write_zip(root / "img_align_celeba.zip", files)
    splits = [0, 0, 0, 0, 0, 1, 2, 2]
    (root / "list_eval_partition.txt").write_text(
        "".join(f"{n} {s}\n" for n, s in zip(names, splits, strict=True))
    )
    rows = "".join(f"{n}  {1 if i % 2 else -1} -1  1\n" for i, n in enumerate(names))
    (root / "list_attr_celeba.txt").write_text(f"8\nSmiling Bald Young\n{rows}")
    return root, files


def test_celeba_as_published(tmp_path):
    root, files = celeba(tmp_path)
    recipe = {"resolution": 16, "fit": "stretch", "filter": "bicubic"}
    counts = {
        s: prepare(root, tmp_path / f"{s}.zip", split=s, **recipe, **QUIET).images
        for s in ("train", "valid", "test")
    }
    assert counts == {"train": 5, "valid": 1, "test": 2}
    images = ImageSet(tmp_path / "train.zip")
    assert images.labels.tolist() == [[0, 0, 1], [1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1]]
    named = prepare(root / "img_align_celeba.zip", tmp_path / "named.zip", split="test", **recipe, **QUIET)
    assert (named.images, named.skipped) == (2, [])
    unpacked = write_folder(tmp_path / "unpacked", files)
    for name in ("list_eval_partition.txt", "list_attr_celeba.txt"):
        (unpacked / name).write_bytes((root / name).read_bytes())
    again = prepare(unpacked, tmp_path / "unpacked.zip", split="test", **recipe, **QUIET)
    assert again.checksum == named.checksum


def test_an_incomplete_celeba_is_refused(tmp_path):
    root, files = celeba(tmp_path)
    write_zip(root / "img_align_celeba.zip", dict(list(files.items())[1:]))
    with pytest.raises(ValueError, match="holds 4 of the 5 images of the train split"):
        prepare(root, tmp_path / "out.zip", resolution=16, **QUIET)


def test_the_lists_of_celeba(tmp_path):
    root, _ = celeba(tmp_path)
    attributes = root / "list_attr_celeba.txt"
    whole = attributes.read_text()
    attributes.write_text(whole + "\n")
    assert prepare(root, tmp_path / "out.zip", resolution=16, **QUIET).images == 5
    attributes.write_text(whole.replace("-1  1\n", "-1  1 1\n", 1))
    with pytest.raises(
        ValueError, match=r"list_attr_celeba\.txt .* 000001\.jpg has not 3 attributes of 1 or"
    ):
        prepare(root, tmp_path / "out.zip", resolution=16, **QUIET)
    attributes.unlink()
    with pytest.raises(ValueError, match="was not made from this source"):  # it has labels, this has none
        prepare(root, tmp_path / "out.zip", resolution=16, **QUIET)
    packed = {file.name: file.read_bytes() for file in root.iterdir()}
    with pytest.raises(ValueError, match=r"all\.zip: unpack it first, img_align_celeba\.zip lies inside"):
        prepare(write_zip(tmp_path / "all.zip", packed), tmp_path / "new.zip", resolution=16, **QUIET)
    (root / "list_eval_partition.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"list_eval_partition\.txt of .* is no text file"):
        prepare(root, tmp_path / "new.zip", resolution=16, **QUIET)


def test_a_folder_with_a_held_out_part(tmp_path):
    """FFHQ keeps its last 10,000 and CelebA-HQ its last 1,000 pictures for testing."""
    files = {f"{i // 3:05d}/{i:05d}.png": encoded(picture(i)) for i in range(10)}
    source = write_folder(tmp_path / "ffhq", files)
    train = prepare(source, tmp_path / "train.zip", resolution=16, split="train", hold_out=3, **QUIET)
    test = prepare(source, tmp_path / "test.zip", resolution=16, split="test", hold_out=3, **QUIET)
    assert (train.images, train.split, test.images, test.split) == (7, "train", 3, "test")
    assert np.array_equal(stored(tmp_path / "test.zip")[1][0], np.asarray(picture(7)))


def test_splits_of_a_plain_folder_need_a_number(tmp_path):
    source = write_folder(tmp_path / "in", {f"{i}.png": encoded(picture(i)) for i in range(4)})
    for options, message in (
        (
            {"split": "test"},
            "has no splits of its own: give --split train or --split test together with --hold-out N",
        ),
        ({"hold_out": 2}, "has no splits of its own"),
        ({"split": "valid", "hold_out": 2}, "--split must be train or test, got 'valid'"),
        ({"split": "test", "hold_out": 4}, "--hold-out must lie between 0 and the 4 pictures of .*, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(source, tmp_path / "out.zip", resolution=16, **options, **QUIET)
    with pytest.raises(ValueError, match=r"resolution is needed: the pictures of .* may have any size"):
        prepare(source, tmp_path / "out.zip", **QUIET)


# --- TFRecords --------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    head = b""
    while value > 127:
        head, value = head + bytes([value & 127 | 128]), value >> 7
    return head + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(pixels: np.ndarray, packed: bool = True) -> bytes:
    """A serialised tf.train.Example with `shape` and `data`, channels first."""
    planes = pixels.transpose(2, 0, 1)
    if packed:
        numbers = field(1, b"".join(varint(n) for n in planes.shape))
    else:
        numbers = b"".join(b"\x08" + varint(n) for n in planes.shape)
    features = {b"shape": field(3, numbers), b"data": field(1, field(1, planes.tobytes()))}
    return field(
        1, b"".join(field(1, field(1, name) + field(2, feature)) for name, feature in features.items())
    )


def record(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, payload)]
    return length + checksums[0] + payload + checksums[1]


def test_the_checksum_of_the_format():
    """CRC-32C of 32 zero bytes is 0x8A9136AA (RFC 3720, B.4); the mask is undone here."""
    rotated = (masked_crc32c(bytes(32)) - 0xA282EAD8) & 0xFFFFFFFF
    assert (rotated >> 17 | rotated << 15) & 0xFFFFFFFF == 0x8A9136AA


@pytest.mark.parametrize("packed", [True, False])
def test_tfrecords_as_published(tmp_path, packed):
    root = tmp_path / "records"
    root.mkdir()
    for level in (3, 4):
        pixels = colours(6, 2**level)
        for shard in range(2):
            records = b"".join(record(example(p, packed)) for p in pixels[3 * shard : 3 * shard + 3])
            (root / f"ffhq-r{level:02d}.tfrecords.{shard:03d}").write_bytes(records)
    prepare(root, tmp_path / "large.zip", **QUIET)
    assert np.array_equal(stored(tmp_path / "large.zip")[1], colours(6, 16))
    prepare(root, tmp_path / "small.zip", resolution=8, **QUIET)
    assert np.array_equal(stored(tmp_path / "small.zip")[1], colours(6, 8))
    one = prepare(root / "ffhq-r04.tfrecords.001", tmp_path / "one.zip", **QUIET)
    assert one.images == 3
    assert np.array_equal(stored(tmp_path / "one.zip")[1], colours(6, 16)[3:])


@pytest.mark.skipif(dali.trouble() is not None, reason="no DALI")
def test_tfrecords_are_what_dali_reads(tmp_path):
    """DALI's reader as an independent judge of the files these tests make."""
    from nvidia.dali import Pipeline, fn
    from nvidia.dali import tfrecord as tfrec

    records = [record(example(p)) for p in colours(3, 8)]
    path, index = tmp_path / "a-r03.tfrecords", tmp_path / "a.idx"
    path.write_bytes(b"".join(records))
    starts = np.cumsum([0] + [len(r) for r in records])
    index.write_text("".join(f"{s} {len(r)}\n" for s, r in zip(starts[:-1], records, strict=True)))
    pipeline = Pipeline(3, 1, None)
    with pipeline:
        features = {
            "data": tfrec.FixedLenFeature((), tfrec.string, ""),
            "shape": tfrec.FixedLenFeature([3], tfrec.int64, 0),
        }
        read = fn.readers.tfrecord(path=str(path), index_path=str(index), features=features)
        pipeline.set_outputs(read["data"], read["shape"])
    pipeline.build()
    data, shapes = pipeline.run()
    ours = RecordFile(path)
    for i in range(3):
        theirs = np.array(data.at(i)).reshape(np.array(shapes.at(i))).transpose(1, 2, 0)
        assert np.array_equal(ours.read(i), theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-5], "is cut off in record 1"),
        (lambda data: data + b"abc", "is cut off in record 2"),
        (lambda data: b"x" + data[1:], "is no TFRecord file, or damaged at record 0"),
        (lambda data: b"", "hold no records"),
        (lambda data: record(b"\x0b\x0c"), r"\.tfrecords of .*: record 0 holds no image"),
        (lambda data: record(b"\x08\x01"), r"\.tfrecords of .*: record 0 holds no image"),
    ],
)
def test_damaged_tfrecords(tmp_path, change, message):
    data = b"".join(record(example(p)) for p in colours(2, 8))
    (tmp_path / "x-r03.tfrecords").write_bytes(change(data))
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "x-r03.tfrecords", tmp_path / "out.zip", **QUIET)


def test_one_colour_record_makes_a_set_of_colour(tmp_path):
    """The damaged record before it decides nothing."""
    grey = [record(example(p[..., :1])) for p in colours(3, 8)]
    colour = [record(b"\x0a\x02\x0b\x0c"), record(example(colours(1, 8)[0]))]
    path = tmp_path / "x-r03.tfrecords"
    path.write_bytes(b"".join(grey + colour))
    assert prepare(path, tmp_path / "mixed.zip", allow_bad=0.2, **QUIET).channels == 3
    assert np.array_equal(stored(tmp_path / "mixed.zip")[1][3], colours(1, 8)[0])
    path.write_bytes(b"".join(grey + colour[:1]))
    assert prepare(path, tmp_path / "grey.zip", allow_bad=0.3, **QUIET).channels == 1


def test_a_damaged_record_is_skipped_by_name(tmp_path):
    good = [record(example(p)) for p in colours(4, 8)]
    (tmp_path / "x-r03.tfrecords").write_bytes(b"".join([*good, record(b"\x0a\x02\x0b\x0c")]))
    manifest = prepare(tmp_path / "x-r03.tfrecords", tmp_path / "out.zip", allow_bad=0.2, **QUIET)
    assert manifest.images == 4
    assert [name for name, _ in manifest.skipped] == ["x-r03.tfrecords/000004"]
