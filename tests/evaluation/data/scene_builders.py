"""Builds small images with masks or depths for tests."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from evaluation.data.scenes import StampData


def photograph(seed: int, size: tuple[int, int]) -> Image.Image:
    """An image of colour bands with noise."""
    random = np.random.default_rng(seed)
    smooth = np.asarray(Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize(size), np.int16)
    return Image.fromarray((smooth + random.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8))


def write(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def grey(values: Any) -> Image.Image:
    return Image.fromarray(np.array(values, np.uint8))


def stamps(root: Path) -> StampData:
    """Stamp data: red animals and green plants, cut out as discs, and blue backgrounds."""
    for number in range(4):
        for folder, color in (("animals", (250, 0, 0)), ("plants", (0, 250, 0))):
            disc = Image.new("RGBA", (40, 30 + number), (9, 9, 9, 0))
            ImageDraw.Draw(disc).ellipse((2, 2, 36, 26), fill=(*color, 255 - number))
            write(root / "stamps" / folder / "deep" / f"{number}.png", disc)
        write(root / "backgrounds" / f"{number}.png", Image.new("RGB", (50, 40), (0, 0, 200 + 10 * number)))
    write(root / "stamps" / "opaque" / "square.png", Image.new("RGB", (20, 20), (250, 0, 0)))
    return StampData(
        layout="stamps",
        stamps=str(root / "stamps"),
        backgrounds=(str(root / "backgrounds"),),
        side=64,
        train_pictures=12,
        test_pictures=6,
    )


def depth_scene(folder: Path, count: int, seed: int) -> None:
    """Writes images whose brightness is their depth, in the layout "folder"."""
    (folder / "rgb").mkdir(parents=True)
    (folder / "depth").mkdir()
    for number in range(count):
        coarse = np.random.default_rng([seed, number]).uniform(1, 8, (3, 3)).astype(np.float32)
        metres = np.asarray(Image.fromarray(coarse).resize((48, 40), Image.Resampling.BILINEAR))
        Image.fromarray((metres * 30).astype(np.uint8)).convert("RGB").save(folder / f"rgb/{number}.png")
        np.save(folder / f"depth/{number}.npy", metres)
