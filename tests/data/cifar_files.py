"""CIFAR archives of a few images, byte for byte of the published format."""

import io
import pickle
import struct
import tarfile

import numpy as np


def colours(count, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def text2(value: bytes) -> bytes:
    """A Python 2 string in pickle protocol 2."""
    return (
        b"U" + bytes([len(value)]) + value
        if len(value) < 256
        else b"T" + struct.pack("<i", len(value)) + value
    )


def python2_pickle(pixels: np.ndarray, label: bytes, labels: list[int]) -> bytes:
    """A CIFAR batch as Python 2 pickled it: {'batch_label', LABEL, 'data', 'filenames'}, protocol 2."""
    rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text2(b"b") + b"\x87R"
        b"(K\x01J" + struct.pack("<i", rows.shape[0]) + b"J" + struct.pack("<i", rows.shape[1]) + b"\x86"
        b"cnumpy\ndtype\n" + text2(b"u1") + b"K\x00K\x01\x87R(K\x03" + text2(b"|") + b"NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + text2(rows.tobytes()) + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"
    pairs = text2(b"batch_label") + text2(b"one of five") + text2(label) + numbers + text2(b"data") + array
    return b"\x80\x02}(" + pairs + b"u."


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def cifar10(seed=0):
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    pixels = {name: colours(3, seed=seed + i) for i, name in enumerate(names)}
    files = {
        f"cifar-10-batches-py/{name}": python2_pickle(pixels[name], b"labels", [i, 9, 0])
        for i, name in enumerate(names)
    }
    return pixels, files | {
        "cifar-10-batches-py/batches.meta": pickle.dumps({}),
        "cifar-10-batches-py/readme.html": b"",
    }
