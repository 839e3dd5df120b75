"""The files of deploy/: they fit their schemas, the scripts run, and Ray is always started with a token.

These tests build no container, and use neither Kubernetes nor ssh. The SLURM script runs under a real slurm.
"""

import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.pipelines.test_curate import bytes_in, home, inline

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
RAY_VERSION = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
SCRIPTS = [DEPLOY / "slurm.sh", ROOT / "pipelines/launch/slurm.sh"]

__all__ = ["home"]  # a fixture


def tool(name: str) -> str:
    """The path of a program that pip installed beside Python."""
    return str(Path(sys.executable).parent / name)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_pass_bash_and_shellcheck(path: Path) -> None:
    for command in (["bash", "-n", str(path)], [tool("shellcheck"), str(path)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# --- the image


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)
    ]


def test_dockerfile_passes_hadolint() -> None:
    done = subprocess.run([tool("hadolint"), str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_image_holds_the_installed_packages_and_does_not_run_as_root() -> None:
    copied = {name for kind, rest in instructions() if kind == "COPY" for name in rest.split()[:-1]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    others = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    assert copied == packages | others and all((ROOT / name).exists() for name in copied)
    ignore_rules = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignore_rules if line.startswith("!")} == copied and "*" in ignore_rules
    users = [rest for kind, rest in instructions() if kind == "USER"]
    assert users == ["1000:1000"] and instructions()[-2][0] == "USER"
    (install,) = [rest for kind, rest in instructions() if kind == "RUN" and "pip install" in rest]
    assert "--constraint constraints.txt" in install
    faiss = dict(rest.split("=", 1) for kind, rest in instructions() if kind == "ARG")["FAISS"]
    assert faiss in project["project"]["dependencies"]
    (environment,) = [rest for kind, rest in instructions() if kind == "ENV"]
    assert "RAY_AUTH_MODE=token" in environment.split()


# --- Kubernetes


def closed_object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(required)}


TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT, TEXT, TRUTH, OBJECT = (
    {"type": "integer", "minimum": 0},
    {"type": "string"},
    {"type": "boolean"},
    {"type": "object"},
)
CONTAINER = closed_object(
    {
        "name": TEXT,
        "image": TEXT,
        "securityContext": OBJECT,
        "resources": closed_object({"requests": TEXTS, "limits": TEXTS}),
        "volumeMounts": {
            "type": "array",
            "items": closed_object({"name": TEXT, "mountPath": TEXT, "readOnly": TRUTH}, "name"),
        },
    },
    "name",
    "image",
    "resources",
)
POD = closed_object(
    {
        "spec": closed_object(
            {
                "automountServiceAccountToken": TRUTH,
                "securityContext": OBJECT,
                "containers": {"type": "array", "items": CONTAINER, "minItems": 1},
                "volumes": {"type": "array", "items": OBJECT},
            },
            "containers",
        )
    },
    "spec",
)
# Names and types from KubeRay's published API reference (ray.io/v1; authOptions since v1.5.1). No package index has the
# schema of the resource, so this one lists only the fields that deploy/rayjob.yaml uses.
RAY_JOB = closed_object(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": closed_object({"name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}}, "name"),
        "spec": closed_object(
            {
                "entrypoint": TEXT,
                "shutdownAfterJobFinishes": TRUTH,
                "ttlSecondsAfterFinished": COUNT,
                "backoffLimit": COUNT,
                "rayClusterSpec": closed_object(
                    {
                        "rayVersion": TEXT,
                        "authOptions": closed_object({"mode": {"enum": ["disabled", "token"]}}, "mode"),
                        "headGroupSpec": closed_object({"rayStartParams": TEXTS, "template": POD}, "template"),
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": closed_object(
                                {
                                    "groupName": TEXT,
                                    "replicas": COUNT,
                                    "minReplicas": COUNT,
                                    "maxReplicas": COUNT,
                                    "rayStartParams": TEXTS,
                                    "template": POD,
                                },
                                "groupName",
                                "minReplicas",
                                "maxReplicas",
                                "template",
                            ),
                        },
                    },
                    "headGroupSpec",
                ),
            },
            "entrypoint",
            "rayClusterSpec",
        ),
    },
    "apiVersion",
    "kind",
    "metadata",
    "spec",
)


def ray_job() -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    return job


def test_ray_job_has_the_fields_of_kuberay() -> None:
    jsonschema.validate(ray_job(), RAY_JOB)
    for change in ({"entryPoint": "x"}, {"backoffLimit": "3"}, {"rayClusterSpec": {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(ray_job() | {"spec": ray_job()["spec"] | change}, RAY_JOB)


def test_ray_job_is_consistent() -> None:
    spec = ray_job()["spec"]
    cluster = spec["rayClusterSpec"]
    assert RAY_VERSION is not None and cluster["rayVersion"] == RAY_VERSION[1]
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        (container,) = pod["containers"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (workers,) = cluster["workerGroupSpecs"]
    cores = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]) * workers["replicas"]
    words = spec["entrypoint"].split()
    assert words[:3] == ["python", "-m", "pipelines.curate"] and words[words.index("--workers") + 1] == str(cores)
    assert words[words.index("--config") + 1].startswith("/config/")


# --- make setup


@pytest.mark.parametrize(("extras", "packages"), [("gpu,dev", ".[dev]"), ("gpu", "."), ("dev", ".[dev]")])
def test_make_setup_puts_one_build_of_faiss_in_the_place_of_the_other(extras: str, packages: str) -> None:
    command = ["make", "--dry-run", "--what-if=pyproject.toml", "setup", f"EXTRAS={extras}"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    (install,) = [line for line in printed.splitlines() if "--editable" in line]
    assert install.endswith(f"--editable '{packages}'")
    of_faiss = [line.partition(" -m pip ")[2] for line in printed.splitlines() if "faiss" in line]
    replacement = [
        "uninstall --quiet --yes faiss-cpu faiss-gpu",
        "install --quiet --constraint constraints.txt faiss-gpu",
    ]
    assert of_faiss == (replacement if "gpu" in extras else [])


# --- ray up


def test_cluster_file_fits_the_schema_of_ray() -> None:
    import ray.autoscaler._private.util as autoscaler

    text = (DEPLOY / "machines.yaml").read_text()
    config = yaml.safe_load(text)
    schema = json.loads(Path(autoscaler.__file__).parents[1].joinpath("ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"max_worker": 2}, schema)
    autoscaler.validate_config(autoscaler.prepare_config(config))
    starts = [
        line for part in ("head", "worker") for line in config[f"{part}_start_ray_commands"] if "ray start" in line
    ]
    assert len(starts) == 2 and all(line.startswith("RAY_AUTH_MODE=token ") for line in starts)
    assert config["max_workers"] == len(config["provider"]["worker_ips"])
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


# --- SLURM

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
SLURM_CONFIG = """
ClusterName=seedbed
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
FirstJobId={first}
NodeName=n1,n2 NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """Two nodes of a real slurm, both on this machine."""

    environment: dict[str, str]

    def run(self, *command: str, folder: Path | None = None) -> str:
        done = subprocess.run(command, env=self.environment, cwd=folder, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        return dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", number).split() if "=" in word)


def wait_until(condition: Callable[[], bool], description: str, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for: {description}"
        time.sleep(0.5)


def free_ports() -> list[int]:
    """Three free ports in a row."""
    for first in range(26_000, 32_000, 3):
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            try:
                for offset, listener in enumerate((one, two, three)):
                    listener.bind(("127.0.0.1", first + offset))
            except OSError:
                continue
        return [first, first + 1, first + 2]
    raise AssertionError("no free ports")


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    if missing := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        pytest.skip(f"slurm is not here (no {', '.join(missing)}); on Debian: apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    ports = free_ports()
    # The names of a job's files contain its number, which must differ from those of another slurm on this machine.
    values = {"host": socket.gethostname(), "user": getpass.getuser(), "folder": folder, "ports": ports}
    (folder / "slurm.conf").write_text(SLURM_CONFIG.format(first=ports[0] + os.getpid() % 1000 * 100, **values))
    environment = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    munged = ["munged", "--force", "--foreground", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munged += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    started = []
    try:
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]):
            log = (folder / f"out-{len(started)}").open("wb")
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            log.close()
            if command is munged:
                wait_until((folder / "munge.socket").exists, "munged", 60)
        made = Slurm(environment)
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        wait_until(lambda: subprocess.run(idle, env=environment, capture_output=True).stdout == b"2\n", "slurm", 120)
        yield made
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait()


def processes_with(text: str) -> list[str]:
    """The command lines on this machine that contain a text."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # the process has ended
        if text in line:
            lines.append(line)
    return lines


@pytest.mark.slow
def test_slurm_script_runs_is_requeued_and_leaves_nothing(slurm: Slurm, home: Path) -> None:
    """Two nodes have a Ray node each; SIGTERM stops the job midway, as at the end of its time."""
    script = ["sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", "--time=60", str(DEPLOY / "slurm.sh")]
    slurm.environment.update(PYTHON=sys.executable, PYTHONPATH=str(ROOT))
    number = slurm.run(*script, "--config", "config.toml", "--output", "out", folder=home).strip()
    log = home / f"slurm-{number}.log"
    try:
        wait_until((home / "out/ingest/manifest.json").exists, "ingest")
        (token,) = home.glob(f".seedbed-{number}.*/token")
        assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        assert len(secret := token.read_text()) == 64
        assert processes_with(f"/tmp/seedbed-{number}") and not processes_with(secret)
        slurm.run("scancel", "--batch", "--signal=TERM", number)
        wait_until(lambda: slurm.job(number).get("Restarts") == "1", "the job to be queued again")
        assert not token.exists()
        slurm.run("scontrol", "update", f"JobId={number}", "StartTime=now")
        wait_until(lambda: slurm.job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "the job")
    finally:
        print(log.read_text() if log.exists() else "no log")
        subprocess.run(["scancel", number], env=slurm.environment, check=False)
    assert (slurm.job(number)["JobState"], slurm.job(number)["ExitCode"]) == ("COMPLETED", "0:0")
    text = log.read_text()
    assert secret not in text and "ingest: already done" in text and "Traceback" not in text
    assert inline(home, output="whole").returncode == 0
    whole = bytes_in(home / "whole")
    assert {name: data for name, data in bytes_in(home / "out").items() if name in whole} == whole
    wait_until(lambda: not processes_with(f"seedbed-{number}"), "processes to end", 60)
    assert not Path(f"/tmp/seedbed-{number}").exists() and not list(home.glob(".seedbed-*"))
    assert all((path.stat().st_mode & 0o044) == 0o044 for path in (home / "out").rglob("*.parquet")), (
        "other users cannot read the output"
    )


@pytest.mark.slow
def test_slurm_script_ends_with_the_status_of_the_command(slurm: Slurm, home: Path) -> None:
    (home / "config.toml").write_text("nonsense = 1")
    script = ["sbatch", "--parsable", "--nodes=1", "--cpus-per-task=1", "--time=60", str(DEPLOY / "slurm.sh")]
    slurm.environment.update(PYTHON=sys.executable, PYTHONPATH=str(ROOT))
    number = slurm.run(*script, "--config", "config.toml", "--output", "out", folder=home).strip()
    wait_until(lambda: slurm.job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "the job")
    assert (slurm.job(number)["JobState"], slurm.job(number)["ExitCode"]) == ("FAILED", "2:0")
    assert "Unknown key: 'nonsense'" in (home / f"slurm-{number}.log").read_text()
    wait_until(lambda: not processes_with(f"seedbed-{number}"), "processes to end", 60)
    assert not list(home.glob(".seedbed-*"))


def test_slurm_script_refuses_to_run_without_slurm() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(["bash", str(DEPLOY / "slurm.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "submit this with sbatch" in done.stderr
