"""Measurements while training: due once each, on all ranks, and training goes on as if there were none."""

import contextlib
import json
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

import sivae_fast
from sivae_fast import consistency, measure, measure_clouds, measure_translation
from sivae_fast.checkpoint import load_newest
from sivae_fast.commands.report import report
from sivae_fast.config import ConfigError, make_config
from sivae_fast.evaluation import reconstruction
from sivae_fast.evaluation.features import load_features
from sivae_fast.growth import Stage
from sivae_fast.inference import Inference
from sivae_fast.measure import evaluate
from sivae_fast.progress import Progress
from sivae_fast.run import append_metric, read_metrics, read_stats
from sivae_fast.systems import make_model
from sivae_fast.training import evaluator, recorder
from sivae_fast.training.loop import Trainer, train

RESIDUAL = {"kind": "residual", "resolution": 16, "channels": 1, "widths": [4, 8], "latent_size": 4}
STYLE = {"start_channels": 4, "max_channels": 8, "latent_size": 8, "mapping_layers": 2}
STYLE |= {"kind": "style", "resolution": 16, "channels": 1}
MEASURED = {"every": 32, "metrics": ["fid", "mse", "log_likelihood"], "images": 20, "features": "random"}
CLOCKS = ("time", "_seconds", "_per_second", "memory")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grey")
    numbers = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(numbers.integers(0, 256, (16, 16), np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def settings(folder, pictures, images=80, model=RESIDUAL, evaluate=None, **sections):
    grows = {"growth": {"images_per_level": 24}} if model["kind"] == "style" else {}
    run = {"folder": str(folder), "tick": 16, "checkpoint": 16, "samples": 1000, "keep": 9}
    return make_config(
        {
            "model": model,
            "objective": {"beta_neg": 16.0},
            "data": {"path": str(pictures), "value_range": "unit", "loader": "torch"},
            "train": {"images": images, "batch": 8, "warmup_images": 8},
            "engine": {"kind": "torch"},
            "run": run,
            "evaluate": evaluate or {},
            **grows,
            **sections,
        }
    )


def ticks(run, *left_out):
    names = (*CLOCKS, *left_out)
    return [{k: v for k, v in tick.items() if not any(n in k for n in names)} for tick in read_stats(run)]


def weights(run):
    tensors, state = load_newest(run / "checkpoints")
    state["marks"].pop("evaluate", None)
    return tensors, {key: value for key, value in state.items() if key != "config"}


def assert_same_training(one, other):
    assert ticks(one, "metric/") == ticks(other, "metric/")
    (first, first_state), (second, second_state) = weights(one), weights(other)
    assert first_state == second_state and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("half_life", [100, None], ids=["averaged", "raw"])
@pytest.mark.parametrize("model", [RESIDUAL, STYLE], ids=["residual", "style"])
def test_training_is_bit_equal_with_and_without(tmp_path, pictures, model, half_life):
    """The residual model has batch norm, the style model grows and its decoder draws noise."""
    average = {"half_life": half_life}
    plain = train(settings(tmp_path / "plain", pictures, model=model, average=average))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    measured = train(settings(tmp_path / "on", pictures, model=model, average=average, evaluate=MEASURED))
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())
    assert_same_training(plain, measured)
    assert [r["images"] for r in read_metrics(measured)["mse"]] == [32, 64, 80]
    assert {r["weights"] for r in read_metrics(measured)["mse"]} == {"averaged" if half_life else "raw"}


def test_values_are_those_of_the_command_and_reach_stats_and_report(tmp_path, pictures):
    run = train(settings(tmp_path, pictures, evaluate=MEASURED))
    features = load_features("random")
    model = Inference.load(run, device="cpu", show=False)
    expected = evaluate(model, MEASURED["metrics"], features=features, count=20)
    found = read_metrics(run)
    for name, record in expected.items():
        assert found[name][-1].keys() == record.keys()
        assert found[name][-1]["value"] == pytest.approx(record["value"], rel=1e-4)
        in_ticks = {
            tick["images"]: tick[f"metric/{name}"] for tick in read_stats(run) if f"metric/{name}" in tick
        }
        assert in_ticks == {r["images"]: r["value"] for r in found[name]}
    page = report(run).read_text(encoding="utf-8")
    assert "<h3>fid</h3>" in page and "<h3>metric/fid</h3>" not in page


@pytest.mark.parametrize("metric", ["mse", "psnr"])
def test_the_best_model_so_far_is_kept(tmp_path, pictures, monkeypatch, metric):
    """The best of three values at 16 pixels; better ones at 8 pixels or by another protocol are no rivals."""
    values = iter([1.0, 5.0, 4.0, 6.0] if metric == "mse" else [9.0, 5.0, 6.0, 4.0])
    of = evaluator.ImageMeasures.of

    def measured(self, *about):
        records = of(self, *about)
        records[metric]["value"] = next(values)
        if records[metric]["resolution"] == 16:
            better = {**records[metric], "value": 0.0 if metric == "mse" else 99.0}
            for other in ("mirrored", "rounded", "features"):
                rival = {**better, other: "of another protocol"}
                append_metric(next(tmp_path.glob("*/run.json")).parent, metric, rival)
        return records

    monkeypatch.setattr(evaluator.ImageMeasures, "of", measured)
    asked = {"every": 32, "metrics": [metric, "log_likelihood"], "images": 20}
    run = train(settings(tmp_path, pictures, 128, model=STYLE, evaluate=asked))
    assert [r["resolution"] for r in read_metrics(run)[metric]] == [8] + [16] * 12
    best = sivae_fast.load(run / f"best-{metric}.safetensors")
    assert best.images == 96 and best.facts["weights"] == "averaged"
    assert [path.name for path in run.glob("best-*")] == [f"best-{metric}.safetensors"]


@pytest.mark.parametrize(
    ("left", "best"), [([3.0, 1.0, 2.0], 32), ([3.0, 2.0, 1.0], 64)], ids=["before", "of the course"]
)
def test_the_best_of_a_course_that_was_left_is_none(tmp_path, pictures, monkeypatch, left, best):
    """NaN after the measurement at 48 images takes training back to 32; from there it measures anew."""
    values, iterate = iter([*left, 6.0, 4.0, 5.0]), Trainer.iterate
    of = evaluator.ImageMeasures.of

    def measured(self, *about):
        records = of(self, *about)
        return {"mse": {**records["mse"], "value": next(values)}}

    def spoilt(trainer, x, stage, *streams):
        iterate(trainer, x * float("nan") if trainer.position == 48 else x, stage, *streams)

    monkeypatch.setattr(evaluator.ImageMeasures, "of", measured)
    monkeypatch.setattr(Trainer, "iterate", spoilt)
    asked = {"every": 16, "metrics": ["mse"], "images": 20}
    interval = {"folder": str(tmp_path), "tick": 16, "checkpoint": 32, "samples": 1000}
    run = train(settings(tmp_path, pictures, evaluate=asked, guard={"rollbacks": 1}, run=interval))
    assert [r["value"] for r in read_metrics(run)["mse"]] == [*left[:2], 6.0, 4.0, 5.0]
    assert sivae_fast.load(run / "best-mse.safetensors").images == best


def test_a_resumed_run_repeats_none_and_skips_none(tmp_path, pictures):
    straight = train(settings(tmp_path / "one", pictures, 96, evaluate=MEASURED))
    for images in (32, 48, 96):
        resumed = train(settings(tmp_path / "two", pictures, images, evaluate=MEASURED))
        if images == 48:  # as after a kill: the newest checkpoint is older than the last measurement
            for path in (resumed / "checkpoints").glob("*48.*"):
                path.unlink()
    assert [r["images"] for r in read_metrics(straight)["fid"]] == [32, 64, 96]
    assert read_metrics(straight) == read_metrics(resumed) and ticks(straight) == ticks(resumed)


def test_a_measurement_waits_for_its_tick_and_takes_no_time_of_training(tmp_path, pictures, monkeypatch):
    """Due at 24, 48 and 72 images; what the end measures is not measured again where training goes on."""
    inside, skipped = [], []

    @contextlib.contextmanager
    def averaged_buffers(model):
        inside.append(model)
        yield
        inside.clear()

    def measured(self, model, images, weights):
        assert inside  # as all ranks have them together
        return {"mse": {"images": images, "value": 1.0}}

    monkeypatch.setattr(recorder, "averaged_buffers", averaged_buffers)
    monkeypatch.setattr(evaluator.ImageMeasures, "of", measured)
    monkeypatch.setattr(Progress, "skip", lambda self, seconds: skipped.append(seconds))
    asked = {**MEASURED, "every": 24, "metrics": ["mse"]}
    for images in (72, 96):
        run = train(settings(tmp_path, pictures, images, evaluate=asked))
    assert [r["images"] for r in read_metrics(run)["mse"]] == [32, 48, 72, 96]
    assert len(skipped) == 4 and min(skipped) > 0


def test_it_can_be_turned_on_and_off_on_the_way(tmp_path, pictures):
    train(settings(tmp_path, pictures, 48))
    run = train(settings(tmp_path, pictures, 80, evaluate=MEASURED))
    assert run == train(settings(tmp_path, pictures, 96))
    assert [r["images"] for r in read_metrics(run)["mse"]] == [64, 80]
    assert_same_training(run, train(settings(tmp_path / "straight", pictures, 96)))


def test_what_is_measured_is_what_was_asked_for(tmp_path, pictures, monkeypatch):
    told = []
    monkeypatch.setattr(evaluator, "evaluate", lambda *given, **options: told.append((*given, options)))
    asked = {"every": 8, "images": 20, "data": str(pictures), "weights": "there"}
    train = {"images": 80, "batch": 8, "seed": 3}
    for metrics in (["ssim", "mse"], ["ssim"]):  # 8 pixels are too few for one of them
        config = settings(tmp_path, None, 80, STYLE, {**asked, "metrics": metrics}, train=train)
        made = evaluator.Evaluator(config, torch.device("cpu"))
        found = made.measure(make_model(config), Stage(1, 0.5, 8, 1e-3, 16.0), 24, "raw")
    assert found == {}
    ((run, metrics, options),) = told
    assert metrics == ["mse"] and run.resolution == 8 and made._model._blend == 0.5
    assert options == {
        "features": None, "count": 20, "seed": 3, "data": str(pictures), "weights": "there"
    }  # fmt: skip


def test_small_levels_have_no_ssim(tmp_path, pictures):
    measured = {**MEASURED, "every": 16, "metrics": ["ssim", "psnr"]}
    run = train(settings(tmp_path, pictures, model=STYLE, evaluate=measured))
    found = {name: [r["images"] for r in records] for name, records in read_metrics(run).items()}
    assert found == {"psnr": [16, 32, 48, 64, 80], "ssim": [64, 80]}  # 16 pixels from 48 images on


def test_small_levels_have_no_lpips(tmp_path, pictures, monkeypatch):
    calls = []

    def load_lpips(weights, device):
        return lambda x, y: calls.append(x.shape[-1]) or torch.zeros(len(x))

    monkeypatch.setattr(evaluator, "load_lpips", load_lpips)
    monkeypatch.setattr(reconstruction, "load_lpips", load_lpips)
    monkeypatch.setitem(reconstruction.SMALLEST, "lpips", 16)  # the pictures are no larger; it is 31
    measured = {**MEASURED, "every": 16, "metrics": ["lpips", "psnr"]}
    run = train(settings(tmp_path, pictures, model=STYLE, evaluate=measured))
    assert [r["images"] for r in read_metrics(run)["lpips"]] == [64, 80] and set(calls) == {16}


def test_two_ranks_share_the_work(launch):
    shown = {"evaluate__every": 32, "evaluate__metrics": "[fid,mse]", "evaluate__images": 20}
    for ranks in (1, 2):
        launch(ranks=ranks, run__name=f"of-{ranks}", evaluate__features="random", **shown)
    one, two = (read_metrics(next((launch.folder / "runs").glob(f"*-of-{n}"))) for n in (1, 2))
    for name in ("fid", "mse"):
        assert [r["images"] for r in one[name]] == [r["images"] for r in two[name]] == [32, 64, 80]
        for first, second in zip(one[name], two[name], strict=True):
            assert first["real_images"] == second["real_images"] == 20
            assert first["value"] == pytest.approx(second["value"], rel=0.02)  # the decoder's noise differs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "inception"}, "Inception weights are needed: download"),
        ({"features": "inception", "weights": "/nowhere.pth"}, "/nowhere.pth does not exist: download"),
        ({"metrics": ["lpips"], "weights": "/nowhere"}, "LPIPS needs AlexNet, download"),
        ({"data": "/nowhere"}, r"evaluate\.data=/nowhere does not exist: a set such as data\.path"),
        (
            {"metrics": ["inception_score"]},
            r"evaluate\.metrics=inception_score: model\.kind=residual accepts fid, ",
        ),
        ({"metrics": ["jsd", "mse"]}, r"evaluate\.metrics=jsd: model\.kind=residual accepts fid, "),
        ({"metrics": []}, "evaluate.metrics"),
        ({"images": 3}, "evaluate.images=3"),
    ],
)
def test_what_is_missing_shows_before_there_is_a_run(tmp_path, pictures, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(settings(tmp_path / "runs", pictures, evaluate={**MEASURED, **changes}))
    assert not (tmp_path / "runs").exists()


def test_what_does_not_fit_the_model_is_named(tmp_path, pictures, monkeypatch):
    small = {**RESIDUAL, "resolution": 8}
    with pytest.raises(ConfigError, match="16x16 images of 1 channels, the model takes 8x8"):
        train(settings(tmp_path, pictures, model=small, evaluate={**MEASURED, "data": str(pictures)},
                       data={"path": str(eight(tmp_path / "eight")), "loader": "torch"}))  # fmt: skip
    monkeypatch.setattr(evaluator, "load_lpips", lambda weights, device: None)
    with pytest.raises(ConfigError, match=r"lpips needs images of at least 31 pixels a side, .* is 8"):
        train(settings(tmp_path, pictures, model=small, evaluate={**MEASURED, "metrics": ["lpips"]},
                       data={"path": str(eight(tmp_path / "eight")), "loader": "torch"}))  # fmt: skip
    with pytest.raises(ConfigError, match="ssim needs images of at least 11 pixels"):
        train(settings(tmp_path, pictures, model=small, evaluate={**MEASURED, "metrics": ["ssim"]},
                       data={"path": str(eight(tmp_path / "eight")), "loader": "torch"}))  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"every=9 needs .* one of style, residual, own, pointnet, two_encoder, got mlp"
    ):
        make_config({"model": {"kind": "mlp"}, "data": {"kind": "density"}, "evaluate": {"every": 9}})


@pytest.mark.parametrize(
    ("images", "message"),
    [(20, r"images=20: 30 images are needed, .* gives 20"), (90, r"data=null: 30 images are needed, .* 24")],
)
def test_every_rank_needs_an_image(tmp_path, pictures, monkeypatch, images, message):
    monkeypatch.setattr(evaluator, "ranks", lambda: 30)
    with pytest.raises(ConfigError, match=rf"evaluate\.{message}"):
        train(settings(tmp_path, pictures, evaluate={**MEASURED, "images": images}))


def eight(folder):
    folder.mkdir(exist_ok=True)
    for i in range(6):
        Image.new("L", (8, 8), 40 * i).save(folder / f"{i}.png")
    return folder


def test_the_configuration_knows_every_metric():
    for kind, module in {
        "style": measure, "residual": measure, "pointnet": measure_clouds, "two_encoder": measure_translation,
    }.items():  # fmt: skip
        assert consistency.METRICS[kind] == module.METRICS
        assert set(consistency.USUAL_METRICS[kind]) <= set(module.METRICS)


def test_no_path_of_this_machine_leaves_it(tmp_path, pictures):
    paths = {"data": "/home/me/faces", "weights": "/home/me/w.pth"}
    measured = settings(tmp_path, pictures, evaluate=paths)
    assert "/home/me" not in json.dumps(measured.portable().to_dict())
    assert measured.identity() == settings(tmp_path, pictures).identity()


def test_the_best_is_the_most_or_the_least():
    known = {name for module in (measure, measure_clouds, measure_translation) for name in module.METRICS}
    errors = {"fid", "kid", "mse", "lpips", "swap_mse", "swap_lpips", "jsd", "mmd_chamfer", "mmd_emd"}
    errors |= {"class_from_content_code", "content_from_class_code"}  # what a code should not tell
    assert {name for name in known if evaluator.is_best(name, 1.0, [2.0])} == errors
    assert {name for name in known if evaluator.is_best(name, 2.0, [1.0])} == known - errors
    assert not any(evaluator.is_best(name, 1.0, [1.0]) for name in known)


@pytest.mark.parametrize("metric", ["psnr", "mse"])
def test_what_is_not_finite_is_never_the_best_and_hinders_none(metric):
    assert evaluator.is_best(metric, 1.0, [None])
    assert not evaluator.is_best(metric, math.nan, []) and not evaluator.is_best(metric, math.inf, [])
    assert evaluator.is_best(metric, 2.0, [None, 1.0]) == (metric == "psnr")
