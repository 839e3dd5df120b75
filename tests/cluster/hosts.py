"""Three hosts on one machine: namespaces of network, processes and mounts, each with its own Ray and temporary folder.

       host1 10.77.0.1      host2 10.77.0.2      host3 10.77.0.3       a Ray node each, started with `ray start`
            \\                   |                   /
             +----------- a bridge, in a namespace of its own; a host's link can be cut there

All hosts see the files of the machine, as they would a network drive's. Processes see those of their host alone: Ray
looks among them for the node to join. Root is needed for the namespaces.
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
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Of the names of network namespaces; the id of the tests' process follows.
PREFIX = "seedbed"
PORT = 6379
NUM_HOSTS = 3
# Ray's least is 75 MiB. Nothing but references goes through it.
OBJECT_STORE_BYTES = 80 * 1024**2
S3_PORT = 5555
S3_URL = f"http://10.77.0.1:{S3_PORT}"
# How long the processes of a host may take to come up or to go. Assumed; seconds on a machine that does nothing else.
PATIENCE = 180.0


# The first process of a host: takes the orphans of the others, and they all die with it.
INIT = "import signal, time; signal.signal(signal.SIGCHLD, signal.SIG_IGN); time.sleep(1e9)"


def address(host: int) -> str:
    return f"10.77.0.{host}"


class Hosts:
    """The hosts 1 to NUM_HOSTS. A context manager: at its end nothing of them is left."""

    def __init__(self) -> None:
        self._name = f"{PREFIX}{os.getpid()}"
        self.token = secrets.token_hex(32)
        self.folder = Path(tempfile.mkdtemp(prefix=f"sb{os.getpid()}-", dir="/tmp"))
        self.home = self.folder / "home"
        self.small_disk = self.home / "small"
        ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {
            **ours,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            # The name of this machine, by which ranks would find each other, leads every host to itself.
            "GLOO_SOCKET_IFNAME": "eth0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            # For an S3 server that a test may start on host 1.
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
            # Before the hosts are there: what is mounted later they would not see.
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
            # Leads nowhere, but Ray finds a machine's own address by asking for the route to the world.
            ip("-n", space, "route", "add", "default", "via", address(254))

    def space(self, host: int) -> str:
        return f"{self._name}h{host}"

    def on(self, host: int, command: list[str], folder: Path = ROOT) -> list[str]:
        """The command line that runs `command` on a host in a folder. Its process is the child of the one started."""
        init = child_of(self._inits[host].pid)
        return ["nsenter", f"--target={init}", "--net", "--pid", "--mount", f"--wdns={folder}", *command]

    def environment_of(self, host: int) -> dict[str, str]:
        """What processes on a host see; `TMPDIR` is the host's own."""
        temporary = self.folder / f"tmp{host}"
        temporary.mkdir(exist_ok=True)
        return {**self.environment, "TMPDIR": str(temporary)}

    def start(self, host: int, attempts: int = 3) -> None:
        """Start Ray on a host, with the command line that people use."""
        if host not in self._inits:
            spaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
            command = ["ip", "netns", "exec", self.space(host), *spaces, sys.executable, "-c", INIT]
            self._inits[host] = subprocess.Popen(command, start_new_session=True)
        where = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        if host != 1:
            where = [f"--address={address(1)}:{PORT}"]
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
                self.on(host, [sys.executable, "-m", "ray.scripts.scripts", "start", *where, *options]),
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
            self.kill(host)  # Ray gives a node 30 s to come up, which a busy machine may exceed
            self.start(host, attempts - 1)

    def processes(self, host: int) -> list[int]:
        """The ids of all processes on a host."""
        listed = subprocess.run(["ip", "netns", "pids", self.space(host)], capture_output=True, text=True)
        return [int(line) for line in listed.stdout.split()]

    def kill(self, host: int) -> None:
        """kill -9 of everything on a host at once, as when its power goes."""
        if (init := self._inits.pop(host, None)) is not None:
            init.kill()
            init.wait()
        if (node := self._nodes.pop(host, None)) is not None:
            node.wait()
        wait_until(lambda: not self.processes(host), f"host {host} is down")
        for left in ("ray", "tmp"):
            shutil.rmtree(self.folder / f"{left}{host}", ignore_errors=True)

    def set_link(self, host: int, state: str) -> None:
        """Cut (`down`) or restore (`up`) the link of a host."""
        ip("-n", f"{self._name}net", "link", "set", f"port{host}", state)

    def workers(self) -> dict[int, int]:
        """The processes that work on shards: id, and the host it is on."""
        found = {}
        for host in range(1, NUM_HOSTS + 1):
            for process in self.processes(host):
                if "_WorkerActor" in command_line(process):
                    found[process] = host
        return found

    def decoders(self) -> list[int]:
        """The processes that decode images."""
        return [
            process
            for host in range(1, NUM_HOSTS + 1)
            for process in self.processes(host)
            if "from curation.images import sandbox" in command_line(process)
        ]


def remove_folder(folder: Path) -> None:
    """Remove the folder of some hosts, with the small disk in it."""
    subprocess.run(["umount", folder / "home/small"], stderr=subprocess.DEVNULL)
    shutil.rmtree(folder)


def remove_leftovers() -> None:
    """End the hosts of tests that were killed, and remove what is left of them."""
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


def wait_until(condition: object, what: str, seconds: float = PATIENCE) -> None:
    """Wait until `condition()` holds. Raises TimeoutError."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(0.2)
