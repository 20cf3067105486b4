"""A new run begins with the weights of another model: `train.init_from`."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from sivae_fast.checkpoint import load, load_newest, part, save_snapshot
from sivae_fast.config import ConfigError, make_config
from sivae_fast.contract import Model
from sivae_fast.draws import Rows, Stream
from sivae_fast.growth import Schedule
from sivae_fast.run import read_stats
from sivae_fast.systems import make_model, make_schedule
from sivae_fast.training import recorder
from sivae_fast.training.initial import take_over
from sivae_fast.training.loop import train
from sivae_fast.training.starting import check_start


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(images, name, ...) trains a small network for points in the plane and gives the run folder."""
    monkeypatch.setattr(recorder, "save_picture", lambda config, path, *about: path.touch())

    def trained(images: int, name: str, source=None, config_alone: bool = False, **sections):
        values = {
            "model": {"kind": "mlp", "width": 8, "hidden_layers": 1},
            "data": {"kind": "density"},
            "train": {"images": images, "batch": 8, "init_from": source and str(source)},
            "engine": {"kind": "torch"},
            "run": {"folder": str(tmp_path / "runs"), "name": name},
        }
        for section, keys in sections.items():
            values[section] = {**values.get(section, {}), **keys}
        config = make_config(values)
        return config if config_alone else train(config)

    return trained


def style(resolution: int, **settings) -> dict:
    """The lower levels of every size are the same networks."""
    size = {"resolution": resolution, "start_channels": 64 // resolution, "max_channels": 8}
    return {"kind": "style", **size, "latent_size": 8, "mapping_layers": 2, **settings}


def config_of(model: dict, **sections):
    return make_config({"model": model, **sections})


def snapshot(path: Path, model: dict, images: int = 0, seed: int = 5, **sections) -> Model:
    """A snapshot of an untrained model with weights of its own, biases and buffers too."""
    config = config_of(model, **sections)
    made = make_model(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in made.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value))
    save_snapshot(path, made, config, images, weights="averaged")
    return load(path)


def taken(path: Path, model: dict, **sections) -> tuple[Model, int]:
    """The model that training begins with, and its images."""
    sections["train"] = {"init_from": str(path), **sections.get("train", {})}
    config = config_of(model, **sections)
    made = make_model(config)
    return made, take_over(made, config, make_schedule(config))


def averages(folder: Path) -> dict[str, torch.Tensor]:
    return part(load_newest(folder / "checkpoints")[0], "average")


def test_a_run_begins_with_the_averaged_weights_of_another(run, caplog):
    """Where nothing is learned, what the first iteration had is what the last one leaves."""
    caplog.set_level(logging.INFO)
    first = run(64, "first", train={"warmup_images": 16})
    still = {"optim": {"learning_rate": 1e-30}}
    second = run(16, "second", first, **still)
    tensors, state = load_newest(second / "checkpoints")
    wanted = averages(first)
    assert wanted.keys() == part(tensors, "model").keys()
    for kind in ("model", "average"):
        for name, value in part(tensors, kind).items():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-20)
    assert state["steps"] == {"encoder": 2, "decoder": 2} and state["images"] == 16
    line = f"beginning with the averaged weights of {first} (64 images), at 0 images"
    assert line in caplog.messages and f"run folder {second}" in caplog.messages
    assert (second / "samples" / "0000000000.png").exists()


def test_snapshots_and_checkpoints_begin_a_run_as_their_run_does(run):
    first = run(64, "first")
    results = []
    for number, source in enumerate(
        [first, *first.glob("snapshots/*"), *first.glob("checkpoints/*.safetensors")]
    ):
        results.append(averages(run(32, f"run{number}", source)))
    assert len(results) == 3
    for result in results[1:]:
        assert all(torch.equal(result[name], value) for name, value in results[0].items())
    other = averages(run(32, "own"))
    assert not any(torch.equal(other[name], value) for name, value in results[0].items())


def test_it_resumes_without_the_model_it_began_with(run, tmp_path):
    first = run(64, "first")
    whole = run(64, "whole", first)
    run(32, "parts", first)
    shutil.move(first, tmp_path / "moved")
    parts = run(64, "parts", first)
    one, two = (load_newest(folder / "checkpoints") for folder in (whole, parts))
    assert all(torch.equal(one[0][name], two[0][name]) for name in one[0])
    assert one[1]["steps"] == two[1]["steps"] and len(list(tmp_path.glob("runs/*"))) == 2


def test_a_run_that_never_reached_a_checkpoint_begins_again(run):
    first = run(64, "first")
    whole = run(32, "whole", first)
    parts = run(32, "parts", first)
    for path in (parts / "checkpoints").iterdir():
        path.unlink()
    (parts / "checkpoints" / "notes.json").write_text("{}")
    assert run(32, "parts", first) == parts
    one, two = (load_newest(folder / "checkpoints")[0] for folder in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", r"^train\.init_from=nowhere: does not exist: give a snapshot"),
        ("hub:name", r"^train\.init_from=hub:name: repo_id is 'name', must be owner/name"),
    ],
)
def test_what_is_no_model_is_one_error_and_leaves_no_folder(run, tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        run(16, "new", source)
    assert not (tmp_path / "runs").exists()


def test_a_published_file_is_converted_first(run, tmp_path):
    torch.save({"model": {}}, tmp_path / "ffhq.pth")
    with pytest.raises(ConfigError, match=r"init_from=.*ffhq\.pth: .*`sivae-fast convert` makes a snapshot"):
        run(16, "new", tmp_path / "ffhq.pth")


def test_a_model_of_another_architecture_is_refused_by_its_settings(tmp_path):
    path = tmp_path / "a.safetensors"
    snapshot(path, {"kind": "residual", "resolution": 16, "widths": (4, 8), "latent_size": 6})
    with pytest.raises(
        ConfigError, match=r"a\.safetensors: it is a model of model\.kind=residual, here it is mlp"
    ):
        taken(path, {"kind": "mlp"}, data={"kind": "density"})
    other = {"kind": "residual", "resolution": 16, "widths": (4, 8), "latent_size": 5}
    with pytest.raises(ConfigError, match=r": it asks for model\.latent_size=6, here it is 5$"):
        taken(path, other)
    snapshot(path, style(16))
    with pytest.raises(
        ConfigError, match=r": it asks for model\.resolution=16, here it is 8, .*start_channels"
    ):
        taken(path, style(8))
    with pytest.raises(ConfigError, match=r": it asks for model\.start_channels=2, here it is 4$"):
        taken(path, style(32, start_channels=4))


def test_settings_that_weights_do_not_show_are_said(tmp_path, caplog):
    path, model = tmp_path / "a.safetensors", {"kind": "pointnet", "points": 16, "latent_size": 2}
    clouds = {"data": {"kind": "pointclouds", "points": 16}, "objective": {"reconstruction": "chamfer"}}
    snapshot(path, model, **clouds)
    taken(path, model, **clouds)
    assert "asks for" not in caplog.text
    taken(path, {**model, "prior_std": 1.0}, **clouds)
    assert "it asks for model.prior_std=0.2, here it is 1.0, which its weights fit" in caplog.text


def test_widths_that_do_not_halve_are_said(tmp_path):
    path = tmp_path / "a.safetensors"
    snapshot(path, style(16, start_channels=3))
    with pytest.raises(ConfigError, match=r": it asks for model\.start_channels=1\.5, here it is 1$"):
        taken(path, style(32, start_channels=1))


def test_settings_without_weights_may_differ(tmp_path):
    path = tmp_path / "a.safetensors"
    sizes = {"kind": "residual", "resolution": 16, "widths": (4, 8), "latent_size": 6}
    source = snapshot(path, sizes)
    model, images = taken(path, {**sizes, "augment": True, "lagged_decoder": True})
    assert images == 0
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
        if name.startswith("decoder."):
            assert torch.equal(model.state_dict()[f"target_{name}"], value)
    lagged = snapshot(path, {**sizes, "lagged_decoder": True})
    model, _ = taken(path, sizes)
    assert all(torch.equal(value, lagged.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("resolution", [32, 64])
def test_a_style_model_goes_on_to_higher_levels(tmp_path, resolution):
    """At the level that was reached it is the same function; the new levels are as they are without it."""
    source = snapshot(tmp_path / "a.safetensors", style(16))
    model, images = taken(tmp_path / "a.safetensors", style(resolution), growth={"images_per_level": 1000})
    assert images == 2500 and source.lod == 2
    model.eval().set_level(2, 1.0)
    x, z = torch.rand(2, 3, 16, 16), torch.randn(2, 8)
    stream = lambda: Stream(3, Rows.all(2), torch.device("cpu"))
    assert torch.equal(model.decode(z, stream()), source.decode(z, stream()))
    for mine, theirs in zip(model.encode(x), source.encode(x), strict=True):
        assert torch.equal(mine, theirs)
    own = make_model(config_of(style(resolution))).state_dict()
    fresh = [name for name, value in model.state_dict().items() if torch.equal(value, own[name])]
    added = model.levels - source.levels
    assert any(name.startswith("encoder.blocks.0.") for name in fresh)
    assert any(name.startswith(f"encoder.from_rgb.{added - 1}.") for name in fresh)
    assert any(name.startswith(f"decoder.to_rgb.{model.levels - 1}.") for name in fresh)
    same = ("mapping", "decoder.blocks.2.", f"encoder.blocks.{added}.")
    assert not any(name.startswith(same) for name in fresh)


@pytest.mark.parametrize(
    ("seen", "growth", "begins"),
    [
        (2400, {"images_per_level": 1000, "fade": 0.5}, 2500),  # had level 2
        (1999, {"images_per_level": 1000, "fade": 0.5}, 1500),  # level 1
        (2000, {"images_per_level": 1000, "fade": 0.5}, 1500),  # level 2 has not begun
        (900, {"images_per_level": 1000, "fade": 0.5}, 0),
        (2400, {"images_per_level": 500, "fade": 0.25}, 1125),
        (2400, {}, 0),
    ],
)
def test_the_clock_starts_where_the_level_is_faded_in(tmp_path, seen, growth, begins):
    path = tmp_path / "a.safetensors"
    snapshot(path, style(16), images=seen, growth={"images_per_level": 1000, "fade": 0.5})
    assert taken(path, style(16), growth=growth)[1] == begins


def test_images_that_are_over_before_training_begins_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    snapshot(path, style(16))
    with pytest.raises(
        ConfigError, match=r"train\.images=2500: level 2, .* is faded in after 2500: give more"
    ):
        taken(path, style(16), growth={"images_per_level": 1000}, train={"images": 2500})
    assert taken(path, style(16), growth={"images_per_level": 1000}, train={"images": 2501})[1] == 2500


def test_values_in_another_range_are_said(tmp_path, caplog):
    path = tmp_path / "a.safetensors"
    sizes = {"kind": "residual", "resolution": 16, "widths": (4, 8)}
    snapshot(path, sizes, data={"value_range": "unit"})
    taken(path, sizes, data={"value_range": "unit"})
    assert "value_range" not in caplog.text
    taken(path, sizes)
    assert "was trained with data.value_range=unit, here it is symmetric" in caplog.text


def test_levels_are_faded_in_after_their_share():
    grows = Schedule(levels=4, images_per_level=1001, fade=0.5, batch=8, learning_rate=1e-3)
    assert [grows.faded_in(lod) for lod in range(4)] == [0, 1502, 2503, 3504]
    assert all(grows.blend(grows.faded_in(lod)) == 1 for lod in range(4))
    assert all(grows.blend(grows.faded_in(lod) - 2) < 1 for lod in range(1, 4))


def test_a_dry_run_finds_what_a_start_would(run, tmp_path, caplog):
    first = run(16, "first")
    config = lambda source, **model: run(16, "new", source, config_alone=True, model=model)
    check_start(config(first))
    assert "does not exist" not in caplog.text
    with pytest.raises(ConfigError, match=r"asks for model\.width=8, here it is 9"):
        check_start(config(first, width=9))
    check_start(config("hub:owner/name"))
    assert "does not exist" not in caplog.text
    check_start(config(tmp_path / "nowhere"))
    assert "nowhere does not exist here: a start ends with that" in caplog.text
    caplog.clear()
    run(16, "new", first)
    shutil.move(first, tmp_path / "moved")
    check_start(config(first))  # it would resume
    assert "does not exist" not in caplog.text


def test_runs_of_before_the_option_are_found_and_paths_stay_here(run):
    plain, other = run(16, "a", config_alone=True), run(16, "a", "there/b.safetensors", config_alone=True)
    assert plain.identity() != other.identity()
    kept = plain.model_copy(update={"train": plain.train.model_copy(update={"images": 5})})
    assert kept.identity() == plain.identity() == "f5dc28d99cc618ed"  # of version 0.1.0 before it
    assert other.portable().train.init_from == "b.safetensors"
    hub = run(16, "a", "hub:owner/name@v1", config_alone=True)
    assert hub.portable().train.init_from == "hub:owner/name@v1"


@pytest.mark.parametrize(
    ("ranks", "kind", "zero"), [(1, "torch", 0), (1, "deepspeed", 1), (2, "torch", 0), (2, "deepspeed", 2)]
)
def test_every_engine_and_number_of_ranks_begins_with_the_same(launch, ranks, kind, zero):
    """A growing model, from where the level that the other one had reached is faded in; it learns nothing."""
    launch(run__name="source")
    (source,) = (launch.folder / "runs").glob("*-source")
    still = {"optim__learning_rate": 1e-30, "train__init_from": source, "train__images": 108}
    launch(ranks=ranks, run__name="other", engine__kind=kind, engine__zero=zero, **still)
    (other,) = (launch.folder / "runs").glob("*-other")
    tensors, _ = load_newest(other / "checkpoints")
    for name, value in averages(source).items():
        torch.testing.assert_close(tensors[f"model/{name}"], value, rtol=0, atol=1e-20)
        torch.testing.assert_close(tensors[f"average/{name}"], value, rtol=0, atol=1e-20)
    lines = read_stats(other)
    assert [line["images"] for line in lines] == [66, 82, 98, 114]  # 50 is 1.25 levels
    assert all(line["lod"] == 1 and line["blend"] == 1 for line in lines)
