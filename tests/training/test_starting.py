"""`--dry-run` finds what a start would end with before it reads data; a configuration that passes, starts."""

import pytest
import yaml

from launch.train import main
from sivae_fast.config import load_config
from tests.training.conftest import ROOT

CONFIGS = sorted((ROOT / "launch" / "configs").glob("*.yaml"))
TORCH = "engine.kind=torch"


def dry_run(capsys, name: str, *overrides: str) -> tuple[int, str, str]:
    path = ROOT / "launch" / "configs" / f"{name}.yaml"
    code = main(["--config", str(path), *overrides, "--dry-run"])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_passes_without_its_data(path, capsys):
    code, printed, _ = dry_run(capsys, path.stem, TORCH)
    assert code == 0
    assert yaml.safe_load(printed)["run"]["name"] == load_config(path).run.name


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("cifar10", [], ["data.path is missing: a start ends with that"]),
        ("cifar10", ["data.path=a.zip"], ["data.path=a.zip does not exist here: a start ends with that"]),
        ("cifar10", [f"data.path={ROOT}"], []),
        ("translation", ["data.path=b"], ["data.path=b does not exist here: a start ends with that"]),
        ("translation", [], []),
        ("quickstart", [], []),
        ("density-rings", [], []),
        ("quickstart", ["evaluate.data=c"], []),
        (
            "quickstart",
            ["evaluate.data=c", "evaluate.every=99"],
            ["evaluate.data=c does not exist here: a start ends with that"],
        ),
    ],
)
def test_data_that_is_not_there_is_said(name, overrides, said, capsys, caplog):
    assert dry_run(capsys, name, TORCH, *overrides)[0] == 0
    messages = [record.getMessage() for record in caplog.records]
    assert [message for message in messages if "a start ends with that" in message] == said


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("ffhq256", ["model.resolution=512"], "train.batch has 7 values, the model has 8 levels of detail"),
        (
            "ffhq256",
            ["model.resolution=512", "train.batch=32"],
            "optim.learning_rate has 7 values, the model has 8 levels of detail",
        ),
        (
            "ffhq256",
            ["train.micro_batch=[4,4]"],
            "train.micro_batch has 2 values, the model has 7 levels of detail",
        ),
        ("cifar10", ["train.batch=[32,64]"], "train.batch has 2 values, a model of one size takes one"),
        (
            "cifar10",
            ["model.resolution=36"],
            "model.resolution is 36, must be a multiple of 8: 3 widths halve it as often",
        ),
        ("translation", ["model.resolution=60"], "model.resolution=60: must be a power of two, at least 8"),
        (
            "translation",
            ["model.swapped_fakes=true", "train.batch=33"],
            "train.batch=33 over 1 ranks goes in passes of 33 images: model.swapped_fakes=true needs an even "
            "number",
        ),
        (
            "density-rings",
            [f"run.folder={ROOT / 'LICENSE' / 'runs'}"],
            f"run.folder={ROOT / 'LICENSE' / 'runs'}: {ROOT / 'LICENSE' / 'runs'} cannot be a folder: "
            f"{ROOT / 'LICENSE'} is not one",
        ),
        (
            "pointclouds",
            ["data.points=1024"],
            "data.points=1024 and model.points=2048 must be the same",
        ),
        (
            "density-rings",
            ["data.name=ringz"],
            "data.name=ringz: unknown density 'ringz': did you mean 'rings'? There are",
        ),
        (
            "cifar10",
            ["model.lagged_decoder=true", "objective.kind=vae"],
            "model.lagged_decoder=true needs objective.kind=soft_introvae, objective.kind=vae reconstructs",
        ),
        ("quickstart", ["train.graphs=true"], "train.graphs=true with a cpu device: accepted is a CUDA GPU"),
        (
            "quickstart",
            ["train.batch=auto"],
            "train.batch=auto fills the memory of a GPU, this run is on a CPU: give a number",
        ),
        (
            "quickstart",
            ["optim.implementation=apex"],
            "optim.implementation=apex needs a GPU, parameters are on cpu: use torch",
        ),
        ("quickstart", ["engine.zero=1"], "engine.zero=1 needs engine.kind=deepspeed; the torch engine has"),
        ("quickstart", ["run.name=a b"], "run.name='a b': accepted are letters, digits, '.', '_' and '-'"),
        (
            "quickstart",
            ["evaluate.every=2000", "evaluate.metrics=[fid]", "evaluate.weights=nowhere"],
            "evaluate.metrics=fid: nowhere",
        ),
        (
            "quickstart",
            ["evaluate.metrics=[fid,foo]"],
            "evaluate.metrics=foo: model.kind=style accepts fid, ",
        ),
        ("density-rings", ["evaluate.metrics=[fid]"], "evaluate.metrics=fid: model.kind=mlp accepts none"),
    ],
)
@pytest.mark.usefixtures("on_a_cpu")
def test_what_a_start_would_end_with_is_found(name, overrides, message, capsys):
    code, printed, errors = dry_run(capsys, name, TORCH, *overrides)
    assert (code, printed) == (1, "")
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {message}")


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_the_launchers_ranks_count(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    code, _, errors = dry_run(capsys, "cifar10", TORCH)
    assert code == 1 and "rank 0: " in errors
    assert "train.batch=32 (level 0) does not divide over 3 ranks: use a multiple of 3, e.g. 33" in errors
    assert dry_run(capsys, "cifar10", TORCH, "train.batch=33")[0] == 0
    monkeypatch.setenv("RANK", "1")
    assert dry_run(capsys, "cifar10", TORCH) == (0, "", "")  # the first rank speaks for all


@pytest.mark.parametrize(
    ("model", "data", "accepted"),
    [
        ({"kind": "residual"}, {"kind": "density"}, "images or factors"),
        ({"kind": "mlp"}, {"kind": "images"}, "density"),
        ({"kind": "style"}, {"kind": "pointclouds"}, "images or factors"),
    ],
)
def test_models_are_told_the_data_they_accept(model, data, accepted, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": model, "data": data}))
    assert main(["--config", str(path), "--dry-run"]) == 1
    assert capsys.readouterr().err == (
        f"error: data.kind={data['kind']} does not fit model.kind={model['kind']}: "
        f"accepted with it is {accepted}\n"
    )


def test_ranks_without_a_meeting_point_are_one_clear_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    config = str(ROOT / "launch" / "configs" / "density-rings.yaml")
    assert main(["--config", config, TORCH, f"run.folder={tmp_path}"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: rank 0: MASTER_ADDR is not set")
