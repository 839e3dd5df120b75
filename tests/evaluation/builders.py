"""Builds small labelled images and a small model for tests."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from curation import backbone, weights
from evaluation.features import FrozenModelConfig

CLASSES = ("bars", "disc", "ring")


def drawn(label: str, seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """An image of one of CLASSES, with random colours and position."""
    random = np.random.default_rng([seed, CLASSES.index(label)])
    dark, light = (tuple(int(value) for value in random.integers(low, low + 90, 3)) for low in (0, 160))
    picture = Image.new("RGB", size, dark)
    draw, (x, y) = ImageDraw.Draw(picture), random.integers(-4, 5, 2)
    box = (int(10 + x), int(6 + y), int(38 + x), int(34 + y))
    match label:
        case "bars":
            for left in range(int(x) % 8, size[0], 8):
                draw.rectangle((left, 0, left + 3, size[1]), fill=light)
        case "disc":
            draw.ellipse(box, fill=light)
        case _:
            draw.ellipse(box, outline=light, width=5)
    return picture


def encoded(label: str, seed: int, size: tuple[int, int] = (48, 40), format: str = "PNG") -> bytes:
    """The same image, encoded."""
    buffer = io.BytesIO()
    drawn(label, seed, size).save(buffer, format)
    return buffer.getvalue()


def image_folder(folder: Path, per_class: int, *, first: int = 0, classes: tuple[str, ...] = CLASSES) -> str:
    """Writes one folder for each class, as torchvision's ImageFolder reads it."""
    for label in classes:
        (folder / label).mkdir(parents=True)
        for number in range(first, first + per_class):
            (folder / label / f"{number:03d}.png").write_bytes(encoded(label, number))
    return str(folder)


def tar_of(path: Path, per_class: int, sidecar: str) -> str:
    """Writes the same images as a WebDataset tar, with the label in `.cls` or `.json`."""
    with tarfile.open(path, "w") as archive:
        for class_index, label in enumerate(CLASSES):
            for number in range(per_class):
                value = str(class_index).encode() if sidecar == "cls" else json.dumps({"label": label}).encode()
                for extension, data in (("png", encoded(label, number)), (sidecar, value)):
                    member = tarfile.TarInfo(f"{label}-{number:03d}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return str(path)


def parquet_of(path: Path, per_class: int) -> str:
    """Writes the same images as Parquet in Hugging Face's form: a struct of bytes, and an integer for the class."""
    rows = [
        {"image": {"bytes": encoded(label, number), "path": None}, "label": class_index}
        for class_index, label in enumerate(CLASSES)
        for number in range(per_class)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def checkpoint(path: Path, seed: int = 0, *, depth: int = 2, registers: int = 0) -> str:
    """Saves a Vision Transformer of a few blocks in the released layout."""
    network = backbone.build(
        "vit_tiny", patch_size=8, image_size=32, depth=depth, num_register_tokens=registers, layer_scale=1.0, seed=seed
    )
    weights.save(network, str(path))
    return str(path)


def model_config(path: Path, seed: int = 0) -> FrozenModelConfig:
    """The config of such a model."""
    return FrozenModelConfig(weights=checkpoint(path / f"vit-{seed}.pth", seed))
