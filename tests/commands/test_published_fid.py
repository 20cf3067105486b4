"""The options that measure FID as it was published, and the records that tell such measurements apart."""

import json

import pytest
import torch

from sivae_fast.cli import main
from sivae_fast.evaluation import fid
from sivae_fast.evaluation.features import load_features
from sivae_fast.inference import Inference
from sivae_fast.measure import RealImages, evaluate, generated
from sivae_fast.run import read_metrics

RANDOM = load_features("random")


@pytest.fixture
def run(runs):
    return Inference.load(runs.style, device="cpu", show=False, batch=10)


def test_half_of_the_real_images_are_mirrored_by_the_seed(run):
    reals = RealImages(run, None, 24)
    stored, mirrored = (torch.cat(list(reals.pixels(seed))) for seed in (None, 5))
    same = (mirrored == stored).all(dim=(1, 2, 3))
    assert 6 <= same.sum() <= 18
    assert torch.equal(mirrored[~same], stored[~same].flip(3))
    assert torch.equal(mirrored, torch.cat(list(reals.pixels(5))))
    assert not torch.equal(mirrored, torch.cat(list(reals.pixels(6))))


def test_ranks_mirror_the_same_images_as_one_does(run, monkeypatch):
    reals = RealImages(run, None, 24)
    whole, parts = torch.cat(list(reals.pixels(5))), []
    for part in ((0, 11), (11, 24)):
        monkeypatch.setattr("sivae_fast.measure.share", lambda count, part=part: part)
        parts += reals.pixels(5)
    assert torch.equal(torch.cat(parts), whole)


def test_samples_are_rounded_down(run):
    nearest, down = (torch.cat(list(generated(run, 24, 0, how))) for how in (False, True))
    assert down.dtype == torch.uint8 and set((nearest.int() - down.int()).unique().tolist()) == {0, 1}


def test_numbers_are_of_what_the_options_say_and_records_tell_them_apart(run):
    real = torch.cat(list(RealImages(run, None, 24).pixels(3)))
    fake = torch.cat(list(generated(run, 24, 3, True)))
    published = evaluate(run, ["fid", "mse"], features=RANDOM, count=24, seed=3, mirror=True, round_down=True)
    expected = fid.compare(RANDOM, [real], [fake], ["fid"])["fid"]
    assert published["fid"]["value"] == pytest.approx(expected, rel=1e-4)
    assert (published["fid"]["mirrored"], published["fid"]["rounded"]) == (True, "down")
    assert not {"mirrored", "rounded"} & set(published["mse"])
    usual = evaluate(run, ["fid"], features=RANDOM, count=24, seed=3)["fid"]
    assert not {"mirrored", "rounded", "batch"} & set(usual)
    assert usual["value"] != published["fid"]["value"]


def test_features_in_train_mode_depend_on_the_batch_which_is_told(run):
    network = torch.nn.Sequential(RANDOM.network, torch.nn.BatchNorm1d(64, eps=1e-12)).train()
    features = RANDOM._replace(network=network)
    assert evaluate(run, ["fid"], features=features, count=20)["fid"]["batch"] == 10


def test_the_command_takes_them_for_fid_and_its_kin_alone(runs, capsys):
    def told(model, *arguments):
        assert main(["evaluate", str(model), "--device", "cpu", "--count", "12", *arguments]) == 1
        return capsys.readouterr().err

    fid_of_few = ["--device", "cpu", "--count", "12", "--features", "random"]
    assert main(["evaluate", str(runs.style), *fid_of_few, "--mirror", "--round-down"]) == 0
    record = json.loads(capsys.readouterr().out)["fid"]
    assert (record["mirrored"], record["rounded"]) == (True, "down")
    assert read_metrics(runs.style)["fid"][-1] == record
    only = "this option is for --metrics fid kid precision recall density coverage"
    assert f"--mirror: {only}" in told(runs.style, "--metrics", "mse", "--mirror")
    assert f"--round-down: {only}" in told(runs.style, "--ood", str(runs.colour), "--round-down")
    for model in (runs.clouds, runs.density, runs.translation):
        assert "--round-down: model.kind is" in told(model, "--round-down")
