import json
import os
import shutil
import socket

import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

from sivae_fast.checkpoint import load as load_model
from sivae_fast.checkpoint import save_snapshot
from sivae_fast.cli import main
from sivae_fast.commands.card import card
from sivae_fast.commands.numbers import as_json
from sivae_fast.commands.report import report
from sivae_fast.evaluation import fid, likelihood
from sivae_fast.evaluation.features import load_features
from sivae_fast.inference import Inference
from sivae_fast.measure import METRICS, RealImages, detect_others, evaluate
from sivae_fast.run import read_metrics
from tests.commands.conftest import RESIDUAL, write_run

RANDOM = load_features("random")
ALL = [name for name in METRICS if name != "lpips"]


def load(path, **options):
    return Inference.load(path, device="cpu", show=False, batch=8, **options)


def test_records_say_what_was_measured_and_go_into_the_run_folder(runs):
    run = load(runs.style)
    records = evaluate(run, ALL, features=RANDOM, count=20, folder=runs.style, seed=3)
    assert list(records) == ALL
    about = {"images": 1000, "weights": "averaged", "real_images": 20, "seed": 3, "resolution": 16}
    for name, record in records.items():
        assert about.items() <= record.items()
        assert read_metrics(runs.style)[name][-1] == record
    assert records["fid"]["features"] == "random network, not comparable"
    assert records["fid"]["comparable"] is False and records["fid"]["generated_images"] == 20


def test_records_of_another_set_name_it(runs, tmp_path):
    run = shutil.copytree(runs.residual, tmp_path / "run")
    for options in ([], ["--data", str(runs.dark)], ["--count", "10"]):
        command = ["evaluate", str(run), "--device", "cpu", "--metrics", "mse", "--count", "12", *options]
        assert main(command) == 0
    own, other, last = read_metrics(run)["mse"]
    assert other["data"] == "dark" and own.keys() == last.keys() == other.keys() - {"data"}
    assert own["value"] != other["value"] and "data dark" not in card(run)
    main([*command, "--data", str(runs.dark)])
    assert "data: dark" in report(run).read_text() and "data dark" in card(run)


def test_numbers_are_those_of_the_parts(runs):
    run = load(runs.residual)
    records = evaluate(run, ["fid", "mse"], features=RANDOM, count=24)
    real = run.read([runs.grey])
    fake = torch.cat([run.decode(z, 0) for z in run.prior(24, 0).split(8)])
    expected = fid.compare(RANDOM, [real], [fake], ["fid"])["fid"]
    assert records["fid"]["value"] == pytest.approx(expected, rel=1e-4)
    error = ((run.reconstruct(real).float() - real.float()) / 255).square().mean().item()
    assert records["mse"]["value"] == pytest.approx(error, rel=1e-4)


def _measure(rank, world, port, path, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    records = evaluate(load(path), ["fid", "precision", "mse"], features=RANDOM, count=24)
    with open(f"{out}/{rank}.json", "w") as file:
        json.dump({name: record["value"] for name, record in records.items()}, file)
    torch.distributed.destroy_process_group()


def test_two_ranks_share_the_work_and_agree_with_one(runs, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_measure, (2, port, str(runs.residual), str(tmp_path)), nprocs=2)
    one = evaluate(load(runs.residual), ["fid", "precision", "mse"], features=RANDOM, count=24)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == pytest.approx({name: record["value"] for name, record in one.items()}, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "metric", "message"),
    [
        ("style", {}, "lpips", "LPIPS needs AlexNet"),
        ("growing", {}, "ssim", "SSIM needs images of at least 11"),  # it is at 8x8
        ("residual", {"batch_norm": "batch"}, "log_likelihood", "batch_norm is 'batch'"),
        ("style", {}, "coverage", "need over 5 images, got 5"),
    ],
)
def test_what_cannot_be_measured_is_said_first(runs, tmp_path, monkeypatch, name, options, metric, message):
    monkeypatch.setattr(fid, "collect", lambda *_: pytest.fail("the rest was measured before"))
    run = load(getattr(runs, name), **options)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(run, ["fid", metric], features=RANDOM, count=5, weights=tmp_path)


def test_a_folder_that_cannot_be_is_refused_before_images_are_scored(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(likelihood, "score_batches", lambda *_, **__: pytest.fail("scored"))
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file cannot be a folder"):
        detect_others(load(runs.residual), {"dark": runs.dark}, tmp_path / "file", count=10)


def test_a_growing_model_is_compared_at_its_level(runs):
    run = load(runs.growing)
    shapes = {tuple(images.shape[1:]) for images in RealImages(run, None, 20).pixels()}
    assert shapes == {(3, 8, 8)}
    assert evaluate(run, ["fid"], features=RANDOM, count=10)["fid"]["resolution"] == 8


def test_other_data_is_scored_and_drawn(runs, tmp_path):
    run = load(runs.residual)
    result = detect_others(run, {"dark": runs.dark, "same": runs.grey}, tmp_path / "o", count=10, samples=2)
    assert json.loads((tmp_path / "o" / "ood.json").read_text()) == result
    assert result["counts"] == {"training set": 10, "dark": 10, "same": 10}
    assert set(result["auroc"]["dark"]) == set(likelihood.SCORES)
    # Fresh draws aside, equal images score equally.
    assert result["auroc"]["same"]["kl"] == 0.5
    assert Image.open(tmp_path / "o" / "ood.png").width > 300
    held_out = detect_others(run, {"dark": runs.dark}, tmp_path / "p", own=runs.grey, count=10, samples=2)
    assert held_out["own_images"] == "own"


def test_the_likelihood_follows_its_options_and_says_them(runs):
    run = load(runs.residual)
    options = {"samples": 3, "variance": 0.1, "proposal": "published"}
    record = evaluate(run, ["log_likelihood"], count=24, seed=4, **options)["log_likelihood"]
    assert options.items() <= record.items()
    x = run.to_input(run.read([runs.grey]))
    generator = torch.Generator().manual_seed(4)
    expected = [
        likelihood.log_likelihood(run.model, part, generator=generator, **options) for part in x.split(8)
    ]
    assert record["value"] == pytest.approx(torch.cat(expected).mean().item(), rel=1e-6)
    half = load(runs.residual, precision="bf16")
    rough = evaluate(half, ["log_likelihood"], count=24, seed=4, **options)["log_likelihood"]["value"]
    assert rough != record["value"] and rough == pytest.approx(record["value"], rel=0.05)


def test_the_command_passes_them_on(runs, tmp_path, capsys):
    common = ["evaluate", str(runs.residual), "--device", "cpu", "--batch", "8", "--count", "10"]
    ood = ["--ood", str(runs.dark), "--out", str(tmp_path)]
    chosen = ["--samples", "2", "--variance", "0.5", "--proposal", "published"]
    assert main([*common, *ood, *chosen]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["variance"], found["proposal"]) == (2, 0.5, "published")
    assert main([*common, *ood]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["variance"], found["proposal"]) == (5, 1.0, "posterior")
    assert main([*common, "--metrics", "log_likelihood", "--samples", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["log_likelihood"]["samples"] == 2
    for arguments, message in [
        ([*ood, "--samples", "0"], "samples is 0, must be at least 1"),
        ([*ood, "--variance", "inf"], "variance is inf, must be positive and finite"),
        ([*ood, "--proposal", "prior"], "proposal is 'prior', must be one of posterior, published"),
        (["--metrics", "mse", "--samples", "9"], "--samples is for --ood and for --metrics log_likelihood"),
        (["--metrics", "mse", "--features", "random"], "--features random: this option is for --metrics fid"),
        (["--metrics", "mse", "ssim", "--weights", "w"], "--weights w: this option is for --metrics fid kid"),
        (["--features", "random", "--weights", "w"], "--weights w: this option is for --metrics lpips"),
        (["--metrics", "mse", "--own", str(runs.grey)], f"--own {runs.grey}: this option is for --ood"),
        (["--metrics", "mse", "--out", "o"], "--out o: this option is for --ood"),
        ([*ood, "--features", "random"], "--features random: this option is for --metrics fid"),
        ([*ood, "--metrics", "mse"], "--ood and --metrics are two evaluations"),
        ([*ood, "--batch-norm", "batch"], "--batch-norm is 'batch'"),
        ([*ood, "--count", "0"], "--count is 0, must be at least 1"),
    ]:
        assert main([*common, *arguments]) == 1
        assert message in capsys.readouterr().err
    for model, arguments, message in [
        (runs.style, ["--batch-norm", "batch"], "--batch-norm is 'batch': this model has no batch norm"),
        (runs.translation, ["--weights", "w"], "--weights w: this option is for --metrics lpips swap_lpips"),
    ]:
        assert main(["evaluate", str(model), "--device", "cpu", "--metrics", "mse", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_batch_norm_is_chosen_on_the_command_line_and_said_beside_the_number(runs, tmp_path, capsys):
    values, pictures = {}, set()
    for mode in ("running", "batch", "recalibrated", None):
        chosen = ["--batch-norm", mode] if mode else []
        assert main(["evaluate", str(runs.residual), "--metrics", "mse", "--batch", "8", *chosen]) == 0
        record = json.loads(capsys.readouterr().out)["mse"]
        assert record["batch_norm"] == (mode or "recalibrated")
        assert record.get("batch") == (None if mode == "running" else 8)
        values[mode] = record["value"]
        out = tmp_path / f"{mode}.png"
        assert main(["sample", str(runs.residual), "--count", "8", "--out", str(out), *chosen]) == 0
        capsys.readouterr()
        pictures.add(out.read_bytes())
    assert values.pop(None) == values["recalibrated"]
    assert len(set(values.values())) == 3 and len(pictures) == 3


def test_the_weights_that_a_model_has_are_said_not_those_that_were_asked_for(runs, tmp_path, capsys):
    unaveraged = write_run(tmp_path / "00000-raw", runs.grey, RESIDUAL, "unit", weights="raw")
    command = ["evaluate", str(unaveraged), "--metrics", "mse", "--count", "4"]
    for flags in ([], ["--raw"]):
        assert main([*command, *flags]) == 0
        assert json.loads(capsys.readouterr().out)["mse"]["weights"] == "raw"
    assert main(["evaluate", str(runs.residual), "--metrics", "mse", "--raw"]) == 1
    assert "1000.safetensors holds averaged weights alone" in capsys.readouterr().err
    assert Inference.load(unaveraged, device="cpu").weights == "raw"


def test_sets_of_one_name_stay_two(runs, tmp_path, capsys):
    twin = tmp_path / runs.dark.name
    twin.symlink_to(runs.dark)
    command = ["evaluate", str(runs.residual), "--ood", str(runs.dark), str(twin), "--count", "6"]
    assert main([*command, "--out", str(tmp_path / "o")]) == 0
    assert set(json.loads(capsys.readouterr().out)["auroc"]) == {str(runs.dark), str(twin)}
    with pytest.raises(ValueError, match="'own' and 'training set' name"):
        detect_others(load(runs.residual), {"own": runs.dark}, tmp_path, own=runs.grey)


def test_bad_input_is_named(runs, tmp_path):
    run = load(runs.residual)
    with pytest.raises(ValueError, match="metrics are is, must be some of fid, kid"):
        evaluate(run, ["is"])
    with pytest.raises(ValueError, match="count is 1"):
        evaluate(run, ["fid"], features=RANDOM, count=1)
    with pytest.raises(ValueError, match="fid need features"):
        evaluate(run, ["fid"])
    with pytest.raises(ValueError, match="16x16 images of 3 channels, the model takes 16x16 of 1"):
        evaluate(run, ["mse"], data=runs.colour)
    with pytest.raises(ValueError, match="there is no image set at"):
        evaluate(run, ["mse"], data=tmp_path / "missing")
    with pytest.raises(ValueError, match="no other image sets"):
        detect_others(run, {}, tmp_path)
    with pytest.raises(ValueError, match="batch_norm is 'batch'"):
        detect_others(load(runs.residual, batch_norm="batch"), {"dark": runs.dark}, tmp_path)


def test_a_run_folder_without_write_permission_is_refused_before_the_work(runs, monkeypatch, capsys):
    access = os.access  # root may write everywhere
    monkeypatch.setattr(
        os, "access", lambda path, mode: str(path) != str(runs.density) and access(path, mode)
    )
    monkeypatch.setattr("sivae_fast.evaluation.density.evaluate_density", None)
    assert main(["evaluate", str(runs.density), "--device", "cpu"]) == 1
    assert f"error: {runs.density} cannot be written" in capsys.readouterr().err


def test_what_is_not_finite_becomes_null_and_says_why(runs, tmp_path, capsys, caplog):
    """Finite weights whose products overflow; JSON has neither NaN nor infinity."""
    folder = write_run(tmp_path / "00000-diverged", runs.grey, RESIDUAL, "unit")
    model = load_model(folder)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(1e30)
    snapshot = folder / "snapshots" / "0000001000.safetensors"
    save_snapshot(snapshot, model, model.config, 1000, weights="averaged")
    command = ["evaluate", str(folder), "--device", "cpu", "--count", "12", "--metrics"]
    assert main([*command, "log_likelihood"]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed["log_likelihood"]["value"] is None
    assert "log_likelihood is nan and given as null: the model's outputs" in caplog.text
    assert read_metrics(folder)["log_likelihood"][-1] == printed["log_likelihood"]
    assert "<td>not finite</td>" in report(folder).read_text(encoding="utf-8")
    assert "| log_likelihood | not finite | 1,000 |" in card(folder)
    assert main([*command, "mse"]) == 1
    assert "z holds NaN or infinity, must be finite: latents of a model that div" in capsys.readouterr().err


def test_equal_images_have_no_finite_psnr(caplog):
    assert json.loads(as_json({"mse": 0.0, "psnr": float("inf")})) == {"mse": 0.0, "psnr": None}
    assert "psnr is inf and given as null: an image and its reconstruction are the same" in caplog.text
