"""What the table of the README says of results."""

import importlib
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("table")
    sys.modules.pop("table", None)


def test_a_step_is_compared_within_its_precision(table):
    seconds = {
        "plain": 1.0,
        "plain, TF32": 0.8,
        "minimal": 0.5,
        "minimal, graphs": 0.4,
        "plain, compiled, bf16": 0.3,
        "minimal, bf16, graphs": 0.1,
    }
    best = {name: {"seconds_an_image": value} for name, value in seconds.items()}
    assert table._step({"best": best, "device": "GPU"}) == (
        "minimal, graphs: **0.40** of the time of the plain published trainer, "
        "**0.50** of the time of the same with TF32 (2 images a second, GPU); "
        "minimal, bf16, graphs: **0.10** of the time of the plain published trainer in float32, "
        "**0.33** of the time of the plain published trainer, compiled, in bf16 (10 images a second, GPU)"
    )


def test_memory_has_the_range_of_its_batches(table):
    mib = {"plain": (100, 300), "minimal": (80, 120), "minimal, recomputing": (50, 60)}
    rows = [
        {"provider": provider, "batch": batch, "mib": value}
        for provider, values in mib.items()
        for batch, value in zip((2, 8), values, strict=True)
    ]
    assert table._memory({"rows": rows, "device": "CPU"}) == (
        "**0.80 to 0.40** of the plain published trainer's, **0.50 to 0.20** with `train.recompute` "
        "(at batch 2 to 8, where plain takes 100 to 300 MiB, CPU)"
    )


def test_memory_is_compared_where_nothing_ran_out(table):
    rows = [
        {"provider": provider, "batch": batch, "mib": 100}
        for provider in ("plain", "minimal", "minimal, recomputing")
        for batch in (4, 8)
    ]
    rows[1] = {"provider": "plain", "batch": 8, "refused": "torch.OutOfMemoryError: 80 GiB"}
    assert "(at batch 4, where plain takes 100 MiB, GPU)" in table._memory({"rows": rows, "device": "GPU"})
    said = table._memory({"rows": rows[:4], "device": "GPU"})  # a machine was taken away before the last ran
    assert said == "**1.00** of the plain published trainer's (at batch 4, where plain takes 100 MiB, GPU)"


def test_losses_are_compared_with_what_could_run(table):
    """Where there is no C++ compiler there is no torch.compile either."""
    speedups = [{"provider": "fused", "times_wall": {"plain": value}} for value in (2.0, 3.0)]
    said = table._losses({"speedups": speedups, "device": "GPU"})
    assert said == "**2.00 to 3.00** times the plain formulas' speed, unknown times torch.compile's (GPU)"


def test_samples_name_their_seeds(table):
    row = lambda model, seeds: {"density": "rings", "model": model, "seeds": seeds, "scores": {"kl": 1.0}}
    rows = [row("the data itself", 20), row("VAE", 1), row("IntroVAE", 1), row("Soft-IntroVAE", 2)]
    assert table._samples({"rows": rows}).endswith("; means of 1 to 2 seeds")
    assert table._samples({"rows": [{**row, "seeds": 1} for row in rows]}).endswith("; means of 1 seed")


def test_a_busy_machine_is_named(table):
    found = {"load_average_by_round": [0.5, 1.9], "machine": {"cores": 2}}
    assert table._busy(found) == ""
    assert "load of 0.5 to 4.2" in table._busy({**found, "load_average_by_round": [0.5, 4.2]})


def test_small_systems_are_held_against_compiled_ones(table):
    rates = {"plain": 100.0, "plain, compiled": 200.0, "graphs": 500.0, "graphs, bf16": 900.0}
    system = {"iterations_per_second": rates, "ratio_to_plain": {k: v / 100 for k, v in rates.items()}}
    said = table._small({"systems": {"density": system}, "device": "GPU"})
    assert said == (
        "density **500** a second (5.0 times plain, 2.5 times the same under torch.compile) (GPU)"
    )


def test_chamfer_is_compared_with_what_could_run(table):
    rows = [
        {"version": version, "points": points, "forward_backward_ms": ms, "added_mib": mib}
        for version, ms, mib in (("sivae", 2.0, 1), ("expansion", 4.0, 30), ("cdist", 6.0, 50))
        for points in (256, 800)
    ]
    of = lambda *names: {"rows": [r for r in rows if r["version"] in names], "device": "GPU", "batch": 2}
    assert table._chamfer(of("sivae", "expansion", "cdist")) == (
        "**2.0 / 2.0** times the expanded squares', 3.0 / 3.0 times `torch.cdist`'s speed, forward and "
        "backward at 256 / 800 points; 1 MiB against 30 and 50 at 800 points (GPU, batch 2)"
    )
    assert table._chamfer(of("sivae", "cdist")) == (
        "**3.0 / 3.0** times `torch.cdist`'s speed, forward and backward at 256 / 800 points; "
        "1 MiB against 50 at 800 points (GPU, batch 2)"
    )
    assert table._chamfer(of("sivae")) == "no other version ran"
