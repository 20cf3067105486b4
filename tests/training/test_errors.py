"""What a user does wrong gets one line that says what is accepted, and nothing is lost."""

import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from sivae_fast.checkpoint import save_checkpoint
from sivae_fast.config import ConfigError, load_config, make_config
from sivae_fast.training.loop import engine_kind
from tests.training.conftest import ROOT

CONFIGS = sorted((ROOT / "launch" / "configs").glob("*.yaml"))


def error_of(launch, **overrides) -> str:
    done = launch(check=False, **overrides)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("error: "))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path):
    config = load_config(path)
    assert make_config(config.to_dict()) == config


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.bach=3", "train.bach: unknown key, did you mean train.batch?"),
        ("modell.kind=style", "modell: unknown key, did you mean model?"),
        ("train.batch=-4", "train.batch=-4: input should be greater than 0, or a list, or 'auto'"),
        ("train.batch=many", "train.batch='many': input should be a valid integer, or a list, or 'auto'"),
        ("train.batch=[4,-1]", "train.batch[1]=-1: input should be greater than 0"),
        ("objective.beta_neg=-1", "beta_neg=-1: input should be greater than or equal to 0, or a list"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: the list is too short"),
        ("evaluate.metrics=[]", "evaluate.metrics=[]: the list should have at least 1 item, not 0"),
        ("train=3", "train=3: input should be a section"),
        ("data.classes=[chair]", "data.classes: data.kind=images has no such option"),
        ("train.batch=[1", "train.batch=[1: not a valid value: expected ',' or ']'"),
        ("train.precision=fp16", "train.precision='fp16': input should be 'fp32', 'bf16' or 'auto'"),
        ("model.resolution=100", "model.resolution=100: input should be 8, 16, 32"),
        ("model.kind=gan", "model.kind=gan: accepted are style, residual, mlp, pointnet, two_encoder, own"),
        ("objective.kind=introvae", "objective.margin is missing"),
        ("objective.beta_rec=-1", "objective.beta_rec=-1: input should be greater than or equal to 0"),
        ("objective.beta_rec=.nan", "objective.beta_rec=nan: input should be"),
        ("train.fresh_draws=true", "train.fresh_draws=true needs train.schedule=published"),
        ("train.batch", "overrides are written section.key=value"),
        ("train.=3", "'train.=3': overrides are written section.key=value"),
    ],
)
def test_wrong_settings_name_the_key_and_what_is_accepted(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "launch" / "configs" / "quickstart.yaml", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"# A page\n\nof text: with `code` and\n- more\n", "not valid YAML: .*, line [0-9]+$"),
        (b"\x89PNG\r\n", "not a text. Give the path of a YAML file"),
        (b"only words", "must hold sections such as `train:`, got str"),
    ],
)
def test_a_config_that_is_no_yaml_gets_one_line(tmp_path, content, message):
    (tmp_path / "page.md").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^--config .*page\.md: {message}"):
        load_config(tmp_path / "page.md")


def test_numbers_may_be_written_with_exponents():
    config = load_config(ROOT / "launch" / "configs" / "quickstart.yaml", ["optim.learning_rate=2e-4"])
    assert config.optim.learning_rate == 2e-4


def test_missing_config_and_dry_run(launch):
    with pytest.raises(ConfigError, match="No such file or directory"):
        load_config("nowhere.yaml")
    done = subprocess.run(
        [*launch.arguments(), "--dry-run"], capture_output=True, text=True, cwd=launch.folder
    )
    assert done.returncode == 0 and "images_per_level: 40" in done.stdout
    assert not (launch.folder / "runs").exists()


def test_wrong_data_path(launch):
    message = error_of(launch, data__path="nowhere")
    assert message.startswith("error: data.path=nowhere: there is no image set at nowhere (a folder")


def test_a_run_folder_that_cannot_be_written(launch):
    message = error_of(launch, run__folder="/proc/runs", train__images=16)  # root may write everywhere else
    assert message == "error: run.folder=/proc/runs: No such file or directory"


def test_images_of_another_size(launch):
    message = error_of(launch, model__resolution=16)
    assert "images are 8x8 with 3 channels" in message
    assert "--resolution 16" in message


def test_batch_that_ranks_do_not_divide(launch):
    done = launch(ranks=2, check=False, train__batch=15)
    assert done.returncode
    assert (
        "train.batch=15 (level 0) does not divide over 2 ranks: use a multiple of 2, e.g. 16" in done.stderr
    )


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"engine__zero": 1}, "engine.zero=1 needs engine.kind=deepspeed"),
        ({"engine__kind": "deepspeed", "engine__zero": 3}, "ZeRO 0, 1 and 2 are accepted"),
        (
            {"engine__kind": "deepspeed", "engine__deepspeed": "{bf16: {enabled: true}}"},
            "engine.deepspeed.bf16 is not accepted",
        ),
        ({"optim__implementation": "apex"}, "optim.implementation=apex needs a GPU"),
    ],
)
def test_unsafe_engines_are_refused_by_name(launch, overrides, message):
    done = launch(check=False, **overrides)
    assert done.returncode == 1
    assert message in done.stderr


def test_divergence_names_the_term_and_keeps_the_checkpoint(launch):
    """The decoder's weights are spoilt in the checkpoint, and the run resumed."""
    launch(run__name="run", train__images=32)
    folder = next((launch.folder / "runs").iterdir()) / "checkpoints"
    before = sorted(path.name for path in folder.iterdir())
    state = json.loads((folder / "0000000032.json").read_text())
    tensors = load_file(folder / "0000000032.safetensors")
    tensors["model/decoder.to_rgb.0.weight"].fill_(float("nan"))
    known = {key: state[key] for key in ("config", "lod", "steps", "tick", "marks")}
    save_checkpoint(folder, 32, tensors, known, keep=3)
    done = launch(run__name="run", check=False)
    assert done.returncode == 1
    assert "training diverged: rec_real is not finite at level 0 (4 pixels), after 48 images" in done.stderr
    assert "a higher objective.beta_neg" in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == before


def test_checkpoint_of_another_architecture(launch):
    launch(run__name="small")
    launch(run__name="large", model__max_channels=16)
    small, large = sorted((launch.folder / "runs").iterdir())
    shutil.rmtree(large / "checkpoints")
    shutil.copytree(small / "checkpoints", large / "checkpoints")
    message = error_of(launch, run__name="large", model__max_channels=16, train__images=96)
    assert "of another architecture" in message and "the model's is" in message


def test_missing_deepspeed_is_said_once_or_refused(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    config = load_config(ROOT / "launch" / "configs" / "quickstart.yaml")
    assert engine_kind(config) == ("torch", 0)
    assert "DeepSpeed cannot be imported" in caplog.text and "using the torch engine" in caplog.text
    config = load_config(ROOT / "launch" / "configs" / "quickstart.yaml", ["engine.kind=deepspeed"])
    with pytest.raises(ConfigError, match="Install it with `pip install deepspeed`"):
        engine_kind(config)
