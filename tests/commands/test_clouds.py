"""Point cloud models: what the commands measure and write, beside the functions that they stand on."""

import json
import shutil
import statistics
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sivae_fast
from sivae_fast.checkpoint import load
from sivae_fast.cli import main
from sivae_fast.commands.clouds import along, reconstruct
from sivae_fast.data.ply import read_ply, write_ply
from sivae_fast.data.pointclouds import load_clouds
from sivae_fast.evaluation import pointcloud
from sivae_fast.evaluation.mitsuba import scene
from sivae_fast.inference import Inference
from sivae_fast.inference_clouds import CloudInference
from sivae_fast.kernels.chamfer import chamfer
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
    assert other["data"] == "other.npy" and "data" not in found["jsd"]


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
        (["--data", str(tmp_path / "small.npy")], "small.npy[36] has 9 points, accepted are 20: train with"),
    ]:
        before = read_metrics(runs.clouds)
        assert main(["evaluate", str(runs.clouds), *arguments]) == 1
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1 and read_metrics(runs.clouds) == before
    monkeypatch.setitem(sys.modules, "ot", None)
    assert main(["evaluate", str(runs.clouds), "--metrics", "jsd", "mmd_emd"]) == 1
    assert "the earth mover's distance needs POT: pip install" in capsys.readouterr().err


def test_images_and_clouds_do_not_take_each_other(runs):
    with pytest.raises(
        ValueError, match=r"model\.kind is pointnet: this takes style, residual, two_encoder and own models"
    ):
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


def call(capsys, *arguments):
    """(exit code, standard output, standard error) of one command."""
    code = main([*map(str, arguments), "--device", "cpu"])
    return code, *capsys.readouterr()


def test_samples_as_picture_array_and_files(run, runs, tmp_path, capsys):
    expected = run.sample(5, 3).numpy()
    for name in ("s.npy", "folder", "s.png"):
        code, said, _ = call(
            capsys, "sample", runs.clouds, "--out", tmp_path / name, "--count", 5, "--seed", 3
        )
        assert code == 0 and said.strip() == str(tmp_path / name)
    np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), expected)
    files = sorted((tmp_path / "folder").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.ply" for i in range(5)]
    np.testing.assert_array_equal(np.stack([read_ply(file) for file in files]), expected)
    assert Image.open(tmp_path / "s.png").size == (3 * 194 + 2, 2 * 194 + 2)
    for name in ("one.ply", "one.xml"):
        assert call(capsys, "sample", runs.clouds, "--out", tmp_path / name, "--seed", 3)[0] == 0
    assert (tmp_path / "one.xml").read_text() == scene(run.sample(1, 3)[0])
    np.testing.assert_allclose(read_ply(tmp_path / "one.ply"), run.sample(1, 3)[0].numpy(), rtol=1e-5)


def test_reconstructions_of_test_clouds_and_of_files(run, runs, tmp_path, capsys, test_clouds):
    out = tmp_path / "r.npy"
    code, said, _ = call(capsys, "reconstruct", runs.clouds, "--out", out, "--count", 4, "--seed", 1)
    chosen = run.own_clouds(4, 1)
    assert code == 0 and len(chosen) == 4
    assert all((test_clouds == cloud).all((1, 2)).any() for cloud in chosen)
    np.testing.assert_allclose(np.load(out), run.reconstruct(chosen).numpy(), rtol=1e-5, atol=1e-7)
    distance = chamfer(chosen, run.reconstruct(chosen)).mean().item()  # summed over points, as in training
    assert json.loads(said)["chamfer"] == pytest.approx(distance, rel=1e-5)
    write_ply(tmp_path / "a.ply", test_clouds[0].numpy())
    np.save(tmp_path / "b.npy", test_clouds[1:3].numpy())
    np.save(tmp_path / "c.npy", test_clouds[3].numpy())
    files = [tmp_path / name for name in ("a.ply", "b.npy", "c.npy")]
    assert torch.equal(run.read(files), test_clouds[:4])
    (tmp_path / "upper").mkdir()
    for file in files:
        shutil.copy(file, tmp_path / "upper" / file.name.upper())
    assert torch.equal(run.read([tmp_path / "upper"]), test_clouds[:4])
    assert call(capsys, "reconstruct", runs.clouds, *files, "--out", tmp_path / "r.png")[0] == 0
    assert Image.open(tmp_path / "r.png").size == (4 * 194 + 2, 2 * 194 + 2)
    assert call(capsys, "reconstruct", runs.clouds, files[0], "--out", tmp_path / "one.ply")[0] == 0
    one = run.reconstruct(test_clouds[:1])[0].numpy()
    np.testing.assert_allclose(read_ply(tmp_path / "one.ply"), one, rtol=1e-5, atol=1e-7)


def test_points_are_drawn_from_clouds_of_another_size_where_asked_for(run, tmp_path):
    large = np.random.default_rng(0).random((50, 3)).astype(np.float32)
    write_ply(tmp_path / "large.ply", large)
    with pytest.raises(ValueError, match=r"large\.ply has 50 points, the model takes 20: give resize"):
        run.read([tmp_path / "large.ply"])
    (drawn,) = run.read([tmp_path / "large.ply"], resize=True)
    assert {tuple(point) for point in drawn.tolist()} <= {tuple(point) for point in large.tolist()}
    assert len({tuple(point) for point in drawn.tolist()}) == 20


def test_clouds_between_clouds(run, runs, tmp_path, capsys, test_clouds):
    np.save(tmp_path / "ends.npy", test_clouds[:2].numpy())
    command = ["interpolate", runs.clouds, tmp_path / "ends.npy", "--out"]
    assert call(capsys, *command, tmp_path / "i.npy", "--steps", 5)[0] == 0
    first, last = run.encode(test_clouds[:2])
    line = run.decode(torch.lerp(first[None], last[None], torch.linspace(0, 1, 5)[:, None]))
    np.testing.assert_allclose(np.load(tmp_path / "i.npy"), line.numpy(), rtol=1e-4, atol=1e-6)
    assert call(capsys, *command, tmp_path / "i.png", "--steps", 3)[0] == 0
    assert Image.open(tmp_path / "i.png").size == (3 * 194 + 2, 194 + 2)
    assert call(capsys, *command, tmp_path / "i.gif", "--steps", 3, "--milliseconds", 90)[0] == 0
    film = Image.open(tmp_path / "i.gif")
    assert film.n_frames >= 5 and film.info["duration"] == 90  # the turning point may be one long frame
    assert call(capsys, "interpolate", runs.clouds, "--out", tmp_path / "own.png", "--steps", 2)[0] == 0
    ends = torch.randn(4, 3)
    path = along(ends, 3)
    torch.testing.assert_close(path[::2], ends)
    torch.testing.assert_close(path[1], ends[:2].mean(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["sample", "--out", "s.jpg"],
            "s.jpg: a name ending in .png, .npy, .ply, .xml or a folder without an ending is needed",
        ),
        (["sample", "--out", "s.ply", "--count", "2"], "s.ply holds one cloud, got 2"),
        (["sample", "--count", "0"], "count is 0, must be at least 1"),
        (["sample", "--truncation", "0.5"], "truncation=0.5: this model is of kind pointnet"),
        (["sample", "--mixing"], "mixing=True: this model is of kind pointnet"),
        (["reconstruct", "--noise", "none"], "noise=none: this model is of kind pointnet"),
        (["sample", "--precision", "fp16"], "precision is 'fp16', must be one of fp32, bf16"),
        (["sample", "--batch-norm", "eval"], "--batch-norm is 'eval', must be one of running, batch"),
        (["reconstruct", "gone.ply"], "gone.ply cannot be used: it does not exist"),
        (["reconstruct", "note.txt"], "note.txt cannot be used: accepted are .ply files and .npy arrays"),
        (["reconstruct", "torn.ply"], "torn.ply: not a .ply file"),
        (["reconstruct", "flat.npy"], "flat.npy holds [4, 2]: accepted are [points, 3] and [n, points, 3]"),
        (["reconstruct", "note.npy"], "note.npy: not a .npy array of numbers: the magic string is not"),
        (["reconstruct", "text.npy"], "text.npy: not a .npy array of numbers: it holds <U1"),
        (["reconstruct", "few.npy"], "few.npy has 9 points, the model takes 20: give resize (--resize)"),
        (["reconstruct", "nan.npy"], "nan.npy: a coordinate is not finite, accepted are 20 points"),
        (["reconstruct", "--data", "gone.npy"], "gone.npy does not exist: give data=PATH (--data PATH)"),
        (["interpolate", "--out", "i.jpg"], "i.jpg: a name ending in .png, .gif, .mp4 or .npy is needed"),
        (["interpolate", "--steps", "1"], "steps is 1, must be at least 2"),
        (
            ["interpolate", "--out", "i.gif", "--milliseconds", "1000000"],
            "--milliseconds is 1000000, must be 10 to 655350 for i.gif",
        ),
        (["reconstruct", "empty"], "empty cannot be used: there are no .ply files and no .npy arrays in it"),
        (["interpolate", "--space", "w"], "space=w: this model is of kind pointnet"),
        (["interpolate", "--space", "x"], "space is 'x', must be one of z, w"),
        (
            ["interpolate", "one.npy", "--out", "i.gif"],
            "goes from one cloud to another: give 2 or more, got 1",
        ),
        (["interpolate", "one.npy", "one.npy", "one.npy"], "between 2 or 4 clouds, got 3"),
        (["mix"], "model.kind is pointnet: this takes style models"),
        (["translate"], "model.kind is pointnet: this takes two_encoder models"),
    ],
)
def test_bad_input_is_named_in_one_line(runs, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.ply").write_bytes(b"ply\n")
    (tmp_path / "note.npy").write_bytes(b"no array")
    np.save(tmp_path / "text.npy", np.full((20, 3), "a"))
    one = np.random.default_rng(0).random((20, 3))
    for name, array in {"flat": one[:4, :2], "few": one[:9], "nan": one * np.nan, "one": one}.items():
        np.save(tmp_path / f"{name}.npy", array)
    before = sorted(tmp_path.iterdir())
    code, _, error = call(capsys, arguments[0], runs.clouds, *arguments[1:])
    assert code == 1 and message in error and len(error.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_clouds_that_do_not_fit_are_named_with_what_is_accepted(runs):
    run = CloudInference.load(runs.clouds, device="cpu", show=False)
    clouds = torch.rand(3, 20, 3)
    for wrong in (clouds.numpy(), clouds[:, :19], clouds[..., :2], clouds[0], clouds[:0], clouds.int()):
        for function in (run.encode, run.reconstruct):
            with pytest.raises(ValueError, match=r"clouds is .*, must be a tensor of floats \[N, 20, 3\]"):
                function(wrong)
    with pytest.raises(ValueError, match="clouds holds NaN or infinity"):
        run.reconstruct(torch.full_like(clouds, torch.nan))
    assert torch.equal(run.encode(clouds.double()), run.encode(clouds))
    with pytest.raises(ValueError, match=r"z is .*, must be a tensor of floats \[N, 4\]"):
        run.decode(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="count is 0"):
        run.sample(0)
    for call in (run.sample, run.own_clouds):
        with pytest.raises(ValueError, match=r"seed is 0\.5, must be a whole number"):
            call(2, seed=0.5)


def test_a_count_also_limits_the_clouds_of_files(run, runs, tmp_path):
    for count, expected in ((2, 2), (None, 60)):
        reconstruct(run, tmp_path / "r.npy", [runs.clouds.parent / "clouds.npy"], count=count)
        assert len(np.load(tmp_path / "r.npy")) == expected


def test_a_folder_of_clouds_is_read_by_name(run, runs, tmp_path):
    folder = tmp_path / "set"
    assert main(["sample", str(runs.clouds), "--device", "cpu", "--count", "3", "--out", str(folder)]) == 0
    (folder / "note.txt").touch()
    files = [folder / f"{number:06d}.ply" for number in range(3)]
    assert torch.equal(run.read([folder]), run.read(files))


def test_drawing_more_clouds_than_a_batch_shows_progress(runs, tmp_path, capsys):
    for out in ("grid.png", "turn.gif"):
        name, *more = ("sample", "--count", 3) if out == "grid.png" else ("interpolate", "--steps", 2)
        for batch, shown in ((2, True), (64, False)):
            code, _, error = call(capsys, name, runs.clouds, *more, "--batch", batch, "--out", tmp_path / out)
            assert code == 0 and ("draw: " in error) is shown
