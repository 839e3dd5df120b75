"""Is the embedding stage as fast as the slower of its halves, and is its memory flat?

The pictures are drawn photographs (decoding.py), JPEGs in tars that ingest has listed. The stage takes them to vectors
on disk; against it stand its halves alone, on the same pictures by the same workers: reading, decoding and resizing
into pixels that nobody uses, and the model on pixels in memory. Loading the model counts nowhere. All are run by turns,
by one worker for each of two cores. Memory is that of a process that embeds small pictures with a small model, a
thousand and many.

    python -m pipelines.bench.embedding rates '{"name": "vit_small_patch14", "num_images": 64, "repeats": 3}'

prints as JSON what it measured.
"""

import io
import json
import multiprocessing
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from curation import backbone, embed, ingest
from curation.config import parse
from curation.embed import EmbedConfig
from curation.engine.manifest import require_manifest
from curation.engine.runner import InlineRunner, Shard
from curation.files import paths
from curation.files.prefetch import Meter
from curation.images.decode import ImageLimits
from curation.images.sources import SourceConfig
from curation.ingest import IngestConfig
from curation.models import embedders
from curation.models.embedders import load_embedder
from curation.run_folder import RunFolder
from pipelines.bench import contests, decoding
from pipelines.bench.processes import in_process

NAME = "embed"
# Model, and photographs for each worker.
MODELS = (("efficientnet_lite0", 256), ("vit_small_patch14", 64))
PHOTOGRAPH, SMALL = (500, 400), (64, 64)
TO_REACH = 0.9
SMALL_MODEL = "vit_tiny_patch16"
WORKERS = 2
# Pictures that are drawn; the others are these at another quality.
NUM_DRAWN = 16
IMAGES_PER_TAR = 1000
NUM_IMAGES = (1_000, 50_000)


@dataclass(frozen=True)
class Rates:
    """Images per second of one model."""

    name: str
    stage: float
    decoding: float
    model: float

    @property
    def ratio(self) -> float:
        """The stage by the slower of its halves."""
        return self.stage / min(self.decoding, self.model)


def bench(*, scale: int = 1, repeats: int | None = None) -> tuple[list[Rates], dict[int, float]]:
    """The rates of MODELS, medians of `repeats` runs (default 3), and the peak of memory by the number of images.

    Numbers of images are divided by `scale`.
    """
    rates = []
    for name, num_images in MODELS:
        found = _in_process("rates", name=name, num_images=max(1, num_images // scale), repeats=repeats or 3)
        rates.append(Rates(name, found["stage"], found["decoding"], found["model"]))
    peaks = {}
    for num_images in NUM_IMAGES:
        number = max(1, num_images // scale)
        with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as folder:
            _in_process("make", folder=folder, num_images=number, size=SMALL)
            peaks[number] = _in_process("memory", folder=folder)["peak"]
    return rates, peaks


def tables(rates: list[Rates], peaks: dict[int, float]) -> list[Table]:
    """What `bench` gave."""
    speed = Table(
        title=f"The embedding stage, photographs of {PHOTOGRAPH[0]} x {PHOTOGRAPH[1]} to vectors, images/s",
        title_justify="left",
    )
    for column in ("model", "stage", "decoding alone", "model alone", "stage by the slower", "to reach"):
        speed.add_column(column, justify="left" if column == "model" else "right")
    for row in rates:
        numbers = (f"{number:.1f}" for number in (row.stage, row.decoding, row.model))
        speed.add_row(row.name, *numbers, f"{row.ratio:.2f}", f"{TO_REACH}")
    memory = Table(title="Its memory, of which the model has a part", title_justify="left")
    for column in ("images", "peak MB"):
        memory.add_column(column, justify="right")
    for number, peak in peaks.items():
        memory.add_row(f"{number:,}", f"{peak / 1e6:,.0f}")
    return [speed, memory]


def rates(name: str, num_images: int, repeats: int) -> dict[str, float]:
    """Images per second of the stage and of its halves: of WORKERS processes with one thread each, as Ray runs them."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as folder:
        make(folder, num_images, PHOTOGRAPH)
        _config(folder, name)
        with context.Manager() as manager, context.Pool(WORKERS) as pool:
            together = manager.Barrier(WORKERS, timeout=600)
            seconds = pool.starmap(_half_by_half, [(folder, name, repeats, together)] * WORKERS, chunksize=1)
    # The slower worker of each run counts.
    runs = {half: [max(both) for both in zip(*(own[half] for own in seconds), strict=True)] for half in seconds[0]}
    return {half: WORKERS * num_images / statistics.median(own) for half, own in runs.items()}


def _half_by_half(folder: str, name: str, repeats: int, together: threading.Barrier) -> dict[str, list[float]]:
    """Seconds of each run of the stage, of decoding and of the model, each begun by all workers together."""
    limits, config = ImageLimits(), _config(folder, name)
    (images,) = require_manifest(paths.join(folder, "ingest")).files("images")
    output = tempfile.mkdtemp(dir=folder)
    work, embedder = embed.make_worker(config, limits, output), load_embedder(config.embedder)
    rows, size = embed.rows_of(paths.join(folder, "ingest", images)), config.embedder.batch_size
    shard = Shard("00000", paths.join(folder, "ingest", images), len(rows))

    def decode() -> list[np.ndarray]:
        return [picture.pixels for picture in embed.prepared_pictures(config, embedder, limits, rows, Meter())]

    pixels = decode()
    batches = [np.stack(pixels[start : start + size]) for start in range(0, len(rows), size)]
    halves: dict[str, Callable[[], Any]] = {
        "stage": lambda: work(shard),
        "decoding": decode,
        "model": lambda: list(embedder.embed_batches(batches)),
    }
    seconds: dict[str, list[float]] = {half: [] for half in halves}
    for _ in range(repeats):
        for half, run in halves.items():
            together.wait()
            started = time.perf_counter()
            run()
            seconds[half].append(time.perf_counter() - started)
    return seconds


def memory(folder: str) -> dict[str, float]:
    """The peak of memory of embedding what `make` made, beyond what imports take."""
    config = _config(folder, SMALL_MODEL)
    before = contests.memory("VmRSS")
    run_folder = RunFolder.of(folder)
    embed.run(config, run_folder, run_folder.embed, InlineRunner())
    return {"peak": contests.memory("VmHWM") - before}


def make(folder: str, num_images: int, size: tuple[int, int]) -> dict[str, float]:
    """JPEGs of that width and height in tars, all different, and their finished ingest in `ingest/`."""
    draw_tars(folder, num_images, size, IMAGES_PER_TAR)
    source = SourceConfig(name="drawn", path=folder, role="pool", layout="webdataset")
    ingest.run(IngestConfig(sources=(source,)), paths.join(folder, "ingest"), InlineRunner())
    return {"images": float(num_images)}


def draw_tars(folder: str, num_images: int, size: tuple[int, int], images_per_tar: int) -> None:
    """JPEGs of that width and height in tars, all different."""
    generator = np.random.default_rng(0)
    drawn = [decoding.draw(*size, generator) for _ in range(min(NUM_DRAWN, num_images))]
    for first in range(0, num_images, images_per_tar):
        with tarfile.open(Path(folder, f"{first:07d}.tar"), "w") as tar:
            for number in range(first, min(first + images_per_tar, num_images)):
                drawn[number % NUM_DRAWN].save(data := io.BytesIO(), "JPEG", quality=90, comment=f"picture {number}")
                header = tarfile.TarInfo(f"{number:07d}.jpg")
                header.size = data.tell()
                data.seek(0)
                tar.addfile(header, data)


def _config(folder: str, name: str) -> EmbedConfig:
    """The model `name` with fresh weights in `folder`, which compute as long as any."""
    chosen: dict[str, Any] = {"name": name}
    if vit := embedders.MODELS[name].vit:
        chosen |= {"weights": paths.join(folder, "weights.pth"), "image_size": 32 if name == SMALL_MODEL else 224}
        if not paths.exists(chosen["weights"]):
            model = backbone.build(vit.size, patch_size=vit.patch_size, image_size=chosen["image_size"])
            torch.save(model.state_dict(), chosen["weights"])
    else:
        chosen["pooling"] = "gem"
    return parse(EmbedConfig, {"embedder": chosen}, origin="benchmark")


WORKS: dict[str, Callable[..., dict[str, float]]] = {work.__name__: work for work in (rates, memory, make)}


def _in_process(work: str, **arguments: Any) -> dict[str, float]:
    return in_process("embedding", work, arguments)


if __name__ == "__main__":
    print(json.dumps(WORKS[sys.argv[1]](**json.loads(sys.argv[2]))))
