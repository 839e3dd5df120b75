"""Measures making the ten crops of an image, and reading samples in random order.

`crops`: our `training.augment.make_crops` makes two crops of 224 and eight of 96 pixels of photographs of 500 x 400
(decoding.py draws them), with decoding and without. The peer makes the same crops from the same random numbers by
Pillow alone, as DINOv2's transforms do.

`reading`: 10,000 samples of 50 kB in tars of 1,000. Our reader reads them in random order by reference, as the trainer
does. The peer is the webdataset library, which reads the tars from front to back. Both return the bytes of an image.

Our code and the peer take turns in one process, on one thread. A value is the median of the rounds' processor time
(crops) or elapsed time (reading).
"""

import io
import statistics
import tempfile
import time
from collections.abc import Sequence
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
from pipelines.bench.tables import Comparison, comparison_table
from pipelines.bench.timing import by_turns
from training import data, samples
from training.augment import AugmentConfig, Crop, Pixels, cut_crops, draw_crops, make_crops

CROPS, READING = "crops", "reading"
SIZE = (500, 400)
NUM_IMAGES = 16
NUM_ROUNDS = 5
NUM_SAMPLES, SAMPLE_BYTES, SAMPLES_PER_TAR = 10_000, 50_000, 1_000
TARGETS = {CROPS: 2.5, READING: 3.0}
LIMITS = ImageLimits()


def bench(names: Sequence[str] = tuple(TARGETS), *, scale: int = 1, repeats: int | None = None) -> list[Comparison]:
    """The rows of the named works; `scale` divides the data, `repeats` is the number of rounds (default 5)."""
    rows = []
    if CROPS in names:
        rows += crops(max(2, NUM_IMAGES // scale), repeats or NUM_ROUNDS)
    if READING in names:
        rows.append(reading(NUM_SAMPLES // scale, repeats or NUM_ROUNDS))
    return rows


def table(rows: Sequence[Comparison]) -> Table:
    """The rows as a table."""
    return comparison_table("Crops and reading, images per second of one core", rows)


def _compare(
    work: str, peer: str, num_images: int, seconds: dict[str, list[float]], kind: str, quality: str
) -> Comparison:
    our_rate, peer_rate = (num_images / statistics.median(seconds[name]) for name in ("ours", "peer"))
    return Comparison(work, peer, "/s", our_rate, peer_rate, f"{TARGETS[kind]:g}", quality, ratio=our_rate / peer_rate)


# Crops


def crops(num_images: int, num_rounds: int) -> list[Comparison]:
    """A row with decoding and one without."""
    generator = np.random.default_rng(0)
    photographs = [decoding.to_jpeg(decoding.draw(*SIZE, generator)) for _ in range(num_images)]
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
            image_crops = draw_crops(config, header.width, header.height, np.random.default_rng(n))
            pillow_crops(Image.open(io.BytesIO(encoded)).convert("RGB"), image_crops, config)

    def ours_decoded() -> None:
        for pixels, image_crops in zip(pictures, drawn, strict=True):
            cut_crops(pixels, image_crops, config, full_width=SIZE[0])

    def peer_decoded() -> None:
        for picture, image_crops in zip(opened, drawn, strict=True):
            pillow_crops(picture, image_crops, config)

    rows = []
    ratios = [psnr for n in range(num_images) for psnr in agreement(pictures[n], drawn[n], config)]
    quality = f"PSNR {statistics.mean(ratios):.1f} dB, worst {min(ratios):.1f}"
    for work, works in (
        ("10 crops, with decoding", {"ours": ours, "peer": peer}),
        ("10 crops, decoded before", {"ours": ours_decoded, "peer": peer_decoded}),
    ):
        seconds = by_turns(works, num_rounds, clock=time.process_time)
        rows.append(_compare(work, "Pillow", num_images, seconds, CROPS, quality))
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])
    return rows


def agreement(pixels: Pixels, drawn: tuple[tuple[Crop, ...], ...], config: AugmentConfig) -> list[float]:
    """The PSNR of each of our crops of one picture against Pillow's crop, in decibels."""
    our_groups = cut_crops(pixels, drawn, config, full_width=pixels.shape[1])
    pillow_groups = pillow_crops(Image.fromarray(pixels), drawn, config)
    return [
        decoding.psnr(our_crop, pillow_crop)
        for our_crops, their_crops in zip(our_groups, pillow_groups, strict=True)
        for our_crop, pillow_crop in zip(our_crops, their_crops, strict=True)
    ]


def pillow_crops(
    picture: Image.Image, drawn: tuple[tuple[Crop, ...], ...], config: AugmentConfig
) -> tuple[Pixels, ...]:
    """The crops by Pillow alone, (V, 3, S, S) uint8 for each group."""
    return tuple(
        np.stack([_pillow_crop(picture, crop, group.size, config) for crop in group_crops])
        for group, group_crops in zip(config.crops, drawn, strict=True)
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


# Reading


def reading(num_samples: int, num_rounds: int) -> Comparison:
    """Samples read by reference in random order, against webdataset's reading in the order of the tars."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as folder:
        listed: list[samples.SampleReference] = []
        for start in range(0, num_samples, SAMPLES_PER_TAR):
            images = [generator.bytes(SAMPLE_BYTES) for _ in range(min(SAMPLES_PER_TAR, num_samples - start))]
            path = str(Path(folder, f"corpus-{start // SAMPLES_PER_TAR:06d}.tar"))
            ids = [image_id(image) for image in images]
            sidecar = {"source": "bench", "reasons": ["as_is:bench"]}
            members = (CorpusSample(key, image, "JPEG", sidecar) for key, image in zip(ids, images, strict=True))
            _, positions = write_tar(path, members)
            listed += [
                samples.SampleReference(key, path, *position, layout="webdataset")
                for key, position in zip(ids, positions, strict=True)
            ]
        order = generator.permutation(num_samples).tolist()

        def ours() -> None:
            reader = data.SampleReader(names_are_ids=True, verify_hashes=False)
            assert sum(len(reader.read(listed[row])) for row in order) == num_samples * SAMPLE_BYTES
            reader.close()

        def peer() -> None:
            tars = sorted(str(path) for path in Path(folder).iterdir())
            dataset = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
            assert sum(len(sample["jpg"]) for sample in dataset) == num_samples * SAMPLE_BYTES

        seconds = by_turns({"ours": ours, "peer": peer}, num_rounds)
    return _compare("reading", "webdataset", num_samples, seconds, READING, "the same bytes")
