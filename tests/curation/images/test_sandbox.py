"""The decoding process: the same verdicts as decoding in this process, and a bad image affects only itself.

Nothing is simulated: processes are killed by real signals, run out of real memory, and overrun real timers.
"""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from PIL import Image

from curation import ingest
from curation.engine.runner import Shard
from curation.images import decode as decode_module
from curation.images import sandbox as sandbox_module
from curation.images.decode import ImageLimits, ImageRejected, RejectReason, decode, decode_picture
from curation.images.detail import content_and_detail
from curation.images.hashing import perceptual_hash
from curation.images.sandbox import ImageFacts, ImageSandbox
from curation.images.sources import SourceConfig

LIMITS = ImageLimits()


def encoded(width: int, height: int, image_format: str = "PNG", seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST).save(buffer, image_format)
    return buffer.getvalue()


SMALL = encoded(60, 40)
SLOW = encoded(7000, 6000)  # about a second


@pytest.fixture(scope="module")
def sandbox() -> Iterator[ImageSandbox]:
    with ImageSandbox(LIMITS) as sandbox:
        yield sandbox


def rejection(sandbox: ImageSandbox, data: bytes) -> ImageRejected:
    with pytest.raises(ImageRejected) as caught:
        sandbox.probe(data)
    return caught.value


def test_facts_equal_those_of_decoding_in_this_process(sandbox: ImageSandbox) -> None:
    for number, image_format in enumerate(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"]):
        data = encoded(60 + number, 40, image_format, seed=number)
        header, image = decode(data, LIMITS)
        of_header = header.width, header.height, header.format, header.mode, header.num_frames
        expected = ImageFacts(*of_header, perceptual_hash(image), *content_and_detail(image))
        assert sandbox.probe(data) == expected


@pytest.mark.parametrize(("image_format", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB")])
def test_the_decoding_process_runs_the_code_of_later_stages(image_format: str, mode: str) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(SMALL)).convert("L").convert(mode).save(buffer, image_format)

    def functions_called(decode_it: Callable[[], object]) -> set[str]:
        names: set[str] = set()

        def note(frame: FrameType, event: str, argument: object) -> None:
            if frame.f_code.co_filename == decode_module.__file__:
                names.add(frame.f_code.co_name)

        sys.setprofile(note)
        try:
            decode_it()
        finally:
            sys.setprofile(None)
        return names

    later = functions_called(lambda: decode_picture(buffer.getvalue(), LIMITS, target_side=40))
    assert later - {"decode_picture"} <= functions_called(lambda: sandbox_module.reply(buffer.getvalue(), LIMITS))


def test_rejections_equal_those_of_decoding_in_this_process(sandbox: ImageSandbox) -> None:
    process_id = sandbox.process_id
    for data in [b"", b"no image", SMALL[: len(SMALL) // 2], encoded(60, 8), encoded(60, 40, "EPS"), SMALL[:20]]:
        with pytest.raises(ImageRejected) as here:
            decode(data, LIMITS)
        rejected = rejection(sandbox, data)
        assert (rejected.reason, rejected.detail) == (here.value.reason, here.value.detail)
    assert sandbox.probe(SMALL).width == 60
    assert process_id is None or sandbox.process_id == process_id


@contextmanager
def killing(sandbox: ImageSandbox, number: int, signal_number: int) -> Iterator[None]:
    """Sends a signal to the first `number` decoding processes that run during the block."""
    stop = threading.Event()

    def watch() -> None:
        seen: list[int] = []
        while len(seen) < number and not stop.wait(0.01):
            process_id = sandbox.process_id
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


def test_an_image_is_rejected_when_the_decoder_crashes_on_it_twice(sandbox: ImageSandbox) -> None:
    sandbox.probe(SMALL)
    with killing(sandbox, 2, signal.SIGSEGV):
        rejected = rejection(sandbox, SLOW)
    assert (rejected.reason, rejected.detail) == (RejectReason.DECODER_CRASHED, "SIGSEGV")
    assert sandbox.probe(SMALL).width == 60


def test_one_crash_rejects_no_image(sandbox: ImageSandbox) -> None:
    before = sandbox.probe(SMALL)
    with killing(sandbox, 1, signal.SIGKILL):
        assert sandbox.probe(SLOW).width == 7000
    assert sandbox.probe(SMALL) == before


def test_an_image_that_takes_too_long_is_rejected() -> None:
    with ImageSandbox(ImageLimits(decode_timeout_seconds=0.1)) as sandbox:
        rejected = rejection(sandbox, SLOW)
        assert rejected.reason == RejectReason.DECODER_TIMEOUT
        assert "0.1 s of processor time" in rejected.detail
        assert sandbox.probe(SMALL).width == 60


@pytest.mark.slow
def test_a_decoder_that_hangs_is_replaced_and_its_image_tried_again() -> None:
    with ImageSandbox(ImageLimits(decode_timeout_seconds=3)) as sandbox:
        sandbox.probe(SMALL)
        with killing(sandbox, 1, signal.SIGSTOP):
            assert sandbox.probe(SLOW).width == 7000
        assert sandbox.probe(SMALL).width == 60


def test_an_image_on_which_every_decoder_hangs_is_rejected() -> None:
    with ImageSandbox(ImageLimits(decode_timeout_seconds=0.2)) as sandbox:
        sandbox.probe(SMALL)
        with killing(sandbox, 2, signal.SIGSTOP):
            rejected = rejection(sandbox, SLOW)
        assert (rejected.reason, rejected.detail) == (RejectReason.DECODER_TIMEOUT, "no answer after 2 s")
        assert sandbox.probe(SMALL).width == 60


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
def test_an_image_that_takes_too_much_memory_is_rejected() -> None:
    with ImageSandbox(ImageLimits(max_decode_memory_bytes=64 << 20)) as sandbox:
        assert rejection(sandbox, SLOW).reason == RejectReason.OUT_OF_MEMORY
        assert sandbox.probe(SMALL).width == 60


def test_close_ends_the_process_and_the_next_image_starts_another() -> None:
    sandbox = ImageSandbox(LIMITS)
    sandbox.close()
    facts = sandbox.probe(SMALL)
    process_id = sandbox.process_id
    assert process_id is not None and is_running(process_id)
    sandbox.close()
    assert not is_running(process_id) and sandbox.process_id is None
    assert sandbox.probe(SMALL) == facts
    sandbox.close()


def is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_that_ends_leaves_neither_a_process_nor_a_zombie(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(SMALL)
    source = SourceConfig(name="pool", path=str(tmp_path), role="pool")
    worker = ingest.make_worker(LIMITS, str(tmp_path / "out"))
    before = children()
    assert worker(Shard("00000", (source, ("one.png",), 1.0))).totals["accepted"] == 1
    (process_id,) = children() - before
    del worker
    deadline = time.monotonic() + 10
    while process_id in children() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process_id not in children()


def children() -> set[int]:
    """The processes that this process started and has not waited for, zombies included."""
    numbers = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                numbers.add(int(path.parent.name))
    return numbers


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    """Runs a script without a main guard. Its process ends before this returns; processes that it started may not."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)


def test_the_process_works_without_a_main_guard_and_ends_with_a_killed_parent() -> None:
    script = f"""
import os, signal
from curation.images.decode import ImageLimits
from curation.images.sandbox import ImageSandbox
sandbox = ImageSandbox(ImageLimits())
print(sandbox.probe({SMALL!r}).width, sandbox.process_id, flush=True)
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
    """Whether a process has ended and its new parent has not yet read its status."""
    try:
        with open(f"/proc/{process_id}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_cannot_start_is_an_error_not_a_rejection() -> None:
    script = f"""
import sys
from curation.errors import SeedbedError
from curation.images.decode import ImageLimits
from curation.images.sandbox import ImageSandbox
sys.executable = "/bin/false"
try:
    ImageSandbox(ImageLimits()).probe({SMALL!r})
except SeedbedError as error:
    print(type(error).__name__, error)
"""
    assert run_script(script).stdout.startswith("SeedbedError The image decoding process did not start (status ")
