"""How fast are the ten crops of an image made, and how fast are samples read in random order?

`crops`: ours is `training.augment.make_crops`; the peer makes the same crops, of the same random numbers, as DINOv2's
transforms do, by Pillow alone. On photographs of 500 x 400 pixels (decoding.py draws them) one core turns each into two
crops of 224 and eight of 96; with decoding, and without.

`reading`: 10,000 samples of 50 kB in tars of 1,000: ours reads them in random order by reference, as the trainer does;
the peer is the webdataset library, which reads the tars from front to back. Both hand over the bytes of an image.

Ours and the peer take turns in one process, on one thread; medians of the runs' processor time (crops) or elapsed time
(reading) count.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import webdataset
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from rich.table import Table

from curation.images.corpus_tar import CorpusSample, write_tar
from curation.images.decode import ImageLimits, decode_picture, read_header
from curation.images.hashing import image_id
from pipelines.bench import decoding
from training import data, samples
from training.augment import AugmentConfig, Crop, Pixels, cut_crops, draw_crops, make_crops

CROPS, READING = "crops", "reading"
SIZE = (500, 400)
NUM_IMAGES = 16
RUNS = 5
NUM_SAMPLES, SAMPLE_BYTES, SAMPLES_PER_TAR = 10_000, 50_000, 1_000
TO_REACH = {CROPS: 2.5, READING: 3.0}
LIMITS = ImageLimits()


@dataclass(frozen=True)
class Row:
    """Rates in images per second, of one core for the crops."""

    work: str
    ours: float
    peer: float
    to_reach: float
    quality: str


def bench(names: Sequence[str] = (CROPS, READING), *, scale: int = 1, repeats: int | None = None) -> list[Row]:
    """The rows of what is named; `scale` divides the data, `repeats` is the runs whose median counts (default 5)."""
    rows = []
    if CROPS in names:
        rows += crops(max(2, NUM_IMAGES // scale), repeats or RUNS)
    if READING in names:
        rows.append(reading(NUM_SAMPLES // scale, repeats or RUNS))
    return rows


# Crops


def crops(num_images: int, runs: int) -> list[Row]:
    """A row with decoding and one without."""
    generator = np.random.default_rng(0)
    photographs = [decoding._jpeg(decoding.draw(*SIZE, generator)) for _ in range(num_images)]
    pictures = [decode_picture(encoded, LIMITS, target_side=max(SIZE)).pixels for encoded in photographs]
    opened = [Image.fromarray(pixels) for pixels in pictures]
    config = AugmentConfig()
    drawn = [draw_crops(config, *SIZE, np.random.default_rng(n)) for n in range(num_images)]
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)

    def ours() -> None:
        for n, encoded in enumerate(photographs):
            make_crops(encoded, LIMITS, config, np.random.default_rng(n))

    def peer() -> None:
        for n, encoded in enumerate(photographs):
            header = read_header(encoded, LIMITS)
            own = draw_crops(config, header.width, header.height, np.random.default_rng(n))
            pillow_crops(Image.open(io.BytesIO(encoded)).convert("RGB"), own, config)

    def ours_decoded() -> None:
        for pixels, own in zip(pictures, drawn, strict=True):
            cut_crops(pixels, own, config, full_width=SIZE[0])

    def peer_decoded() -> None:
        for picture, own in zip(opened, drawn, strict=True):
            pillow_crops(picture, own, config)

    rows = []
    ratios = [psnr for n in range(num_images) for psnr in agreement(pictures[n], drawn[n], config)]
    quality = f"PSNR {statistics.mean(ratios):.1f} dB, worst {min(ratios):.1f}"
    for work, one, other in (
        ("10 crops, with decoding", ours, peer),
        ("10 crops, decoded before", ours_decoded, peer_decoded),
    ):
        seconds = _in_turns((one, other), runs, time.process_time)
        rows.append(Row(work, num_images / seconds[0], num_images / seconds[1], TO_REACH[CROPS], quality))
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])
    return rows


def agreement(pixels: Pixels, drawn: tuple[tuple[Crop, ...], ...], config: AugmentConfig) -> list[float]:
    """The PSNR of our crops of one picture against Pillow's, in decibels, one of each crop."""
    ours = cut_crops(pixels, drawn, config, full_width=pixels.shape[1])
    theirs = pillow_crops(Image.fromarray(pixels), drawn, config)
    return [
        decoding.psnr(own, other)
        for one, two in zip(ours, theirs, strict=True)
        for own, other in zip(one, two, strict=True)
    ]


def pillow_crops(
    picture: Image.Image, drawn: tuple[tuple[Crop, ...], ...], config: AugmentConfig
) -> tuple[Pixels, ...]:
    """The crops by Pillow alone, (V, 3, S, S) uint8 for each group."""
    return tuple(
        np.stack([_pillow_crop(picture, crop, group.size, config) for crop in own])
        for group, own in zip(config.crops, drawn, strict=True)
    )


def _pillow_crop(picture: Image.Image, crop: Crop, size: int, config: AugmentConfig) -> Pixels:
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    image = picture.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    if crop.flip:
        image = ImageOps.mirror(image)
    for change in crop.order:
        match change:
            case "brightness":
                image = ImageEnhance.Brightness(image).enhance(crop.brightness)
            case "contrast":
                image = ImageEnhance.Contrast(image).enhance(crop.contrast)
            case "saturation":
                image = ImageEnhance.Color(image).enhance(crop.saturation)
            case "hue":
                hue, saturation, value = image.convert("HSV").split()
                turned = Image.fromarray(np.asarray(hue) + np.uint8(round(crop.hue * 255) % 256))
                image = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    if crop.grayscale:
        image = image.convert("L").convert("RGB")
    if crop.sigma:
        image = image.filter(ImageFilter.GaussianBlur(crop.sigma))
    if crop.solarize:
        image = ImageOps.solarize(image, config.solarize_threshold)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _in_turns(contestants: Sequence[Callable[[], None]], runs: int, clock: Callable[[], float]) -> list[float]:
    """The median seconds of each; the first round only warms up."""
    seconds: list[list[float]] = [[] for _ in contestants]
    for _ in range(1 + runs):
        for contestant, own in zip(contestants, seconds, strict=True):
            started = clock()
            contestant()
            own.append(clock() - started)
    return [statistics.median(own[1:]) for own in seconds]


# Reading


def reading(num_samples: int, runs: int) -> Row:
    """Samples read by reference in random order, against webdataset's in the order of the tars."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as folder:
        listed: list[samples.Sample] = []
        for start in range(0, num_samples, SAMPLES_PER_TAR):
            images = [generator.bytes(SAMPLE_BYTES) for _ in range(min(SAMPLES_PER_TAR, num_samples - start))]
            path = str(Path(folder, f"corpus-{start // SAMPLES_PER_TAR:06d}.tar"))
            ids = [image_id(image) for image in images]
            sidecar = {"source": "bench", "reasons": ["as_is:bench"]}
            members = (CorpusSample(key, image, "JPEG", sidecar) for key, image in zip(ids, images, strict=True))
            _, places = write_tar(path, members)
            listed += [samples.Sample(key, path, *place) for key, place in zip(ids, places, strict=True)]
        order = generator.permutation(num_samples).tolist()

        def ours() -> None:
            reader = data.Reader(named=True, hashed=False)
            assert sum(len(reader.read(listed[row])) for row in order) == num_samples * SAMPLE_BYTES
            reader.close()

        def peer() -> None:
            tars = sorted(str(path) for path in Path(folder).iterdir())
            found = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
            assert sum(len(sample["jpg"]) for sample in found) == num_samples * SAMPLE_BYTES

        seconds = _in_turns((ours, peer), runs, time.perf_counter)
    return Row("reading", num_samples / seconds[0], num_samples / seconds[1], TO_REACH[READING], "the same bytes")


def table(rows: Sequence[Row]) -> Table:
    """What was measured, as a table."""
    result = Table(title="Crops and reading, images per second of one core", title_justify="left")
    for name in ("work", "ours", "peer", "ratio", "to reach", "agreement"):
        result.add_column(name, justify="left" if name in ("work", "agreement") else "right")
    for row in rows:
        rates = (f"{row.ours:,.0f}", f"{row.peer:,.0f}", f"{row.ours / row.peer:.2f}", f"{row.to_reach:g}")
        result.add_row(row.work, *rates, row.quality)
    return result
