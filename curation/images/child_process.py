"""A process of its own for untrusted bytes, connected by a socket.

It is started by its own command line, not by multiprocessing: it inherits no locks, threads or libraries and never
imports the caller's main module. It ends with its parent, because its socket is then closed.
"""

import os
import resource
import socket
import subprocess
import sys
import tempfile
from typing import IO, NamedTuple


class ChildProcess(NamedTuple):
    """A started process, the socket to it, and the file of its standard error."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    messages: IO[bytes]


def start(code: str, *arguments: str, **environment: str) -> ChildProcess:
    """Starts Python on `code`, with the socket as standard input and this process's `sys.path`."""
    channel, remote_channel = socket.socketpair()
    messages = tempfile.TemporaryFile()
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    with remote_channel:
        process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", code, *arguments],
            stdin=remote_channel.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=messages,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **environment},
        )
    return ChildProcess(process, channel, messages)


def end(child: ChildProcess) -> tuple[int, str]:
    """Kills a process; gives its exit status (negative: a signal's number) and its last line of standard error."""
    child.channel.close()
    child.process.kill()
    status = child.process.wait()
    with child.messages as messages:
        messages.seek(max(0, os.fstat(messages.fileno()).st_size - 1000))
        lines = messages.read().decode(errors="replace").strip().splitlines()
    return status, lines[-1] if lines else ""


# In the process


def address_space() -> int:
    """Bytes of address space of this process; 0 where the system does not both report and limit them."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
