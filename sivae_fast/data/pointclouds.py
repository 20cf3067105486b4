"""Point cloud sets: ShapeNet samples (.ply), ModelNet40 (.h5), arrays (.npy) and the made solids."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sivae_fast.data import solids
from sivae_fast.data.h5 import contents, open_h5, shape_in
from sivae_fast.data.held import Held
from sivae_fast.data.ply import read_ply
from sivae_fast.draws import Draws

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
MADE = 2000
RADIUS = 0.5  # of the ball that models, their settings and the measures are made for

PLY = "[!.]*.[pP][lL][yY]"  # without the hidden files that some systems add

#: Folder names of ShapeNetCore that have a common name in the literature on point clouds.
SYNSETS = {
    "airplane": "02691156", "bag": "02773838", "bathtub": "02808440", "bed": "02818832", "bench": "02828884",
    "bottle": "02876657", "car": "02958343", "chair": "03001627", "guitar": "03467517", "lamp": "03636649",
    "mug": "03797390", "pistol": "03948459", "rifle": "04090263", "sofa": "04256520", "table": "04379243",
    "vessel": "04530566",
}  # fmt: skip


class Clouds(NamedTuple):
    """A set of clouds of one size, with the class of each."""

    points: Tensor  # [n, points, 3] fp32
    labels: Tensor  # [n] int64, index into `names`
    names: tuple[str, ...]


def load_clouds(
    path: str | Path | None,
    split: str = "train",
    *,
    classes: Sequence[str] = (),
    points: int = 2048,
    resample: bool = False,
) -> Clouds:
    """One split of a point cloud set, recognised by what lies at `path`:

    None        the made set: 2000 solids, `classes` of `solids.KINDS`
    folder      `shape_net_core_uniform_samples_2048`: .ply files in a folder for each class, called by its
                WordNet number or a name of `SYNSETS`; or one of these folders
    folder      ModelNet40 in HDF5: `*train*.h5` and `*test*.h5` with `data` [n, >= points, 3] and `label`,
                class names in `shape_names.txt` if present; brought from radius 1 to 0.5
    .npy file   one array [n, points, 3]

    The items of a class, in the order of their names or positions, are split 85 : 5 : 10 into train,
    validation and test (ModelNet40: 95 : 5 : the test files). The published split took the order of the
    directory listing, which depends on the file system; this one is the same everywhere. `classes` () takes
    all.

    Raises ValueError for an unknown split or class, a path that is none of these, coordinates that are not
    finite, and, unless `resample`, clouds of another size. `resample` draws points at random (with repetition
    where a cloud has too few), the same ones in every run. Raises ImportError where h5py is needed and
    missing. Clouds that reach out of the ball of radius `RADIUS` are loaded with a warning.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: accepted are {', '.join(SPLITS)}")
    groups, names = _reader(path)(path, split, tuple(classes), points)
    if twice := sorted(name for name in set(names) if names.count(name) > 1):
        raise ValueError(
            f"data.classes={list(classes)}: {', '.join(twice)} is there twice, by name or number, in "
            f"{path or 'the made set'}: accepted is each class once"
        )
    clouds, labels = [], []
    for label, group in enumerate(groups):
        for where, cloud in group:
            clouds.append(_checked(cloud, where, points, resample))
            labels.append(label)
    if not clouds:
        raise ValueError(f"data.path={path}: no clouds in its {split} split")
    found = Clouds(torch.from_numpy(np.stack(clouds)), torch.tensor(labels), names)
    farthest = found.points.norm(dim=2).max().item()
    if farthest > 1.01 * RADIUS:
        log.warning(
            "data.path=%s: points lie up to %.4g from the origin, clouds should lie in a ball of radius %g: "
            "scale them", path, farthest, RADIUS,
        )  # fmt: skip
    return found


Group = list[tuple[str, np.ndarray]]  # (where a cloud comes from, its points [n, 3])
Groups = tuple[list[Group], tuple[str, ...]]


def _reader(path: str | Path | None) -> Callable[..., Groups]:
    if path is None:
        return _read_made
    path = Path(path)
    if path.suffix == ".npy" and path.is_file():
        return _read_npy
    if path.is_dir():
        os.listdir(path)  # raises: glob finds nothing in a folder that may not be read
    if path.is_dir() and any(path.glob("*train*.h5")):
        return _read_modelnet
    if path.is_dir() and any(path.glob(f"*/{PLY}")):
        return _read_shapenet
    if path.is_dir() and any(path.glob(PLY)):
        return _read_one_class
    raise ValueError(
        f"data.path={path}: accepted are a folder of class folders with .ply files or one of these, a folder "
        "with the *train*.h5 and *test*.h5 of ModelNet40, a .npy array [n, points, 3], or null for the made "
        "set"
    )


def _part(items: Sequence, split: str, ends: tuple[float, float] = (0.85, 0.9)) -> Sequence:
    first, second = (math.floor(end * len(items)) for end in ends)
    return {"train": items[:first], "validation": items[first:second], "test": items[second:]}[split]


def _chosen(classes: tuple[str, ...], available: Sequence[str], path) -> tuple[str, ...]:
    unknown = sorted(set(classes) - set(available))
    if unknown:
        raise ValueError(f"data.classes={list(classes)}: {path} has {', '.join(available)}")
    return classes or tuple(available)


def _read_made(path, split: str, classes: tuple[str, ...], points: int) -> Groups:
    names = classes or ("chair", "table", "plane")
    groups = [_part(range(label, MADE, len(names)), split) for label in range(len(names))]
    return [
        [(f"made cloud {i}", solids.made_cloud(i, points, names)) for i in group] for group in groups
    ], names


def open_array(path: str | os.PathLike) -> np.ndarray:
    """The numbers of a .npy file, read where they are used. OSError; ValueError for what is no such file."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # np.load tells how to unpickle other files
        if array.dtype.kind not in "iuf":
            raise ValueError(f"it holds {array.dtype}")
    except OSError:
        raise
    except Exception as error:  # damaged headers raise anything
        raise ValueError(f"{path}: not a .npy array of numbers: {error}") from error
    return array


def _read_npy(path, split: str, classes: tuple[str, ...], points: int) -> Groups:
    clouds = open_array(path)
    if clouds.ndim != 3 or clouds.shape[2] != 3:
        raise ValueError(f"{path} holds {list(clouds.shape)}: accepted is [n, points, 3]")
    names = (Path(path).stem,)
    if set(classes) - set(names):
        raise ValueError(f"data.classes={list(classes)}: {path} is an array without classes, accepted is []")
    return [[(f"{path}[{i}]", clouds[i]) for i in _part(range(len(clouds)), split)]], names


def _read_shapenet(path, split: str, classes: tuple[str, ...], points: int) -> Groups:
    folders = {folder.name: folder for folder in sorted(Path(path).iterdir()) if any(folder.glob(PLY))}
    common = {number: name for name, number in SYNSETS.items()}
    available = tuple(common.get(name, name) for name in folders)
    by_name = dict(zip(available, folders.values(), strict=True))
    names = _chosen(tuple(common.get(name, name) for name in classes), available, path)
    files = [_part(sorted(by_name[name].glob(PLY)), split) for name in names]
    return [[(str(file), read_ply(file)) for file in group] for group in files], names


def _read_one_class(path, split: str, classes: tuple[str, ...], points: int) -> Groups:
    path = Path(path).resolve()
    return _read_shapenet(path.parent, split, classes or (path.name,), points)


def _read_modelnet(path, split: str, classes: tuple[str, ...], points: int) -> Groups:
    part = "test" if split == "test" else "train"
    files = sorted(Path(path).glob(f"*{part}*.h5"))
    if not files:
        raise ValueError(f"data.path={path}: has no *{part}*.h5")
    arrays = [_read_h5(file) for file in files]
    clouds = [cloud for data, _ in arrays for cloud in data]
    labels = np.concatenate([label for _, label in arrays])
    listing = Path(path) / "shape_names.txt"
    count = labels.max(initial=-1) + 1
    available = _lines(listing) if listing.is_file() else [str(n) for n in range(count)]
    if count > len(available):
        raise ValueError(f"{listing} names {len(available)} classes, the archives of {path} have {count}")
    names = _chosen(classes, available, path)
    groups = []
    for name in names:
        of_class = np.flatnonzero(labels == available.index(name))
        kept = of_class if split == "test" else _part(of_class, split, (0.95, 1.0))
        # The archive's clouds, 2048 points in random order, are cut as its own loaders cut them.
        groups.append([(f"{path} cloud {i}", 0.5 * clouds[i][:points]) for i in kept])
    return groups, names


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in file.read_text().splitlines() if line.strip()]


def _read_h5(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Clouds float32 [n, points, 3] and their classes int64 [n]."""
    with open_h5(file) as archive:
        shape, labels = shape_in(archive, "data"), shape_in(archive, "label")
        if len(shape) != 3 or shape[2] != 3 or labels not in ((shape[0],), (shape[0], 1)):
            raise ValueError(
                f"{file} holds {contents(archive)}: accepted are data [n, points, 3] and label [n]"
            )
        if any(archive[name].dtype.kind not in "iuf" for name in ("data", "label")):
            raise ValueError(f"{file}: data and label have to be numbers")
        classes = archive["label"][:].astype(np.int64).ravel()
        if (classes < 0).any():
            raise ValueError(f"{file}: label is {classes.min()}, classes count from 0")
        return archive["data"][:].astype(np.float32), classes


def _checked(cloud: np.ndarray, where: str, points: int, resample: bool) -> np.ndarray:
    cloud = finite(cloud, where, points)
    if len(cloud) != points and not resample:
        raise ValueError(
            f"{where} has {len(cloud)} points, accepted are {points}: train with data.points={len(cloud)} "
            f"and model.points={len(cloud)}, or with data.resample=true, which draws from clouds of any size"
        )
    return resampled(cloud, points)


def finite(cloud: np.ndarray, where: str, points: int) -> np.ndarray:
    """`cloud` [n, 3] as float32. ValueError, naming `where` it is from, for no points, NaN and infinity."""
    cloud = np.asarray(cloud, np.float32)
    if not len(cloud) or not np.isfinite(cloud).all():
        found = "a coordinate is not finite" if len(cloud) else "there are no points"
        raise ValueError(f"{where}: {found}, accepted are {points} points of finite numbers")
    return cloud


def resampled(cloud: np.ndarray, points: int) -> np.ndarray:
    """`points` points of a cloud [n, 3], drawn with repetition where it has too few; always the same ones."""
    if len(cloud) == points:
        return cloud
    order = np.random.Generator(np.random.Philox(len(cloud))).permutation(len(cloud))
    return cloud[np.resize(order, points)]


class PointClouds(Held):
    """Clouds as training data (`contract.TrainingData`).

    `rotate` turns every cloud about the z axis by a uniform angle in [0, 180) degrees, as the published
    option.
    """

    def __init__(
        self, clouds: Clouds, *, seed: int = 0, device: torch.device | str = "cpu", rotate: bool = False
    ):
        super().__init__(clouds.points, seed, device)
        self.names, self.rotate = clouds.names, rotate
        self.input_shape = tuple(clouds.points.shape[1:])

    def to_input(self, batch: Tensor, draws: Draws, lod: int = 0, blend: float = 1.0) -> Tensor:
        """Clouds [B, points, 3] fp32 on draws.device."""
        x = batch.to(draws.device)
        return turned(x, math.pi * draws.stream("data").uniform(len(x))) if self.rotate else x

    def fixed(self, count: int) -> Tensor:
        """The same `count` clouds in every run: [count, points, 3]."""
        return self.first(count)


def turned(clouds: Tensor, angles: Tensor) -> Tensor:
    """Clouds [B, points, 3] turned about the z axis by angles [B] in radians."""
    c, s = angles.cos()[:, None], angles.sin()[:, None]
    x, y, z = clouds.unbind(2)
    return torch.stack([c * x - s * y, s * x + c * y, z], 2)
