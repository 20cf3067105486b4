"""Checkpoints are whole or passed over; snapshots rebuild their model; nothing executes anything."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import sivae_fast
from sivae_fast.checkpoint import (
    CheckpointError,
    load,
    load_checkpoint,
    load_newest,
    load_weights,
    part,
    remove_after,
    save_checkpoint,
    save_snapshot,
)
from sivae_fast.config import make_config
from sivae_fast.systems import make_model

SMALL = {"kind": "style", "resolution": 8, "start_channels": 4, "max_channels": 8, "latent_size": 8}


@pytest.fixture
def config():
    return make_config({"model": SMALL})


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model/a": torch.full((3, 2), value), "encoder/exp_avg/a": torch.zeros(3, 2)}


def test_newest_are_kept_and_read_back(tmp_path):
    for images in (10, 20, 30, 40):
        save_checkpoint(tmp_path, images, tensors(images), {"lod": 2}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "0000000030.json", "0000000030.safetensors", "0000000040.json", "0000000040.safetensors",
    ]  # fmt: skip
    found, state = load_newest(tmp_path)
    assert state["images"] == 40 and state["lod"] == 2
    assert torch.equal(found["model/a"], torch.full((3, 2), 40.0))


def test_whoever_may_read_the_run_folder_may_read_the_weights(tmp_path, config):
    before = os.umask(0o027)
    try:
        checkpoint = save_checkpoint(tmp_path, 10, tensors(1.0), {}, keep=1)
        save_snapshot(tmp_path / "one.safetensors", make_model(config), config, 1)
    finally:
        os.umask(before)
    for path in (checkpoint, checkpoint.with_suffix(".json"), tmp_path / "one.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o640, path.name


def test_the_newest_planned_one_outlives_those_of_signals(tmp_path):
    for images, planned in ((10, True), (20, True), (30, False), (40, False), (50, False)):
        save_checkpoint(tmp_path, images, tensors(images), {"planned": planned}, keep=2)
    assert sorted(int(path.stem) for path in tmp_path.glob("*.json")) == [20, 40, 50]
    assert load_newest(tmp_path)[1]["images"] == 50
    assert load_newest(tmp_path, planned=True)[1]["images"] == 20


def test_the_one_that_was_just_written_stays_and_those_of_earlier_versions_count_as_planned(tmp_path):
    for images in (30, 40, 20):  # 20: training went back, and the others could not be removed
        path = save_checkpoint(tmp_path, images, tensors(images), {}, keep=1)
        assert load_checkpoint(path)[1]["images"] == images
    assert load_newest(tmp_path, planned=True)[1]["images"] == 40


def test_a_damaged_one_does_not_hinder_the_next(tmp_path):
    truncate_the_json(save_checkpoint(tmp_path, 10, tensors(1.0), {"planned": True}, keep=1))
    save_checkpoint(tmp_path, 20, tensors(2.0), {"planned": False}, keep=1)
    assert load_newest(tmp_path)[1]["images"] == 20


def test_tensors_are_on_the_disk_before_their_name_and_their_json(tmp_path, monkeypatch):
    path, synced, sync = tmp_path / "0000000010.safetensors", [], os.fsync

    def note(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((name.rpartition(".")[2], path.exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    save_checkpoint(tmp_path, 10, tensors(1.0), {}, keep=1)
    assert synced[:2] == [("safetensors", False), ("tmp", True)]


def test_tensors_of_one_rank_are_not_those_of_the_tenth():
    assert part({"rank1/a": 1, "rank10/a": 10, "rank1": 0}, "rank1") == {"a": 1}


def test_a_run_without_checkpoints_is_its_newest_snapshot(tmp_path, config):
    for images in (10, 20):
        path = tmp_path / "snapshots" / f"{images:010d}.safetensors"
        save_snapshot(path, make_model(config), config, images)
    assert load(tmp_path).images == 20


def test_tensors_that_a_model_has_not_are_named(config):
    model = make_model(config)
    with pytest.raises(CheckpointError, match=r"^a is of another architecture: more is unknown$"):
        load_weights(model, {**model.state_dict(), "more": torch.zeros(1)}, "a")


def kill_before_the_json(path):
    path.with_suffix(".json").unlink()


def truncate_the_json(path):
    path.with_suffix(".json").write_text('{"format": "sivae')


def truncate_the_tensors(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def remove_the_tensors(path):
    path.unlink()


@pytest.mark.parametrize(
    "damage",
    [kill_before_the_json, truncate_the_json, truncate_the_tensors, flip_a_bit, remove_the_tensors],
    ids=lambda function: function.__name__,
)
def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path, damage):
    save_checkpoint(tmp_path, 10, tensors(1.0), {}, keep=3)
    damage(save_checkpoint(tmp_path, 20, tensors(2.0), {}, keep=3))
    (tmp_path / ".0000000030.safetensors.77.tmp").write_bytes(b"a write that a kill cut short")
    found, state = load_newest(tmp_path)
    assert state["images"] == 10
    assert torch.equal(found["model/a"], torch.ones(3, 2))


def test_no_checkpoint_at_all(tmp_path):
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "nowhere") is None


def test_files_of_other_names_are_left_alone(tmp_path, caplog):
    """Neither taken for checkpoints, newest or oldest, nor counted among those that stay, nor removed."""
    mine = [tmp_path / name for name in ("name.json", "-notes.json", "0000000020-copy.json", "20.json")]
    for path in mine:
        path.write_text('{"planned": true}')
    for images in (10, 20, 30):
        save_checkpoint(tmp_path, images, tensors(images), {"planned": True}, keep=2)
    remove_after(tmp_path, 20)
    assert load_newest(tmp_path)[1]["images"] == 20
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["0000000020.safetensors"]
    assert all(path.exists() for path in mine) and not caplog.text


def test_the_newest_is_that_of_the_most_images(tmp_path):
    for images in (9_999_999_999, 10_000_000_000):
        save_checkpoint(tmp_path, images, tensors(1.0), {}, keep=1)
    assert load_newest(tmp_path)[1]["images"] == 10_000_000_000


def test_checkpoints_that_are_all_damaged_are_not_taken_for_none(tmp_path, config):
    folder = tmp_path / "checkpoints"
    for images in (10, 20):
        flip_a_bit(save_checkpoint(folder, images, tensors(1.0), {"planned": True}, keep=3))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*/checkpoints can be used \(2 tried\)"):
        load_newest(folder)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load(tmp_path)
    save_snapshot(tmp_path / "snapshots" / "0000000015.safetensors", make_model(config), config, 15)
    assert load(tmp_path).images == 15
    save_checkpoint(folder, 30, tensors(1.0), {"planned": False}, keep=3)
    assert load_newest(folder, planned=True) is None


def test_checkpoints_on_a_disk_that_is_not_there_are_not_taken_for_none(tmp_path):
    (tmp_path / "checkpoints").symlink_to(tmp_path / "unmounted" / "checkpoints")
    with pytest.raises(FileNotFoundError, match=r"/checkpoints'$"):
        load_newest(tmp_path / "checkpoints")


def test_other_formats_are_named(tmp_path):
    path = save_checkpoint(tmp_path, 10, tensors(1.0), {}, keep=3)
    state = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**state, "format": "sivae-fast 9"}))
    with pytest.raises(CheckpointError, match="has format 'sivae-fast 9'"):
        load_checkpoint(path)


def test_snapshot_rebuilds_its_model(tmp_path, config):
    model = make_model(config).eval()
    with torch.no_grad():
        model.dlatent_avg.normal_()
    save_snapshot(tmp_path / "one.safetensors", model, config, 640, weights="raw")
    again = sivae_fast.load(tmp_path / "one.safetensors")
    assert again.images == 640 and again.config == config and not again.training
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    z = torch.randn(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(again.decode(z, noise="none"), model.decode(z, noise="none"))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"path": "/home/somebody/ffhq.zip", "value_range": "unit"}, None),
        ({"path": "quickstart", "value_range": "unit"}, "quickstart"),
        # null would mean the made set
        ({"kind": "factors", "path": "/home/somebody/cars3d"}, "cars3d"),
        ({"kind": "factors"}, None),
    ],
)
def test_paths_stay_in_the_run_folder(tmp_path, data, expected):
    settings = {"model": SMALL, "data": data, "run": {"folder": "/home/somebody/runs"}}
    perceptual = {"reconstruction": "perceptual", "perceptual_weights": "/home/somebody/vgg16.pth"}
    config = make_config({**settings, "objective": perceptual, "engine": {"deepspeed": {"path": "/home"}}})
    path = tmp_path / "run" / "snapshots" / "0000000001.safetensors"
    save_snapshot(path, make_model(config), config, 1)
    assert b"/home" not in path.read_bytes()
    again = load(path).config
    assert again.data.path == expected and again.objective.perceptual_weights == "vgg16.pth"
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml())
    assert load(path).config == load(tmp_path / "run").config == config
    best = tmp_path / "run" / "best-fid.safetensors"
    best.write_bytes(path.read_bytes())
    assert load(best).config == config


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b"\0" * 64, "not valid YAML: .*"),
        (b"\xff\xfe\xff", "not a text"),
        (b"train: {bach: 3}", r"train\.bach: unknown key, did you mean train\.batch\?"),
    ],
)
def test_a_damaged_configuration_is_that_of_the_run(tmp_path, config, content, why):
    path = tmp_path / "00000-run" / "snapshots" / "0000000001.safetensors"
    save_snapshot(path, make_model(config), config, 1)
    settings = tmp_path / "00000-run" / "config.yaml"
    settings.write_bytes(content)
    for source in (path, tmp_path / "00000-run"):
        with pytest.raises(CheckpointError, match=rf"^{settings}, .* cannot be used \({why}\): the command"):
            load(source)
    settings.unlink()
    assert load(path).config == config


def test_averaged_and_raw_weights_of_a_run(tmp_path, config):
    model = make_model(config)
    state = {f"model/{name}": value for name, value in model.state_dict().items()}
    average = {f"average/{name}": value + 1 for name, value in model.named_parameters()}
    run = tmp_path / "00000-run"
    save_checkpoint(run / "checkpoints", 64, state | average, {"config": config.to_dict()}, keep=3)
    name = "decoder.const"
    raw = dict(model.named_parameters())[name]
    torch.testing.assert_close(dict(load(run).named_parameters())[name], raw + 1)
    torch.testing.assert_close(dict(load(run, averaged=False).named_parameters())[name], raw)
    assert load(run).facts["weights"] == "averaged" and load(run, averaged=False).facts["weights"] == "raw"


@pytest.mark.parametrize(("facts", "has"), [({}, "a run folder or"), ({"source": "a.pth"}, "`sivae-fast")])
def test_averaged_weights_are_not_taken_for_those_of_the_optimizer(tmp_path, config, facts, has):
    snapshot = tmp_path / "00000-run" / "snapshots" / "0000000064.safetensors"
    save_snapshot(snapshot, make_model(config), config, 64, weights="averaged", **facts)
    for path in (snapshot, tmp_path / "00000-run"):
        with pytest.raises(CheckpointError, match=f"064.safetensors holds averaged weights alone: {has}"):
            load(path, averaged=False)
    save_snapshot(snapshot, make_model(config), config, 64, weights="raw")
    assert load(snapshot).facts["weights"] == load(snapshot, averaged=False).facts["weights"] == "raw"
    save_snapshot(snapshot, make_model(config), config, 64)
    assert load(snapshot, averaged=False).facts["weights"] == "unknown"


def test_a_half_grown_model_is_at_the_level_it_had_reached(tmp_path):
    config = make_config({"model": {**SMALL, "resolution": 16}, "growth": {"images_per_level": 100}})
    save_snapshot(tmp_path / "half.safetensors", make_model(config), config, 126)
    model = load(tmp_path / "half.safetensors")
    assert model.lod == 1 and model.fading
    assert model.generate(torch.randn(2, 8)).shape == (2, 3, 8, 8)
    save_snapshot(tmp_path / "end.safetensors", make_model(config), config, 100)
    assert load(tmp_path / "end.safetensors").lod == 0  # no image of the next level was seen
    save_snapshot(tmp_path / "begin.safetensors", make_model(config), config, 0)
    assert load(tmp_path / "begin.safetensors").lod == 0


def test_wrong_files_are_named(tmp_path, config):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint and no snapshot"):
        load(tmp_path)
    checkpoint = save_checkpoint(tmp_path / "checkpoints", 10, tensors(1.0), {}, keep=3)
    with pytest.raises(CheckpointError, match=r"0010\.json only describes .* give 0000000010\.safetensors"):
        load(checkpoint.with_suffix(".json"))
    (tmp_path / "text.safetensors").write_text("this is no snapshot")
    with pytest.raises(CheckpointError, match=r"text.safetensors cannot be read"):
        load(tmp_path / "text.safetensors")
    other = make_config({"model": {**SMALL, "max_channels": 16}})
    save_snapshot(tmp_path / "mixed.safetensors", make_model(other), config, 0)
    with pytest.raises(CheckpointError, match=r"another architecture: .* the model's is"):
        load(tmp_path / "mixed.safetensors")


def test_a_write_that_is_refused_names_the_file_that_was_asked_for(tmp_path, config, monkeypatch):
    import safetensors.torch

    def refuse(values, path, metadata):
        raise SafetensorError(f'Error while serializing: Read-only file system at path "{tmp_path}/.tmpXV"')

    monkeypatch.setattr(safetensors.torch, "save_file", refuse)
    with pytest.raises(OSError, match=r"/one\.safetensors could not be .*: Read-only file system$"):
        save_snapshot(tmp_path / "one.safetensors", make_model(config), config, 0)


def test_a_failed_write_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    import safetensors.torch

    save_checkpoint(tmp_path, 10, tensors(1.0), {}, keep=3)

    def full(values, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 20, tensors(2.0), {}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000000010.json", "0000000010.safetensors"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, config, value):
    model = make_model(config)
    name, broken = next(iter(model.named_parameters()))
    with torch.no_grad():
        broken.view(-1)[0] = value
    path = tmp_path / "run" / "snapshots" / "0000000001.safetensors"
    save_snapshot(path, model, config, 1)
    for source in (path, tmp_path / "run"):
        with pytest.raises(CheckpointError, match=rf"{path.name}: {name} holds NaN or infinity"):
            load(source)
    weights = {f"model/{n}": t for n, t in model.state_dict().items()}
    path = save_checkpoint(tmp_path / "run" / "checkpoints", 2, weights, {"config": config.to_dict()}, 1)
    for source in (path, tmp_path / "run"):
        with pytest.raises(CheckpointError, match=rf"{path.name}: {name} holds NaN or infinity"):
            load(source)


def test_a_flipped_bit_of_a_snapshot_is_noticed(tmp_path, config):
    path = tmp_path / "one.safetensors"
    save_snapshot(path, make_model(config), config, 1, weights="raw")
    assert load(path).facts == {"weights": "raw"}
    content = bytearray(path.read_bytes())
    content[-4] ^= 1  # the last bits of a float: finite, but another number
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"one\.safetensors is damaged \(its checksum does not agree"):
        load(path)


def test_a_snapshot_that_cannot_be_read_is_named_with_its_folder(tmp_path, monkeypatch):
    path = tmp_path / "snapshots" / "0000000001.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"not one")
    with pytest.raises(CheckpointError, match=rf"^{path} cannot be read as \.safetensors"):
        load(path)

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(CheckpointError, match="Permission denied"):
        load(path)


def test_a_snapshot_without_a_checksum_loads(tmp_path, config):
    path, model = tmp_path / "old.safetensors", make_model(config)
    about = {"format": "sivae-fast 1", "config": json.dumps(config.to_dict()), "images": "1"}
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path, about)
    assert load(path).facts == {"weights": "unknown"}


@pytest.mark.parametrize("name", ["checkpoints", "snapshots"])
def test_a_part_of_a_run_folder_is_told_from_the_whole(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"{name} is a part of a run folder: give {tmp_path}, or one"):
        load(tmp_path / name)


KILLED = """
import os, signal, sys, threading, torch
from pathlib import Path
from sivae_fast.checkpoint import save_checkpoint

def kill_where_something_is_written():
    while not any(path.is_file() for path in Path(sys.argv[1]).rglob("*")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)

tensors = {"model/a": torch.zeros(30_000_000)}
threading.Thread(target=kill_where_something_is_written, daemon=True).start()
save_checkpoint(Path(sys.argv[1]), 20, tensors, {}, 3)
"""


def test_a_kill_in_the_middle_of_a_save_leaves_nothing_for_good(tmp_path):
    """safetensors writes to a file that it names itself."""
    code = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)]).returncode
    assert code == -signal.SIGKILL and any(path.is_file() for path in tmp_path.rglob("*"))
    (tmp_path / "0000000015.safetensors").write_bytes(b"without its JSON")
    (tmp_path / "mine.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, 30, {"model/a": torch.zeros(3)}, {}, 3)
    names = ["0000000030.json", "0000000030.safetensors", "mine.safetensors"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == names
