"""What lies at a path: a well-known image set as it is published, with its own splits, or any pictures.

CIFAR-10 and CIFAR-100 (python tar.gz, or unpacked), SVHN (.mat), MNIST and its kin (idx, gzipped or not),
CelebA (img_align_celeba.zip beside its lists), TFRecord files of StyleGAN and ALAE.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sivae_fast.data.archive import Folder, Zip, is_zip
from sivae_fast.data.sources import Files, Source, Tar, part
from sivae_fast.data.tfrecord import RecordFile, is_record_file, level_of

#: CelebA as published: the images, the list of splits, the list of attributes.
CELEBA = ("img_align_celeba.zip", "list_eval_partition.txt", "list_attr_celeba.txt")


def open_source(path: Path, split: str | None, hold_out: int | None, resolution: int | None) -> Source:
    """The pictures at `path`; ValueError where there are none, or `split` or `resolution` do not fit."""
    files = _open_files(path)
    source = find_published(files, split, resolution) if hold_out is None else None
    if source is None and (split is None) != (hold_out is None):
        raise ValueError(
            f"{path} has no splits of its own: give --split train or --split test together with "
            f"--hold-out N, which makes the last N pictures the test split"
        )
    if source is None:
        source = Files(files) if split is None else part(files, split, hold_out)
    if not source.names:
        raise ValueError(f"no pictures in {path} ({len(source.others)} other files)")
    if resolution is None and source.size is None:
        raise ValueError(f"--resolution is needed: the pictures of {path} may have any size")
    return source


def _open_files(path: Path) -> Folder | Zip | Tar:
    if not path.exists():
        raise ValueError(f"there is no source at {path}: a folder, zip or tar of pictures is needed")
    if path.is_dir():
        return Folder(path)
    if path.suffix == ".mat" or is_record_file(path.name):
        return Folder(path.parent, [path.name])
    if path.name == CELEBA[0] and (path.parent / CELEBA[1]).exists():
        return Folder(path.parent, [name for name in CELEBA if (path.parent / name).exists()])
    if is_zip(path):
        return Zip(path)
    if tarfile.is_tarfile(path):
        return Tar(path)
    raise ValueError(f"{path} is neither a folder nor a whole zip or tar file")


class Pixels(Source):
    """Images that are arrays already: uint8 [N, H, W] or [N, H, W, 3], with class numbers."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, split: str):
        if len(pixels) != len(labels):
            raise ValueError(f"{len(pixels)} images but {len(labels)} labels in the {split} split")
        self._pixels = pixels
        self.split = split
        self.names = [f"{split}/{i:06d}" for i in range(len(pixels))]
        self.others = []
        self.labels = dict(zip(self.names, labels.astype(int).tolist(), strict=True))
        self.size, self.grey = pixels.shape[1], pixels.ndim == 3
        self.key = hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()

    def items(self, skip: set[int]) -> Iterator[tuple[int, np.ndarray]]:
        yield from ((i, self._pixels[i]) for i in range(len(self.names)) if i not in skip)


def find_published(files: Folder | Zip | Tar, split: str | None, resolution: int | None) -> Source | None:
    """The published set that these files are, None where they are none of them.

    `split` None is the training split. Raises ValueError naming a damaged file, or the splits there are.
    """
    by_name = {Path(name).name.removesuffix(".gz"): name for name in sorted(files.names)}
    if "data_batch_1" in by_name:
        batches = [f"data_batch_{i}" for i in range(1, 6)]
        return _cifar(files, by_name, {"train": batches, "test": ["test_batch"]}, "labels", split)
    if {"train", "test", "meta"} <= by_name.keys():
        return _cifar(files, by_name, {"train": ["train"], "test": ["test"]}, "fine_labels", split)
    if any(f"{s}_32x32.mat" in by_name for s in ("train", "test", "extra")):
        return _svhn(files, by_name, split)
    if "train-images-idx3-ubyte" in by_name or "t10k-images-idx3-ubyte" in by_name:
        return _mnist(files, by_name, split)
    if CELEBA[1] in by_name:
        return _celeba(files, by_name, split)
    if any(is_record_file(name) for name in files.names):
        return Records(files, split, resolution)
    return None


def chosen(split: str | None, available: list[str], what: str) -> str:
    """The split that is meant: the first one unless named. Raises ValueError where there is no such split."""
    if split is not None and split not in available:
        raise ValueError(f"{what} has the splits {', '.join(available)}; there is no split {split!r}")
    return split or available[0]


def _cifar(
    files, by_name: dict[str, str], splits: dict[str, list[str]], label: str, split: str | None
) -> Pixels:
    split = chosen(split, list(splits), "CIFAR")
    missing = [name for name in splits[split] if name not in by_name]
    if missing:
        raise ValueError(f"{files.path} lacks {', '.join(missing)} of the {split} split")
    parts = [_cifar_part(files.read(by_name[name]), name, label) for name in splits[split]]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Pixels(pixels, labels, split)


def _cifar_part(data: bytes, name: str, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [n, 32, 32, 3] and classes [n] of one pickled file."""
    try:
        content = _unpickle(data)
        for key in ("data", label):
            if key.encode() not in content:
                raise ValueError(f"it lacks {key}")
        pixels = np.asarray(content[b"data"])
        if pixels.dtype != np.uint8:
            raise ValueError(f"its pixels are {pixels.dtype}, not uint8")
        classes = np.asarray(content[label.encode()], np.int64)
        return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), classes
    except Exception as error:  # damaged pickles raise anything
        raise ValueError(f"{name} is no readable CIFAR file: {error}") from None


class _ArraysOnly(pickle.Unpickler):
    """Unpickles containers, numbers, text and NumPy arrays; whatever else a file names is refused."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in a file of images")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickle(data: bytes) -> dict:
    content = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    return {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}


def _svhn(files: Folder, by_name: dict[str, str], split: str | None) -> Pixels:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("reading .mat files (SVHN) needs scipy: pip install 'sivae-fast[eval]'") from error
    available = [s for s in ("train", "test", "extra") if f"{s}_32x32.mat" in by_name]
    split = chosen(split, available, f"SVHN in {files.path}")
    name = f"{split}_32x32.mat"
    try:
        content = loadmat(io.BytesIO(files.read(by_name[name])))
        pixels, labels = content["X"].transpose(3, 0, 1, 2), content["y"].reshape(-1)
    except Exception as error:  # damaged .mat files raise anything
        raise ValueError(f"{name} is no readable SVHN file: {error}") from None
    return Pixels(pixels, labels % 10, split)  # the digit 0 is stored as 10


def _mnist(files: Folder | Zip | Tar, by_name: dict[str, str], split: str | None) -> Pixels:
    prefixes = {"train": "train", "test": "t10k"}
    available = [s for s, prefix in prefixes.items() if f"{prefix}-images-idx3-ubyte" in by_name]
    split = chosen(split, available, f"MNIST in {files.path}")
    arrays = []
    for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
        name = f"{prefixes[split]}-{kind}-ubyte"
        if name not in by_name:
            raise ValueError(f"{files.path} lacks {name}")
        arrays.append(_idx(files.read(by_name[name]), name, dimensions))
    return Pixels(*arrays, split)


def _idx(data: bytes, name: str, dimensions: int) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, type 8, number of dimensions, sizes, content."""
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        if data[:3] != b"\0\0\x08":
            raise ValueError("it does not begin like an IDX file of bytes")
        shape = struct.unpack_from(f">{data[3]}I", data, 4)
        if len(shape) != dimensions:
            raise ValueError(f"its array has the shape {list(shape)}, not {dimensions} dimensions")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"{name} is no readable IDX file: {error}") from None


def _celeba(files: Folder | Zip | Tar, by_name: dict[str, str], split: str | None) -> Files:
    """The aligned images, in a zip beside the lists or unpacked; labels are the 40 attributes as 0 or 1."""
    split = chosen(split, ["train", "valid", "test"], "CelebA")
    if CELEBA[0] in by_name and not isinstance(files, Folder):
        raise ValueError(f"{files.path}: unpack it first, {CELEBA[0]} lies inside")
    number = str(["train", "valid", "test"].index(split))
    members = {row[0] for row in _rows(files, by_name[CELEBA[1]]) if row[1:] == [number]}
    attributes = {}
    if CELEBA[2] in by_name:
        rows = _rows(files, by_name[CELEBA[2]])  # their number, their names, and one for each image
        for name, *values in rows[2:]:
            if len(values) != len(rows[1]) or not set(values) <= {"1", "-1"}:
                raise ValueError(
                    f"{CELEBA[2]} of {files.path}: {name} has not {len(rows[1])} attributes of 1 or -1"
                )
            attributes[name] = [int(value == "1") for value in values]
    pictures = Zip(files.path / by_name[CELEBA[0]]) if CELEBA[0] in by_name else files
    source = Files(pictures, keep=lambda name: Path(name).name in members)
    if len(source.names) < len(members):
        raise ValueError(
            f"{pictures.path} holds {len(source.names)} of the {len(members)} images of the {split} split"
        )
    source.split, source.others = split, []
    source.labels = {n: attributes[Path(n).name] for n in source.names if Path(n).name in attributes}
    return source


def _rows(files: Folder | Zip | Tar, name: str) -> list[list[str]]:
    """The words of every line of a text file that has any."""
    try:
        lines = files.read(name).decode().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} of {files.path} is no text file: {error}") from None
    return [line.split() for line in lines if line.strip()]


class Records(Source):
    """The images of TFRecord files: of the level that has `resolution`, else of the largest there is."""

    def __init__(self, files: Folder, split: str | None, resolution: int | None):
        if split is not None:
            raise ValueError(f"TFRecord files have no splits; name the folder of the {split} files")
        if not isinstance(files, Folder):
            raise ValueError(f"{files.path}: unpack the TFRecord files first")
        names = [name for name in files.names if is_record_file(name)]
        levels = {level_of(name) or 0 for name in names}
        wanted = (resolution or 0).bit_length() - 1
        level = wanted if wanted in levels else max(levels)
        names = [name for name in names if (level_of(name) or 0) == level]
        opened = {name: RecordFile(files.path / name) for name in names}
        self._records = [(file, i) for file in opened.values() for i in range(len(file))]
        self.names = [f"{name}/{i:06d}" for name, file in opened.items() for i in range(len(file))]
        self.others, self.labels = [], {}
        if not self._records:
            raise ValueError(f"the TFRecord files of {files.path} hold no records")
        try:
            first = opened[names[0]].read(0)
        except OSError as error:
            raise ValueError(f"{names[0]} of {files.path}: {error}") from None
        self.size, self.grey = first.shape[0], all(map(_is_grey, self._records))
        self.key = hashlib.sha256("".join(f"{n}:{files.size(n)}\n" for n in names).encode()).hexdigest()
        self.changed = files.changed(names)

    def items(self, skip: set[int]) -> Iterator[tuple[int, np.ndarray | OSError]]:
        for index, (file, record) in enumerate(self._records):
            if index not in skip:
                try:
                    yield index, file.read(record)
                except OSError as error:
                    yield index, error


def _is_grey(record: tuple[RecordFile, int]) -> bool:
    """Whether a record holds no colour; a damaged one holds none."""
    file, index = record
    try:
        return file.read(index).ndim == 2
    except OSError:
        return True
