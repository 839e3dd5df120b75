"""Plants files that are broken or stored in an unusual way, each with the outcome that ingest must give it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image, ImageOps

from curation.files import parquet
from curation.files.paths import FileRecord
from curation.images.decode import RejectReason
from curation.images.hashing import image_id
from pipelines.demo.planted_copies import Original, encode, write_file

ODD = pa.schema(
    [
        ("file", pa.string()),  # path below data/demo
        ("image_id", pa.string()),
        ("original", pa.string()),  # path below data/demo of the image that it shows; null when it shows none
        ("expected", pa.string()),  # 'accepted', or the RejectReason
        ("description", pa.string()),
    ]
)


def plant(tree: Path, originals: Iterator[Original]) -> FileRecord:
    """Write the files of odd/, and the expected outcome of each to odd.parquet; returns the table's record."""
    rows = []
    for name, original, data, expected, description in _odd_files(originals):
        write_file(tree / "odd" / name, data)
        rows.append(
            {
                "file": f"odd/{name}",
                "image_id": image_id(data),
                "original": original,
                "expected": expected,
                "description": description,
            }
        )
    return parquet.write_table(str(tree / "odd.parquet"), pa.Table.from_pylist(rows, ODD))


def _odd_files(originals: Iterator[Original]) -> Iterator[tuple[str, str | None, bytes, str, str]]:
    """Name, path of the original, bytes, expected outcome, description."""
    path, _, picture = next(originals)
    data = encode(picture, "PNG")
    yield "truncated.png", path, data[: len(data) // 2], RejectReason.TRUNCATED, "the first half of a PNG"

    path, _, picture = next(originals)
    data = encode(picture, "JPEG", quality=90)
    yield "truncated.jpg", path, data[: len(data) // 2], RejectReason.TRUNCATED, "the first half of a JPEG"

    yield "empty.jpg", None, b"", RejectReason.EMPTY, "no bytes"

    text = b"This is no photograph.\n"
    yield "text.jpg", None, text, RejectReason.NOT_AN_IMAGE, "text under an image's name"

    path, _, picture = next(originals)
    others = [ImageOps.flip(picture), ImageOps.invert(picture)]
    data = encode(picture, "GIF", save_all=True, append_images=others, duration=200, loop=0)
    yield "animated.gif", path, data, "accepted", "three frames, of which the first counts"

    path, _, picture = next(originals)
    data = encode(picture.convert("CMYK"), "JPEG", quality=90)
    yield "cmyk.jpg", path, data, "accepted", "a JPEG in four inks"

    path, _, picture = next(originals)
    data = encode(Image.fromarray(np.asarray(picture.convert("L"), dtype=np.uint16) * 257), "PNG")
    yield "sixteen-bit.png", path, data, "accepted", "grey in 16 bits"

    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    for orientation, turn in turns.items():
        path, _, picture = next(originals)
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        data = encode(picture.transpose(turn), "JPEG", quality=90, exif=exif)
        yield f"orientation-{orientation}.jpg", path, data, "accepted", "stored turned; EXIF says how to turn it back"

    path, data, _ = next(originals)
    yield "renamed.png", path, data, "accepted", "an exact copy under another name"
