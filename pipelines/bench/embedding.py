"""Measures the embedding stage against the slower of its halves, and its memory as the number of images grows.

The pictures are drawn photographs (decoding.py), JPEGs in tars that ingest has listed. The stage turns them into
vectors on disk. The halves do their part alone, on the same pictures by the same workers: reading, decoding and
resizing; and the model on pixels in memory. No time includes loading the model. All run by turns, with one worker for
each of two cores. Memory is that of a process that embeds small pictures with a small model, a thousand and many.
"""

import functools
import io
import multiprocessing
import statistics
import tarfile
import tempfile
import threading
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
from pipelines.bench import decoding
from pipelines.bench.processes import Measurements, in_process, run_work
from pipelines.bench.processes import memory as process_memory
from pipelines.bench.tables import make_table
from pipelines.bench.timing import by_turns

NAME = "embed"
# Models, and photographs for each worker.
MODELS = (("efficientnet_lite0", 256), ("vit_small_patch14", 64))
PHOTOGRAPH, SMALL = (500, 400), (64, 64)
TARGET = 0.9
SMALL_MODEL = "vit_tiny_patch16"
WORKERS = 2
# Pictures that are drawn; the others are copies of these with another comment.
NUM_DRAWN = 16
IMAGES_PER_TAR = 1000
NUM_IMAGES = (1_000, 50_000)


@dataclass(frozen=True)
class StageRates:
    """Images per second of the stage with one model, and of its halves."""

    name: str
    stage: float
    decoding: float
    model: float

    @property
    def ratio(self) -> float:
        """The stage's rate divided by that of its slower half."""
        return self.stage / min(self.decoding, self.model)


def bench(*, scale: int = 1, repeats: int | None = None) -> tuple[list[StageRates], dict[int, float]]:
    """The rates of MODELS, medians of `repeats` rounds (default 3), and the peak memory by the number of images.

    Numbers of images are divided by `scale`.
    """
    rows = []
    for name, num_images in MODELS:
        halves = _in_process("rates", name=name, num_images=max(1, num_images // scale), repeats=repeats or 3)
        rows.append(StageRates(name, halves["stage"], halves["decoding"], halves["model"]))
    peaks = {}
    for num_images in NUM_IMAGES:
        number = max(1, num_images // scale)
        with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as folder:
            _in_process("make", folder=folder, num_images=number, size=SMALL)
            peaks[number] = _in_process("memory", folder=folder)["peak"]
    return rows, peaks


def tables(rows: list[StageRates], peaks: dict[int, float]) -> list[Table]:
    """The results of `bench` as tables."""
    photographs = f"photographs of {PHOTOGRAPH[0]} x {PHOTOGRAPH[1]}"
    columns = ("model", "stage", "decoding alone", "model alone", "stage by the slower half", "target")
    speed = make_table(f"The embedding stage, {photographs} to vectors, images/s", columns, left=("model",))
    for row in rows:
        rates = (f"{rate:.1f}" for rate in (row.stage, row.decoding, row.model))
        speed.add_row(row.name, *rates, f"{row.ratio:.2f}", f"{TARGET}")
    memory = make_table("Memory of the embedding stage, the model included", ("images", "peak MB"))
    for number, peak in peaks.items():
        memory.add_row(f"{number:,}", f"{peak / 1e6:,.0f}")
    return [speed, memory]


def rates(name: str, num_images: int, repeats: int) -> Measurements:
    """Images per second of the stage and of its halves, by WORKERS processes with one thread each, as Ray runs them."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as folder:
        make(folder, num_images, PHOTOGRAPH)
        _config(folder, name)
        with context.Manager() as manager, context.Pool(WORKERS) as pool:
            barrier = manager.Barrier(WORKERS, timeout=600)
            workers = pool.starmap(_time_halves, [(folder, name, repeats, barrier)] * WORKERS, chunksize=1)
    rates = {}
    for half in workers[0]:
        # The slower worker of each round counts.
        rounds = [max(seconds) for seconds in zip(*(worker[half] for worker in workers), strict=True)]
        rates[half] = WORKERS * num_images / statistics.median(rounds)
    return rates


def _time_halves(folder: str, name: str, repeats: int, barrier: threading.Barrier) -> dict[str, list[float]]:
    """Seconds of each round of the stage, of decoding and of the model; all workers begin each at the same time."""
    (images,) = require_manifest(paths.join(folder, "ingest")).files("images")
    images_file = paths.join(folder, "ingest", images)
    works = halves(_config(folder, name), ImageLimits(), images_file, tempfile.mkdtemp(dir=folder))
    return by_turns(works, repeats, num_warm_ups=0, before_each=barrier.wait)


def halves(config: EmbedConfig, limits: ImageLimits, images_file: str, output: str) -> dict[str, Callable[[], Any]]:
    """The stage on one file of IMAGES, and its halves alone: decoding, and the model on pixels in memory.

    The stage writes to `output`, and returns the measurements of its shard. Models are loaded here.
    """
    work, embedder = embed.make_worker(config, limits, output), load_embedder(config.embedder)
    rows, size = embed.rows_of(images_file), config.embedder.batch_size
    shard = Shard("00000", images_file, len(rows))

    def decode() -> list[np.ndarray]:
        return [picture.pixels for picture in embed.prepared_pictures([config], embedder, limits, rows, Meter())]

    pixels = decode()
    batches = [np.stack(pixels[start : start + size]) for start in range(0, len(rows), size)]
    return {
        "stage": lambda: work(shard).measured,
        "decoding": decode,
        "model": lambda: list(embedder.embed_batches(batches)),
    }


def memory(folder: str) -> Measurements:
    """The peak memory of embedding the images that `make` made, beyond the memory of imports."""
    config = _config(folder, SMALL_MODEL)
    before = process_memory("VmRSS")
    run_folder = RunFolder.of(folder)
    embed.run(config, run_folder, run_folder.embed, InlineRunner())
    return {"peak": process_memory("VmHWM") - before}


def make(folder: str, num_images: int, size: tuple[int, int]) -> Measurements:
    """Make JPEGs of that width and height in `tars/`, all different, and their finished ingest in `ingest/`."""
    tars = paths.join(folder, "tars")
    Path(tars).mkdir()
    draw_tars(tars, num_images, size, IMAGES_PER_TAR)
    source = SourceConfig(name="drawn", path=tars, role="pool", layout="webdataset")
    ingest.run(IngestConfig(sources=(source,)), paths.join(folder, "ingest"), InlineRunner())
    return {"images": float(num_images)}


def draw_tars(folder: str, num_images: int, size: tuple[int, int], images_per_tar: int) -> None:
    """Make JPEGs of that width and height in tars, all different."""
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
    """The model `name` with fresh weights in `folder`; their values do not change the time."""
    embedder: dict[str, Any] = {"name": name}
    if vit := embedders.MODELS[name].vit:
        embedder |= {"weights": paths.join(folder, "weights.pth"), "image_size": 32 if name == SMALL_MODEL else 224}
        if not paths.exists(embedder["weights"]):
            model = backbone.build(vit.size, patch_size=vit.patch_size, image_size=embedder["image_size"])
            torch.save(model.state_dict(), embedder["weights"])
    else:
        embedder["pooling"] = "gem"
    return parse(EmbedConfig, {"embedder": embedder}, origin="benchmark")


_in_process = functools.partial(in_process, "embedding")

if __name__ == "__main__":
    run_work({"rates": rates, "memory": memory, "make": make})
