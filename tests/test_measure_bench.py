"""What the benches measure with, and where their results go."""

import ast
import importlib
import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("measure")
    for name in ("measure", "density_grid", "densities"):
        sys.modules.pop(name, None)


def test_commit_is_that_of_the_environment_or_of_the_repository(measure, monkeypatch):
    """A copy may bring a repository that stands at another commit."""
    monkeypatch.setenv("SIVAE_COMMIT", "from outside")
    assert measure.commit() == "from outside"
    monkeypatch.delenv("SIVAE_COMMIT")
    assert measure.commit() not in ("from outside", "unknown", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=""))  # no repository
    assert measure.commit() == "unknown"


def test_results_do_not_make_other_code_of_a_commit(measure, monkeypatch, tmp_path):
    for name in ("bench/results/one.json", "bench/one.py", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "bench" / "measure.py"))
    clean = measure.commit()
    assert clean and "dirty" not in clean
    for name in ("bench/results/one.json", "README.md"):
        (tmp_path / name).write_text("after")
    assert measure.commit() == clean
    (tmp_path / "bench" / "one.py").write_text("after")
    assert measure.commit() == f"{clean}-dirty"


def test_a_machine_without_git_is_described(measure, monkeypatch):
    def missing(command, **_):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", missing)
    monkeypatch.delenv("SIVAE_COMMIT", raising=False)
    assert measure.machine("cpu")["commit"] == "unknown"
    monkeypatch.setenv("SIVAE_COMMIT", "1234567")
    assert measure.machine("cpu")["commit"] == "1234567"


def test_driver_and_clocks_are_those_of_the_device_in_use(measure, monkeypatch):
    asked = []

    def answer(command, **_):
        asked.append(command)
        return SimpleNamespace(stdout="580.1, 345 MHz, 1980 MHz, 700.00 W\n")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12-34"))
    monkeypatch.setattr(subprocess, "run", answer)
    assert measure.driver() == {
        "driver": "580.1",
        "clock_before": "345 MHz",
        "clock_limit": "1980 MHz",
        "power_limit": "700.00 W",
    }
    assert asked[0][-2:] == ["-i", "GPU-12-34"]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=""))
    assert measure.driver() == {}


def test_waiting_and_annotations_are_no_launches(measure):
    device, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(name=name, device_type=kind, is_user_annotation=annotation)
        for name, kind, annotation in (
            ("aten::add", host, False),
            ("add_kernel", device, False),
            ("Memset (Device)", device, False),
            ("Optimizer.step#Adam.step", device, True),
            ("Context Sync", device, False),
            ("Stream Wait Event", device, False),
        )
    ]
    assert [event.name for event in measure.on_device(events)] == ["add_kernel", "Memset (Device)"]


@pytest.mark.parametrize("count", [1, 7, 30])
def test_python_waits_for_the_gpu_after_twenty_calls_at_the_earliest(measure, monkeypatch, count):
    done = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    assert measure.wall([lambda: done.append("call")] * count, "cuda", 0.0) > 0
    waits = [i for i, what in enumerate(done) if what == "wait"]
    assert len(waits) > 1 and all(b - a > 20 for a, b in itertools.pairwise(waits))


def test_rounds_tell_their_spread(measure):
    values = iter([3.0, 1.0, 2.0])
    found = measure.rounds({"a": lambda: next(values)}, 3)["a"]
    assert found == (2.0, 1.0, 3.0)
    assert found.row("wall_ms") == {"wall_ms": 2e3, "wall_ms_least": 1e3, "wall_ms_most": 3e3}


def options_of(path):
    """Names and keywords of the options of a script."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    added = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    return {call.args[0].value: {k.arg for k in call.keywords} for call in added}


def test_every_bench_that_writes_results_says_where(measure):
    apart = ("table.py", "translation.py")  # the README, a folder of its own
    scripts = {path.name: options_of(path) for path in BENCH.glob("*.py") if path.name not in apart}
    assert [name for name, options in scripts.items() if options and "--out" not in options] == []
    assert [n for n, options in scripts.items() if "help" not in options.get("--out", ["help"])] == []


def test_the_grid_goes_where_it_is_told_and_goes_on_there(measure, monkeypatch, tmp_path):
    grid = importlib.import_module("density_grid")
    before, asked = grid.RESULT.read_bytes(), []
    monkeypatch.setattr(grid, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(grid, "score", lambda *run: asked.append(run) or 1.0)
    monkeypatch.setattr(grid, "SETTINGS", [("vae", 4.0)])
    out = tmp_path / "new" / "grid.json"
    monkeypatch.setattr(sys, "argv", ["density_grid.py", "--jobs", "1", "--out", str(out)])
    grid.main()
    assert [row["density"] for row in json.loads(out.read_text())["runs"]] == list(grid.DENSITIES)
    grid.main()
    assert len(asked) == len(grid.DENSITIES) and grid.RESULT.read_bytes() == before


def test_the_grid_is_trained_in_float32_on_every_processor(measure, monkeypatch):
    grid, threads = importlib.import_module("density_grid"), torch.get_num_threads()

    class Seen(Exception):
        pass

    def trainer(config, *_):
        raise Seen(config.train.precision)

    monkeypatch.setattr(grid, "Trainer", trainer)
    try:
        with pytest.raises(Seen, match="fp32"):
            grid.score("rings", "vae", 4.0)
    finally:
        torch.set_num_threads(threads)


def test_faults_of_another_file_leave_the_page_alone(monkeypatch, tmp_path, capsys):
    from bench import faults

    before, page = faults.RESULTS.read_bytes(), faults.PAGE.read_bytes()
    row = {"injected": "a fault", "happened": "nothing", "seconds": None, "images_lost": 0}
    monkeypatch.setattr(faults, "SCENARIOS", {"one": lambda _: row})
    out = tmp_path / "new" / "faults.json"
    monkeypatch.setattr(sys, "argv", ["faults.py", "one", "--out", str(out)])
    assert faults.main() == 0
    assert json.loads(out.read_text())["rows"]["one"]["happened"] == "nothing"
    assert "| a fault | nothing | - | 0 |" in capsys.readouterr().out
    assert faults.RESULTS.read_bytes() == before and faults.PAGE.read_bytes() == page
    monkeypatch.setattr(sys, "argv", ["faults.py", "--check", "--out", str(out)])
    with pytest.raises(SystemExit):
        faults.main()
    assert "--table and --check are about docs/faults.md: without --out" in capsys.readouterr().err
