"""A separate process that decodes untrusted images, so that a harmful image affects no other image.

    this process                          the decoding process (one per ImageSandbox, started at the first image)
    ------------                          -----------------------------------------------------------------------
    encoded bytes    -- socket -->        header, limits, pixels, perceptual hash
    facts or reason  <-- socket --        (pixels are never sent)

The decoding process has its own limits on memory and processor time. If it dies or hangs, a fresh process replaces it.
An image is rejected for a crash, for memory or for a timeout only if a fresh process fails on it too. So the verdict
on an image does not depend on earlier images, nor on a pause of the whole machine.

The process (`child_process.py`) is killed and waited for when its `ImageSandbox` is closed or deleted, so that no
zombie is left of it.

It decodes as later stages do (`decode.py`), by the same two libraries; only the scaling of JPEGs is left to the stages.
"""

import json
import os
import resource
import signal
import socket
import struct
import sys
import weakref
from dataclasses import asdict
from types import TracebackType
from typing import NamedTuple, Self, final

from PIL import Image

from curation.errors import SeedbedError
from curation.images import child_process
from curation.images.child_process import ChildProcess
from curation.images.decode import ImageLimits, ImageRejected, RejectReason, check_length, decode
from curation.images.detail import content_and_detail
from curation.images.hashing import perceptual_hash

# Wall time per second of allowed processor time. A decoder beyond that is waiting, not working. Assumed.
WALL_SECONDS_PER_PROCESSOR_SECOND = 10
# Wall time for the start. Assumed: measured 1 to 3 seconds, more from a cold disk on a busy machine.
START_TIMEOUT_SECONDS = 300.0

_COMMAND = "from curation.images import sandbox; sandbox.serve()"
_LENGTH = struct.Struct("<Q")
_READY = b"ready"
_RETRIED_REASONS = (RejectReason.DECODER_CRASHED, RejectReason.DECODER_TIMEOUT, RejectReason.OUT_OF_MEMORY)


class ImageFacts(NamedTuple):
    """The facts about an accepted image. `width` and `height` are in pixels, after EXIF orientation.

    `content_pixels` and `detail_pixels` are those of detail.content_and_detail.
    """

    width: int
    height: int
    format: str
    mode: str
    num_frames: int
    phash: int
    content_pixels: int
    detail_pixels: int


@final
class ImageSandbox:
    """Decodes untrusted images in a separate process, one at a time. A context manager; `close` is optional."""

    def __init__(self, limits: ImageLimits) -> None:
        self._limits = limits
        self._decoder: ChildProcess | None = None
        self._finalizer: weakref.finalize[..., ImageSandbox] | None = None

    def probe(self, data: bytes) -> ImageFacts:
        """The facts of an encoded image, from one full decode. Raises ImageRejected."""
        check_length(data, self._limits)
        try:
            return self._request(data)
        except ImageRejected as rejected:
            if rejected.reason not in _RETRIED_REASONS:
                raise
        self.close()
        return self._request(data)

    @property
    def process_id(self) -> int | None:
        """The operating system's id of the decoding process; None while no process runs."""
        return None if self._decoder is None else self._decoder.process.pid

    def close(self) -> None:
        """Ends the decoding process. The next `probe` starts another."""
        if self._finalizer is not None:
            self._finalizer()
        self._decoder = self._finalizer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, data: bytes) -> ImageFacts:
        if self._decoder is None:
            self._decoder = _start(self._limits)
            # A worker's sandbox is deleted, not closed.
            self._finalizer = weakref.finalize(self, child_process.end, self._decoder)
        decoder = self._decoder
        wall_seconds = self._limits.decode_timeout_seconds * WALL_SECONDS_PER_PROCESSOR_SECOND
        decoder.channel.settimeout(wall_seconds)
        try:
            _send(decoder.channel, data)
            reply = json.loads(_receive(decoder.channel))
        except TimeoutError:
            self.close()
            raise ImageRejected(RejectReason.DECODER_TIMEOUT, f"no answer after {wall_seconds:g} s") from None
        except (ConnectionError, EOFError):
            assert self._finalizer is not None
            self._finalizer.detach()
            self._decoder = self._finalizer = None
            raise _rejection_of_death(decoder, self._limits) from None
        except BaseException:
            self.close()  # an unread reply must not be mistaken for that of the next image
            raise
        if "reason" in reply:
            raise ImageRejected(RejectReason(reply["reason"]), reply["detail"])
        return ImageFacts(**reply)


def serve() -> None:
    """Runs as the decoding process: replies to images until the parent closes. The first argument: limits as JSON."""
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(2, 1)  # output of libraries must not look like a reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process when its timer runs out, even inside C code
    limits = ImageLimits.model_validate_json(sys.argv[1])
    perceptual_hash(Image.new("RGB", (32, 32)))  # loads its libraries, which must not count as memory of an image
    content_and_detail(Image.new("RGB", (64, 64)))
    _limit_memory(limits.max_decode_memory_bytes)
    _send(channel, _READY)
    while True:
        try:
            data = _receive(channel)
        except (ConnectionError, EOFError):
            return
        os.lseek(2, 0, os.SEEK_SET)  # the last line of standard error then is of this image
        os.ftruncate(2, 0)
        signal.setitimer(signal.ITIMER_PROF, limits.decode_timeout_seconds)
        answer = reply(data, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(channel, answer)


def reply(data: bytes, limits: ImageLimits) -> bytes:
    """The facts of an image, or the reason of its rejection, as JSON. This part runs in the decoding process."""
    try:
        header, image = decode(data, limits)
        content, detail = content_and_detail(image)
        measured = {"phash": perceptual_hash(image), "content_pixels": content, "detail_pixels": detail}
        return json.dumps({**asdict(header), **measured}).encode()
    except ImageRejected as rejected:
        return json.dumps({"reason": rejected.reason, "detail": rejected.detail}).encode()
    except MemoryError:
        return json.dumps({"reason": RejectReason.OUT_OF_MEMORY, "detail": "memory ran out while hashing"}).encode()


def _limit_memory(growth: int) -> None:
    """Limits this process to `growth` more bytes of address space, and disables core files."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if present := child_process.address_space():
        resource.setrlimit(resource.RLIMIT_AS, (present + growth, present + growth))


def _start(limits: ImageLimits) -> ChildProcess:
    """Starts a decoding process and waits until it is ready. Raises SeedbedError if it does not start."""
    decoder = child_process.start(_COMMAND, limits.model_dump_json())
    decoder.channel.settimeout(START_TIMEOUT_SECONDS)
    try:
        ready = _receive(decoder.channel)
    except (TimeoutError, ConnectionError, EOFError) as error:
        status, text = child_process.end(decoder)
        raise SeedbedError(f"The image decoding process did not start (status {status}): {text or error}") from None
    assert ready == _READY
    return decoder


def _rejection_of_death(decoder: ChildProcess, limits: ImageLimits) -> ImageRejected:
    decoder.process.wait()  # the process is ending already; without the wait, the status could be that of our kill
    status, last_line = child_process.end(decoder)
    if status == -signal.SIGPROF:
        detail = f"more than {limits.decode_timeout_seconds:g} s of processor time"
        return ImageRejected(RejectReason.DECODER_TIMEOUT, detail)
    cause = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return ImageRejected(RejectReason.DECODER_CRASHED, f"{cause}: {last_line}" if last_line else cause)


def _send(channel: socket.socket, message: bytes) -> None:
    channel.sendall(_LENGTH.pack(len(message)))
    channel.sendall(message)


def _receive(channel: socket.socket) -> bytes:
    """The next message. Raises EOFError when the other side has closed the socket."""
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
