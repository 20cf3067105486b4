"""The bench of the style model's chains refuses what is wrong and writes what it measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.training.emulated import EmulatedRecorder

ROOT = Path(__file__).parents[1]


@pytest.fixture
def chains(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    threads = torch.get_num_threads()
    yield importlib.import_module("chains")
    torch.set_num_threads(threads)
    for name in ("chains", "measure"):
        sys.modules.pop(name, None)


def test_times_stand_beside_errors_and_what_is_wrong_gets_none(chains, tmp_path, monkeypatch, capsys):
    def providers(device, kind):
        plain, _, _ = chains.CHAINS[kind]

        def wrong(*inputs):
            y, *moments = plain(*inputs)
            return 1.001 * y, *moments

        return {"plain": plain, "wrong": wrong}

    monkeypatch.setattr(chains, "providers", providers)
    config = str(ROOT / "launch/configs/ffhq256.yaml")
    chains.main(
        ["--config", config, "--sides", "4", "--batches", "2", "--seconds", "0", "--out", str(tmp_path)]
    )
    rows = json.loads((tmp_path / "chains-cpu.json").read_text())["rows"]
    found = {(row["chain"], row["provider"], row.get("direction")) for row in rows}
    assert found == {
        (chain, *rest)
        for chain in chains.CHAINS
        for rest in (("wrong", None), *(("plain", direction) for direction in chains.DIRECTIONS))
    }
    assert all(row["wall_ms"] > 0 and row["error"] < 1e-4 for row in rows if row["provider"] == "plain")
    assert all(row["refused"] and "wall_ms" not in row for row in rows if row["provider"] == "wrong")
    forward = next(row for row in rows if row.get("direction") == "forward")
    assert forward["least_mib"] == 2 * 4 * 2 * 512 * 16 / 2**20
    assert [chains.passes("encoder", 32, d) for d in chains.DIRECTIONS] == [2, 3, 5]
    assert [chains.passes("decoder", 64, d) for d in chains.DIRECTIONS] == [3, 5, 8]
    assert [chains.passes("from_rgb", 64, d) for d in chains.DIRECTIONS] == [1, 1, 2]
    assert "| decoder | 512 x 4x4 | 2 | both |" in capsys.readouterr().out


def test_a_provider_that_fails_while_it_is_timed_costs_no_other(chains, monkeypatch):
    whole, twin = chains.call, lambda *inputs: chains.plain(*inputs)

    def call(run, case, direction):
        if run is twin and direction == "both":
            raise RuntimeError("not captured")
        return whole(run, case, direction)

    monkeypatch.setattr(chains, "providers", lambda *_: {"plain": chains.plain, "twin": twin})
    monkeypatch.setattr(chains, "call", call)
    rows = chains.measure("encoder", 2, 8, 4, torch.float32, "cpu", 0, None)
    timed = [(row["provider"], row["direction"]) for row in rows if "wall_ms" in row]
    assert timed == [(p, d) for d in chains.DIRECTIONS for p in ("plain", "twin")][:-1]
    assert [row["refused"] for row in rows if "refused" in row] == ["both: RuntimeError: not captured"]


@pytest.mark.parametrize("kind", ["blur", "from_rgb", "to_rgb"])
def test_what_is_compared_is_the_same(chains, kind):
    case = chains.Case(kind, 2, 8, 5, torch.float64, "cpu")
    found = []
    for run in chains.CHAINS[kind]:
        outputs = run(*case.inputs)
        found.append([*outputs, *case.backward(outputs)])
    for others in found[1:]:
        for got, want in zip(others, found[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # sums of shifted maps are fp32


@pytest.mark.parametrize("kind", ["decoder", "encoder", "blur", "from_rgb", "to_rgb"])
def test_what_is_timed_copies_nothing_from_the_host(chains, kind):
    """On a GPU it is captured; with PyTorch 2.11 nothing is drawn any more after a capture that failed."""
    case = chains.Case(kind, 2, 8, 5, torch.float32, "cpu")
    for direction in chains.DIRECTIONS:
        for run in chains.CHAINS[kind][:2]:  # the operators are other functions on a CPU
            timed = chains.call(run, case, direction)
            timed()
            EmulatedRecorder().capture(timed, [])


def test_maps_are_those_of_the_configuration(chains):
    found = chains.sizes(str(ROOT / "launch/configs/ffhq256.yaml"))
    assert found == [(64, 256), (128, 128), (256, 64), (512, 32), (512, 16), (512, 8), (512, 4)]


def errors(chains, run, dtype):
    case = chains.Case("decoder", 2, 16, 16, dtype, "cpu")
    wide = case.double()
    outputs = chains.plain(*wide.inputs)
    return chains.misses(run, case, [*outputs, *wide.backward(outputs)])


def test_bf16_is_within_its_limits_and_a_tenth_of_the_values_is_not(chains):
    values, gradients = errors(chains, chains.plain, torch.bfloat16)
    limits = chains.OF_PLAIN[torch.bfloat16]
    assert values < limits[0] and gradients < limits[1]

    def wrong(x, *others):
        y, variance, mean = chains.plain(x, *others)
        return torch.cat([1.1 * y[:, :2], y[:, 2:]], 1), variance, mean

    assert errors(chains, wrong, torch.bfloat16)[0] > limits[0]
    assert errors(chains, chains.plain, torch.float32)[1] < 1e-5


def test_inputs_rotate_on_a_gpu_where_that_empties_its_cache(chains, monkeypatch):
    case = chains.Case("decoder", 2, 16, 16, torch.float32, "cpu")
    make = lambda seed: chains.Case("decoder", 2, 16, 16, torch.float32, "cpu", seed)
    monkeypatch.setattr(chains, "second_level_cache", lambda device: 2 * case.bytes)
    cases, state = chains.rotated(case, make, "cuda")
    assert state == "cold" and sum(other.bytes for other in cases) > 6 * case.bytes
    assert not torch.equal(cases[0].inputs[0], cases[1].inputs[0])
    assert chains.rotated(case, make, "cpu") == ([case], "hot")
    monkeypatch.setattr(chains, "second_level_cache", lambda device: 40 * case.bytes)
    assert chains.rotated(case, make, "cuda") == ([case], "hot")
