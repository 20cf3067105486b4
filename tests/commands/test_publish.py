"""Model cards, and the folder that goes to the Hugging Face Hub. No test reaches the Hub: `hub` is a stand-in
that keeps repositories on the disk."""

import getpass
import inspect
import json
import shutil
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import sivae_fast
from sivae_fast.checkpoint import load, save_snapshot
from sivae_fast.cli import main
from sivae_fast.commands.card import card
from sivae_fast.commands.publish import write_publication
from sivae_fast.config import make_config
from sivae_fast.export import export
from sivae_fast.hub import FILES, _failing, pull, upload
from sivae_fast.run import append_metric
from sivae_fast.systems import make_model

TWO_ENCODER = {"kind": "two_encoder", "resolution": 8, "width": 4, "class_size": 5, "content_size": 3}
POINTNET = {"kind": "pointnet", "points": 12, "latent_size": 4}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for huggingface_hub; `.calls` are (function, positional, named arguments) of it."""
    repositories, calls = tmp_path / "repositories", []

    class HfApi:
        def __init__(self, **options):
            calls.append(("HfApi", (None,), options))

        def create_repo(self, *args, **options):
            calls.append(("HfApi.create_repo", (self, *args), options))
            (repositories / args[0]).mkdir(parents=True, exist_ok=options["exist_ok"])
            return f"https://huggingface.co/{args[0]}"

        def upload_folder(self, *args, **options):
            calls.append(("HfApi.upload_folder", (self, *args), options))
            for name in options["allow_patterns"]:
                shutil.copy(f"{options['folder_path']}/{name}", repositories / options["repo_id"])

    def snapshot_download(*args, **options):
        calls.append(("snapshot_download", args, options))
        dest = options["local_dir"] or tmp_path / "cache"
        return str(shutil.copytree(repositories / args[0], dest, dirs_exist_ok=True))

    module = SimpleNamespace(HfApi=HfApi, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return SimpleNamespace(calls=calls, repositories=repositories)


def settings_of(path) -> dict:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["config"])


@pytest.mark.parametrize("kind", ["style", "growing", "residual"])
def test_what_is_pushed_loads_to_equal_images(runs, hub, tmp_path, kind):
    run = getattr(runs, kind)
    address = sivae_fast.push(run, "owner/name", private=True)
    assert address == "https://huggingface.co/owner/name"
    assert sorted(p.name for p in (hub.repositories / "owner/name").iterdir()) == sorted(FILES)
    assert next(options for name, _, options in hub.calls if name == "HfApi.create_repo")["private"]
    model, pulled = load(run), sivae_fast.load("hub:owner/name@v1")
    assert hub.calls[-1][2]["revision"] == "v1"
    assert pulled.images == model.images and pulled.config.model == model.config.model
    assert torch.equal(pulled.sample(2), model.sample(2))
    size = getattr(model, "resolution", 16)  # a half-grown model is at its level
    x = torch.rand(2, model.config.model.channels, size, size)
    assert torch.equal(pulled.reconstruct(x), model.reconstruct(x))
    folder = sivae_fast.pull("owner/name", tmp_path / "mine")
    assert torch.equal(load(folder).sample(2), model.sample(2))


def test_calls_fit_the_real_library(runs, monkeypatch, request):
    real = pytest.importorskip("huggingface_hub")
    accepted = {
        "HfApi": inspect.signature(real.HfApi.__init__),
        "HfApi.create_repo": inspect.signature(real.HfApi.create_repo),
        "HfApi.upload_folder": inspect.signature(real.HfApi.upload_folder),
        "snapshot_download": inspect.signature(real.snapshot_download),
    }
    hub = request.getfixturevalue("hub")
    sivae_fast.push(runs.style, "owner/name", token="secret")
    sivae_fast.pull("owner/name", token="secret")
    assert {name for name, _, _ in hub.calls} == set(accepted)
    for name, arguments, options in hub.calls:
        accepted[name].bind(*arguments, **options)


def test_the_hub_is_asked_for_the_files_of_a_model_alone(hub, tmp_path):
    for name in FILES:
        (tmp_path / name).touch()
    for _ in range(2):  # the second one is another version of the same model
        upload(tmp_path, "owner/name", token="secret")
    pull("owner/name", token="secret")
    asked = {name: options for name, _, options in hub.calls}
    assert asked["HfApi"] == {"token": "secret"}
    assert asked["HfApi.create_repo"] == {"private": False, "exist_ok": True}
    assert asked["snapshot_download"] == {
        "allow_patterns": [*FILES], "revision": None, "local_dir": None, "token": "secret"
    }  # fmt: skip


def test_nothing_that_is_pushed_tells_of_this_machine(runs, tmp_path):
    write_publication(runs.style, tmp_path, "owner/name")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(FILES)
    told = [str(runs.style.parent), socket.gethostname(), f"/{getpass.getuser()}/"]
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        assert not [text for text in told if text.encode() in content], path.name
    assert settings_of(tmp_path / "model.safetensors")["data"]["path"] is None
    assert json.loads((tmp_path / "config.json").read_text())["model"]["kind"] == "style"


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (TWO_ENCODER, {"kind": "factors"}),
        (POINTNET, {"kind": "pointclouds", "points": 12}),
        ({"kind": "mlp", "width": 8}, {"kind": "density"}),
    ],
    ids=["two_encoder", "pointnet", "mlp"],
)
def test_every_system_has_samples_and_a_card(tmp_path, model, data):
    error = "chamfer" if model["kind"] == "pointnet" else "sse"
    config = make_config({"model": model, "data": data, "objective": {"reconstruction": error}})
    save_snapshot(tmp_path / "m.safetensors", make_model(config), config, 5)
    write_publication(tmp_path / "m.safetensors", tmp_path, "owner/name")
    assert f"| system | `{model['kind']}`" in (tmp_path / "README.md").read_text()
    with Image.open(tmp_path / "samples.png") as picture:
        assert len(picture.convert("L").getcolors()) > 2


def test_a_card_says_what_the_model_is(runs, tmp_path):
    run = shutil.copytree(runs.style, tmp_path / "00007-mine")
    for images, value in ((500, 40.0), (1000, 30.25), (9000, 1.0)):
        beside = {"features": "inception", "seed": 0, "range_over_draws": 0.012345678}
        append_metric(run, "fid", {"images": images, "value": value, **beside})
    text = card(run)
    parameters = sum(p.numel() for p in load(run).parameters())
    assert "# Style-based image model, 16x16, colour" in text
    assert f"| parameters | {parameters:,} |" in text and "| images seen | 1,000 |" in text
    assert "| `objective.beta_neg` | 256.0 |" in text and "| `data.flip` | True |" in text
    # Not the one that was measured after this model.
    assert "| fid | 30.25 | 1,000 | features inception, seed 0, range_over_draws 0.01235 |" in text
    assert 'sivae_fast.load("00007-mine")' in text and "Apache-2.0" in text and str(tmp_path) not in text
    alone = shutil.copy(run / "snapshots" / "0000001000.safetensors", tmp_path)
    assert "fid" not in card(alone)


def test_batch_norm_that_the_commands_measure_anew_is_told(runs, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("sivae_fast.export._program", lambda network, shape: network)
    monkeypatch.setattr("sivae_fast.export._pack_torch", lambda *_: b"")
    monkeypatch.setattr("sivae_fast.export._difference", lambda *_: 0.0)
    for run in (runs.residual, runs.style, runs.clouds):  # clouds keep the running statistics everywhere
        caplog.clear()
        export(run, tmp_path / "out", format="torch")
        told = run == runs.residual
        assert ("batch norm is exported with the running statistics" in caplog.text) == told
        assert (f'Inference.load("{run.name}")` measures them anew' in card(run)) == told


def test_what_a_card_loads_is_there(runs, tmp_path, monkeypatch):
    run = shutil.copytree(runs.style, tmp_path / "runs" / "00007-mine")
    for here, typed, loaded in (
        (tmp_path, "runs/00007-mine", "runs/00007-mine"),
        (tmp_path, str(run), "runs/00007-mine"),
        (run, "snapshots/0000001000.safetensors", "snapshots/0000001000.safetensors"),
        (tmp_path / "runs", "../runs/00007-mine/", "00007-mine"),
    ):
        monkeypatch.chdir(here)
        assert f'sivae_fast.load("{loaded}")' in card(typed)
        assert load(loaded).images == 1000


def test_a_card_of_converted_weights_claims_no_training(tmp_path):
    config = make_config(
        {
            "model": POINTNET,
            "data": {"kind": "pointclouds", "points": 12},
            "objective": {"reconstruction": "chamfer"},
        }
    )
    facts = {"weights": "raw", "source": "01618.pth"}
    save_snapshot(tmp_path / "m.safetensors", make_model(config), config, 0, **facts)
    text = card(tmp_path / "m.safetensors")
    assert "`01618.pth`" in text and "are their authors'" in text
    assert "## Training" not in text and "images seen" not in text


def test_commands(runs, hub, tmp_path, capsys):
    assert main(["card", str(runs.residual), "--out", str(tmp_path / "README.md")]) == 0
    assert "16x16, grey" in (tmp_path / "README.md").read_text()
    assert main(["push", str(runs.residual), "owner/name"]) == 0
    assert main(["pull", "owner/name", str(tmp_path / "mine")]) == 0
    assert main(["sample", "hub:owner/name", "--out", str(tmp_path / "s.png"), "--count", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [str(tmp_path / "mine"), str(tmp_path / "s.png")]


def test_a_lone_snapshot_asks_for_the_training_images(runs, tmp_path, capsys):
    alone = str(shutil.copy(runs.residual / "snapshots" / "0000001000.safetensors", tmp_path))
    command = ["reconstruct", alone, "--out", str(tmp_path / "r.png"), "--count", "2"]
    assert main(command) == 1
    assert "a snapshot does not say where they are: give data=PATH (--data PATH)" in capsys.readouterr().err
    assert main([*command, "--data", str(runs.grey)]) == 0
    within = str(runs.residual / "snapshots" / "0000001000.safetensors")
    assert main(["reconstruct", within, *command[2:]]) == 0, "the run folder knows"


def test_wrong_names_and_a_missing_package_are_named(runs, hub, tmp_path, monkeypatch):
    for name in ("name", "owner/", "a/b/c", "owner/na me", "owner/näme"):
        with pytest.raises(ValueError, match="must be owner/name"):
            sivae_fast.push(runs.style, name)
        with pytest.raises(ValueError, match="must be owner/name"):
            sivae_fast.pull(name)
    (hub.repositories / "owner/other").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"owner/other holds no model\.safetensors"):
        sivae_fast.load("hub:owner/other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        sivae_fast.pull("owner/name")


def test_a_failing_network_is_one_clear_error(runs, hub, monkeypatch, capsys):
    class ConnectError(Exception):
        """As of the HTTP library: no OSError."""

    def fail(*args, **options):
        raise ConnectError("connection refused")

    monkeypatch.setattr(sys.modules["huggingface_hub"].HfApi, "create_repo", fail)
    assert main(["push", str(runs.style), "owner/name"]) == 1
    assert "owner/name was not uploaded: ConnectError: connection refused" in capsys.readouterr().err

    def absent(*args, **options):
        raise FileNotFoundError("Got: ConnectError\nAn error happened")

    monkeypatch.setattr(sys.modules["huggingface_hub"], "snapshot_download", absent)
    assert main(["pull", "owner/name"]) == 1
    said = "owner/name was not fetched: FileNotFoundError: Got: ConnectError An error happened"
    assert capsys.readouterr().err == f"error: {said}\n"


def test_a_hub_out_of_reach_is_said_in_a_few_words():
    class LocalEntryNotFoundError(Exception):
        pass

    said = r"^a/b was not fetched: the Hugging Face Hub cannot be reached$"
    with pytest.raises(OSError, match=said), _failing("a/b was not fetched"):
        raise LocalEntryNotFoundError("a long text " * 20)


def test_a_converted_density_model_shows_no_density_that_it_may_not_have_learned(tmp_path):
    config = make_config({"model": {"kind": "mlp", "width": 8}, "data": {"kind": "density"}})
    facts = {"weights": "raw", "source": "2spirals_epoch_3.pth"}
    save_snapshot(tmp_path / "m.safetensors", make_model(config), config, 0, **facts)
    write_publication(tmp_path / "m.safetensors", tmp_path, "owner/name")
    assert not (tmp_path / "samples.png").exists()
    assert "![" not in (tmp_path / "README.md").read_text()


def test_a_card_of_the_weights_of_the_optimizer_loads_those(tmp_path):
    config = make_config({"model": {"kind": "mlp", "width": 8}, "data": {"kind": "density"}})
    path = tmp_path / "m.safetensors"
    save_snapshot(path, make_model(config), config, 0, weights="raw")
    assert 'sivae_fast.load("m.safetensors", averaged=False)' in card(path, averaged=False)
    assert 'sivae_fast.load("m.safetensors")' in card(path)
