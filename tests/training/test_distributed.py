"""N ranks at the same global batch reach the parameters of one rank, under every engine."""

import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from sivae_fast.checkpoint import load_newest, part
from sivae_fast.models.residual import ResidualModel
from sivae_fast.training.averaging import Average
from sivae_fast.training.initial import share_first_weights
from tests.training.conftest import ROOT, environment
from tests.training.test_reduction import of_two_ranks

#: Largest |difference| / |update| over the parameters of a network after 5 iterations; it comes from the
#: order of float32 sums, 2e-5 to 3e-4 were measured on CPU.
FLOOR = 2e-3
#: With beta1 = 0 Adam makes a full step of a gradient however small it is, also where rounding decides about
#: its sign: one such number was seen to make 2e-2 of it. Not with a larger eps.
STEADY = {"optim__eps": 1e-5}
#: The first map of a new decoder is a constant plus this bias, and instance norm takes both out again: its
#: true gradient is 0, so that it follows rounding alone.
ROUNDING_ALONE = "decoder.blocks.0.bias_1"


def weights(folder, name):
    (run,) = (folder / "runs").glob(f"*-{name}")
    tensors, state = load_newest(run / "checkpoints")
    assert state["images"] == 80
    return tensors


def largest_difference(a, b, start) -> float:
    worst = 0.0
    for net in ("encoder", "mapping_tl", "decoder", "mapping_fl"):
        names = [n for n in a if n.startswith(f"model/{net}.") and ROUNDING_ALONE not in n]
        difference = sum(float((a[n] - b[n]).square().sum()) for n in names) ** 0.5
        update = sum(float((a[n] - start[n]).square().sum()) for n in names) ** 0.5
        assert update > 0
        worst = max(worst, difference / update)
    return worst


@pytest.fixture
def start():
    from sivae_fast.config import make_config
    from sivae_fast.systems import make_model

    model = {
        "resolution": 8, "start_channels": 4, "max_channels": 8, "latent_size": 8, "mapping_layers": 2
    }  # fmt: skip
    return {f"model/{n}": t for n, t in make_model(make_config({"model": model})).state_dict().items()}


@pytest.mark.parametrize("kind, zero", [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)])
def test_two_ranks_equal_one(launch, start, kind, zero):
    launch(run__name="one", **STEADY)
    launch(ranks=2, run__name="two", engine__kind=kind, engine__zero=zero, **STEADY)
    one, two = weights(launch.folder, "one"), weights(launch.folder, "two")
    assert largest_difference(one, two, start) < FLOOR
    for name in one:
        if "exp_avg_sq" in name and ROUNDING_ALONE not in name:
            torch.testing.assert_close(two[name], one[name], rtol=0.05, atol=1e-9)
    averages = part(one, "average"), part(two, "average")
    for name in set(averages[0]) - {ROUNDING_ALONE}:
        torch.testing.assert_close(averages[1][name], averages[0][name], rtol=1e-3, atol=2e-4)


def test_deepspeed_under_plain_python(launch, start):
    launch(run__name="one", **STEADY)
    launch(run__name="deepspeed", engine__kind="deepspeed", engine__zero=1, **STEADY)
    assert (
        largest_difference(weights(launch.folder, "one"), weights(launch.folder, "deepspeed"), start) < FLOOR
    )


def test_accumulation_on_two_ranks_equals_one(launch, start):
    settings = {"optim__eps": 1e-2}
    launch(run__name="one", **settings)
    launch(ranks=2, run__name="two", train__micro_batch=4, **settings)
    launch(
        ranks=2, run__name="zero", train__micro_batch=4, engine__kind="deepspeed", engine__zero=2, **settings
    )
    one = weights(launch.folder, "one")
    assert largest_difference(one, weights(launch.folder, "two"), start) < FLOOR
    assert largest_difference(one, weights(launch.folder, "zero"), start) < FLOOR


def other_weights(rank: int, file: str, answers) -> None:
    """Two ranks whose weights were drawn from other seeds, as other processors would round them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = ResidualModel(resolution=8, widths=(4, 8), latent_size=3)
    model.encoder.main[1].running_mean += rank
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = SimpleNamespace(model=model, average=Average(model, 100.0), engines={})
    share_first_weights(trainer)
    found = [None, None]
    dist.all_gather_object(found, (before, model.state_dict(), trainer.average.model().state_dict()))
    if rank == 0:
        differing = lambda state: sum(not torch.equal(state[name], before[name]) for name in before)
        answers.put([[differing(state) for state in states] for states in found])
    dist.barrier()
    dist.destroy_process_group()


def test_all_ranks_begin_with_the_weights_of_the_first():
    (_, *first), (apart, *second) = of_two_ranks(other_weights)
    assert apart > 10
    assert first == second == [0, 0]


def test_a_snapshot_has_the_buffers_of_all_ranks(launch):
    """The style average as a checkpoint of that moment has it; and no trace of it in what is trained then."""
    settings = {"ranks": 2, "train__images": 48, "train__warmup_images": 0}
    launch(run__name="snapshot", run__snapshot=32, **settings)
    launch(run__name="checkpoint", run__checkpoint=32, run__snapshot=1000, **settings)
    launch(run__name="neither", run__snapshot=1000, **settings)
    runs = {path.name.partition("-")[2]: path for path in (launch.folder / "runs").iterdir()}
    name = "0000000032.safetensors"
    found = load_file(runs["snapshot"] / "snapshots" / name)["dlatent_avg"]
    wanted = load_file(runs["checkpoint"] / "checkpoints" / name)["model/dlatent_avg"]
    assert wanted.any() and torch.equal(found, wanted)
    (one, _), (other, _) = (load_newest(runs[name] / "checkpoints") for name in ("snapshot", "neither"))
    assert all(torch.equal(one[name], other[name]) for name in other)


OVERFLOWING = """
import os, sys
from sivae_fast.config import load_config
from sivae_fast.training.loop import Trainer, train

iterate, until = Trainer.iterate, int(os.environ["UNTIL"])

def overflowing(trainer, *given):
    weight = trainer.model.encoder.blocks[-1].conv_2.weight
    overflows = 48 <= trainer.position < until
    hook = weight.register_hook(lambda gradient: gradient * float("inf")) if overflows else None
    iterate(trainer, *given)
    if hook:
        hook.remove()

Trainer.iterate = overflowing
train(load_config(sys.argv[1], sys.argv[2:]))
"""


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_that_deepspeed_leaves_out_is_not_passed_over(launch, zero):
    """The losses stay finite. One return leaves the images at fault out, and ends where there are more."""
    program = launch.folder / "overflowing.py"
    program.write_text(OVERFLOWING)
    settings = {"engine.kind": "deepspeed", "engine.zero": zero, "run.checkpoint": 32, "guard.rollbacks": 1}
    command = launch.arguments(2, settings)
    at = command.index(str(ROOT / "launch" / "train.py"))
    command[at : at + 1] = [str(program), str(ROOT / "launch" / "configs" / "quickstart.yaml")]

    def done(until: int, name: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        where = {**environment(), "PYTHONPATH": path, "UNTIL": str(until)}
        named = [*command, f"run.name={name}"]
        return subprocess.run(
            named, env=where, cwd=launch.folder, capture_output=True, text=True, timeout=300
        )

    always, once = done(10**6, "always"), done(64, "once")
    assert always.returncode and "the gradient of the encoder is not finite at level" in always.stderr
    assert once.returncode == 0, once.stderr[-3000:]
    (run,) = (launch.folder / "runs").glob("*-once")
    assert "Went back from 64 to 32 images" in (run / "log.txt").read_text()
