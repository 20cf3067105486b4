"""Image translation models: what the commands measure and write, beside the functions that they stand on."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import sivae_fast
from sivae_fast.checkpoint import load
from sivae_fast.cli import main
from sivae_fast.data.factors import load_factors
from sivae_fast.evaluation import reconstruction, translation
from sivae_fast.figures import save_image
from sivae_fast.inference import Inference
from sivae_fast.measure_translation import METRICS, Swaps, evaluate_translation
from sivae_fast.run import read_metrics

WITHOUT_LPIPS = [name for name in METRICS if not name.endswith("lpips")]


@pytest.fixture(scope="module")
def run(runs):
    return Inference.load(runs.translation, device="cpu", show=False)


@pytest.fixture(scope="module")
def made():
    return load_factors(None, 16)


@torch.no_grad()
def test_the_measures_are_those_of_the_functions(run, runs, made):
    found = evaluate_translation(run, folder=runs.translation)
    assert list(found) == WITHOUT_LPIPS
    model, images = load(runs.translation), made.images.permute(0, 3, 1, 2).float() / 255
    z = model.encode(images).mean
    givers, others = translation.swap_pairs(made.classes, made.contents, made.test)
    truth = images[made.find(made.classes[givers], made.contents[others])]
    answers = {
        "value": model.decode(model.swap(z[givers], z[others])),
        "truth_of_another_pair": translation.shuffled(truth),
        "image_that_gives_the_class": images[givers],
        "image_that_gives_the_content": images[others],
        "mean_image": images.mean(0).expand_as(truth),
    }
    for name, function in (("mse", reconstruction.mse), ("ssim", reconstruction.ssim)):
        for answer, made_up in answers.items():
            expected = function(made_up, truth).mean().item()
            assert found[f"swap_{name}"][answer] == pytest.approx(expected, rel=1e-4)
        rec = function(model.decode(z[made.test]), images[made.test]).mean().item()
        assert found[name]["value"] == pytest.approx(rec, rel=1e-4)
    for factor, labels in (("class", made.classes), ("content", made.contents)):
        for code, values in zip(("class", "content"), model.split(z), strict=True):
            record = found[f"{factor}_from_{code}_code"]
            exact = translation.probe_accuracy(values, labels, made.test)
            assert record["value"] == pytest.approx(exact, abs=0.01)
            assert record["chance"] == translation.chance(labels, made.test)
    about = {"images": 1000, "weights": "averaged", "resolution": 16, "test_images": int(made.test.sum())}
    for name, record in found.items():
        assert about.items() <= record.items() and read_metrics(runs.translation)[name][-1] == record
    assert found["swap_mse"]["pairs"] == len(givers)


def test_fewer_images_are_drawn_from_the_seed(run, made):
    swaps, all_of_them = Swaps(run, made, 50, seed=3), Swaps(run, made)
    assert len(swaps.test) == len(swaps.training) == 50 and len(swaps.numbers) == 100
    assert made.test[swaps.test].all() and not made.test[swaps.training].any()
    assert torch.isin(torch.cat(swaps.pairs[:2]), swaps.test).all() and len(swaps.givers) > 30
    torch.testing.assert_close(swaps.codes(swaps.test), all_of_them.codes(swaps.test))
    assert not torch.equal(Swaps(run, made, 50, seed=4).test, swaps.test)


def test_the_command_prints_what_was_measured(run, runs, capsys):
    command = ["evaluate", str(runs.translation), "--device", "cpu", "--count", "60", "--seed", "1"]
    assert main([*command, "--metrics", "mse", "swap_mse"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == evaluate_translation(run, ["mse", "swap_mse"], count=60, seed=1)


def test_lpips_where_its_weights_are_given(run, runs, monkeypatch, capsys, tmp_path):
    assert main(["evaluate", str(runs.translation), "--metrics", "lpips", "--weights", str(tmp_path)]) == 1
    assert "LPIPS needs AlexNet, download" in capsys.readouterr().err
    monkeypatch.setattr(
        reconstruction, "load_lpips", lambda weights, device: lambda x, y: torch.full((len(x),), 7.0)
    )
    found = evaluate_translation(run, count=20, weights="there")
    assert list(found) == list(METRICS)
    assert found["lpips"]["value"] == found["swap_lpips"]["value"] == found["swap_lpips"]["mean_image"] == 7


def test_what_a_set_cannot_tell_is_left_out(runs, tmp_path, capsys, caplog):
    assert main(["evaluate", str(runs.videos), "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["mse", "ssim", "class_from_class_code", "class_from_content_code"]
    (line,) = [record.getMessage() for record in caplog.records]
    left = "swap_mse, swap_ssim, content_from_class_code, content_from_content_code"
    assert line.startswith(f"left out: {left} (no image is known to hold the class of one test image")
    savemat = pytest.importorskip("scipy.io").savemat
    views = torch.randint(256, (20, 16, 16, 3, 3, 2), dtype=torch.uint8).numpy()
    for i, car in enumerate(views):
        savemat(tmp_path / f"car_{i:03}_mesh.mat", {"im": car})
    assert main(["evaluate", str(runs.translation), "--data", str(tmp_path), "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)  # cars: the test classes are no training classes
    assert set(WITHOUT_LPIPS) - set(found) == {"class_from_class_code", "class_from_content_code"}
    assert "the training images do not tell the class of the test images" in caplog.text
    assert found["mse"]["data"] == tmp_path.name
    assert found["swap_mse"]["pairs"] > 0 and found["content_from_content_code"]["training_images"] == 108


def test_what_does_not_fit_is_named(runs, tmp_path, capsys):
    two = tmp_path / "two"
    for person in range(2):  # too few frames for the lot to fall on one
        (two / f"person0{person}_handwaving_d4").mkdir(parents=True)
        frame = next((runs.videos.parent / "kth").glob("*/000.png"))
        (two / f"person0{person}_handwaving_d4" / "0.png").write_bytes(frame.read_bytes())
    translated, videos = str(runs.translation), str(runs.videos)
    for arguments, message in [
        ([translated, "--metrics", "fid"], "metrics are fid, must be some of swap_mse, swap_ssim"),
        ([translated, "--count", "0"], "count is 0, must be at least 1"),
        ([translated, "--ood", "a"], "--ood a: model.kind is two_encoder, this option is for other models"),
        ([translated, "--features", "random"], "--features random: model.kind is two_encoder"),
        ([translated, "--data", "gone"], "gone does not exist: give data=PATH (--data PATH)"),
        ([translated, "--data", str(runs.colour)], "accepted are a folder with the .mat files of Cars3D"),
        ([translated, "--data", str(two)], "holds images of 1 channels, the model takes 3"),
        ([videos, "--data", str(two)], "the set has no test images"),
    ]:
        before = read_metrics(runs.translation)
        assert main(["evaluate", *arguments]) == 1
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
        assert read_metrics(runs.translation) == before
    with pytest.raises(ValueError, match=r"model\.kind is residual: swaps need two_encoder"):
        evaluate_translation(Inference.load(runs.residual, device="cpu", show=False))


def test_the_model_itself_is_one_line_of_python(runs):
    model = sivae_fast.load(runs.translation)
    images = model.sample(4, seed=1)
    assert images.shape == model.reconstruct(images).shape == (4, 3, 16, 16)


def cells(path, columns, rows, cell=96, gap=2):
    """The pictures of a grid by (row, column), 16 x 16 numbers each."""
    grid = np.asarray(Image.open(path)).astype(int)
    assert grid.shape == (rows * (cell + gap) + gap, columns * (cell + gap) + gap, 3)
    at = lambda place: slice(gap + place * (cell + gap), gap + place * (cell + gap) + cell, cell // 16)
    return {(row, column): grid[at(row), at(column)] for row in range(rows) for column in range(columns)}


def as_picture(image):
    return image.permute(1, 2, 0).numpy()


def test_a_grid_of_swapped_pictures(run, runs, tmp_path, capsys, made):
    own = run.own_images(4, 2)
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for file, image in zip(files, own, strict=True):
        save_image(file, image)
    out = tmp_path / "deep" / "grid.png"
    command = ["translate", str(runs.translation), "--device", "cpu", "--out", str(out)]
    given = ["--classes", *map(str, files[::2]), "--contents", *map(str, files[1::2])]
    assert main([*command, *given]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    grid = cells(out, 3, 3)
    assert (grid[0, 0] == 255).all()
    z = run.encode(own)
    for i in range(2):
        assert np.array_equal(grid[i + 1, 0], as_picture(own[2 * i]))
        assert np.array_equal(grid[0, i + 1], as_picture(own[2 * i + 1]))
        for j in range(2):
            swapped = run.decode(run.model.swap(z[2 * i, None], z[2 * j + 1, None]))[0]
            assert np.abs(grid[i + 1, j + 1] - as_picture(swapped)).max() <= 1
    written = out.read_bytes()
    assert main([*command, "--count", "2", "--seed", "2"]) == 0  # the same test images without files
    assert out.read_bytes() == written
    tests = {image.numpy().tobytes() for image in made.images[made.test].permute(0, 3, 1, 2)}
    assert {image.numpy().tobytes() for image in own} <= tests


def test_the_commands_of_image_models(run, runs, tmp_path, capsys):
    common = [str(runs.translation), "--device", "cpu", "--out"]
    assert main(["sample", *common, str(tmp_path / "s.png"), "--count", "4"]) == 0
    assert main(["interpolate", *common, str(tmp_path / "i.png"), "--steps", "3"]) == 0
    capsys.readouterr()
    assert main(["reconstruct", *common, str(tmp_path / "r.png"), "--count", "6", "--seed", "5"]) == 0
    images = run.own_images(6, 5)
    error = ((images.float() - run.reconstruct(images).float()) / 255).square().mean().item()
    assert json.loads(capsys.readouterr().out)["mse"] == pytest.approx(error, rel=1e-4)
    assert all((tmp_path / f"{name}.png").exists() for name in "sir")


def test_bad_pictures_are_named_in_one_line(runs, tmp_path, capsys):
    save_image(tmp_path / "large.png", torch.zeros(3, 20, 20, dtype=torch.uint8))
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    (tmp_path / "torn.png").write_bytes(b"no picture")
    out = tmp_path / "grid.png"
    for path, arguments, message in [
        (runs.translation, ["--classes", "large.png"], "large.png has 20x20 pixels, the model takes 16x16"),
        (runs.translation, ["--contents", "torn.png"], "torn.png cannot be used: it is no readable picture"),
        (runs.translation, ["--contents", "gone.png"], "gone.png cannot be used: it does not exist"),
        (runs.translation, ["--count", "0"], "count is 0, must be at least 1"),
        (runs.translation, ["--data", "gone"], "gone does not exist: give data=PATH (--data PATH)"),
        (runs.translation, ["--out", "grid.gif"], "grid.gif: a name ending in .png is needed"),
        (runs.residual, [], "model.kind is residual: this takes two_encoder models"),
    ]:
        arguments = [str(tmp_path / a) if a.endswith((".png", ".gif", "gone")) else a for a in arguments]
        assert main(["translate", str(path), "--out", str(out), *arguments]) == 1
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1 and not out.exists()
    assert main(["translate", str(runs.density), "--out", str(out)]) == 1
    accepted = "model.kind is mlp: this takes style, residual, two_encoder, own and pointnet models"
    assert accepted in capsys.readouterr().err
    resized = ["--classes", str(tmp_path / "large.png"), "--resize", "--count", "1"]
    assert main(["translate", str(runs.translation), "--out", str(out), *resized]) == 0 and out.exists()


def test_grey_models_take_pictures_in_colour_as_grey_ones(runs, tmp_path):
    """As all commands do: a single file is brought to the channels of the model."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    out = tmp_path / "g.png"
    arguments = ["--classes", str(tmp_path / "red.png"), "--count", "2", "--out", str(out)]
    assert main(["translate", str(runs.videos), *arguments]) == 0
    assert cells(out, 3, 2)[1, 0].std() == 0
