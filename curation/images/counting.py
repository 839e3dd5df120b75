"""Counts the images of a source by names and headers, before any image is read.

    folder        the files whose names end as those of images do; a name with another ending counts when its first
                  bytes are those of an image, as in ingest
    webdataset    the members of the tars that ingest would read as images. A header leads to the next one, so no image
                  is read
    parquet       the rows in the footers, less the rows without an image where the file's statistics count them

A source of many images is counted by a part: its files in the order of the hashes of their names, until MAX_IMAGES
are counted. The rest follows from the bytes of the files. The same source always gives the same count.
"""

import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from curation.errors import DamagedFileError, InputError
from curation.files import paths
from curation.images import listing, sources, tar_members
from curation.images.decode import ImageLimits, ImageRejected, begins_like_an_image, read_header
from curation.images.parquet_rows import ImageRow, ParquetRows
from curation.images.sources import SourceConfig, SourceFile

# Images of one source that are counted one by one. Measured: 42 us a header, so 2.5 s, and 8 s with two sidecars each.
MAX_IMAGES = 60_000
# Images whose size in pixels is read. Assumed: the mean of their pixels is then known to a fifth or so.
MAX_PICTURES = 48
# Files of a source in which these images lie, and bytes that are read of each image. The size of a JPEG stands behind
# its preview.
MAX_PICTURE_FILES = 8
PICTURE_BYTES = 256 << 10


@dataclass(frozen=True)
class SourceCount:
    """The images of a source."""

    images: int
    """Exact where all files are counted, else estimated from their bytes."""
    image_bytes: float
    """Bytes of an image on average."""
    num_files: int
    num_counted: int
    """Files that were counted; fewer than all in a source of many images."""
    pixels: float | None = None
    """Width times height of an image on average, of a few images; None where none can be read."""
    damaged: tuple[str, ...] = field(default=())
    """Tars and Parquet files that cannot be read to their end. The images before the damage count."""

    @property
    def is_exact(self) -> bool:
        """Whether all files are counted."""
        return self.num_counted == self.num_files


@dataclass(frozen=True)
class _FileCount:
    images: int
    image_bytes: int
    num_read: int
    """Bytes of the file that the count covers."""
    is_damaged: bool = False


def count_images(source: SourceConfig) -> SourceCount:
    """The images of a source on a disk or a server. Raises InputError as `list_source` does, and for a wrong column."""
    files = sources.list_source(source).files
    order = sorted(files, key=lambda file: hashlib.blake2b(os.fsencode(file.path), digest_size=8).digest())
    if source.layout == "folder":
        return _count_folder(source, order)
    pictures: list[bytes] = []
    images, image_bytes, bytes_read, num_counted, damaged = 0, 0, 0, 0, []
    with ParquetRows() as rows:  # its process starts with the first Parquet file
        for file in order:
            if images >= MAX_IMAGES:
                break
            wanted = MAX_PICTURES // MAX_PICTURE_FILES if len(pictures) < MAX_PICTURES else 0
            count = _count_archive(source, file, rows, MAX_IMAGES - images, wanted, pictures)
            images, image_bytes = images + count.images, image_bytes + count.image_bytes
            bytes_read += count.num_read
            num_counted += count.num_read == file.size
            if count.is_damaged:
                damaged.append(_uri(source, file))
    total_bytes = sum(file.size for file in files)
    share = bytes_read / total_bytes if total_bytes and num_counted < len(files) else 1.0
    return SourceCount(
        images=round(images / share) if share else 0,
        image_bytes=image_bytes / images if images else 0.0,
        num_files=len(files),
        num_counted=num_counted,
        pixels=_mean_pixels(pictures),
        damaged=tuple(damaged),
    )


def _uri(source: SourceConfig, file: SourceFile) -> str:
    return paths.join(source.path, file.path) if file.path else source.path


def _count_folder(source: SourceConfig, order: list[SourceFile]) -> SourceCount:
    named = [file for file in order if listing.has_image_name(file.path)]
    others = [file for file in order if not listing.has_image_name(file.path)]
    looked_at = others[:MAX_IMAGES]
    images = [file for file in looked_at if begins_like_an_image(_start(source, file, tar_members.START_BYTES))]
    num_others = round(len(images) * len(others) / len(looked_at)) if looked_at else 0
    images += named
    pictures = [_start(source, file, PICTURE_BYTES) for file in named[:MAX_PICTURES]]
    return SourceCount(
        images=len(named) + num_others,
        image_bytes=sum(file.size for file in images) / len(images) if images else 0.0,
        num_files=len(order),
        num_counted=len(named) + len(looked_at),
        pixels=_mean_pixels(pictures),
    )


def _start(source: SourceConfig, file: SourceFile, num_bytes: int) -> bytes:
    """The first bytes of a file; none where it must not or cannot be opened, which ingest rejects."""
    uri = _uri(source, file)
    if sources.location_problem(source, uri) is not None:
        return b""
    try:
        with paths.RetryingFile(uri) as opened:
            return opened.read(num_bytes)
    except OSError:
        return b""


def _count_archive(
    source: SourceConfig,
    file: SourceFile,
    rows: ParquetRows,
    max_images: int,
    num_pictures: int,
    pictures: list[bytes],
) -> _FileCount:
    """The count of a tar or Parquet file. Adds the starts of its first images to `pictures`."""
    uri = _uri(source, file)
    if sources.location_problem(source, uri) is not None:
        return _FileCount(0, 0, file.size, is_damaged=True)
    try:
        with paths.RetryingFile(uri) as opened:
            stream = cast(BinaryIO, opened)
            if source.layout == "webdataset":
                return _count_tar(stream, file.size, max_images, num_pictures, pictures)
            counts = rows.count(stream, uri, source.image_column)
            for _, item in zip(range(num_pictures), _rows(rows, stream, uri, source), strict=False):
                pictures.append(item.data or b"")
            return _FileCount(counts.num_rows - counts.num_nulls, counts.num_bytes, file.size)
    except DamagedFileError:
        return _FileCount(0, 0, file.size, is_damaged=True)
    except OSError as error:
        if not paths.is_permanent(error):
            raise InputError(f"{uri}: cannot be read ({type(error).__name__}: {error}).") from None
        return _FileCount(0, 0, file.size, is_damaged=True)


def _rows(rows: ParquetRows, file: BinaryIO, uri: str, source: SourceConfig) -> Iterator[ImageRow]:
    for item in rows.read(file, uri, source.image_column, None, max_bytes=ImageLimits().max_bytes):
        if isinstance(item, ImageRow):
            yield item


def _count_tar(file: BinaryIO, size: int, max_images: int, num_pictures: int, pictures: list[bytes]) -> _FileCount:
    members = tar_members.read_images(file, Counter(), max_bytes=0, is_chosen=lambda name: False, with_labels=False)
    starts: list[int] = []
    images, image_bytes, end = 0, 0, size
    is_damaged = False
    try:
        for member in members:
            images, image_bytes = images + 1, image_bytes + member.length
            if len(starts) < num_pictures:
                starts.append(member.offset)
            if images >= max_images:
                end = min(size, member.offset + member.length)
                break
    except tarfile.TarError:
        is_damaged = True
    for start in starts:
        file.seek(start)
        pictures.append(file.read(PICTURE_BYTES))
    return _FileCount(images, image_bytes, end, is_damaged)


def _mean_pixels(starts: list[bytes]) -> float | None:
    """Width times height on average, of the images whose size their first bytes give."""
    limits, pixels = ImageLimits(), []
    for start in starts:
        try:
            header = read_header(start, limits)
        except ImageRejected:
            continue
        pixels.append(header.width * header.height)
    return sum(pixels) / len(pixels) if pixels else None
