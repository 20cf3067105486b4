"""The cluster recipes: their flags exist in the installed launchers, and a signal saves before it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sivae_fast.config import load_config
from tests.training.conftest import ROOT, TINY, environment, image_folder

__all__ = ["image_folder"]

CLUSTERS = ROOT / "launch" / "clusters"
SCRIPTS = sorted(CLUSTERS.glob("*.sh"))
SLURM = {
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NODELIST": "node-[0-1]",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
}
#: Far more than is reached before the signal.
ENDLESS = {"train.images": 10**7, "run.tick": 160, "growth.images_per_level": 10**7}


@pytest.fixture
def stubs(tmp_path):
    """A folder that leads PATH: programs in it take the place of launchers and of Slurm."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def add(name: str, body: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    add.path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return add


def recording(target: Path) -> str:
    """A stub's body that leaves its arguments in `target`, one list a line and call."""
    code = f'import json, sys; print(json.dumps(sys.argv[1:]), file=open("{target}", "a"))'
    return f"exec {sys.executable} -c '{code}' \"$@\""


def run_script(name: str, stubs, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    env = {**environment(), "PATH": stubs.path, **variables}
    return subprocess.run(
        ["bash", CLUSTERS / name, *arguments], env=env, capture_output=True, text=True, timeout=60
    )


def wait_until(condition, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def elastic_options(arguments: list[str]):
    from torch.distributed.run import get_args_parser

    program, *options = arguments
    assert Path(program).resolve() == ROOT / "launch" / "elastic.py"
    return get_args_parser().parse_args(options)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def test_node_script_fits_the_deepspeed_launcher(stubs, tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    stubs("deepspeed", recording(tmp_path / "arguments"))
    done = run_script("node.sh", stubs, "launch/train.py", "a=1", NODE_RANK="1", MASTER_ADDR="10.0.0.1")
    assert done.returncode == 0, done.stderr
    options = parse_args(json.loads((tmp_path / "arguments").read_text()))
    assert (options.node_rank, options.master_addr, options.no_ssh) == (1, "10.0.0.1", True)
    assert (options.user_script, options.user_args) == ("launch/train.py", ["a=1"])
    assert dict(fetch_hostfile(options.hostfile)) == {"node-0": 8, "node-1": 8}


@pytest.mark.parametrize(
    "variables, arguments, missing",
    [
        ({"MASTER_ADDR": "x"}, ["launch/train.py"], "NODE_RANK"),
        ({"NODE_RANK": "0"}, ["launch/train.py"], "MASTER_ADDR"),
        ({"NODE_RANK": "0", "MASTER_ADDR": "x"}, [], "no program"),
    ],
)
def test_node_script_names_what_is_missing(stubs, tmp_path, variables, arguments, missing):
    stubs("deepspeed", recording(tmp_path / "arguments"))
    done = run_script("node.sh", stubs, *arguments, **variables)
    assert done.returncode != 0 and missing in done.stderr
    assert not (tmp_path / "arguments").exists()


def test_slurm_script_fits_the_elastic_launcher(stubs, tmp_path):
    stubs("scontrol", "echo node-0; echo node-1")
    stubs("srun", 'shift; exec "$@"')  # its one option, then the command, as on one node
    stubs("python3", recording(tmp_path / "arguments"))
    done = run_script("slurm.sh", stubs, "launch/train.py", "a=1", **SLURM, SLURM_GPUS_ON_NODE="8")
    assert done.returncode == 0, done.stderr
    options = elastic_options(json.loads((tmp_path / "arguments").read_text()))
    assert (options.nnodes, options.node_rank, options.nproc_per_node) == ("2", 1, "8")
    assert (options.master_addr, options.master_port) == ("node-0", 32345)
    assert (options.training_script, options.training_script_args) == ("launch/train.py", ["a=1"])
    stubs("python3", f'echo "$SIVAE_LAUNCH" > {tmp_path}/launch')
    assert run_script("slurm.sh", stubs, "launch/train.py", **SLURM).returncode == 0
    assert (tmp_path / "launch").read_text() == "slurm-12345\n"


def test_slurm_script_reports_a_failure_and_stays_out_of_the_queue(stubs, tmp_path):
    stubs("scontrol", f'[ "$1" = show ] && echo node-0 || echo "$@" > {tmp_path}/requeued')
    stubs("srun", "exit 3")
    assert run_script("slurm.sh", stubs, "launch/train.py", **SLURM).returncode == 3
    assert not (tmp_path / "requeued").exists()


POD = {"NODES": "2", "NODE_RANK": "1", "PROCESSES": "8", "MASTER_ADDR": "node-0"}


def test_pod_script_fits_the_elastic_launcher(stubs, tmp_path):
    stubs("python3", recording(tmp_path / "arguments"))
    assert run_script("pod.sh", stubs, "launch/train.py", "a=1", **POD).returncode == 0
    started, asked = (json.loads(line) for line in (tmp_path / "arguments").read_text().splitlines())
    options = elastic_options(started)
    assert (options.nnodes, options.node_rank, options.nproc_per_node) == ("2", 1, "8")
    assert (options.master_addr, options.master_port) == ("node-0", 29500)
    assert (options.training_script, options.training_script_args) == ("launch/train.py", ["a=1"])
    assert asked == ["launch/train.py", "a=1", "--finished"]


def test_pod_script_asks_the_doctor_once(stubs, tmp_path):
    stubs("python3", recording(tmp_path / "arguments"))
    assert run_script("pod.sh", stubs, "launch/doctor.py", **POD).returncode == 0
    (started,) = (json.loads(line) for line in (tmp_path / "arguments").read_text().splitlines())
    assert elastic_options(started).training_script == "launch/doctor.py"


def test_pod_script_hands_a_failure_on(stubs, tmp_path):
    stubs("python3", f"echo >> {tmp_path}/calls; exit 3")
    assert run_script("pod.sh", stubs, "launch/train.py", **POD).returncode == 3
    assert (tmp_path / "calls").read_text() == "\n"  # nobody was asked whether the run is finished


def test_kubernetes_job_is_consistent():
    service, job = yaml.safe_load_all((CLUSTERS / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    name = job["metadata"]["name"]
    script, program, config_flag, *overrides = container["command"]
    assert (ROOT / script) == CLUSTERS / "pod.sh" and program == "launch/train.py"
    values = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(values["NODES"])
    assert values["NODE_RANK"] == "$(JOB_COMPLETION_INDEX)"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(values["PROCESSES"])
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
    assert values["MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["ports"][0]["port"] == 29500  # what pod.sh takes by itself
    (codes,) = (r["onExitCodes"]["values"] for r in spec["podFailurePolicy"]["rules"] if "onExitCodes" in r)
    assert codes == [75]
    (label,) = (v["valueFrom"]["fieldRef"] for v in container["env"] if v["name"] == "SIVAE_LAUNCH")
    assert label == {"fieldPath": "metadata.labels['batch.kubernetes.io/controller-uid']"}  # that of the Job
    (grace,) = (int(v["value"]) for v in container["env"] if v["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert pod["terminationGracePeriodSeconds"] > grace
    config = load_config(ROOT / config_flag.removeprefix("--config="), overrides)
    (claim,) = (m["mountPath"] for m in container["volumeMounts"] if m["name"] == "shared")
    assert config.run.folder.startswith(claim) and config.data.path.startswith(claim)


def settings(images: Path) -> list[str]:
    chosen = {**TINY, "data.path": images, **ENDLESS}
    return [f"{key}={value}" for key, value in chosen.items()]


def start(name: str, stubs, folder: Path, images: Path, **variables: str) -> subprocess.Popen:
    """A script that trains without end, once it has written its first tick."""
    command = ["bash", CLUSTERS / name, ROOT / "launch" / "train.py", *settings(images)]
    env = {**environment(), "PATH": stubs.path, **variables}
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=output, stderr=output, start_new_session=True
        )
    wait_until(lambda: list(folder.glob("runs/*/stats.jsonl")) or process.poll() is not None)
    assert process.poll() is None, (folder / "output").read_text()
    return process


def saved(folder: Path) -> bool:
    return len(list(folder.glob("runs/*/checkpoints/*.json"))) == 1


def test_slurm_script_saves_at_the_limit_and_requeues(stubs, tmp_path, image_folder):
    stubs("scontrol", f'[ "$1" = show ] && echo 127.0.0.1 || echo "$@" > {tmp_path}/requeued')
    stubs("srun", f'shift; echo $$ > {tmp_path}/task; exec "$@"')
    stubs("scancel", f'[ "$*" = "--signal=TERM 12345" ] && kill -TERM $(cat {tmp_path}/task)')
    one_node = {**SLURM, "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    process = start("slurm.sh", stubs, tmp_path, image_folder, **one_node)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    assert saved(tmp_path)
    assert (tmp_path / "requeued").read_text() == "requeue 12345\n"


@pytest.mark.parametrize("number", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_node_script_saves_at_a_signal(stubs, tmp_path, image_folder, number):
    """A terminal sends Ctrl-C to the whole process group, others one signal to the script."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    variables = {
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29517",
        "HOSTFILE": str(hostfile),
    }
    process = start("node.sh", stubs, tmp_path, image_folder, **variables)
    if number == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    process.wait(timeout=60)
    assert saved(tmp_path), (tmp_path / "output").read_text()
    assert "stopped at" in (tmp_path / "output").read_text()


def test_a_pod_that_stops_because_another_was_evicted_is_not_complete(stubs, tmp_path, image_folder):
    one_node = {**POD, "NODES": "1", "NODE_RANK": "0", "PROCESSES": "2", "MASTER_ADDR": "127.0.0.1"}
    process = start("pod.sh", stubs, tmp_path, image_folder, **one_node, MASTER_PORT="29518")
    (runner,) = children(process.pid)
    os.kill(children(runner)[0], signal.SIGTERM)  # as it reaches a rank of another node
    assert process.wait(timeout=60) == 75, (tmp_path / "output").read_text()
    assert saved(tmp_path)
    ask = [sys.executable, ROOT / "launch" / "train.py", *settings(image_folder), "--finished"]
    assert subprocess.run(ask, cwd=tmp_path).returncode == 75
    assert subprocess.run([*ask, "train.images=160"], cwd=tmp_path).returncode == 0
    assert subprocess.run([*ask, "run.name=other"], cwd=tmp_path).returncode == 75


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
