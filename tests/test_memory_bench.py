"""The memory bench goes on after what ran out of memory, and its picture and table leave that out."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("memory")
    for name in ("memory", "step", "plain_trainer", "plain_style", "measure", "table"):
        sys.modules.pop(name, None)


def test_what_fails_says_why_and_costs_no_other(memory, monkeypatch, tmp_path):
    def answer(command, **_):
        if command[0] != sys.executable:
            return SimpleNamespace(stdout="")
        if command[-2:] == ["plain", "8"]:
            return SimpleNamespace(
                returncode=1, stdout="", stderr="Traceback ...\nOutOfMemoryError: 80 GiB\n"
            )
        return SimpleNamespace(returncode=0, stdout=f"{10 * int(command[-1])}.0\n")

    monkeypatch.setattr(subprocess, "run", answer)
    monkeypatch.setattr(sys, "argv", ["memory.py", "--batches", "4", "8", "--out", str(tmp_path)])
    memory.main()
    (path,) = tmp_path.glob("memory-*.json")
    found = json.loads(path.read_text())
    assert len(found["rows"]) == 2 * len(memory.PROVIDERS)
    assert [row["refused"] for row in found["rows"] if "mib" not in row] == ["OutOfMemoryError: 80 GiB"]
    assert path.with_suffix(".png").stat().st_size > 1000
    assert "at batch 4, where plain takes 40 MiB" in importlib.import_module("table")._memory(found)
