"""Makes three hosts on one machine: namespaces of network, processes and mounts, each with a Ray node and a TMPDIR.

       host1 10.77.0.1      host2 10.77.0.2      host3 10.77.0.3       a Ray node each, started with `ray start`
            \\                   |                   /
             +----------- a bridge, in a namespace of its own; a host's link can be cut there

All hosts see the files of the machine, like those of a network drive. A process sees the processes of its host only,
because Ray looks among them for the node to join. The namespaces need root.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Prefix of the names of network namespaces; the id of the tests' process follows.
PREFIX = "seedbed"
PORT = 6379
NUM_HOSTS = 3
# Ray's minimum is 75 MiB. Only references pass through the object store.
OBJECT_STORE_BYTES = 80 * 1024**2
S3_PORT = 5555
S3_URL = f"http://10.77.0.1:{S3_PORT}"
# Seconds that the processes of a host may take to start or to end. Assumed; an idle machine needs a few.
PATIENCE = 180.0


# The first process of a host: it adopts the orphans of the others, and they all die with it.
INIT = "import signal, time; signal.signal(signal.SIGCHLD, signal.SIG_IGN); time.sleep(1e9)"


def address(host: int) -> str:
    return f"10.77.0.{host}"


class Hosts:
    """The hosts 1 to NUM_HOSTS. A context manager, which removes all of them at its end."""

    def __init__(self) -> None:
        self._name = f"{PREFIX}{os.getpid()}"
        self.token = secrets.token_hex(32)
        self.folder = Path(tempfile.mkdtemp(prefix=f"sb{os.getpid()}-", dir="/tmp"))
        self.home = self.folder / "home"
        self.small_disk = self.home / "small"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {
            **inherited,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            # Ranks would find each other by the name of this machine, which every host resolves to itself.
            "GLOO_SOCKET_IFNAME": "eth0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            # Of the S3 server that a test starts on host 1.
            "AWS_ENDPOINT_URL": S3_URL,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self._inits: dict[int, subprocess.Popen[bytes]] = {}
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Hosts":
        remove_leftovers()
        try:
            self.small_disk.mkdir(parents=True)
            # Before the hosts start: they would not see a later mount.
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "seedbed", self.small_disk], check=True)
            self._make_network()
            for host in range(1, NUM_HOSTS + 1):
                self.start(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in range(1, NUM_HOSTS + 1):
            self.kill(host)
        for space in (*map(self.space, range(1, NUM_HOSTS + 1)), f"{self._name}net"):
            subprocess.run(["ip", "netns", "delete", space], stderr=subprocess.DEVNULL)
        remove_folder(self.folder)

    def _make_network(self) -> None:
        network = f"{self._name}net"
        ip("netns", "add", network)
        ip("-n", network, "link", "add", "bridge", "type", "bridge")
        ip("-n", network, "link", "set", "bridge", "up")
        for host in range(1, NUM_HOSTS + 1):
            space = self.space(host)
            ip("netns", "add", space)
            ip("-n", network, "link", "add", f"port{host}", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("-n", network, "link", "set", f"port{host}", "master", "bridge", "up")
            ip("-n", space, "address", "add", f"{address(host)}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
            # No host has that address, but Ray finds a machine's address by the route to a public one.
            ip("-n", space, "route", "add", "default", "via", address(254))

    def space(self, host: int) -> str:
        return f"{self._name}h{host}"

    def on(self, host: int, command: list[str], folder: Path = ROOT) -> list[str]:
        """The command line that runs `command` on a host in a folder, as a child of the started process."""
        init = child_of(self._inits[host].pid)
        return ["nsenter", f"--target={init}", "--net", "--pid", "--mount", f"--wdns={folder}", *command]

    def environment_of(self, host: int) -> dict[str, str]:
        """The environment of processes on a host; `TMPDIR` belongs to the host alone."""
        temporary = self.folder / f"tmp{host}"
        temporary.mkdir(exist_ok=True)
        return {**self.environment, "TMPDIR": str(temporary)}

    def start(self, host: int, attempts: int = 3) -> None:
        """Start Ray on a host with the command that users run."""
        if host not in self._inits:
            spaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
            command = ["ip", "netns", "exec", self.space(host), *spaces, sys.executable, "-c", INIT]
            self._inits[host] = subprocess.Popen(command, start_new_session=True)
        role = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        if host != 1:
            role = [f"--address={address(1)}:{PORT}"]
        options = [
            f"--node-ip-address={address(host)}",
            f"--temp-dir={self.folder}/ray{host}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--num-cpus=1",
            "--disable-usage-stats",
            "--block",
        ]
        log_path = self.folder / f"ray{host}.log"
        log_path.touch()
        log_size = log_path.stat().st_size
        with log_path.open("ab") as log:
            self._nodes[host] = subprocess.Popen(
                self.on(host, [sys.executable, "-m", "ray.scripts.scripts", "start", *role, *options]),
                env=self.environment_of(host),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

        def is_up() -> bool:
            if self._nodes[host].poll() is not None:
                raise RuntimeError(f"`ray start` on host {host} failed: {log_path.read_text()[-2000:]}")
            return b"Ray runtime started" in log_path.read_bytes()[log_size:]

        try:
            wait_until(is_up, f"Ray on host {host} is up")
        except RuntimeError:
            if attempts == 1:
                raise
            self.kill(host)  # Ray gives a node 30 s to start, which a busy machine may exceed
            self.start(host, attempts - 1)

    def processes(self, host: int) -> list[int]:
        """The ids of all processes on a host."""
        listed = subprocess.run(["ip", "netns", "pids", self.space(host)], capture_output=True, text=True)
        return [int(line) for line in listed.stdout.split()]

    def kill(self, host: int) -> None:
        """Kill all processes of a host at once with SIGKILL, like a loss of power."""
        if (init := self._inits.pop(host, None)) is not None:
            init.kill()
            init.wait()
        if (node := self._nodes.pop(host, None)) is not None:
            node.wait()
        wait_until(lambda: not self.processes(host), f"host {host} is down")
        for kind in ("ray", "tmp"):
            shutil.rmtree(self.folder / f"{kind}{host}", ignore_errors=True)

    def set_link(self, host: int, state: str) -> None:
        """Cut (`down`) or restore (`up`) the link of a host."""
        ip("-n", f"{self._name}net", "link", "set", f"port{host}", state)

    def workers(self) -> dict[int, int]:
        """The host of each process that works on shards, by process id."""
        host_of_worker = {}
        for host in range(1, NUM_HOSTS + 1):
            for process in self.processes(host):
                if "_WorkerActor" in command_line(process):
                    host_of_worker[process] = host
        return host_of_worker

    def decoders(self) -> list[int]:
        """The processes that decode images."""
        return [
            process
            for host in range(1, NUM_HOSTS + 1)
            for process in self.processes(host)
            if "from curation.images import sandbox" in command_line(process)
        ]


def remove_folder(folder: Path) -> None:
    """Remove the folder of a `Hosts`, with the small disk in it."""
    subprocess.run(["umount", folder / "home/small"], stderr=subprocess.DEVNULL)
    shutil.rmtree(folder)


def remove_leftovers() -> None:
    """End the hosts of tests that were killed, and remove their files."""
    for space in sorted(path.name for path in Path("/run/netns").glob(PREFIX + "*")):
        owner = re.sub(r"\D.*", "", space.removeprefix(PREFIX))
        if not Path(f"/proc/{owner}").exists():
            listed = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout.split()
            for process in listed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            ip("netns", "delete", space)
    for folder in Path("/tmp").glob("sb*-*/"):
        if not Path(f"/proc/{folder.name[2:].partition('-')[0]}").exists():
            remove_folder(folder)


def child_of(process: int) -> int:
    """The first child of a process, as soon as it has one."""
    children = Path(f"/proc/{process}/task/{process}/children")
    wait_until(lambda: bool(children.read_text().split()), f"process {process} has a child")
    return int(children.read_text().split()[0])


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def command_line(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_until(condition: Callable[[], bool], description: str, seconds: float = PATIENCE) -> None:
    """Wait until `condition()` holds. Raises TimeoutError with the description."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {description}")
        time.sleep(0.2)
