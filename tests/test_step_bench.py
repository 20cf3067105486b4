"""The step bench times nothing that does not compute the published update."""

import contextlib
import copy
import functools
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from sivae_fast.training import graphs
from tests.training.emulated import EmulatedRecorder

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("step")
    for name in ("step", "plain_trainer", "plain_style", "measure"):
        sys.modules.pop(name, None)


def main_with(step, monkeypatch, *arguments):
    """The bench with these arguments; the number of threads is left as it was."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["step.py", *arguments])
    try:
        step.main()
    finally:
        torch.set_num_threads(threads)


def test_all_providers_compute_the_published_update(step):
    assert step.largest_difference() < 1e-10
    assert step.largest_difference(dtype=torch.float32) < 1e-4
    assert step.largest_difference(dtype=torch.float32, autocast=torch.bfloat16) < 0.5


def test_a_different_update_is_noticed_and_not_timed(step, monkeypatch):
    kl = lambda posterior: 0.5 * (posterior.logvar.exp() + posterior.mean.square() - posterior.logvar).sum(1)
    monkeypatch.setattr(step.PlainTrainer.encoder_loss.__globals__["kl"], "__code__", kl.__code__)
    assert step.largest_difference() > 1e-3  # the constant 1 matters inside the exponential
    monkeypatch.setattr(sys, "argv", ["step.py"])
    monkeypatch.setattr(step, "measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="no timing"):
        step.main()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_compiled_baseline_has_the_optimizer_that_the_project_has(step, compiled):
    model = step.StyleModel(8, start_channels=4, max_channels=8, latent_size=8, mapping_layers=2)
    plain = step.PlainTrainer(step.PlainStyle(model), **step.WEIGHTS, compile=compiled)
    assert [optimizer.defaults["fused"] for optimizer in plain.optimizers] == [compiled or None] * 2


def test_matrix_products_are_tf32_for_the_one_baseline_alone(step):
    matmul, seen = torch.backends.cuda.matmul, []
    iteration = step.WithTF32(lambda x, draws: seen.append(matmul.allow_tf32))
    iteration(None, None)
    assert seen == [True] and not matmul.allow_tf32
    assert "plain, TF32" in step.providers(torch.device("cuda"))


def test_a_captured_step_is_the_eager_one(step, monkeypatch):
    monkeypatch.setattr(graphs, "CudaRecorder", EmulatedRecorder)
    torch.manual_seed(0)
    model = step.StyleModel(8, start_channels=4, max_channels=8, latent_size=8, mapping_layers=2)
    x = torch.randn(4, 3, 8, 8)
    eager, captured = (step.Ours(copy.deepcopy(model), graphs=on) for on in (False, True))
    for images in range(12):
        for iteration in (eager, captured):
            iteration(x, step.Draws(0, images, step.Rows.all(4)))
    pairs = zip(eager.model.parameters(), captured.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert sum(graph.replays for graph in captured.graphs._recorder.graphs) >= 6


@pytest.mark.parametrize("found", [0.7, float("nan"), RuntimeError("no kernel")])
def test_a_precision_whose_update_differs_is_refused(step, monkeypatch, found):
    def largest_difference(device="cpu", dtype=torch.float64, autocast=None):
        if autocast and isinstance(found, Exception):
            raise found
        return found if autocast else 1e-12

    monkeypatch.setattr(step, "largest_difference", largest_difference)
    differences, refused = step.differences(torch.device("cuda"))
    assert differences["float64"] == differences["float32"] == 1e-12
    assert list(refused) == ["bf16"]
    assert str(found) in refused["bf16"] if isinstance(found, Exception) else "5e-01" in refused["bf16"]


def test_the_other_precisions_are_timed_and_saved(step, monkeypatch, tmp_path):
    why = "the updates differ by 7.0e-01, accepted is 5e-01"
    differences = {"float64": 1e-12, "float32": 1e-5, "bf16": 0.7}, {"bf16": why}
    monkeypatch.setattr(step, "differences", lambda device: differences)
    makers = {"plain": step.Ours, "minimal": step.Ours, "minimal, bf16": lambda _: pytest.fail("timed")}
    monkeypatch.setattr(step, "providers", lambda device: makers)
    out = tmp_path / "step.json"
    arguments = ["--resolution", "8", "--start-channels", "4", "--batches", "2", "--rounds", "1"]
    with pytest.raises(SystemExit, match=r"not timed: .*bf16"):
        main_with(step, monkeypatch, *arguments, "--out", str(out))
    found = json.loads(out.read_text())
    assert [row["provider"] for row in found["rows"]] == ["plain", "minimal"]
    assert set(found["ratio_to_plain"]) == {"plain", "minimal"} and found["refused"] == {"bf16": why}


def test_a_provider_without_memory_is_refused_and_the_others_are_measured(step, monkeypatch):
    def greedy(model):
        raise torch.OutOfMemoryError("no memory")

    model = step.StyleModel(8, start_channels=4, max_channels=8, latent_size=8, mapping_layers=2)
    makers = {"greedy": greedy, "minimal": step.Ours}
    refused, measured = step.measure_batch(model, 2, 1, torch.device("cpu"), makers, alone=True)
    assert refused == {"provider": "greedy", "batch": 2, "refused": "out of memory"}
    assert measured["provider"] == "minimal" and measured["seconds"] > 0


def test_a_provider_that_fails_tells_why_and_costs_no_other(step, monkeypatch, tmp_path):
    def broken(model):
        raise ValueError("no such kernel")

    out = tmp_path / "step.json"
    arguments = ["--resolution", "8", "--start-channels", "4", "--batches", "2", "--rounds", "1"]
    measure_batch = step.measure_batch
    monkeypatch.setattr(step, "providers", lambda device: {"plain": broken, "minimal": step.Ours})
    alone = lambda *given, **_: measure_batch(*given, alone=True)
    monkeypatch.setattr(step, "measure_batch", alone)
    main_with(step, monkeypatch, *arguments, "--out", str(out))
    found = json.loads(out.read_text())
    assert found["rows"][0]["refused"] == "ValueError: no such kernel"
    assert set(found["best"]) == {"minimal"} and found["ratio_to_plain"] == {}


def test_what_was_measured_is_written_before_a_later_batch_fails(step, monkeypatch, tmp_path):
    def measure_batch(model, batch, *_, **__):
        if batch == 4:
            raise KeyboardInterrupt
        return [step.row_of("plain", batch, [1.0])]

    out = tmp_path / "step.json"
    arguments = ["--resolution", "8", "--start-channels", "4", "--batches", "2", "4"]
    monkeypatch.setattr(step, "measure_batch", measure_batch)
    with pytest.raises(KeyboardInterrupt):
        main_with(step, monkeypatch, *arguments, "--out", str(out))
    assert [row["batch"] for row in json.loads(out.read_text())["rows"]] == [2]


def test_each_provider_starts_with_the_compiler_as_pytorch_has_it(step, monkeypatch):
    import torch._functorch.config as compiler

    found = []

    def changing(model):
        found.append(compiler.donated_buffer)
        compiler.donated_buffer = False
        return lambda x, draws: None

    makers = {"one": changing, "other": changing}
    model = step.StyleModel(8, start_channels=4, max_channels=8, latent_size=8, mapping_layers=2)
    with compiler.patch(donated_buffer=False):  # monkeypatch takes the option away for good
        list(step.measure_batch(model, 2, 1, torch.device("cpu"), makers, alone=True))
    assert found == [True, True]


def test_some_rows_alone(step, monkeypatch, tmp_path, capsys):
    out = tmp_path / "step.json"
    small = [
        "--resolution",
        "8",
        "--start-channels",
        "4",
        "--batches",
        "2",
        "--rounds",
        "1",
        "--out",
        str(out),
    ]
    main_with(step, monkeypatch, *small, "--only", "plain", "minimal")
    found = json.loads(out.read_text())
    assert [row["provider"] for row in found["rows"]] == ["plain", "minimal"]
    assert found["command"].endswith("--batches 2 --only plain minimal")
    with pytest.raises(SystemExit):
        main_with(step, monkeypatch, *small, "--only", "plane")
    assert "--only plane: here are plain, published schedule" in capsys.readouterr().err


@pytest.mark.parametrize("batches", [["2"], ["2", "4"]])
def test_a_result_names_every_provider_and_the_machine(step, monkeypatch, tmp_path, batches):
    out = tmp_path / "step.json"
    arguments = ["--resolution", "8", "--start-channels", "4", "--batches", *batches, "--rounds", "1"]
    main_with(step, monkeypatch, *arguments, "--out", str(out))
    found = json.loads(out.read_text())
    assert set(found["ratio_to_plain"]) == set(step.providers(torch.device("cpu")))
    assert len(found["rows"]) == len(batches) * len(found["best"])
    assert found["torch"] == torch.__version__ and "commit" in found and "provider" not in found
    assert found["refused"] == {}


def captured(step, **options):
    return functools.partial(step.Ours, graphs=True, **options)


@pytest.mark.parametrize("options", [{}, {"autocast": torch.bfloat16}], ids=["float32", "bf16"])
def test_a_captured_row_is_held_against_the_eager_one(step, monkeypatch, options):
    monkeypatch.setattr(graphs, "CudaRecorder", EmulatedRecorder)
    step.check_update(captured(step, **options), torch.device("cpu"))
    monkeypatch.setattr(graphs._Repeated, "prepare", lambda *_: None)  # replays draw the numbers of others
    accepted = "2e-01" if options else "5e-02"
    with pytest.raises(ValueError, match=rf"differs by .* from that without graphs, accepted is {accepted}"):
        step.check_update(captured(step, **options), torch.device("cpu"))


def test_a_captured_row_may_round_otherwise(step, monkeypatch):
    """As where a GPU adds up in another order, which bf16 magnifies."""
    move = step.movement

    def nudged(iteration, x):
        generator = torch.Generator().manual_seed(0)
        for parameter in iteration.model.parameters() if iteration.graphs else ():
            parameter.data *= 1 + 1e-7 * torch.randn(parameter.shape, generator=generator)
        return move(iteration, x)

    monkeypatch.setattr(step, "movement", nudged)
    monkeypatch.setattr(graphs, "CudaRecorder", EmulatedRecorder)
    step.check_update(captured(step, autocast=torch.bfloat16), torch.device("cpu"))


@pytest.mark.parametrize("of", ["plain", "ours"])
def test_a_compiled_row_is_held_against_the_eager_one(step, monkeypatch, of):
    """With a compiler that compiles nothing, and with one that makes another network."""

    def spoilt(network, **options):
        network.register_forward_hook(lambda module, inputs, output: output * 0.5)

    make = step.Ours if of == "ours" else step.providers(torch.device("cpu"))["plain"]
    make = functools.partial(make, compile=True)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network, **options: None)
    step.check_update(make, torch.device("cpu"))
    monkeypatch.setattr(torch.nn.Module, "compile", spoilt)
    with pytest.raises(ValueError, match=r"differs by .* from that without compile, accepted is 1e-03"):
        step.check_update(functools.partial(make), torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_the_compiler_makes_is_the_same_update(step):
    step.check_update(functools.partial(step.Ours, compile=True), torch.device("cpu"))


def test_a_row_whose_update_differs_is_not_timed(step, monkeypatch):
    monkeypatch.setattr(graphs, "CudaRecorder", EmulatedRecorder)
    monkeypatch.setattr(graphs._Repeated, "prepare", lambda *_: None)
    model = step.StyleModel(8, start_channels=4, max_channels=8, latent_size=8, mapping_layers=2)
    makers = {"minimal": step.Ours, "minimal, graphs": captured(step)}
    timed, refused = step.measure_batch(model, 2, 1, torch.device("cpu"), makers, alone=True)
    assert timed["seconds"] > 0 and "seconds" not in refused
    assert refused["refused"].startswith("ValueError: the update differs by")


def test_every_row_of_a_gpu_that_is_compiled_or_captured_is_checked(step, monkeypatch):
    checked = []
    monkeypatch.setattr(step, "small_model", lambda *_: checked.append(True))
    for name, make in step.providers(torch.device("cuda")).items():
        checked.clear()
        with contextlib.suppress(TypeError):
            step.check_update(make, torch.device("cuda"))
        assert bool(checked) == any(how in name for how in ("compiled", "graphs", "overhead")), name
