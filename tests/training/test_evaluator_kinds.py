"""Point clouds and translation, measured while they train: as images are, see test_evaluator.py."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from sivae_fast import measure_translation
from sivae_fast.commands.report import report
from sivae_fast.config import ConfigError, make_config
from sivae_fast.evaluation import reconstruction
from sivae_fast.inference import Inference
from sivae_fast.inference_clouds import CloudInference
from sivae_fast.measure_clouds import evaluate_clouds
from sivae_fast.measure_translation import evaluate_translation
from sivae_fast.run import read_metrics, read_stats
from sivae_fast.systems import make_model, make_schedule
from sivae_fast.training import evaluator, recorder
from sivae_fast.training.loop import train

from .conftest import ROOT, environment
from .test_evaluator import assert_same_training

CLOUDS = ["jsd", "mmd_chamfer", "coverage_chamfer"]
SWAPS = ["swap_mse", "mse", "ssim", "content_from_content_code"]
MEASURED = {"clouds": CLOUDS, "translation": SWAPS}
KINDS = list(MEASURED)


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Those of clouds take longer than all the rest."""
    monkeypatch.setattr(recorder, "save_picture", lambda *about: None)


@pytest.fixture(scope="module")
def clouds_file(tmp_path_factory):
    """60 clouds of 20 points, of which 3 are validation and 6 are test clouds."""
    points = np.random.default_rng(0).normal(size=(60, 20, 3))
    path = tmp_path_factory.mktemp("clouds") / "clouds.npy"
    np.save(path, (points / np.linalg.norm(points, axis=2, keepdims=True) / 2).astype(np.float32))
    return path


@pytest.fixture
def sections(clouds_file):
    def of(kind, folder, evaluate=None, images=48, **run):
        """A configuration as nested dictionaries; every 16 images are a tick."""
        systems = {
            "clouds": {
                "model": {"kind": "pointnet", "points": 20, "latent_size": 4},
                "objective": {"reconstruction": "chamfer", "beta_rec": 20.0},
                "data": {"kind": "pointclouds", "path": str(clouds_file), "points": 20},
            },
            "translation": {
                "model": {
                    "kind": "two_encoder", "resolution": 16, "class_size": 4, "content_size": 4, "width": 4,
                },
                "data": {"kind": "factors"},
            },
        }  # fmt: skip
        return {
            **systems[kind],
            "train": {"images": images, "batch": 8, "warmup_images": 16},
            "engine": {"kind": "torch"},
            "average": {"half_life": 16},
            "evaluate": {"images": 40, **(evaluate or {})},
            "run": {"folder": str(folder), "tick": 16, "checkpoint": 1000, "samples": 1000, **run},
        }

    return of


@pytest.fixture
def settings(sections):
    return lambda *about, **more: make_config(sections(*about, **more))


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bit_equal_with_and_without(tmp_path, settings, kind):
    plain = train(settings(kind, tmp_path / "plain"))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    measured = train(settings(kind, tmp_path / "on", {"every": 32, "metrics": MEASURED[kind]}))
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())
    assert_same_training(plain, measured)
    found = read_metrics(measured)
    assert set(found) == set(MEASURED[kind])
    assert all([r["images"] for r in records] == [32, 48] for records in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_command_and_reach_stats_and_report(tmp_path, settings, kind):
    run = train(settings(kind, tmp_path, {"every": 16, "metrics": MEASURED[kind]}))
    found = read_metrics(run)
    page = report(run).read_text(encoding="utf-8")
    for name, record in by_one_process(kind, run).items():
        assert found[name][-1] == record
        in_ticks = {tick["images"]: tick[f"metric/{name}"] for tick in read_stats(run)}
        assert in_ticks == {r["images"]: r["value"] for r in found[name]} and len(in_ticks) == 3
        assert f"<h3>{name}</h3>" in page and f"<h3>metric/{name}</h3>" not in page


def by_one_process(kind, run):
    """What the command measures of the finished run."""
    options, about = {"device": "cpu", "show": False}, {"count": 40, "seed": 0}
    if kind == "clouds":
        return evaluate_clouds(CloudInference.load(run, **options), CLOUDS, split="validation", **about)
    return evaluate_translation(Inference.load(run, **options), SWAPS, **about)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_measured_is_what_was_asked_for(tmp_path, settings, monkeypatch, kind):
    told = []
    for name in ("evaluate_clouds", "evaluate_translation"):
        monkeypatch.setattr(evaluator, name, lambda run, metrics, **options: told.append((metrics, options)))
    config = settings(kind, tmp_path, {"every": 8, "metrics": MEASURED[kind], "images": 30})
    stage = make_schedule(config).at(8)
    evaluator.Evaluator(config, torch.device("cpu")).measure(make_model(config), stage, 8, "raw")
    ((metrics, options),) = told
    assert [*metrics] == MEASURED[kind] and options["count"] == 30


@pytest.mark.parametrize(("kind", "usual"), [("clouds", ["jsd"]), ("translation", ["mse", "swap_mse"])])
def test_a_kind_has_metrics_that_need_not_be_named(tmp_path, settings, kind, usual):
    run = train(settings(kind, tmp_path, {"every": 48}))
    assert sorted(read_metrics(run)) == usual


def test_a_resumed_run_repeats_none_and_skips_none(tmp_path, settings):
    measured = {"every": 16, "metrics": ["jsd"]}
    straight = train(settings("clouds", tmp_path / "one", measured))
    for images in (32, 48):
        resumed = train(settings("clouds", tmp_path / "two", measured, images=images))
    assert [r["images"] for r in read_metrics(straight)["jsd"]] == [16, 32, 48]
    assert read_metrics(straight) == read_metrics(resumed)


def test_other_data_and_fewer_of_them(tmp_path, settings, clouds_file):
    np.save(tmp_path / "other.npy", 0.5 * np.load(clouds_file))
    chosen = {"every": 48, "metrics": ["jsd"], "images": 6}
    values = {
        name: read_metrics(train(settings("clouds", tmp_path / name, {**chosen, "data": data})))["jsd"][0]
        for name, data in (("own", None), ("other", str(tmp_path / "other.npy")))
    }
    assert values["own"]["value"] != values["other"]["value"] and values["own"]["validation_clouds"] == 3
    assert values["other"]["test_clouds"] == 6
    assert values["other"]["data"] == "other.npy" and "data" not in values["own"]
    run = train(settings("translation", tmp_path, {"every": 48, "images": 6}))
    assert read_metrics(run)["mse"][0]["test_images"] == 6


def test_lpips_where_its_weights_are(tmp_path, settings, monkeypatch):
    given = []

    def load_lpips(weights, device):
        given.append(weights)
        return lambda x, y: x.new_full((len(x),), 7.0)

    monkeypatch.setattr(reconstruction, "load_lpips", load_lpips)
    monkeypatch.setitem(reconstruction.SMALLEST, "lpips", 16)  # the model's size
    measured = {"every": 48, "metrics": ["swap_lpips", "lpips"], "weights": "there"}
    found = read_metrics(train(settings("translation", tmp_path, measured)))
    assert found["lpips"][0]["value"] == found["swap_lpips"][0]["mean_image"] == 7 and set(given) == {"there"}


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_share_the_work(tmp_path, sections, kind):
    launch(tmp_path, sections(kind, tmp_path, {"every": 16, "metrics": MEASURED[kind]}), ranks=2)
    (run,) = tmp_path.glob("00000-*")
    found = read_metrics(run)
    assert set(found) == set(MEASURED[kind])
    for name, record in by_one_process(kind, run).items():
        assert [r["images"] for r in found[name]] == [16, 32, 48]
        assert found[name][-1].keys() == record.keys()
        assert found[name][-1]["value"] == pytest.approx(record["value"], rel=1e-5)


def launch(folder, values, ranks):
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *run, str(ROOT / "launch" / "train.py"), "--config", "config.yaml"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("clouds", {"metrics": ["fid", "jsd"]}, r"metrics=fid: model\.kind=pointnet accepts jsd, mmd_"),
        ("clouds", {"data": "/nowhere"}, r"evaluate\.data=/nowhere does not exist"),
        ("clouds", {"weights": "w"}, r"weights=w needs .* one of style, residual, own, two_encoder, got"),
        ("clouds", {"features": "random"}, r"features=random needs .* one of style, residual, own, got"),
        ("translation", {"metrics": ["psnr"]}, r"metrics=psnr: model\.kind=two_encoder accepts swap_mse"),
        ("translation", {"metrics": ["lpips"], "weights": "/no"}, r"metrics=lpips: /no/.* download"),
        ("translation", {"data": "/nowhere"}, r"evaluate\.data=/nowhere does not exist"),
        ("translation", {"features": "random"}, r"features=random needs .* one of style, residual, own, got"),
    ],
)
def test_what_is_missing_shows_before_there_is_a_run(tmp_path, settings, kind, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(settings(kind, tmp_path / "runs", {"every": 16, **changes}))
    assert not (tmp_path / "runs").exists()


def test_pot_is_asked_for_before_there_is_a_run(tmp_path, settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ConfigError, match=r"evaluate\.metrics=jsd, mmd_emd: .* needs POT: pip install"):
        train(settings("clouds", tmp_path / "runs", {"every": 16, "metrics": ["jsd", "mmd_emd"]}))
    assert not (tmp_path / "runs").exists()


def test_what_a_set_cannot_tell_is_said_once(tmp_path, settings, caplog, monkeypatch):
    monkeypatch.setattr(measure_translation.Swaps, "tells", lambda self, factor: False)
    chosen = ["mse", "class_from_class_code"]
    run = train(settings("translation", tmp_path, {"every": 16, "metrics": chosen}))
    assert set(read_metrics(run)) == {"mse"}
    assert sum("left out: class_from_class_code" in message for message in caplog.messages) == 1
    with pytest.raises(
        ConfigError, match=r"evaluate\.data=null: the set tells none of class_from_class_code"
    ):
        train(settings("translation", tmp_path / "none", {"every": 16, "metrics": chosen[1:]}))
