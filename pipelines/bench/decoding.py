"""How fast is a photograph decoded and resized for a model, and is it the same picture?

Ours is `images.decode_picture` and `images.to_shape`; the peers are Pillow as most loaders use it, `open`,
`convert("RGB")`, `resize` with the bicubic filter, and the same after `draft`. Each runs in a process of its own, since
what one leaves in the allocator changes how long the next takes, and on one thread; processor time counts.

The photographs are drawn, since the repository has none: dead leaves (Lee, Mumford and Huang 2001: discs that hide each
other, their radii by a power law, which has the edges and the scaling of natural pictures), each with a texture of
1/f noise, seen through a slight blur and with the grain of a sensor. As JPEG they take the bytes of photographs: 55 kB
and 480 kB. Or give a folder of your own JPEGs; the more bytes a pixel has, the smaller the ratio (docs/benchmarks.md).

    python -m pipelines.bench.decoding ours FOLDER

prints the images per second of one contestant on the photographs in a folder.
"""

import io
import os
import statistics
import subprocess
import sys
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

NAME = "decode"
SIDE = 224
# The ratio to reach at each width and height.
TO_REACH = {(500, 400): 2.0, (2000, 1500): 5.0}
NUM_IMAGES = 8
RUNS_PER_PROCESS = 5
QUALITY = 85
# Standard deviation of the grain, of 255. Assumed.
GRAIN = 1.0
LIMITS = decode.ImageLimits()


@dataclass(frozen=True)
class Row:
    """What was measured of one size. Rates in images per second of one core; PSNR in decibels against plain Pillow."""

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
    sizes: Sequence[tuple[int, int]] = tuple(TO_REACH),
) -> list[Row]:
    """A row for each size (width, height).

    `scale` divides the number of photographs, `repeats` is the processes of each contestant whose median counts
    (default 3), `folder` holds JPEGs to take in place of drawn ones, cut and scaled to each size.
    """
    rows = []
    for width, height in sizes:
        photographs = _photographs(width, height, max(1, NUM_IMAGES // scale), folder)
        quality = [psnr(ours(data), plain(data)) for data in photographs]
        with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as written:
            for number, data in enumerate(photographs):
                Path(written, f"{number}.jpg").write_bytes(data)
            rounds = [{name: _in_process(name, written) for name in CONTESTANTS} for _ in range(repeats or 3)]
        size = sum(map(len, photographs)) / len(photographs)
        rates = {name: statistics.median(rates[name] for rates in rounds) for name in CONTESTANTS}
        rows.append(Row(width, height, size, **rates, psnr_mean=statistics.mean(quality), psnr_worst=min(quality)))
    return rows


def _in_process(name: str, folder: str) -> float:
    """What `rate` gives in a process of its own. Raises RuntimeError with what it printed when it fails."""
    command = [sys.executable, "-m", "pipelines.bench.decoding", name, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"The benchmark's {name} ended with status {finished.returncode}:\n{finished.stderr}")
    return float(finished.stdout)


def rate(name: str, folder: str) -> float:
    """Images per second of processor time of a contestant, on the photographs in a folder.

    The fastest of several runs over them counts: the one that other work on the machine disturbed least.
    """
    photographs = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
    contestant = CONTESTANTS[name]
    seconds = []
    for _ in range(1 + RUNS_PER_PROCESS):
        started = time.process_time()
        for data in photographs:
            contestant(data)
        seconds.append(time.process_time() - started)
    return len(photographs) / min(seconds)


def ours(data: bytes) -> NDArray[np.uint8]:
    """One JPEG as a model sees it, (3, SIDE, SIDE)."""
    return decode.to_shape(decode.decode_picture(data, LIMITS, target_side=SIDE), (SIDE, SIDE))


def plain(data: bytes) -> NDArray[np.uint8]:
    """The same by Pillow alone."""
    return _squashed(Image.open(io.BytesIO(data)))


def draft(data: bytes) -> NDArray[np.uint8]:
    """The same by Pillow, which decodes at 1/2, 1/4 or 1/8 of the size."""
    image = Image.open(io.BytesIO(data))
    image.draft(None, (SIDE, SIDE))
    return _squashed(image)


def _squashed(image: Image.Image) -> NDArray[np.uint8]:
    square = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(square).transpose(2, 0, 1)


CONTESTANTS: dict[str, Callable[[bytes], NDArray[np.uint8]]] = {"ours": ours, "plain": plain, "draft": draft}


def psnr(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in decibels, over all pixels and channels."""
    error = np.mean((ours.astype(np.float64) - theirs) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else np.inf


def _photographs(width: int, height: int, num_images: int, folder: str | None) -> list[bytes]:
    """JPEGs of the size: drawn, or those of a folder, cut and scaled to it."""
    if folder is None:
        generator = np.random.default_rng([width, height])
        pictures = [draw(width, height, generator) for _ in range(num_images)]
    else:
        found = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
        opened = (decode.decode_rgb(path.read_bytes(), LIMITS) for path in found)
        pictures = [ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS) for picture in opened]
    return [_jpeg(picture) for picture in pictures]


def draw(width: int, height: int, generator: np.random.Generator) -> Image.Image:
    """A picture with the edges, textures and grain of a photograph; see the top of this module."""
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
    seen = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.8))
    grain = generator.normal(0, GRAIN, (height, width, 1)) + generator.normal(0, GRAIN / 2, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(seen) + grain, 0, 255).astype(np.uint8))


def _pink_noise(width: int, height: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Noise whose amplitude falls as 1/frequency, of standard deviation 1, (H, W)."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise: NDArray[np.float64] = np.fft.irfft2(
        np.fft.rfft2(generator.normal(size=(height, width))) / frequency, (height, width)
    )
    noise /= noise.std()
    return noise


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return buffer.getvalue()


def table(rows: Sequence[Row]) -> Table:
    """What was measured, as a table."""
    result = Table(title=f"JPEG to {SIDE} x {SIDE}, images per second of one core", title_justify="left")
    for name in ("size", "kB", "ours", "Pillow", "Pillow, draft", "ratio", "to reach", "PSNR", "worst"):
        result.add_column(name, justify="right")
    for row in rows:
        result.add_row(
            f"{row.width} x {row.height}",
            f"{row.bytes_per_image / 1000:.0f}",
            *(f"{rate:.0f}" for rate in (row.ours, row.plain, row.draft)),
            f"{row.ours / row.plain:.2f}",
            f"{TO_REACH[row.width, row.height]:g}",
            f"{row.psnr_mean:.1f} dB",
            f"{row.psnr_worst:.1f} dB",
        )
    return result


if __name__ == "__main__":
    print(rate(sys.argv[1], sys.argv[2]))
