"""The configurations that ship: their first lines are commands that work, their tables fit their models."""

import argparse
import contextlib
import itertools
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from launch.train import main
from sivae_fast.cli import parser
from sivae_fast.config import ConfigError, load_config, make_config
from sivae_fast.data.convert import Recipe
from sivae_fast.systems import make_model, make_objective, make_schedule
from sivae_fast.training.iteration import check_batches

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "launch" / "configs"
#: Named by image sets that are prepared, their first lines say how.
PREPARED = sorted(path.stem for path in CONFIGS.glob("*.yaml") if "sivae-fast prepare" in path.read_text())
#: Published with one size and splits of their own.
COMPLETE = {"bootstrap-cifar10", "cifar10", "svhn", "mnist", "fmnist"}


def load(name: str, *overrides: str):
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def commands(name: str) -> list[list[str]]:
    """The indented commands in the comment at the top of a configuration, as a shell reads them."""
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    text = "\n".join(line[4:] for line in comment if line.startswith("#   "))
    return [shlex.split(line) for line in text.replace("\\\n", "").splitlines()]


def preparation(name: str) -> argparse.Namespace:
    program, *arguments = commands(name)[0]
    assert program == "sivae-fast"
    return parser().parse_args(arguments)


@pytest.mark.parametrize("name", PREPARED)
def test_first_command_prepares_a_set_of_the_models_size(name):
    options = preparation(name)
    Recipe(options.resolution, options.fit, options.filter, options.format)  # refuses unknown ones
    assert options.resolution == (None if name in COMPLETE else load(name).model.resolution)
    assert (options.split is None) == (options.hold_out is None)


@pytest.mark.parametrize("name", PREPARED)
def test_second_command_trains_on_what_the_first_made(name, capsys):
    launcher, script, *arguments = commands(name)[1]
    assert (launcher, script) == ("deepspeed", "launch/train.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main([*arguments, "--dry-run"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["run"]["name"] == name
    assert resolved["data"]["path"] == preparation(name).dest


def test_faces_hold_out_the_published_number_of_pictures():
    held_out = {name: preparation(name).hold_out for name in PREPARED}
    assert held_out["ffhq256"] == held_out["ffhq1024"] == 10_000
    assert held_out["celebahq256"] == held_out["celeb1024"] == 1_000


@pytest.mark.parametrize("name", ["celeb128", "celeb256", "celeb1024", "monsters128"])
def test_sets_of_the_residual_model_are_resized_as_published(name):
    options = preparation(name)
    assert (options.fit, options.filter) == ("stretch", "bicubic")


@pytest.mark.parametrize("size", [512, 1024])
def test_ffhq1024_is_the_published_model_and_schedule_up_to_256(size, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # has none for meta
    narrower = [] if size == 1024 else ["model.resolution=512", "model.start_channels=32"]
    published, config = load("ffhq256"), load("ffhq1024", *narrower)
    schedule = make_schedule(config)
    check_batches(config, schedule, world=8)
    stages, expected = schedule.stages(), make_schedule(published).stages()
    assert stages[: len(expected)] == expected
    assert 4 << stages[-1].lod == size
    assert all((s.batch, s.beta_neg, s.learning_rate) == (32, 512, 0.002) for s in stages[len(expected) :])
    assert config.train.images > schedule.images_per_level * len(stages)
    with torch.device("meta"):
        model, smaller = make_model(config), make_model(published)
        shapes = [{name: p.shape for name, p in m.decoder.named_parameters()} for m in (model, smaller)]
        assert shapes[1].items() <= shapes[0].items()
        posterior = model.encode(torch.empty(2, 3, size, size))
        assert posterior.mean.shape == (2, 512)
        assert model.decode(posterior.mean, noise="none").shape == (2, 3, size, size)


def test_the_bootstrap_variant_differs_in_its_own_settings_alone():
    plain, bootstrap = load("cifar10").to_dict(), load("bootstrap-cifar10").to_dict()
    own = {"model.lagged_decoder": True, "model.lag_epochs": 1, "objective.gamma_r": 1.0}
    for key, value in own.items():
        section, option = key.split(".")
        assert bootstrap[section][option] == value
        plain[section][option] = value
    plain["run"]["name"] = "bootstrap-cifar10"
    assert bootstrap == plain
    with torch.device("meta"):
        assert make_model(load("bootstrap-cifar10")).lagged_decoder


def test_what_may_change_on_resume_and_what_makes_another_run():
    free = ["run.name=b", "run.tick=1", "engine.zero=1", "evaluate.every=10", "guard.rollbacks=3"]
    free += ["train.images=5", "train.micro_batch=2", "train.recompute=true", "train.compile=true"]
    free += ["data.loader=torch", "data.workers=2", "data.cache_gib=0", "train.graphs=true"]
    bound = ["train.batch=8", "train.seed=1", "train.warmup_images=10", "train.precision=bf16"]
    bound += ["train.schedule=published", "optim.learning_rate=0.1", "average.half_life=5"]
    bound += ["objective.beta_neg=3", "model.latent_size=4", "data.flip=false", "data.path=other"]
    bound += ["growth.fade=0.125"]
    identity = load("quickstart").identity()
    assert [change for change in free if load("quickstart", change).identity() != identity] == []
    assert [change for change in bound if load("quickstart", change).identity() == identity] == []


@pytest.mark.parametrize(
    "setting, message",
    [
        ("logvar_clamp=[2,-2]", "objective.logvar_clamp=[2,-2]: the first must be below the second"),
        ("logvar_clamp=[-2]", "objective.logvar_clamp=[-2]: the list is too short"),
        ("logvar_clamp=[-.inf,2]", "objective.logvar_clamp[0]=-inf: input should be a finite number"),
        ("huber_delta=0", "objective.huber_delta=0: input should be greater than 0"),
    ],
)
def test_wrong_bounds_are_named(setting, message):
    with pytest.raises(ConfigError) as caught:
        load("cifar10", f"objective.{setting}")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "vae", "beta_rec": 0.5, "beta_kl": 2.0},
        {"kind": "introvae", "beta_rec": 0.5, "beta_kl": 2.0, "beta_neg": 3.0, "margin": 5.0},
        {"kind": "soft_introvae", "beta_neg": 3.0, "scale": 0.1, "alpha": 1.5, "gamma_r": 0.25},
    ],
    ids=lambda settings: settings["kind"],
)
def test_every_weight_reaches_the_objective(settings):
    overrides = [f"objective.{key}={value}" for key, value in settings.items()]
    objective = make_objective(load("cifar10", *overrides), (3, 32, 32))
    kind = settings.pop("kind")
    assert type(objective).__name__.lower() == kind.replace("_", "")
    assert {key: getattr(objective, key) for key in settings} == settings


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["margin=10"],
            "objective.margin=10 needs objective.kind=introvae, got soft_introvae: null leaves it out",
        ),
        (
            ["kind=introvae", "margin=10", "gamma_r=0.5"],
            "objective.gamma_r=0.5 needs objective.kind=soft_introvae, got introvae: null leaves it out",
        ),
        (
            ["reconstruction=bce"],
            "objective.reconstruction='bce': input should be 'sse', 'l1', 'huber', 'chamfer' or 'perceptual'",
        ),
    ],
)
def test_weights_that_would_do_nothing_are_refused(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load("cifar10", *(f"objective.{override}" for override in overrides))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("cifar10", ["growth.images_per_level=9"], "growth.images_per_level=9 needs model.kind=style and "),
        (
            "quickstart",
            ["data={kind: factors}"],
            "needs model.kind=style and data.kind=images, model.kind=sty",
        ),
        (
            "translation",
            ["data={kind: images, path: a}"],
            "model.kind=two_encoder needs data.value_range=unit, got symmetric: its decoder ends",
        ),
        ("cifar10", ["train.compile=true"], "train.compile=true needs model.kind=style, got model.kind=res"),
        ("cifar10", ["objective.perceptual_weights=a"], "objective.perceptual_weights=a: perceptual needs "),
        ("density-rings", ["evaluate.every=9"], "evaluate.every=9 needs model.kind to be one of style, "),
        (
            "pointclouds",
            ["evaluate.every=9", "evaluate.weights=a"],
            "evaluate.weights=a needs model.kind to be one of style, residual, own, two_encoder, got",
        ),
        (
            "translation",
            ["evaluate.every=9", "evaluate.features=random"],
            "evaluate.features=random needs model.kind to be one of style, residual, own, got two_encoder: ",
        ),
    ],
)
def test_settings_of_other_models_are_refused(name, overrides, message):
    with pytest.raises(ConfigError) as caught:
        load(name, *overrides)
    assert message in str(caught.value)


def test_settings_that_do_nothing_yet_are_accepted():
    assert load("pointclouds", "evaluate.weights=a").evaluate.every is None
    images = "data={kind: images, path: a, value_range: unit}"
    assert load("translation", "evaluate.every=9", "evaluate.weights=a", images)
    assert load("quickstart", "data={kind: factors}", "growth.images_per_level=0").data.path is None


@pytest.mark.parametrize("kind", ["vae", "introvae", "soft_introvae"])
def test_bounds_reach_the_objective(kind):
    own = ["objective.huber_delta=0.5", "objective.logvar_clamp=[-20,20]"]
    own += ["objective.margin=5"] if kind == "introvae" else []
    objective = make_objective(load("cifar10", f"objective.kind={kind}", *own), (3, 32, 32))
    assert (objective.huber_delta, objective.logvar_clamp) == (0.5, (-20.0, 20.0))


def test_what_belongs_to_a_system_reaches_its_objective():
    made = lambda *settings: make_objective(load(*settings), (3, 32, 32))
    assert made("pointclouds").prior_std == 0.2 and made("ffhq256").beta_neg == 2048
    assert made("translation", "model.swapped_fakes=true").fakes == dict.fromkeys(
        ("rec", "fake", "swap"), 1 / 3
    )
    published = ("cifar10", "train.schedule=published")
    weights = (
        made("cifar10").gamma_r,
        made(*published).gamma_r,
        made(*published, "objective.gamma_r=0").gamma_r,
    )
    assert weights == (0, 1e-8, 0)
    hinge = ("cifar10", "objective.kind=introvae", "objective.margin=5")
    members = [made(*hinge, f"objective.hinge={kind}")._member.name for kind in ("sample", "batch")]
    assert members == ["HINGE", "BATCH_HINGE"]


def test_the_seed_decides_the_first_weights_and_no_other_draws():
    before = torch.get_rng_state()
    one, same, other = (
        make_model(load("density-rings", "model.width=4", f"train.seed={seed}")).state_dict()
        for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "pointclouds",
            ["objective.reconstruction=sse"],
            r"reconstruction=sse does not fit model\.kind=pointnet",
        ),
        ("cifar10", ["objective.reconstruction=chamfer"], r"reconstruction=chamfer does not fit .*=residual"),
        (
            "quickstart",
            ["objective.reconstruction=perceptual", "objective.perceptual_weights=vgg16.pth"],
            r"perceptual needs data\.value_range=unit, got symmetric",
        ),
    ],
)
def test_errors_that_do_not_fit_the_data_are_refused(name, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(name, *overrides)


@pytest.mark.parametrize(
    "setting",
    [
        *("train.batch=0", "train.images='5'", "train.compile=1", "evaluate.images=5", "engine.zero=4"),
        *("optim.learning_rate=.inf", "objective.beta_kl=.inf", "optim.betas=[1,0.9]", "optim.betas=[0.9,1]"),
        *(
            "train.seed=4611686018427387904",
            "objective.beta_neg=[]",
            "growth.fade=1.1",
            "model.style_mixing=1.1",
            "guard.spike=1",
            "growth.images_per_level=-1",
        ),
    ],
)
def test_values_just_outside_are_named(setting):
    with pytest.raises(ConfigError, match=setting.partition("=")[0]):
        load("quickstart", setting)


@pytest.mark.parametrize(
    "setting",
    [
        *("train.batch=1", "growth.fade=0", "growth.fade=1", "growth.images_per_level=0", "train.seed=0"),
        *("model.style_mixing=0", "model.style_mixing=1", "objective.beta_kl=0", "optim.betas=[0,0]"),
        *("data.shift=0.5", "data.cache_gib=0", "evaluate.images=6", "guard.spike=1.1"),
    ],
)
def test_values_at_the_edge_are_accepted(setting):
    key, _, value = setting.partition("=")
    section, option = key.split(".")
    assert load("quickstart", setting).to_dict()[section][option] == yaml.safe_load(value)


def test_a_configuration_does_not_change_after_it_was_checked():
    with pytest.raises(ValueError, match="frozen"):
        load("quickstart").train.seed = 3


def test_what_leaves_the_machine_holds_names_but_no_paths():
    private = ["engine.deepspeed={aio: {path: /home/me}}", "run.folder=/home/me/runs"]
    private += ["evaluate.data=/home/me/faces", "evaluate.weights=/home/me/w.pth"]
    weights = ["objective.reconstruction=perceptual", "objective.perceptual_weights=/home/me/vgg16.pth"]
    images = load("cifar10", *private, *weights, "data.path=/home/me/faces").portable()
    assert "/home/me" not in images.to_yaml() and images.run.folder == load("cifar10").run.folder
    assert images.data.path is None and images.objective.perceptual_weights == "vgg16.pth"
    clouds = load("pointclouds", "data.path=/home/me/sets/chairs/points/..").portable()
    assert clouds.data.path == "chairs"
    for unchanged in (load("quickstart"), load("translation"), load("density-rings")):
        assert unchanged.portable() == unchanged


def test_a_section_without_keys_takes_overrides(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("train:\n  # batch: 8\n")
    assert load_config(path, ["train.batch=4"]).train.batch == 4


def test_an_empty_file_has_the_defaults_and_a_dictionary_stays_as_it_was(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert load_config(tmp_path / "empty.yaml") == make_config({})
    settings = {"data": {"flip": False}}
    assert not make_config(settings).data.flip and settings == {"data": {"flip": False}}


def test_numbers_with_a_sign_and_an_exponent_are_numbers():
    assert load("cifar10", "objective.logvar_clamp=[-2e1,+2e1]").objective.logvar_clamp == (-20, 20)


def test_a_value_is_no_section():
    with pytest.raises(ConfigError, match=r"^train\.batch\.size: batch is a value, not a section"):
        load("quickstart", "train.batch.size=3")
