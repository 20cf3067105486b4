"""Captured iterations are the eager ones, for every system, over everything that changes while training.

The graphs are emulated (`tests.training.emulated`); what only a GPU can show is marked.
"""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from sivae_fast.config import ConfigError, make_config
from sivae_fast.draws import Draws, Rows
from sivae_fast.growth import Schedule
from sivae_fast.systems import make_schedule
from sivae_fast.training import graphs, loop
from sivae_fast.training.loop import Trainer
from sivae_fast.training.resume import restore, state_of
from tests.training.emulated import EmulatedRecorder

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(graphs, "CudaRecorder", EmulatedRecorder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


SMALL_STYLE = {"start_channels": 4, "max_channels": 8, "latent_size": 8, "mapping_layers": 2}
SYSTEMS = {
    "mlp": {
        "model": {"kind": "mlp", "width": 16},
        "objective": {"beta_rec": 0.2, "beta_kl": 0.3, "beta_neg": 0.9},
        "data": {"kind": "density", "name": "rings"},
    },
    "residual": {
        "model": {"kind": "residual", "resolution": 8, "widths": (4, 8), "latent_size": 4},
        "data": {"value_range": "unit"},
    },
    "bootstrap": {
        "model": {
            "kind": "residual",
            "resolution": 8,
            "widths": (4, 8),
            "latent_size": 4,
            "norm": "group",
            "lagged_decoder": True,
            "augment": True,
        },
        "objective": {"gamma_r": 1.0},
        "data": {"value_range": "unit", "shift": 0.2, "hue": 0.1},
    },
    "two_encoder": {
        "model": {
            "kind": "two_encoder",
            "resolution": 8,
            "class_size": 4,
            "content_size": 4,
            "width": 4,
            "swapped_fakes": True,
        },
        "data": {"kind": "factors"},
    },
    "pointclouds": {
        "model": {"kind": "pointnet", "points": 16, "latent_size": 4},
        "objective": {"reconstruction": "chamfer", "beta_rec": 20.0},
        "data": {"kind": "pointclouds", "points": 16, "rotate": True},
    },
    "style": {
        "model": {"resolution": 8, **SMALL_STYLE, "style_mixing": 0.6},
        "objective": {"beta_neg": (16.0, 24.0), "scale": 0.01},
        "growth": {"images_per_level": 160},
        "optim": {
            "betas": (0.0, 0.99),
            "published_eps": True,
            "learning_rate": (1e-3, 2e-3),
            "drops": (120, 280),
        },
    },
}


def configuration(system: str, folder, pictures, graphs: bool = True, **train):
    values = {"objective": {}, "data": {}, "optim": {"drops": (120,)}, **SYSTEMS[system]}
    if values["data"].get("kind", "images") == "images":
        values["data"] = {**values["data"], "path": str(pictures), "loader": "torch"}
    values["train"] = {"images": 320, "batch": 8, "warmup_images": 40, "graphs": graphs, **train}
    values |= {"average": {"half_life": 50}, "engine": {"kind": "torch"}}
    values["run"] = {"folder": str(folder), "tick": 72, "checkpoint": 10_000, "samples": 10_000}
    return make_config(values)


@pytest.fixture
def make(tmp_path, pictures):
    """Trainers of a system, closed in the end; each has a folder of its own unless one is named."""
    made = []

    def trainer(system: str, folder: str | None = None, device=CPU, **options) -> Trainer:
        config = configuration(system, tmp_path / (folder or str(len(made))), pictures, **options)
        made.append(Trainer(config, make_schedule(config), 0, 1, device))
        return made[-1]

    yield trainer
    for trainer in made:
        trainer.close()


def advance(trainer: Trainer, iterations: int) -> Trainer:
    batches = trainer._batches()
    for _ in range(iterations):
        trainer._advance(batches)
    batches.close()
    return trainer


def assert_same(one: Trainer, other: Trainer) -> None:
    (tensors, state), (others, other_state) = state_of(one, True), state_of(other, True)
    assert tensors.keys() == others.keys()
    wrong = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    assert not wrong, wrong
    assert state["tick"] == other_state["tick"] and state["steps"] == other_state["steps"]


def replays(trainer: Trainer) -> list[int]:
    """Of each graph that is still in use."""
    return [graph.replays for graph in trainer.graphs._recorder.graphs]


@pytest.mark.parametrize("system", ["mlp", "residual", "bootstrap", "two_encoder", "pointclouds"])
@pytest.mark.parametrize("options", [{}, {"micro_batch": 4}, {"schedule": "published"}], ids=str)
def test_replays_are_eager_iterations(system, options, emulated, make):
    """First the VAE, whose moments and graph end with it, then both phases; over drops of the rate, a new
    beta_neg and epochs of 40 images."""
    eager, captured = make(system, graphs=False, **options), make(system, **options)
    for trainer in (eager, captured):
        advance(trainer, 12)
        changed = {"learning_rate": 1e-3, "beta_neg": 32.0, "drops": (120,)}
        trainer.schedule = Schedule(batch=8, micro_batch=options.get("micro_batch"), **changed)
        advance(trainer, 8)
    assert_same(eager, captured)
    assert replays(captured) == [13]


def test_moments_and_graph_of_the_warmup_are_kept_where_asked(emulated, make, monkeypatch):
    optim = {"drops": (120,), "clear_after_warmup": False}
    monkeypatch.setitem(SYSTEMS, "mlp", {**SYSTEMS["mlp"], "optim": optim})
    eager, captured = (advance(make("mlp", graphs=graphs), 20) for graphs in (False, True))
    assert_same(eager, captured)
    assert replays(captured) == [3, 13]


@pytest.mark.parametrize(
    "options",
    [{}, {"schedule": "published", "fresh_draws": True}, {"recompute": True}, {"precision": "bf16"}],
    ids=str,
)
def test_a_growing_model_with_mixed_styles(options, emulated, make):
    """Two levels of 20 iterations: fades, both ways in which a coin falls, cutoffs, rates, beta_neg.

    The eager twin has the same optimizer: the published rule has another rounding on the device.
    """
    eager, captured = make("style", **options), make("style", **options)
    eager.graphs = None
    assert_same(advance(eager, 40), advance(captured, 40))
    kinds = captured.graphs._kinds
    assert len(kinds) == 2 and all(len(of_a_key) >= 2 for of_a_key in kinds.values())
    assert sum(replays(captured)) > 8


@pytest.mark.parametrize("system", ["mlp", "residual", "style"])
@pytest.mark.parametrize("stop", [96, 168], ids=["within a tick", "elsewhere"])
def test_a_resumed_run_is_the_uninterrupted_one(system, stop, emulated, make):
    def run(folder, images):
        trainer = make(system, folder, images=images)
        trainer.run()
        trainer.close()
        return trainer

    whole = run("whole", 240)
    assert run("parts", stop).images == stop
    parts = run("parts", 240)
    assert_same(whole, parts)
    assert sum(replays(parts)) > 3


def test_a_return_to_a_checkpoint_leaves_graphs_behind(emulated, make, monkeypatch):
    straight, returned = advance(make("residual"), 20), advance(make("residual"), 12)
    returned.recorder._save_checkpoint(planned=True)
    advance(returned, 5)
    assert restore(returned) and returned.images == 96
    assert_same(straight, advance(returned, 8))
    monkeypatch.setattr(returned, "forget_graphs", lambda: None)
    restore(returned)
    with pytest.raises(RuntimeError, match="memory that was given back"):  # the optimizers' former state
        advance(returned, 1)


def _frozen_rate(patch, trainer):
    fused = torch._fused_adam_
    with_number = lambda *given, lr, **named: fused(*given, lr=trainer.stage.learning_rate, **named)
    patch.setattr(torch, "_fused_adam_", with_number)


def _frozen_seed(patch, trainer):
    patch.setattr(graphs._Repeated, "prepare", lambda self, seed: self.restart(0))


def _frozen_fade(patch, trainer):
    to_input = trainer.data.to_input
    fade = lambda batch, draws, lod, blend: to_input(batch, draws, lod, float(trainer.stage.blend))
    patch.setattr(trainer.data, "to_input", fade)


@pytest.mark.parametrize(
    "system, mistake", [("residual", _frozen_rate), ("style", _frozen_seed), ("style", _frozen_fade)]
)
def test_a_number_of_the_host_would_be_noticed(system, mistake, emulated, make, monkeypatch):
    eager, captured = make(system), make(system)
    eager.graphs = None
    advance(eager, 40)
    with monkeypatch.context() as patch:
        mistake(patch, captured)
        advance(captured, 40)
    with pytest.raises(AssertionError, match="model/"):
        assert_same(eager, captured)


def test_what_waits_for_the_device_is_refused(emulated):
    x, mask = torch.ones(3), torch.tensor([True, False, True])
    generator = torch.Generator()
    for wait in (
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x[mask],
        lambda: x.new_tensor(3.0),
        lambda: torch.randn(3, generator=generator),
    ):
        with pytest.raises(RuntimeError, match=r"waits for the device|does not know"):
            EmulatedRecorder().capture(wait, [])


def test_a_capture_changes_nothing_and_numbers_of_the_host_stay():
    x, number = torch.zeros(3), 1.0
    replay = EmulatedRecorder().capture(lambda: x.add_(torch.ones(3) * number), [])
    assert torch.equal(x, torch.zeros(3))
    number = 5.0
    replay()
    replay()
    assert torch.equal(x, 2 * torch.ones(3))


def test_memory_that_was_given_back_is_not_used():
    x, given = torch.zeros(3), [torch.ones(3)]
    replay = EmulatedRecorder().capture(lambda: x.add_(given[0]), [])
    replay()
    given.clear()
    with pytest.raises(RuntimeError, match="memory that was given back"):
        replay()


def test_an_integer_of_the_host_cannot_be_captured(emulated):
    def body(batch, make_stream):
        make_stream("name", Rows.all(2)).integer(1, 3)

    with pytest.raises(RuntimeError, match="draw an index"):
        graphs.Graphs(0, CPU).run("key", body, torch.zeros(2), 0)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"engine": {"kind": "torch"}}, "train.graphs=true with a cpu device: accepted is a CUDA GPU"),
        ({"kind": "deepspeed"}, "engine.kind=deepspeed: accepted is torch"),
        ({"world": 2}, "2 ranks: accepted is one"),
        ({"train": {"compile": True}}, "train.compile=true: accepted is false"),
        ({"train": {"batch": "auto"}}, "train.batch=auto: accepted is numbers"),
        ({"train": {"micro_batch": "auto"}}, "train.micro_batch=auto: accepted is numbers or null"),
        ({"optim": {"implementation": "apex"}}, "optim.implementation=apex: accepted is torch"),
        (
            {"model": {"kind": "mlp"}, "data": {"kind": "density", "name": "sequential8gaussians"}},
            "data.name=sequential8gaussians: accepted is a density that does not move",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_captured_is_refused(setting, message):
    kind, world = setting.pop("kind", "torch"), setting.pop("world", 1)
    device = CPU if "engine" in setting else torch.device("cuda")
    setting["train"] = {**setting.get("train", {}), "graphs": True}
    with pytest.raises(ConfigError, match=re.escape(message)):
        graphs.check_graphs(make_config(setting), kind, world, device)


def test_a_run_on_a_cpu_is_refused_before_its_folder_is_made(tmp_path, pictures):
    with pytest.raises(ConfigError, match="accepted is a CUDA GPU"):
        loop.train(configuration("mlp", tmp_path / "runs", pictures))
    assert not (tmp_path / "runs").exists()


def test_captures_do_not_make_another_run():
    settings = [{"train": {"graphs": on}} for on in (False, True)]
    assert len({make_config(setting).identity() for setting in settings}) == 1


@pytest.mark.gpu
def test_a_replay_draws_what_an_eager_iteration_draws():
    """Normal and uniform numbers and an index, over shapes of many blocks, either way a coin falls."""
    found = torch.zeros(3, 1000, 33, device=GPU)

    def body(batch, make_stream):
        draws = Draws(5, images, Rows.all(1000), GPU, make_stream)
        stream = draws.stream("a")
        found[0] = stream.normal(1000, 33) if stream.coin(0.5) else stream.uniform(1000, 33)
        found[1] = draws.stream("b").normal(1000, 33)
        found[2] = draws.stream("a").index(1, 9) + batch.sum()

    captured, seen = graphs.Graphs(5, GPU), []
    for images in range(12):
        batch = torch.full((4,), float(images), device=GPU)
        body(batch, None)
        expected = found.clone()
        found.zero_()
        captured.run("key", body, batch, images)
        seen.append(torch.equal(found, expected))
    assert all(seen), seen


@pytest.mark.gpu
@pytest.mark.parametrize("system", SYSTEMS)
class TestOnAGPU:
    def test_replays_are_eager_iterations(self, system, make, monkeypatch):
        """Statistics and all weights together: single weights without a gradient but rounding drift apart."""
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        eager, captured = make(system, device=GPU), make(system, device=GPU)
        eager.graphs = None
        (one, state), (other, other_state) = (state_of(advance(t, 40), True) for t in (eager, captured))
        assert state["steps"] == other_state["steps"]
        for name, (total, count) in state["tick"].items():
            assert other_state["tick"][name] == (pytest.approx(total, rel=1e-2), count), name
        distance, length = (
            sum(float(t.double().square().sum()) for t in tensors)
            for tensors in ((one[n] - other[n] for n in one), one.values())
        )
        assert distance < 1e-4 * length

    @pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
    def test_no_iteration_waits_for_the_device(self, system, captured, make):
        trainer = make(system, device=GPU, graphs=captured)
        batches = trainer._batches()
        for _ in range(14):
            trainer._advance(batches)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                trainer._advance(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        batches.close()
