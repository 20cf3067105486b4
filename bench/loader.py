"""Images per second of the loaders, and what resizing offline is worth.

    python bench/loader.py     writes --out, bench/results/loader-cpu.json

Made photographs (512 x 512 JPEG) are prepared to 256 x 256 as PNG (stored without compression), as PNG
compressed like most people's, and as JPEG. Every row of the table delivers the same uint8 batches in the
same order; a row counts only if its pixels are those of Pillow. Rounds of all rows are interleaved and
the median counts, in images per second and per second of CPU time (all threads and worker processes
together: the number to trust where other programs share the machine).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from measure import commit
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from sivae_fast.data.archive import ImageSet
from sivae_fast.data.loader import ImageLoader
from sivae_fast.data.prepare import prepare
from sivae_fast.data.sampler import Sampler
from sivae_fast.files import write_text

COUNT, EPOCHS, BATCH, WORKERS, LARGE, SMALL = 400, 2, 16, 2, 512, 256
KINDS = ("png", "compressed-png", "jpeg")
RESULTS = Path(__file__).parent / "results"


def photograph(number: int) -> Image.Image:
    """Noise of all scales, falling off as in photographs: LARGE x LARGE, about 85 kB as a JPEG file."""
    rng = np.random.default_rng(number)
    pixels = np.full((LARGE, LARGE, 3), 128.0)
    for size, strength in ((4, 80), (8, 50), (16, 30), (32, 18), (64, 10), (128, 6), (256, 5)):
        for channel in range(3):
            noise = Image.fromarray(rng.normal(0, strength, (size, size)).astype(np.float32))
            pixels[..., channel] += np.asarray(noise.resize((LARGE, LARGE), Image.Resampling.BICUBIC))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_sets(folder: Path) -> dict[str, Path]:
    source = folder / "photographs"
    source.mkdir()
    for number in range(COUNT):
        photograph(number).save(source / f"{number:04d}.jpg", quality=90)
    sets = {"512 jpeg": source, "png": folder / "png.zip", "jpeg": folder / "jpeg.zip"}
    for kind in ("png", "jpeg"):
        prepare(source, sets[kind], resolution=SMALL, format=kind, progress=False)
    sets["compressed-png"] = folder / "compressed-png"
    sets["compressed-png"].mkdir()
    images = ImageSet(sets["png"])
    for number in range(COUNT):
        Image.fromarray(images.decode(number)).save(sets["compressed-png"] / f"{number:04d}.png")
    return sets


class Decoded(Dataset):
    """The images of a set, decoded (and resized) one by one, for PyTorch's DataLoader."""

    def __init__(self, images: ImageSet, resize: bool = False):
        self.images, self.resize = images, resize

    def __getitem__(self, index: int) -> torch.Tensor:
        pixels = self.images.decode(int(index))
        if self.resize:
            pixels = np.asarray(Image.fromarray(pixels).resize((SMALL, SMALL), Image.Resampling.LANCZOS))
        return torch.from_numpy(pixels.copy())


Batches = Callable[[], Iterator[torch.Tensor]]


def ours(path: Path, loader: str) -> Batches:
    def batches() -> Iterator[torch.Tensor]:
        data = ImageLoader(path, loader=loader, workers=WORKERS, cache_gib=0)
        yield from data.batches(0, lambda _: BATCH)

    return batches


def processes(path: Path, resize: bool = False) -> Batches:
    def batches() -> Iterator[torch.Tensor]:
        images = ImageSet(path)
        order = Sampler(len(images)).indices(0, EPOCHS * COUNT + BATCH).reshape(-1, BATCH)
        yield from DataLoader(Decoded(images, resize), batch_sampler=order.tolist(), num_workers=WORKERS)

    return batches


def dali_resizing(path: Path) -> Batches:
    """The large files decoded and resized by DALI (LANCZOS3, antialiased) while training."""

    def batches() -> Iterator[torch.Tensor]:
        from nvidia.dali import Pipeline, fn, types

        images = ImageSet(path)
        requests = Sampler(len(images)).requests(0, lambda _: BATCH)
        files = ([np.frombuffer(images.read(int(i)), np.uint8) for i in rows] for rows in requests)
        pipeline = Pipeline(BATCH, WORKERS, None, prefetch_queue_depth=2)
        with pipeline:
            encoded = fn.external_source(source=files, dtype=types.UINT8, ndim=1, batch=True)
            pixels = fn.decoders.image(encoded, output_type=types.RGB)
            pipeline.set_outputs(
                fn.resize(pixels, size=(SMALL, SMALL), interp_type=types.INTERP_LANCZOS3, antialias=True)
            )
        pipeline.build()
        while True:
            yield torch.from_dlpack(pipeline.run()[0].as_tensor()).clone()

    return batches


def rows_of(sets: dict[str, Path]) -> dict[str, Batches]:
    rows = {}
    for kind in KINDS:
        rows[f"{kind} 256, DALI"] = ours(sets[kind], "dali")
        rows[f"{kind} 256, torch loader (threads)"] = ours(sets[kind], "torch")
        rows[f"{kind} 256, DataLoader (processes)"] = processes(sets[kind])
    rows["jpeg 512 resized while training, DALI"] = dali_resizing(sets["512 jpeg"])
    rows["jpeg 512 resized while training, DataLoader (processes)"] = processes(sets["512 jpeg"], resize=True)
    return rows


def check(name: str, batches: Batches, sets: dict[str, Path]) -> float:
    """Mean difference to Pillow's pixels in the first batch, in grey levels; more than 1 is an error."""
    kind = "512 jpeg" if "512" in name else name.split()[0]
    decoded = Decoded(ImageSet(sets[kind]), resize="512" in name)
    expected = torch.stack([decoded[i] for i in Sampler(COUNT).indices(0, BATCH)]).float()
    difference = (next(batches()).float() - expected).abs().mean().item()
    if difference > 1:
        raise SystemExit(
            f"error: {name} delivers other pixels than Pillow (mean difference {difference:.2f})"
        )
    return difference


def measure(batches: Batches) -> tuple[float, float]:
    """Images per second (without the first batch) and per second of CPU time (start-up and all)."""
    cpu = _cpu_seconds()
    running = batches()
    next(running)
    wall = time.perf_counter()
    images = sum(len(batch) for batch in islice(running, EPOCHS * COUNT // BATCH))
    wall = time.perf_counter() - wall
    running.close()
    return images / wall, (images + BATCH) / (_cpu_seconds() - cpu)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def _cpu_seconds() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def machine() -> dict[str, object]:
    """Where the numbers come from."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    names = ("torch", "pillow", "numpy", "nvidia-dali-cuda130")
    return {
        "cpu": model[0].split(": ")[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "commit": commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "loader-cpu.json", help="default: the committed file"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    known, loads = machine(), [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        sets = make_sets(Path(folder))
        rows = rows_of(sets)
        differences = {name: check(name, batches, sets) for name, batches in rows.items()}
        rates = {name: [] for name in rows}
        for _ in range(options.rounds):
            for name, batches in rows.items():
                rates[name].append(measure(batches))
            loads.append(os.getloadavg()[0])
        sizes = {kind: _size(sets[kind]) // COUNT for kind in KINDS}
    table = {
        name: {
            "images_per_second": round(statistics.median(wall for wall, _ in found), 1),
            "images_per_cpu_second": round(statistics.median(cpu for _, cpu in found), 1),
            "difference_to_pillow": round(differences[name], 4),
        }
        for name, found in rates.items()
    }
    result = {
        "machine": known,
        "load_average_by_round": [round(load, 2) for load in loads],
        "setting": {"images": COUNT, "batch": BATCH, "workers": WORKERS, "bytes_per_image": sizes},
        "rows": table,
        "ratios": ratios(table),
    }
    write_text(options.out, json.dumps(result, indent=1) + "\n")
    for name, row in table.items():
        wall, cpu = row["images_per_second"], row["images_per_cpu_second"]
        print(f"{name:58} {wall:8.0f} images/s {cpu:8.0f} per CPU second")
    for name, ratio in result["ratios"].items():
        print(f"{name:58} {ratio['wall']:8.2f} times   {ratio['cpu']:9.2f} times")


def ratios(table: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    pairs = {
        f"{kind}: DALI / {other}": (f"{kind} 256, DALI", f"{kind} 256, {other}")
        for kind in KINDS
        for other in ("torch loader (threads)", "DataLoader (processes)")
    }
    online = "jpeg 512 resized while training, "
    pairs["resizing while training: DALI / DataLoader"] = (online + "DALI", online + "DataLoader (processes)")
    pairs["DALI: resized offline / while training"] = ("png 256, DALI", online + "DALI")
    return {
        name: {
            "wall": round(table[a]["images_per_second"] / table[b]["images_per_second"], 2),
            "cpu": round(table[a]["images_per_cpu_second"] / table[b]["images_per_cpu_second"], 2),
        }
        for name, (a, b) in pairs.items()
    }


if __name__ == "__main__":
    main()
