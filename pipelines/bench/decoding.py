"""Measures decoding and resizing photographs for a model: speed, and agreement of the pictures.

Our code is `decode_picture` and `to_shape` of curation/images/decode.py. The peers are Pillow as most loaders use it
(`open`, `convert("RGB")`, `resize` with the bicubic filter) and the same after `draft`. Each runs on one thread in a
process of its own, because the state of the allocator changes the time of later works. Times are processor time.

The photographs are drawn, since the repository has none. They are dead leaves (Lee, Mumford and Huang 2001): discs that
hide each other, with radii by a power law. Such pictures have the edges and the scaling of natural ones. Each disc has
a texture of 1/f noise; a slight blur and the grain of a sensor follow. As JPEGs they have the size of photographs: 55
kB and 480 kB. Or give a folder of your own JPEGs; the ratio falls with the bytes per pixel (docs/benchmarks.md).
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from rich.table import Table

from curation.images import decode
from pipelines.bench.processes import Measurements, in_process, run_work
from pipelines.bench.tables import make_table
from pipelines.bench.timing import by_turns

NAME = "decode"
SIDE = 224
# The ratio to reach at each width and height.
TARGETS = {(500, 400): 2.0, (2000, 1500): 5.0}
NUM_IMAGES = 8
ROUNDS_PER_PROCESS = 6
QUALITY = 85
# Standard deviation of the grain, of 255. Assumed.
GRAIN = 1.0
LIMITS = decode.ImageLimits()


@dataclass(frozen=True)
class DecodingRates:
    """The rates at one size, in images per second of one core. PSNR in decibels against plain Pillow."""

    width: int
    height: int
    bytes_per_image: float
    ours: float
    plain: float
    draft: float
    psnr_mean: float
    psnr_worst: float


def bench(
    *,
    scale: int = 1,
    repeats: int | None = None,
    folder: str | None = None,
    sizes: Sequence[tuple[int, int]] = tuple(TARGETS),
) -> list[DecodingRates]:
    """A row for each size (width, height).

    `scale` divides the number of photographs. A rate is the median of `repeats` processes (default 3). `folder` holds
    JPEGs to use in place of drawn ones, cropped and scaled to each size.
    """
    rows = []
    for width, height in sizes:
        photographs = _photographs(width, height, max(1, NUM_IMAGES // scale), folder)
        quality = [psnr(ours(data), plain(data)) for data in photographs]
        with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as jpegs:
            for number, data in enumerate(photographs):
                Path(jpegs, f"{number}.jpg").write_bytes(data)
            rounds = [
                {name: in_process("decoding", "rate", threads=1, name=name, folder=jpegs)["rate"] for name in DECODERS}
                for _ in range(repeats or 3)
            ]
        size = sum(map(len, photographs)) / len(photographs)
        rates = {name: statistics.median(rates[name] for rates in rounds) for name in DECODERS}
        rows.append(
            DecodingRates(width, height, size, **rates, psnr_mean=statistics.mean(quality), psnr_worst=min(quality))
        )
    return rows


def rate(name: str, folder: str) -> Measurements:
    """Images per second of processor time of a decoder, on the photographs in a folder.

    The fastest of several rounds counts, because other work on the machine disturbed it least.
    """
    photographs = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
    decoder = DECODERS[name]

    def decode_all() -> None:
        for data in photographs:
            decoder(data)

    seconds = by_turns({name: decode_all}, ROUNDS_PER_PROCESS, num_warm_ups=0, clock=time.process_time)
    return {"rate": len(photographs) / min(seconds[name])}


def ours(data: bytes) -> NDArray[np.uint8]:
    """One JPEG as the input of a model, (3, SIDE, SIDE)."""
    return decode.to_shape(decode.decode_picture(data, LIMITS, target_side=SIDE), (SIDE, SIDE))


def plain(data: bytes) -> NDArray[np.uint8]:
    """The same by Pillow alone."""
    return _squashed(Image.open(io.BytesIO(data)))


def draft(data: bytes) -> NDArray[np.uint8]:
    """The same by Pillow, which decodes at 1/2, 1/4 or 1/8 of the size where that suffices."""
    image = Image.open(io.BytesIO(data))
    image.draft(None, (SIDE, SIDE))
    return _squashed(image)


def _squashed(image: Image.Image) -> NDArray[np.uint8]:
    square = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(square).transpose(2, 0, 1)


DECODERS: dict[str, Callable[[bytes], NDArray[np.uint8]]] = {"ours": ours, "plain": plain, "draft": draft}


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in decibels, over all pixels and channels."""
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else np.inf


def _photographs(width: int, height: int, num_images: int, folder: str | None) -> list[bytes]:
    """JPEGs of the size: drawn, or the JPEGs of a folder, cropped and scaled to it."""
    if folder is None:
        generator = np.random.default_rng([width, height])
        pictures = [draw(width, height, generator) for _ in range(num_images)]
    else:
        files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
        opened = (decode.decode_rgb(path.read_bytes(), LIMITS) for path in files)
        pictures = [ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS) for picture in opened]
    return [to_jpeg(picture) for picture in pictures]


def draw(width: int, height: int, generator: np.random.Generator) -> Image.Image:
    """A picture with the edges, textures and grain of a photograph, as the module's docstring says."""
    num_discs, shorter = 3000, min(width, height)
    smallest, largest = shorter / 150, shorter * 0.4
    radius = smallest / np.sqrt(generator.uniform((smallest / largest) ** 2, 1, num_discs))  # density ~ radius**-3
    centre = generator.uniform(-0.1, 1.1, (num_discs, 2)) * (width, height)
    canvas = Image.new("I", (width, height))
    pen = ImageDraw.Draw(canvas)
    for disc in range(num_discs):
        pen.circle(centre[disc].tolist(), float(radius[disc]), fill=disc + 1)
    disc_at = np.asarray(canvas)
    grey = generator.uniform(20, 235, num_discs + 1)
    colour = grey[:, None] + generator.normal(0, 25, (num_discs + 1, 3))
    contrast = generator.exponential(6, num_discs + 1)
    values = colour[disc_at] + (contrast[disc_at] * _pink_noise(width, height, generator))[..., None]
    blurred = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.8))
    grain = generator.normal(0, GRAIN, (height, width, 1)) + generator.normal(0, GRAIN / 2, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(blurred) + grain, 0, 255).astype(np.uint8))


def _pink_noise(width: int, height: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Noise with an amplitude of 1/frequency and standard deviation 1, (H, W)."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise: NDArray[np.float64] = np.fft.irfft2(
        np.fft.rfft2(generator.normal(size=(height, width))) / frequency, (height, width)
    )
    noise /= noise.std()
    return noise


def to_jpeg(picture: Image.Image) -> bytes:
    """The picture as a JPEG of quality QUALITY."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return buffer.getvalue()


def table(rows: Sequence[DecodingRates]) -> Table:
    """The rows as a table."""
    columns = ("size", "kB", "ours", "Pillow", "Pillow, draft", "ratio", "target", "PSNR", "worst")
    result = make_table(f"JPEG to {SIDE} x {SIDE}, images per second of one core", columns)
    for row in rows:
        result.add_row(
            f"{row.width} x {row.height}",
            f"{row.bytes_per_image / 1000:.0f}",
            *(f"{rate:.0f}" for rate in (row.ours, row.plain, row.draft)),
            f"{row.ours / row.plain:.2f}",
            f"{TARGETS[row.width, row.height]:g}",
            f"{row.psnr_mean:.1f} dB",
            f"{row.psnr_worst:.1f} dB",
        )
    return result


if __name__ == "__main__":
    run_work({"rate": rate})
