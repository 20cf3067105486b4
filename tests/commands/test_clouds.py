"""Point cloud models: what the commands measure and write, beside the functions that they stand on."""

import json
import statistics
import sys

import numpy as np
import pytest
import torch

import sivae_fast
from sivae_fast.checkpoint import load
from sivae_fast.cli import main
from sivae_fast.data.pointclouds import load_clouds
from sivae_fast.evaluation import pointcloud
from sivae_fast.inference import Inference
from sivae_fast.inference_clouds import CloudInference
from sivae_fast.measure_clouds import evaluate_clouds
from sivae_fast.run import read_metrics


@pytest.fixture(scope="module")
def run(runs):
    return CloudInference.load(runs.clouds, device="cpu", show=False, batch=8)


@pytest.fixture
def test_clouds(run):
    return load_clouds(run.config.data.path, "test", points=20).points


def sample_sets(model, count, seeds):
    """As bench/pointclouds.py draws them."""
    for seed in seeds:
        noise = torch.randn(count, model.latent_size, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            yield model.generate(model.prior_std * noise)


def test_the_measures_are_those_of_the_functions(run, runs, test_clouds):
    pytest.importorskip("ot")
    names = ["jsd", "mmd_chamfer", "coverage_chamfer", "mmd_emd", "coverage_emd"]
    found = evaluate_clouds(run, names, folder=runs.clouds)
    assert list(found) == names and len(test_clouds) == 6
    sets = list(sample_sets(load(runs.clouds), 3 * 6, range(3)))
    each = [pointcloud.jsd(pointcloud.occupancy(test_clouds), pointcloud.occupancy(s)) for s in sets]
    assert found["jsd"]["value"] == pytest.approx(statistics.mean(each), rel=1e-9)
    assert found["jsd"]["range_over_draws"] == pytest.approx(max(each) - min(each))
    published = pointcloud.sampling_jsd(lambda count, draw: sets[draw], test_clouds)
    assert found["jsd"]["value"] == pytest.approx(published, rel=1e-9)
    for name, distance in (("chamfer", pointcloud.chamfer_distances), ("emd", pointcloud.emd_distances)):
        both = [pointcloud.mmd_and_coverage(distance(s, test_clouds)) for s in sets]
        mmd, coverage = map(statistics.mean, zip(*both, strict=True))
        assert found[f"mmd_{name}"]["value"] == pytest.approx(mmd, rel=1e-5)
        assert found[f"coverage_{name}"]["value"] == pytest.approx(coverage)
    about = {"images": 1000, "weights": "averaged", "points": 20, "test_clouds": 6, "samples": 18, "seed": 0}
    for name, record in found.items():
        assert about.items() <= record.items() and read_metrics(runs.clouds)[name][-1] == record


def test_the_command_measures_the_test_clouds_or_other_ones(run, runs, tmp_path, capsys):
    command = ["evaluate", str(runs.clouds), "--device", "cpu", "--seed", "2"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == evaluate_clouds(run, seed=2)
    assert list(found) == ["jsd", "mmd_chamfer", "coverage_chamfer"]
    shifted = 0.1 + 0.5 * np.load(run.config.data.path)
    np.save(tmp_path / "other.npy", shifted.astype(np.float32))
    assert main([*command, "--data", str(tmp_path / "other.npy"), "--metrics", "jsd", "--count", "4"]) == 0
    other = json.loads(capsys.readouterr().out)["jsd"]
    assert other["test_clouds"] == 4 and other["value"] != found["jsd"]["value"]


def test_what_does_not_fit_is_named(runs, tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "small.npy", np.zeros((40, 9, 3), np.float32))
    for arguments, message in [
        (
            ["--metrics", "fid"],
            "metrics are fid, must be some of jsd, mmd_chamfer, coverage_chamfer, mmd_emd",
        ),
        (["--count", "0"], "count is 0, must be at least 1"),
        (["--ood", "a", "b"], "--ood a b: model.kind is pointnet, this option is for other models"),
        (["--own", "a"], "--own a: model.kind is pointnet"),
        (["--weights", "a"], "--weights a: model.kind is pointnet"),
        (["--features", "random"], "--features random: model.kind is pointnet"),
        (["--samples", "3"], "--samples is for --ood and for --metrics log_likelihood"),
        (["--data", "gone.npy"], "gone.npy does not exist: give data=PATH (--data PATH)"),
        (["--data", str(tmp_path / "small.npy")], "small.npy[36] has 9 points, data.points=20 accepts that"),
    ]:
        before = read_metrics(runs.clouds)
        assert main(["evaluate", str(runs.clouds), *arguments]) == 1
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1 and read_metrics(runs.clouds) == before
    monkeypatch.setitem(sys.modules, "ot", None)
    assert main(["evaluate", str(runs.clouds), "--metrics", "jsd", "mmd_emd"]) == 1
    assert "the earth mover's distance needs POT: pip install" in capsys.readouterr().err


def test_images_and_clouds_do_not_take_each_other(runs):
    with pytest.raises(ValueError, match=r"model\.kind is pointnet: this takes style, residual and two_enc"):
        Inference.load(runs.clouds, device="cpu")
    with pytest.raises(ValueError, match=r"model\.kind is residual: this takes pointnet models"):
        CloudInference.load(runs.residual, device="cpu")


def test_batches_batch_norm_and_precision(run, runs, test_clouds):
    options = {"device": "cpu", "show": False}
    running, again, half = (
        CloudInference.load(runs.clouds, **options, **more)
        for more in ({}, {"batch_norm": "recalibrated"}, {"precision": "bf16"})
    )
    z = running.encode(test_clouds)
    assert running.described["batch_norm"] == "running" and z.shape == (6, 4)
    torch.testing.assert_close(z, run.encode(test_clouds))
    torch.testing.assert_close(running.reconstruct(test_clouds), load(runs.clouds).reconstruct(test_clouds))
    assert not torch.allclose(again.encode(test_clouds), z)
    assert 0 < (half.encode(test_clouds) - z).norm() < 0.05 * z.norm()
    assert half.sample(2).dtype == torch.float32


def test_the_model_itself_is_one_line_of_python(runs, test_clouds):
    model = sivae_fast.load(runs.clouds)
    assert model.sample(4, seed=1).shape == (4, 20, 3)
    assert model.reconstruct(test_clouds).shape == test_clouds.shape
