"""A process apart in which strangers' images are decoded, so that a bad one costs itself and nothing else.

    this process                          the decoding process (one per Prober, started at the first image)
    ------------                          ----------------------------------------------------------------
    encoded bytes    -- socket -->        header, limits, pixels, perceptual hash
    facts or reason  <-- socket --        (pixels never travel)

The decoding process has its own limits on memory and processor time. When it dies or hangs, a fresh one takes its
place. An image is rejected for a crash, for memory or for taking too long only when a fresh process fails on it too, so
the verdict on an image does not depend on the images before it, nor on a moment at which the machine stood still. The
process is started by a command line of its own, not by multiprocessing: it inherits no locks, threads or libraries and
never imports the caller's main module. It ends with its parent, because its socket then ends.
"""

import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from dataclasses import asdict
from types import TracebackType
from typing import IO, NamedTuple, Self, final

from PIL import Image

from curation.errors import SeedbedError
from curation.images.decode import ImageLimits, ImageRejected, RejectReason, check_length, decode
from curation.images.hashing import perceptual_hash

# Wall time per second of allowed processor time. A decoder that takes more is not working but waiting. Assumed.
WALL_SECONDS_PER_PROCESSOR_SECOND = 10
# Wall time for starting. Assumed: measured 1 to 3 seconds, more from a cold disk on a busy machine.
START_TIMEOUT_SECONDS = 300.0

_COMMAND = "from curation.images import sandbox; sandbox.serve()"
_LENGTH = struct.Struct("<Q")
_READY = b"ready"
_TRIED_AGAIN = (RejectReason.DECODER_CRASHED, RejectReason.DECODER_TIMEOUT, RejectReason.OUT_OF_MEMORY)


class ImageFacts(NamedTuple):
    """What ingest records of an accepted image. `width` and `height` are in pixels, after EXIF orientation."""

    width: int
    height: int
    format: str
    mode: str
    num_frames: int
    phash: int


class _Child(NamedTuple):
    process: subprocess.Popen[bytes]
    channel: socket.socket
    messages: IO[bytes]
    """Its standard error, emptied before each image."""


@final
class Prober:
    """Decodes untrusted images in a process of its own, one at a time. A context manager; else call `close`."""

    def __init__(self, limits: ImageLimits) -> None:
        self._limits = limits
        self._child: _Child | None = None

    def probe(self, data: bytes) -> ImageFacts:
        """The facts of an encoded image, from one full decode. Raises ImageRejected."""
        check_length(data, self._limits)
        try:
            return self._ask(data)
        except ImageRejected as rejected:
            if rejected.reason not in _TRIED_AGAIN:
                raise
        self.close()
        return self._ask(data)

    @property
    def process_id(self) -> int | None:
        """The operating system's id of the decoding process; None while there is none."""
        return None if self._child is None else self._child.process.pid

    def close(self) -> None:
        """End the decoding process. The next `probe` starts another."""
        if self._child is not None:
            _end(self._child)
            self._child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, data: bytes) -> ImageFacts:
        if self._child is None:
            self._child = _start(self._limits)
        child = self._child
        wall_seconds = self._limits.decode_timeout_seconds * WALL_SECONDS_PER_PROCESSOR_SECOND
        child.channel.settimeout(wall_seconds)
        try:
            _send(child.channel, data)
            reply = json.loads(_receive(child.channel))
        except TimeoutError:
            self.close()
            raise ImageRejected(RejectReason.DECODER_TIMEOUT, f"no answer after {wall_seconds:g} s") from None
        except (ConnectionError, EOFError):
            self._child = None
            raise _rejection_of_death(child, self._limits) from None
        except BaseException:
            self.close()  # an answer that was not read must not be taken for the next image's
            raise
        if "reason" in reply:
            raise ImageRejected(RejectReason(reply["reason"]), reply["detail"])
        return ImageFacts(**reply)


def serve() -> None:
    """Be the decoding process: answer images until the parent goes away. The limits are the first argument, as JSON."""
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(2, 1)  # what libraries print must not look like an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process when its timer runs out, even inside C code
    limits = ImageLimits.model_validate_json(sys.argv[1])
    perceptual_hash(Image.new("RGB", (32, 32)))  # loads its libraries, which shall not count as an image's memory
    _limit_memory(limits.max_decode_memory_bytes)
    _send(channel, _READY)
    while True:
        try:
            data = _receive(channel)
        except (ConnectionError, EOFError):
            return
        os.lseek(2, 0, os.SEEK_SET)
        os.ftruncate(2, 0)
        signal.setitimer(signal.ITIMER_PROF, limits.decode_timeout_seconds)
        reply = _answer(data, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(channel, reply)


def _answer(data: bytes, limits: ImageLimits) -> bytes:
    try:
        header, image = decode(data, limits)
        return json.dumps({**asdict(header), "phash": perceptual_hash(image)}).encode()
    except ImageRejected as rejected:
        return json.dumps({"reason": rejected.reason, "detail": rejected.detail}).encode()
    except MemoryError:
        return json.dumps({"reason": RejectReason.OUT_OF_MEMORY, "detail": "memory ran out while hashing"}).encode()


def _limit_memory(growth: int) -> None:
    """Let this process grow by `growth` bytes of address space and no more, and leave no core file when it crashes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # the only system that both tells the size and enforces the limit
        with open("/proc/self/statm") as file:
            present = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (present + growth, present + growth))


def _start(limits: ImageLimits) -> _Child:
    """Start a decoding process and wait until it is ready. Raises SeedbedError when it does not come up."""
    channel, its_channel = socket.socketpair()
    messages = tempfile.TemporaryFile()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    with its_channel:
        process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", _COMMAND, limits.model_dump_json()],
            stdin=its_channel.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=messages,
            env=environment,
        )
    child = _Child(process, channel, messages)
    channel.settimeout(START_TIMEOUT_SECONDS)
    try:
        ready = _receive(channel)
    except (TimeoutError, ConnectionError, EOFError) as error:
        status, text = _end(child)
        raise SeedbedError(f"The image decoding process did not start (status {status}): {text or error}") from None
    assert ready == _READY
    return child


def _end(child: _Child) -> tuple[int, str]:
    """Kill a decoding process; its exit status (a signal's number negative) and the last line it wrote."""
    child.channel.close()
    child.process.kill()
    status = child.process.wait()
    with child.messages as messages:
        messages.seek(max(0, os.fstat(messages.fileno()).st_size - 1000))
        lines = messages.read().decode(errors="replace").strip().splitlines()
    return status, lines[-1] if lines else ""


def _rejection_of_death(child: _Child, limits: ImageLimits) -> ImageRejected:
    child.process.wait()  # it is dying already: only so is the status its own and not that of our kill
    status, last_line = _end(child)
    if status == -signal.SIGPROF:
        detail = f"more than {limits.decode_timeout_seconds:g} s of processor time"
        return ImageRejected(RejectReason.DECODER_TIMEOUT, detail)
    cause = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return ImageRejected(RejectReason.DECODER_CRASHED, f"{cause}: {last_line}" if last_line else cause)


def _send(channel: socket.socket, message: bytes) -> None:
    channel.sendall(_LENGTH.pack(len(message)))
    channel.sendall(message)


def _receive(channel: socket.socket) -> bytes:
    """The next message. Raises EOFError when the other side has closed."""
    (length,) = _LENGTH.unpack(_receive_exactly(channel, _LENGTH.size))
    return bytes(_receive_exactly(channel, length))


def _receive_exactly(channel: socket.socket, length: int) -> bytearray:
    buffer = bytearray(length)
    view = memoryview(buffer)
    while view:
        count = channel.recv_into(view)
        if count == 0:
            raise EOFError("the other side has closed")
        view = view[count:]
    return buffer
