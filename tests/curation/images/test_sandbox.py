"""The decoding process: the same verdicts as decoding here, and one bad image costs one image.

Nothing is simulated: processes are killed by real signals, run out of real memory, and overrun real timers.
"""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from curation.images.decode import ImageLimits, ImageRejected, RejectReason, decode
from curation.images.hashing import perceptual_hash
from curation.images.sandbox import ImageFacts, Prober

LIMITS = ImageLimits()


def encoded(width: int, height: int, image_format: str = "PNG", seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST).save(buffer, image_format)
    return buffer.getvalue()


SMALL = encoded(60, 40)
SLOW = encoded(7000, 6000)  # about a second


@pytest.fixture(scope="module")
def prober() -> Iterator[Prober]:
    with Prober(LIMITS) as prober:
        yield prober


def rejection(prober: Prober, data: bytes) -> ImageRejected:
    with pytest.raises(ImageRejected) as caught:
        prober.probe(data)
    return caught.value


def test_facts_are_those_of_a_decode_here(prober: Prober) -> None:
    for number, image_format in enumerate(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"]):
        data = encoded(60 + number, 40, image_format, seed=number)
        header, image = decode(data, LIMITS)
        expected = (header.width, header.height, header.format, header.mode, header.num_frames, perceptual_hash(image))
        assert prober.probe(data) == ImageFacts(*expected)


def test_rejections_are_those_of_a_decode_here(prober: Prober) -> None:
    process_id = prober.process_id
    for data in [b"", b"no image", SMALL[: len(SMALL) // 2], encoded(60, 8), encoded(60, 40, "EPS"), SMALL[:20]]:
        with pytest.raises(ImageRejected) as here:
            decode(data, LIMITS)
        there = rejection(prober, data)
        assert (there.reason, there.detail) == (here.value.reason, here.value.detail)
    assert prober.probe(SMALL).width == 60
    assert process_id is None or prober.process_id == process_id


@contextmanager
def killing(prober: Prober, number: int, signal_number: int) -> Iterator[None]:
    """Send a signal to the first `number` decoding processes that are seen while the block runs."""
    stop = threading.Event()

    def watch() -> None:
        seen: list[int] = []
        while len(seen) < number and not stop.wait(0.01):
            process_id = prober.process_id
            if process_id is not None and process_id not in seen:
                seen.append(process_id)
                os.kill(process_id, signal_number)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_an_image_is_rejected_when_the_decoder_crashes_on_it_twice(prober: Prober) -> None:
    prober.probe(SMALL)
    with killing(prober, 2, signal.SIGSEGV):
        rejected = rejection(prober, SLOW)
    assert (rejected.reason, rejected.detail) == (RejectReason.DECODER_CRASHED, "SIGSEGV")
    assert prober.probe(SMALL).width == 60


def test_one_crash_costs_nothing(prober: Prober) -> None:
    before = prober.probe(SMALL)
    with killing(prober, 1, signal.SIGKILL):
        assert prober.probe(SLOW).width == 7000
    assert prober.probe(SMALL) == before


def test_an_image_that_takes_too_long_is_rejected() -> None:
    with Prober(ImageLimits(decode_timeout_seconds=0.1)) as prober:
        rejected = rejection(prober, SLOW)
        assert rejected.reason == RejectReason.DECODER_TIMEOUT
        assert "0.1 s of processor time" in rejected.detail
        assert prober.probe(SMALL).width == 60


@pytest.mark.slow
def test_a_decoder_that_waits_forever_is_replaced_and_its_image_tried_again() -> None:
    with Prober(ImageLimits(decode_timeout_seconds=3)) as prober:
        prober.probe(SMALL)
        with killing(prober, 1, signal.SIGSTOP):
            assert prober.probe(SLOW).width == 7000
        assert prober.probe(SMALL).width == 60


def test_an_image_on_which_every_decoder_waits_is_rejected() -> None:
    with Prober(ImageLimits(decode_timeout_seconds=0.2)) as prober:
        prober.probe(SMALL)
        with killing(prober, 2, signal.SIGSTOP):
            rejected = rejection(prober, SLOW)
        assert (rejected.reason, rejected.detail) == (RejectReason.DECODER_TIMEOUT, "no answer after 2 s")
        assert prober.probe(SMALL).width == 60


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
def test_an_image_that_takes_too_much_memory_is_rejected() -> None:
    with Prober(ImageLimits(max_decode_memory_bytes=64 << 20)) as prober:
        assert rejection(prober, SLOW).reason == RejectReason.OUT_OF_MEMORY
        assert prober.probe(SMALL).width == 60


def test_close_ends_the_process_and_the_next_image_starts_another() -> None:
    prober = Prober(LIMITS)
    prober.close()
    facts = prober.probe(SMALL)
    process_id = prober.process_id
    assert process_id is not None and is_running(process_id)
    prober.close()
    assert not is_running(process_id) and prober.process_id is None
    assert prober.probe(SMALL) == facts
    prober.close()


def is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script that has no main guard. Its process ends before this returns; those it started may not."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)


def test_the_process_works_without_a_main_guard_and_ends_with_a_killed_parent() -> None:
    script = f"""
import os, signal
from curation.images.decode import ImageLimits
from curation.images.sandbox import Prober
prober = Prober(ImageLimits())
print(prober.probe({SMALL!r}).width, prober.process_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run_script(script)
    width, process_id = done.stdout.split()
    assert (done.returncode, width) == (-signal.SIGKILL, "60")
    deadline = time.monotonic() + 60
    while is_running(int(process_id)) and not is_zombie(int(process_id)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(int(process_id)) or is_zombie(int(process_id))


def is_zombie(process_id: int) -> bool:
    """Whether a process has ended and only waits for whoever inherited it to take note."""
    try:
        with open(f"/proc/{process_id}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_cannot_start_is_an_error_and_no_rejection() -> None:
    script = f"""
import sys
from curation.errors import SeedbedError
from curation.images.decode import ImageLimits
from curation.images.sandbox import Prober
sys.executable = "/bin/false"
try:
    Prober(ImageLimits()).probe({SMALL!r})
except SeedbedError as error:
    print(type(error).__name__, error)
"""
    assert run_script(script).stdout.startswith("SeedbedError The image decoding process did not start (status ")
