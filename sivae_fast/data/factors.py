"""Images whose class and content are known: the made pictures, Cars3D, KTH, SmallNorb and 3D Shapes."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sivae_fast.data import pixels
from sivae_fast.data.archive import reason
from sivae_fast.data.h5 import contents, open_h5, shape_in
from sivae_fast.data.held import Held
from sivae_fast.data.made_images import made_images
from sivae_fast.draws import Draws

HELD_OUT = 10  # one class in ten, or one image in ten where classes are few, is kept for testing


class Factors(NamedTuple):
    """Images with their factors. Training never looks at the factors; measuring does."""

    images: Tensor  # [n, R, R, C] uint8
    classes: Tensor  # [n] int64
    contents: Tensor  # [n] int64; -1 where a set does not tell
    test: Tensor  # [n] bool: not for training

    def find(self, classes: Tensor, contents: Tensor) -> Tensor:
        """The number of the image with each class and content [m]: int64 [m], -1 where there is none."""
        span = int(self.contents.max()) + 2
        keys, order = (self.classes * span + self.contents).sort()
        wanted = classes * span + contents
        at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return torch.where((keys[at] == wanted) & (contents >= 0), order[at], -1)


def load_factors(path: str | Path | None, resolution: int = 64) -> Factors:
    """A set of square images with factors, recognised by what lies at `path`:

    None            the made pictures: 6 shapes in 6 colours, at 77 places
    folder          Cars3D: `*.mat` of `nips2015-analogy-data` (class: car; content: azimuth and elevation)
    folder          SmallNorb: `smallnorb-*-{dat,cat,info}.mat`, also as .gz (class: category, instance,
                    elevation, lighting and camera; content: azimuth)
    .h5 file        3D Shapes (class: the three hues, scale and shape; content: orientation)
    folder          KTH: a folder of frames for each video `person01_handwaving_d4...` (class: person;
    content unknown)

    Test images are those of every tenth class; of the made set and KTH one image in ten instead, by lot.
    Images of another size are reduced by area. Raises ValueError for a path that is none of these and for
    archives that lack a part or hold something else, ImportError where scipy or h5py is needed and missing.
    """
    if path is None:
        return _made(resolution)
    return _reader(Path(path))(Path(path), resolution)


def _reader(path: Path) -> Callable[[Path, int], Factors]:
    if path.suffix in (".h5", ".hdf5") and path.is_file():
        return _shapes3d
    if path.is_dir():
        os.listdir(path)  # raises: glob finds nothing in a folder that may not be read
        if any(path.glob("smallnorb-*")):
            return _smallnorb
        if any(path.rglob("*.mat")):
            return _cars3d
        if any(_videos(path)):
            return _kth
    raise ValueError(
        f"data.path={path}: accepted are a folder with the .mat files of Cars3D or SmallNorb, folders of KTH "
        "frames (person01_handwaving_d4...), the .h5 file of 3D Shapes, or null for the made set"
    )


def _factors(images: np.ndarray, classes, contents, by_class: bool) -> Factors:
    classes, contents = (torch.as_tensor(np.asarray(f), dtype=torch.int64) for f in (classes, contents))
    # One in ten by lot: a regular stride could always meet the same content.
    lot = torch.from_numpy((np.random.Philox(0).random_raw(len(classes)) % HELD_OUT).astype(np.int64))
    key = classes if by_class else lot
    return Factors(torch.from_numpy(images), classes, contents, key % HELD_OUT == HELD_OUT - 1)


def _resized(images: np.ndarray, resolution: int) -> np.ndarray:
    """uint8 [n, H, W, C] to [n, resolution, resolution, C]."""
    if images.shape[1:3] == (resolution, resolution):
        return images
    from PIL import Image

    size = (resolution, resolution)
    small = [np.asarray(Image.fromarray(i.squeeze()).resize(size, Image.Resampling.BOX)) for i in images]
    return np.stack(small).reshape(len(images), *size, images.shape[3])


def _made(resolution: int) -> Factors:
    images = made_images(resolution)
    classes, contents = np.indices(images.shape[:2])
    return _factors(images.reshape(-1, *images.shape[2:]), classes.ravel(), contents.ravel(), by_class=False)


def _cars3d(path: Path, resolution: int) -> Factors:
    files = sorted(path.rglob("*.mat"))
    cars = [_resized(_car(file), resolution) for file in files]
    views = {len(car) for car in cars}
    if len(views) > 1:
        raise ValueError(f"{path}: cars have {sorted(views)} views each: accepted is the same number for all")
    (count,) = views
    return _factors(
        np.concatenate(cars), np.repeat(range(len(cars)), count), np.tile(range(count), len(cars)), True
    )


def _car(file: Path) -> np.ndarray:
    """Views of one car, uint8 [azimuths * elevations, H, W, 3], elevation changing fastest."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(f"{file}: reading .mat needs scipy: pip install 'sivae-fast[eval]'") from error
    try:
        content = loadmat(file)
    except Exception as error:  # damaged .mat files raise anything
        raise ValueError(f"{file}: not a MATLAB file of version 5: {error}") from error
    images = content.get("im")
    shape = np.shape(images)
    if len(shape) != 5 or shape[0] != shape[1] or shape[2] != 3 or images.dtype != np.uint8:
        held = {name: list(value.shape) for name, value in content.items() if isinstance(value, np.ndarray)}
        raise ValueError(f"{file} holds {held}: accepted is im [R, R, 3, azimuths, elevations] uint8")
    return images.transpose(3, 4, 0, 1, 2).reshape(-1, *images.shape[:3])


def _smallnorb(path: Path, resolution: int) -> Factors:
    images, keys, azimuths = [], [], []
    for part in sorted(
        {re.split(r"-(?:dat|cat|info)\.mat", file.name)[0] for file in path.glob("smallnorb-*.mat*")}
    ):
        pictures, category, info = (
            _norb_matrix(path, f"{part}-{kind}.mat") for kind in ("dat", "cat", "info")
        )
        count, _, *sides = pictures.shape if pictures.ndim == 4 else (0, 0)
        square = len(set(sides)) == 1 and pictures.dtype == np.uint8
        if not square or info.shape != (count, 4) or category.shape != (count,):
            shapes = [f"{a.dtype} {list(a.shape)}" for a in (pictures, category, info)]
            raise ValueError(
                f"{path / part}: dat, cat and info are {', '.join(shapes)}: accepted is uint8 [n, 2, R, R], "
                "[n], [n, 4]"
            )
        instance, elevation, azimuth, lighting = info.T
        for camera in range(pictures.shape[1]):
            images.append(_resized(pictures[:, camera, :, :, None], resolution))
            keys.append(
                np.stack([category, instance, elevation, lighting, np.full_like(category, camera)], 1)
            )
            azimuths.append(azimuth // 2)
    classes = np.unique(np.concatenate(keys), axis=0, return_inverse=True)[1].ravel()
    return _factors(np.concatenate(images), classes, np.concatenate(azimuths), by_class=True)


_NORB_TYPES = {0x1E3D4C55: "u1", 0x1E3D4C54: "<i4", 0x1E3D4C51: "<f4", 0x1E3D4C53: "<f8", 0x1E3D4C56: "<i2"}


def _norb_matrix(path: Path, name: str) -> np.ndarray:
    """An array in SmallNorb's own matrix format (which is not MATLAB's, despite the .mat)."""
    file = next((f for f in (path / name, path / f"{name}.gz") if f.is_file()), None)
    if file is None:
        raise ValueError(
            f"data.path={path}: {name} (or {name}.gz) is missing, it holds the factors or the images"
        )
    try:
        data = (gzip.decompress if file.suffix == ".gz" else bytes)(file.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not a complete gzip file: {error}") from error
    magic, dimensions = np.frombuffer(data, "<i4", 2) if len(data) >= 20 else (0, 0)
    if magic not in _NORB_TYPES or not 1 <= dimensions <= 8:
        raise ValueError(f"{file}: not a matrix of the NORB format")
    shape = np.frombuffer(data, "<i4", dimensions, 8)
    kind = np.dtype(_NORB_TYPES[int(magic)])
    start = 8 + 4 * max(int(dimensions), 3)  # the header has room for three sizes at least
    if len(data) != start + kind.itemsize * shape.prod():
        raise ValueError(
            f"{file} has {len(data)} bytes, its header tells of an array {shape.tolist()} of {kind}"
        )
    return np.frombuffer(data, kind, offset=start).reshape(shape)


def _shapes3d(path: Path, resolution: int) -> Factors:
    with open_h5(path) as file:
        shape = shape_in(file, "images")
        side = shape[1:2] * 2
        if 0 in shape or shape[1:] != (*side, 3) or shape_in(file, "labels") != (shape[0], 6):
            raise ValueError(
                f"{path} holds {contents(file)}: accepted are images [n, R, R, 3] and labels [n, 6]"
            )
        if file["images"].dtype != np.uint8:
            raise ValueError(f"{path}: images are {file['images'].dtype}, accepted is uint8")
        images, labels = file["images"][:], file["labels"][:]
    levels = np.stack([np.unique(column, return_inverse=True)[1].ravel() for column in labels.T], 1)
    classes = np.unique(levels[:, :5], axis=0, return_inverse=True)[1].ravel()
    return _factors(_resized(images, resolution), classes, levels[:, 5], by_class=True)


def _videos(path: Path) -> list[Path]:
    return sorted(f for f in path.iterdir() if f.is_dir() and re.match(r"person\d+_", f.name))


def _kth(path: Path, resolution: int) -> Factors:
    from PIL import Image

    videos = [v for v in _videos(path) if re.match(r"person\d+_handwaving_d4", v.name)]
    if not videos:
        raise ValueError(f"data.path={path}: has no person<number>_handwaving_d4... among its videos")
    people = sorted({video.name.split("_")[0] for video in videos})
    images, classes = [], []
    for video in videos:
        shown = [f for f in video.iterdir() if not f.name.startswith(".")]
        for file in sorted(f for f in shown if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp")):
            try:
                frame = np.asarray(Image.open(file).convert("L"))
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"{file} cannot be decoded: {reason(error)}") from None
            side = min(frame.shape)  # frames are 160 x 120, the person in the middle
            top, left = ((size - side) // 2 for size in frame.shape)
            images.append(_resized(frame[None, top : top + side, left : left + side, None], resolution)[0])
            classes.append(people.index(video.name.split("_")[0]))
    if not images:
        raise ValueError(f"data.path={path}: its folders hold no frames (.png, .jpg, .bmp)")
    return _factors(np.stack(images), classes, np.full(len(classes), -1), by_class=False)


class FactorImages(Held):
    """The images for training, without their factors (`contract.TrainingData`)."""

    def __init__(self, factors: Factors, *, seed: int = 0, device: torch.device | str = "cpu"):
        super().__init__(factors.images[~factors.test], seed, device)
        side, _, channels = factors.images.shape[1:]
        self.input_shape = (channels, side, side)

    def to_input(self, batch: Tensor, draws: Draws, lod: int = 0, blend: float = 1.0) -> Tensor:
        """Images [B, C, R, R] fp32 in [0, 1] on draws.device; mirroring would change the content."""
        return pixels.to_input(batch, draws, flip=False, signed=False)

    def fixed(self, count: int) -> Tensor:
        """The same `count` images in every run: [count, C, R, R] in [0, 1]."""
        return pixels.to_input(self.first(count), None, signed=False)
