"""What all commands share: options named as typed, nothing loaded too early, interrupts, the disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sivae_fast import checkpoint
from sivae_fast.cli import main, parser
from sivae_fast.config import make_config
from sivae_fast.run import read_metrics
from sivae_fast.systems import make_model

ROOT = Path(__file__).parents[2]


def test_options_are_named_as_they_were_typed(runs, tmp_path, capsys):
    out, model = f"--out={tmp_path / 's.png'}", str(runs.residual)
    for arguments, message in [
        (["evaluate", model, "--metrics", "foo", "bar"], "--metrics are foo, bar, must be some of fid"),
        (["evaluate", model, "--metrics", "mse", "--count=0"], "--count is 0, must be at least 2"),
        (["evaluate", model, "--metrics", "mse", "--data=no.zip"], "--data=no.zip: there is no image set at"),
        (["evaluate", model, "--ood", "no.zip"], "--ood=no.zip: there is no image set at no.zip (a folder"),
        (["evaluate", model, "--ood", "x", "--own", "no.zip"], "--own=no.zip: there is no image set at"),
        (["sample", model, out, "--batch-norm", "x"], "--batch-norm is 'x', must be one of running"),
        (["sample", model, out, "--truncation", "0.5"], "--truncation=0.5: this model is of kind residual"),
        (["mix", str(runs.style), out, "--layers", "2-99"], "--layers is '2-99': this model has layers 0 to"),
        (
            ["interpolate", str(runs.residual), out, "--space", "w"],
            "--space=w: this model is of kind residual",
        ),
        (
            ["report", model, f"--out={tmp_path / 'r.pdf'}"],
            f"{tmp_path / 'r.pdf'}: a name ending in .html or",
        ),
        (["report", model, "--pictures", "0"], "--pictures is 0, must be at least 1"),
        (["card", str(runs.colour / "000.png")], f"{runs.colour / '000.png'} cannot be read as .safetensors"),
        (["pull", "name"], "repo_id is 'name', must be owner/name"),
        (["convert", "a", str(tmp_path / "b"), "--raw"], f"{tmp_path / 'b'}: a snapshot is a file that ends"),
    ]:
        assert main(arguments) == 1
        assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["reconstruct", "RUN", "--resize", "a.png"], {"model": "RUN", "files": ["a.png"], "resize": True}),
        (["interpolate", "--steps", "3", "RUN", "a", "--resize", "b"], {"files": ["a", "b"], "steps": 3}),
        (["doctor", "a=1", "--config", "c.yaml", "b=2"], {"overrides": ["a=1", "b=2"], "config": "c.yaml"}),
        (["convert", "in", "--raw", "out"], {"source": "in", "dest": "out", "raw": True}),
        (["mix", "RUN", "--sources", "a", "b", "--count", "2"], {"model": "RUN", "sources": ["a", "b"]}),
    ],
)
def test_options_stand_where_one_likes(arguments, found):
    assert found.items() <= vars(parser().parse_args(arguments)).items()


def test_an_empty_argument_is_no_option_that_a_message_begins_with(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the empty path is this folder
    assert main(["sample", ""]) == 1
    assert capsys.readouterr().err.startswith("error: . holds no checkpoint and no snapshot: give a run")


@pytest.mark.parametrize("seed", ["-1", "1.5", "x", str(2**62)])
def test_seeds_that_no_generator_takes_are_refused(runs, seed, capsys):
    with pytest.raises(SystemExit):
        main(["sample", str(runs.style), "--seed", seed])
    assert f"argument --seed: {seed} is no whole number from 0 to 2^62 - 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "program", [["-m", "sivae_fast.cli", "sample", "runs/0"], [str(ROOT / "launch" / "train.py")]], ids=len
)
def test_an_interrupt_while_pytorch_is_loaded_is_quiet(tmp_path, program):
    (tmp_path / "torch.py").write_text(
        "import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Tests in the background of a script inherit that interrupts are ignored.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen([sys.executable, *program], cwd=tmp_path, env=environment, **options) as process:
        for _ in range(600):
            if (tmp_path / "begun").exists():
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "stopped\n")
    assert process.returncode == 130


def test_help_loads_no_pytorch():
    say = "import sys, sivae_fast.cli as cli; cli.parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", say], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_missing_folders_are_made_by_all_commands(runs, tmp_path, capsys):
    run = str(runs.style)
    for name, *arguments in (
        ["a.png", "sample", run, "--count", "1"],
        ["b.html", "report", run],
        ["c", "card", run],
    ):
        path = tmp_path / name / "new" / name
        assert main([*arguments, "--out", str(path)]) == 0
        assert path.is_file() and capsys.readouterr().out == f"{path}\n"


def test_devices_are_not_replaced(runs, capsys):
    for arguments in (["sample", str(runs.style)], ["report", str(runs.style)], ["card", str(runs.style)]):
        assert main([*arguments, "--out", "/dev/full"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: /dev/full") and len(error.splitlines()) == 1
    assert Path("/dev/full").is_char_device()


def test_a_model_is_loaded_once(runs, tmp_path, monkeypatch):
    """Else all that is said of a damaged checkpoint is said twice."""
    made, make = [], checkpoint.make_model
    monkeypatch.setattr(checkpoint, "make_model", lambda config: made.append(config) or make(config))
    monkeypatch.setattr("sivae_fast.commands.densities.GRID", 16)
    monkeypatch.setattr("sivae_fast.evaluation.density.evaluate_density", lambda *about: {"kl": 1.0})
    picture = ["--out", str(tmp_path / "a.png")]
    for run, command, *options in (
        [runs.residual, "sample", *picture],
        [runs.clouds, "sample", *picture, "--count", "1"],
        [runs.density, "sample", *picture],
        [runs.residual, "evaluate", "--metrics", "mse"],
        [runs.clouds, "evaluate", "--metrics", "jsd"],
        [runs.density, "evaluate"],
    ):
        model = next(run.glob("snapshots/*"))  # evaluations of it add nothing to the run
        assert main([command, str(model), "--device", "cpu", *options]) == 0
        assert len(made) == 1
        made.clear()


def test_records_of_densities_say_what_they_are_of(runs, capsys):
    run = str(runs.density)
    assert main(["evaluate", run, "--seed", "1", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"gnelbo", "kl", "jsd", "kl_nats", "jsd_nats"}
    for name, record in found.items():
        assert record == {
            "value": record["value"], "images": 1, "weights": "averaged", "precision": "fp32", "seed": 1,
            "density": "8gaussians",
        }  # fmt: skip
        assert read_metrics(run)[name] == [record]
    snapshot = str(next(Path(run).glob("snapshots/*")))
    assert main(["evaluate", snapshot, "--seed", "1", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out) == found and len(read_metrics(run)["kl"]) == 1
    for arguments, message in [
        (["--raw"], "holds averaged weights alone"),
        (["--precision", "bf16"], "--precision is 'bf16', must be fp32 for models of points in the plane"),
        (
            ["--metrics", "fid", "kid"],
            "--metrics fid kid: model.kind is mlp, this option is for other models",
        ),
        (["--data", "x"], "unknown density 'x'"),
    ]:
        assert main(["evaluate", run, *arguments]) == 1
        assert message in capsys.readouterr().err


def test_convert_says_what_a_folder_is(runs, tmp_path, capsys):
    assert main(["convert", str(runs.style), str(tmp_path / "x.safetensors")]) == 1
    expected = f"error: {runs.style} is no file: give a published checkpoint (.pth)\n"
    assert capsys.readouterr().err == expected


def test_convert_names_what_is_in_the_way_before_it_reads(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "x.safetensors").mkdir()
    for dest, message in [
        ("file/x.safetensors", f"{tmp_path}/file cannot be a folder: {tmp_path}/file is not one"),
        ("x.safetensors", f"{tmp_path}/x.safetensors is there already and no plain file"),
    ]:
        assert main(["convert", str(tmp_path / "none.pth"), str(tmp_path / dest)]) == 1
        assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["x.safetensors", "--images", "0"],
            "--images is for a run: give --config in place of x.safetensors",
        ),
        (["x.safetensors", "--no-optimizer"], "--no-optimizer is for a run: give --config"),
        (["x.safetensors", "--set", "a=b"], "--set is for a run: give --config"),
        (["--config", "CONFIG", "--raw"], "--raw is for a snapshot: a run has both weights"),
        (["--config", "CONFIG", "--images", "-5"], "--images is -5, must be at least 0"),
    ],
)
def test_convert_refuses_what_it_has_no_use_for(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    model = make_model(make_config({"model": {"kind": "mlp"}, "data": {"kind": "density"}}))
    torch.save({"epoch": 3, "model": model.state_dict()}, "rings.pth")
    (tmp_path / "small.yaml").write_text("model: {kind: mlp}\ndata: {kind: density}\n")
    arguments = ["small.yaml" if argument == "CONFIG" else argument for argument in arguments]
    assert main(["convert", "rings.pth", *arguments]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
    assert {path.name for path in tmp_path.iterdir()} == {"rings.pth", "small.yaml"}
