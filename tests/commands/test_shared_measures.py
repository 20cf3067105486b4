"""Clouds and translation measured by two processes: each does a part, both have what one process has."""

import json
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp

from sivae_fast.inference import Inference
from sivae_fast.inference_clouds import CloudInference
from sivae_fast.measure_clouds import evaluate_clouds
from sivae_fast.measure_translation import evaluate_translation

CLOUDS = ["jsd", "mmd_chamfer", "coverage_chamfer"]


def measures(clouds, translation, folders):
    """By name: the records of clouds, of images, and of images in one batch, so that a process has none."""
    options = {"device": "cpu", "show": False}
    points = CloudInference.load(clouds, batch=8, **options)
    images, at_once = (Inference.load(translation, batch=batch, **options) for batch in (8, 500))
    some = {"count": 60, "seed": 1}
    return {
        "clouds": evaluate_clouds(points, CLOUDS, seed=2, folder=folders.get("clouds")),
        "images": evaluate_translation(images, **some, folder=folders.get("images")),
        "at once": evaluate_translation(at_once, ["mse", "class_from_class_code"], **some),
    }


def parted(record):
    """(what it is about, what was measured)."""
    numbers = {key: value for key, value in record.items() if isinstance(value, float)}
    return {key: value for key, value in record.items() if key not in numbers}, numbers


def _measure(rank, port, clouds, translation, out):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    found = measures(clouds, translation, {name: f"{out}/{name}" for name in ("clouds", "images")})
    with open(f"{out}/{rank}.json", "w") as file:
        json.dump(found, file)
    torch.distributed.destroy_process_group()


def test_two_ranks_share_the_work_and_agree_with_one(runs, tmp_path):
    for name in ("clouds", "images"):
        (tmp_path / name).mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_measure, (port, str(runs.clouds), str(runs.translation), str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    one = measures(runs.clouds, runs.translation, {})
    for kind, records in one.items():
        assert list(first[kind]) == list(records)
        for name, record in records.items():
            about, numbers = parted(record)
            shared_about, shared_numbers = parted(first[kind][name])
            assert shared_about == about and shared_numbers == pytest.approx(numbers, rel=1e-5, abs=1e-8)
    for kind in ("clouds", "images"):
        written = {path.stem: path.read_text().splitlines() for path in (tmp_path / kind).iterdir()}
        assert {name: [json.loads(line) for line in lines] for name, lines in written.items()} == {
            f"metric-{name}": [record] for name, record in first[kind].items()
        }
