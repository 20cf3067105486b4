"""`sivae-fast doctor`: one line a check, alone and over ranks, with the broken cases it is there for."""

import re
import socket
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sivae_fast import cli
from sivae_fast.commands import doctor as room
from sivae_fast.commands.doctor import doctor
from sivae_fast.commands.fingerprint import fingerprint
from tests.training.conftest import ROOT, environment

CONFIG = ROOT / "launch" / "configs" / "quickstart.yaml"
DOCTOR = ROOT / "launch" / "doctor.py"


def images(folder: Path, count: int = 6, seed: int = 0) -> Path:
    """`count` images of 32x32 pixels."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def found(*overrides: str) -> dict[str, room.Finding]:
    return {f.check: f for f in doctor(str(CONFIG), ["engine.kind=torch", *overrides])}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def over_ranks(folders: list[Path], *arguments: str, program: Path = DOCTOR):
    """(finding by check, exit codes) of one rank a folder, each a node of its own as launchers set it up."""
    variables = {"WORLD_SIZE": str(len(folders)), "LOCAL_RANK": "0"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def node(rank: int) -> subprocess.CompletedProcess:
        folders[rank].mkdir(parents=True, exist_ok=True)
        env = {**environment(), **variables, "RANK": str(rank), "GROUP_RANK": str(rank)}
        command = [sys.executable, str(program), "--local_rank=0", *arguments]
        return subprocess.run(
            command, cwd=folders[rank], env=env, capture_output=True, text=True, timeout=120
        )

    with ThreadPoolExecutor(len(folders)) as pool:
        done = list(pool.map(node, range(len(folders))))
    assert not any("Traceback" in one.stdout + one.stderr for one in done)
    assert done[1].stdout == ""
    by_check = {}
    for line in done[0].stdout.splitlines():
        verdict, check, text = line[:9].strip(), line[9:24].strip(), line[24:]
        by_check[check] = (verdict, text)
    return by_check, [one.returncode for one in done]


CHECKS = (
    "ranks", "versions", "devices", "clocks", "configuration", "data", "run folder", "disk", "reduction"
)  # fmt: skip


def test_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "set")
    assert cli.main(["doctor", "--config", str(CONFIG), "data.path=set", "engine.kind=torch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[9:24].strip() for line in lines] == list(CHECKS)
    assert {line.split()[0] for line in lines} <= {"ok", "warning"}
    assert not (tmp_path / "runs").exists()  # it leaves nothing behind


def test_without_a_configuration_only_the_environment():
    assert [f.check for f in doctor()] == ["ranks", "versions", "devices", "clocks", "reduction"]


def test_overrides_are_not_ignored_where_no_configuration_is_given(tmp_path, capsys):
    assert cli.main(["doctor", "data.path=/nope", "train.batch=-3"]) == 1
    assert capsys.readouterr().err == (
        "error: data.path=/nope train.batch=-3: overrides change a configuration, give it as --config FILE\n"
    )
    by_check, codes = over_ranks([tmp_path / "a", tmp_path / "b"], "data.path=/nope")  # of the quickstart
    assert codes == [1, 1] and "/nope" in by_check["data"][1]


@pytest.mark.parametrize(
    "override, check, words",
    [
        ("train.batch=0", "configuration", "train.batch=0"),
        ("train.bach=4", "configuration", "did you mean train.batch"),
        ("train.graphs=true", "configuration", "train.graphs=true with a cpu device"),
        ("data.path=nowhere", "data", "there is no image set at nowhere"),
        ("run.folder=file/runs", "run folder", "Not a directory"),
    ],
)
def test_a_broken_setting_fails_in_one_line(tmp_path, monkeypatch, capsys, override, check, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--config", str(CONFIG), "engine.kind=torch", override])
    assert stopped.value.code == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed")]
    assert len(failed) == 1 and check in failed[0] and words in failed[0]


def test_disk_space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = room._room(room._plan(str(CONFIG), ["engine.kind=torch"]).config)[1]
    for checkpoints, verdict in ((1.9, "failed"), (2.1, "warning"), (100, "ok")):
        usage = (0, 0, int(checkpoints * checkpoint))
        free = type("Usage", (), {"free": usage[2]})
        monkeypatch.setattr(room.shutil, "disk_usage", lambda path, free=free: free)
        assert found()["disk"].verdict == verdict


def test_checkpoint_size_is_that_of_a_checkpoint(tmp_path, monkeypatch):
    """Two moments and the average beside the weights: what training writes, but for a few bytes of header."""
    from sivae_fast.config import load_config
    from sivae_fast.training.loop import train

    monkeypatch.chdir(tmp_path)
    images(tmp_path / "set", 16)
    overrides = [
        "engine.kind=torch",
        "data.path=set",
        "data.loader=torch",
        "train.images=16",
        "train.batch=16",
    ]
    overrides += ["growth.images_per_level=0", "train.warmup_images=16"]
    folder = train(load_config(CONFIG, overrides))
    (written,) = folder.glob("checkpoints/*.safetensors")
    said = room._room(load_config(CONFIG, overrides))[1]
    assert abs(written.stat().st_size - said) < 0.05 * said


GPU = {"gpus": 2, "name": "H", "total": 80 << 30, "free": 79 << 30}


@pytest.mark.parametrize(
    "facts, verdict, words",
    [
        ([GPU | {"id": "a"}, GPU | {"id": "b"}], "ok", "H, 80 GiB on every rank"),
        ([GPU | {"id": "a"}, GPU | {"id": "a"}], "failed", "use the same GPU"),
        ([GPU | {"id": "a"}, {"gpus": 0}], "failed", "no GPU on rank 1"),
        ([GPU | {"id": "a"}, {"gpus": 1}], "failed", "more processes than the 1 visible"),
        ([GPU | {"id": "a"}, GPU | {"id": "b", "free": 9 << 30}], "warning", "rank 1 (h) (9.0 GiB free)"),
        ([GPU | {"id": "a"}, GPU | {"id": "b", "name": "L"}], "warning", "the slowest sets the pace"),
        ([{"gpus": 0}, {"gpus": 0}], "warning", "no GPU is visible"),
        ([GPU | {"id": "a"}, room.Trouble("driver")], "failed", "driver on rank 1"),
    ],
)
def test_devices(monkeypatch, facts, verdict, words):
    ranks = room.Ranks()
    ranks.world, ranks.nodes = 2, [("h", "0")] * 2
    monkeypatch.setattr(ranks, "gather", lambda fact: facts)
    said = room._devices(ranks, None)
    assert said[0] == verdict and words in said[1]


def test_fingerprint_sees_every_change(tmp_path):
    original = images(tmp_path / "a")
    before = fingerprint(original)
    assert fingerprint(images(tmp_path / "b")) == before
    data = bytearray((original / "3.png").read_bytes())
    data[-20] ^= 1
    (original / "3.png").write_bytes(data)
    changed = fingerprint(original)
    (original / "3.png").rename(original / "9.png")
    assert len({before, changed, fingerprint(original)}) == 3


def test_fingerprint_of_a_large_file_reads_its_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("sivae_fast.commands.fingerprint.PIECE", 16)
    path, seen = tmp_path / "x", set()
    data = bytearray(64 * 16 * 3 + 5)
    for place in (None, 0, len(data) - 1):
        if place is not None:
            data[place] = 1
        path.write_bytes(data)
        seen.add(fingerprint(path))
    assert len(seen) == 3


@pytest.mark.parametrize("name", ["a.zip", "a.set"])
def test_fingerprint_of_a_zip_has_the_checksums_of_all_members(tmp_path, monkeypatch, name):
    """One byte differs that is in none of the pieces; the checksum that tells lies before them too."""
    monkeypatch.setattr("sivae_fast.commands.fingerprint._pieces", lambda files, sizes: ())
    seen = set()
    for byte in b"xy":
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("0.png", bytes([byte]) * 9)
        seen.add(fingerprint(tmp_path / name))
    assert len(seen) == 2


def test_two_ranks(tmp_path):
    shared = images(tmp_path / "set")
    settings = ["--config", str(CONFIG), f"data.path={shared}", f"run.folder={tmp_path / 'runs'}"]
    lines, codes = over_ranks([tmp_path / "a", tmp_path / "b"], *settings)
    assert codes == [0, 0]
    assert set(lines) == set(CHECKS)
    assert {verdict for verdict, _ in lines.values()} <= {"ok", "warning"}
    assert lines["ranks"][1].startswith("2 on 2 nodes")
    assert re.search(r"[\d.]+ ms for one number, 16 MiB in \d+ ms = [\d.]+ GB/s", lines["reduction"][1])


def test_two_ranks_with_different_data_and_folders(tmp_path):
    images(tmp_path / "a" / "set")
    images(tmp_path / "b" / "set", seed=1)
    settings = ["--config", str(CONFIG), "engine.kind=torch", "data.path=set", "run.folder=runs"]
    lines, codes = over_ranks([tmp_path / "a", tmp_path / "b"], *settings)
    assert codes == [1, 1]
    assert lines["data"][0] == "failed" and len(set(re.findall(r"digest (\w+)", lines["data"][1]))) == 2
    assert lines["run folder"][0] == "failed" and "is not shared" in lines["run folder"][1]
    assert lines["reduction"][0] == "ok"


@pytest.fixture
def odd_second_rank(tmp_path) -> Path:
    """The doctor's program, on rank 1 with another PyTorch, seed and a clock an hour ahead."""
    program = tmp_path / "odd.py"
    program.write_text(
        "import os, runpy, sys, time\n"
        "from sivae_fast.commands import doctor\n"
        "if os.environ['RANK'] == '1':\n"
        "    real = doctor.versions\n"
        "    doctor.versions = lambda: real() | {'torch': '1.13.1'}\n"
        "    sys.argv.append('train.seed=7')\n"
        "    doctor.now = lambda: time.time() + 3600\n"
        f"runpy.run_path({str(DOCTOR)!r}, run_name='__main__')\n"
    )
    return program


def test_versions_clocks_and_settings_that_differ(tmp_path, odd_second_rank):
    settings = ["--config", str(CONFIG), f"run.folder={tmp_path / 'runs'}", "engine.kind=torch"]
    lines, codes = over_ranks([tmp_path / "a", tmp_path / "b"], *settings, program=odd_second_rank)
    assert codes == [1, 1]
    verdict, text = lines["versions"]
    assert verdict == "failed" and text.startswith("torch: ") and "1.13.1 on rank 1" in text
    assert "python" not in text
    verdict, text = lines["configuration"]
    assert verdict == "failed" and text.startswith("train.seed: 0 on rank 0") and "7 on rank 1" in text
    assert lines["clocks"][0] == "warning" and "3600.0 s apart, rank 1" in lines["clocks"][1]


def test_a_rank_that_never_comes(tmp_path, monkeypatch, capsys):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--timeout", "2"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("failed") and "did not meet the others at 127.0.0.1" in line


@pytest.mark.parametrize("timeout", ["-1", "0", "nan", "inf"])
def test_a_time_that_is_none_is_refused(timeout, capsys):
    assert cli.main(["doctor", "--timeout", timeout]) == 1
    assert capsys.readouterr().err == f"error: --timeout is {timeout}, must be above 0 and finite\n"
