"""The loss bench refuses what is wrong and writes what it measured."""

import csv
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def losses(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("losses")

    def wrong(inputs):
        loss, *statistics = module.plain(inputs)
        return loss * 1.01, *statistics

    def broken(inputs):
        raise RuntimeError("does not compile")

    monkeypatch.setattr(
        module,
        "providers",
        lambda first, repeated=False: {
            "plain": module.plain,
            "fused": module.fused(first),
            "wrong": wrong,
            "broken": broken,
        },
    )
    yield module
    for name in ("losses", "measure"):
        sys.modules.pop(name, None)


def test_times_stand_beside_errors_and_what_is_wrong_gets_none(losses, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(
        sys, "argv", ["losses.py", "--out", str(tmp_path), "--batches", "4", "--sizes", "plane"]
    )
    monkeypatch.setattr(losses, "BATCHES", (4,))
    try:
        losses.main()
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "losses-cpu.json").read_text())
    rows = {(row["provider"], row.get("direction")): row for row in found["rows"]}
    assert rows["broken", None]["refused"] == "RuntimeError: does not compile"
    refused = {("wrong", None), ("broken", None)}
    assert set(rows) == refused | {*((p, d) for p in ("plain", "fused") for d in losses.DIRECTIONS)}
    assert rows["wrong", None]["refused"] and "wall_ms" not in rows["wrong", None]
    assert all(
        row["wall_ms"] > 0 and row["loss_error"] < 1e-4 for row in found["rows"] if "refused" not in row
    )
    assert found["speedups"][0]["times_wall"]["plain"] > 0
    with open(tmp_path / "losses-cpu.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(found["rows"])
    assert (tmp_path / "losses-cpu.png").stat().st_size > 1000


def test_a_provider_that_fails_while_it_is_timed_costs_no_other(losses, monkeypatch):
    whole = losses.call

    def call(run, inputs, direction):
        if run is losses.plain and direction == "backward":
            raise RuntimeError("not captured")
        return whole(run, inputs, direction)

    monkeypatch.setattr(losses, "call", call)
    rows = losses.measure("plane", 4, torch.float32, "cpu", None)
    timed = {(row["provider"], row["direction"]) for row in rows if "wall_ms" in row}
    assert timed == {*(("fused", d) for d in losses.DIRECTIONS), ("plain", "forward"), ("plain", "both")}
    refused = {row["provider"]: row["refused"] for row in rows if "refused" in row}
    assert refused["plain"] == "backward, hot: RuntimeError: not captured"


@pytest.mark.parametrize("size", ["plane", "image32"])
def test_plain_formulas_in_bf16_are_not_refused_at_random_and_the_fused_ones_stay_strict(losses, size):
    for seed in range(10):
        torch.manual_seed(seed)
        inputs = losses.Inputs.make(size, 4, torch.bfloat16, "cpu")
        for name, run in {"plain": losses.plain, "fused": losses.fused(inputs)}.items():
            assert losses.sound_errors(name, losses.misses(run, inputs), torch.bfloat16)
    rounded = {"loss_error": 1e-3, "gradient_error": 1e-3}
    assert not losses.sound_errors("fused", rounded, torch.bfloat16)
    assert not losses.sound_errors("plain", rounded, torch.float32)
    assert not losses.sound_errors("plain", {**rounded, "loss_error": float("nan")}, torch.bfloat16)
