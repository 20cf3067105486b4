"""A trained point cloud model ready for use: files, batches, precision and batch norm are taken care of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sivae_fast.contract import check_count, checked_seed
from sivae_fast.data.ply import read_ply
from sivae_fast.data.pointclouds import finite, load_clouds, open_array, resampled
from sivae_fast.trained import CALIBRATION, Trained


class CloudInference(Trained):
    """A point cloud model with all that its use needs; `CloudInference.load` has it from a run or a file.

    The arguments are those of `Trained`. Clouds go in and come out as float32 on the CPU. Batch norm, which
    the encoder alone has, uses its running statistics unless told otherwise, as published. ValueError for
    what is no tensor of finite floats of the shape that a function takes.
    """

    kinds = ("pointnet",)
    default_batch_norm = "running"

    @property
    def points(self) -> int:
        """Points of a cloud that the model makes."""
        return self.config.model.points

    @property
    def size(self) -> dict[str, int]:
        return {"points": self.points}

    def encode(self, clouds: Tensor) -> Tensor:
        """Posterior means [N, Z] of clouds [N, points, 3]."""
        self._check_floats("clouds", clouds, self.points, 3)
        self._calibrate_encoder()
        return self.map(lambda rows, _: self.model.encode(rows).mean, clouds, "encode")

    def decode(self, z: Tensor) -> Tensor:
        """Clouds [N, points, 3] of latents [N, Z]."""
        self._check_latents(z)
        return self.map(self.model.decode, z, "decode")

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Clouds [count, points, 3] of prior samples."""
        check_count(count)
        return self.decode(self.prior(count, seed))

    def reconstruct(self, clouds: Tensor) -> Tensor:
        """Reconstructions [N, points, 3] of clouds [N, points, 3], from the posterior mean."""
        return self.decode(self.encode(clouds))

    def calibration_batches(self) -> Iterator[Tensor]:
        clouds = self.clouds("train")[: CALIBRATION * self.calibration_size]
        return (part.to(self.device) for part in clouds.split(self.calibration_size))

    def clouds(self, split: str) -> Tensor:
        """One split of the run's data [n, points, 3]. Raises ValueError where they are not there any more."""
        data = self.config.data
        found = load_clouds(
            self._where_the_data_are(),
            split,
            classes=data.classes,
            points=self.points,
            resample=data.resample,
        )
        return found.points

    def own_clouds(self, count: int, seed: int = 0) -> Tensor:
        """At most `count` test clouds of the run's data [n, points, 3], drawn from `seed`."""
        clouds = self.clouds("test")
        generator = torch.Generator().manual_seed(checked_seed(seed))
        return clouds[torch.randperm(len(clouds), generator=generator)[:count]]

    def read(self, files: Sequence[str | os.PathLike], resize: bool = False) -> Tensor:
        """Clouds [n, points, 3] of .ply files, of .npy arrays [points, 3] or [n, points, 3], and of all such
        files of a folder, by name.

        resize: draw points from clouds of another size, the same ones every time. Raises ValueError naming
        the file that cannot be read or does not fit.
        """
        found = [self._fitted(cloud, where, resize) for file in files for where, cloud in _read(Path(file))]
        if not found:
            raise ValueError("no clouds are given")
        return torch.from_numpy(np.stack(found))

    def _fitted(self, cloud: np.ndarray, where: str, resize: bool) -> np.ndarray:
        cloud = finite(cloud, where, self.points)
        if len(cloud) != self.points and not resize:
            raise ValueError(
                f"{where} has {len(cloud)} points, the model takes {self.points}: give resize (--resize) to "
                "draw as many"
            )
        return resampled(cloud, self.points)


def _read(path: Path) -> list[tuple[str, np.ndarray]]:
    """(where it is from, the cloud) of every cloud in a file or folder."""
    if path.is_dir():
        shown = [file for file in path.iterdir() if not file.name.startswith(".")]
        files = sorted(file for file in shown if file.suffix.lower() in (".ply", ".npy"))
        if not files:
            raise ValueError(f"{path} cannot be used: there are no .ply files and no .npy arrays in it")
        return [cloud for file in files for cloud in _read(file)]
    if not path.is_file():
        raise ValueError(f"{path} cannot be used: it does not exist")
    if path.suffix.lower() == ".ply":
        return [(str(path), read_ply(path))]
    if path.suffix.lower() != ".npy":
        raise ValueError(f"{path} cannot be used: accepted are .ply files and .npy arrays")
    clouds = open_array(path)
    if clouds.ndim not in (2, 3) or clouds.shape[-1] != 3:
        raise ValueError(f"{path} holds {list(clouds.shape)}: accepted are [points, 3] and [n, points, 3]")
    if clouds.ndim == 2:
        return [(str(path), clouds)]
    return [(f"{path}[{i}]", cloud) for i, cloud in enumerate(clouds)]
