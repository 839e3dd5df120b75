"""The corpus on disk: WebDataset tars whose bytes depend only on their samples.

A sample is two members: `<key>.<ext>` holds the original bytes, `<key>.json` the origin of the image and the reasons
for its selection. Tars are plain USTAR with fixed headers (mtime 0, owner 0, mode 644), open with the webdataset
library and with `tar`, and hold no pickle. Readers use `corpus-*.parquet`, which lists every sample of every tar and
the position of its image in the tar.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from curation.errors import InputError
from curation.files import paths
from curation.images.decode import EXTENSION_OF_FORMAT


@dataclass(frozen=True)
class CorpusSample:
    """One image of the corpus: its key (letters, digits, `-` and `_`), its bytes and format, and its sidecar."""

    key: str
    data: bytes
    format: str
    sidecar: dict[str, Any]


class ByteRange(NamedTuple):
    """The position of an image's bytes in its tar."""

    offset: int
    length: int


def write_tar(path: str, samples: Iterator[CorpusSample]) -> tuple[paths.FileRecord, list[ByteRange]]:
    """Writes the samples to a tar at `path`, atomically, one in memory at a time; gives the position of each image."""
    ranges = []
    with paths.atomic_write(path) as file:
        for sample in samples:
            sidecar = (_SIDECAR.encode(sample.sidecar) + "\n").encode()
            ranges.append(ByteRange(file.size + tarfile.BLOCKSIZE, len(sample.data)))  # behind the header
            image = _member(f"{sample.key}.{EXTENSION_OF_FORMAT[sample.format]}", sample.data)
            file.write(b"".join((*image, *_member(f"{sample.key}.json", sidecar))))
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.write(bytes(-file.size % tarfile.RECORDSIZE))
    record = paths.FileRecord(name=path.rpartition("/")[2], sha256=file.sha256, bytes=file.size, rows=len(ranges))
    return record, ranges


def read_tar(path: str) -> Iterator[CorpusSample]:
    """The samples of a tar that `write_tar` wrote, in order. Raises InputError for any other tar."""
    with paths.open_read(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                yield from _read_samples(archive)
                # Python's reader treats the first cut or damaged header as the end of the tar.
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"neither a header nor the end mark at byte {archive.offset}")
        except (tarfile.TarError, ValueError) as error:
            raise InputError(
                f"{path}: this is not a complete tar of a corpus: {error}. Pack the corpus again with --replace."
            ) from None


def _read_samples(archive: tarfile.TarFile) -> Iterator[CorpusSample]:
    format_of = {extension: name for name, extension in EXTENSION_OF_FORMAT.items()}
    members = iter(archive)
    for image in members:
        key, _, extension = image.name.partition(".")
        content = archive.extractfile(image)
        data = content.read() if content else b""
        sidecar = next(members, None)
        if extension not in format_of or sidecar is None or sidecar.name != f"{key}.json":
            raise tarfile.ReadError(f"'{image.name}' is not followed by '{key}.json'")
        content = archive.extractfile(sidecar)
        yield CorpusSample(key, data, format_of[extension], json.loads(content.read() if content else b"{}"))


def _member(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """A file in a tar: header, content, and zeros up to the next block.

    The header equals that of Python's tarfile for a TarInfo of this name, whose defaults are fixed: mtime 0, owner 0
    without names, mode 644. Only name, size and checksum differ between members. tarfile formats and encodes all
    fields of every member, which took three quarters of the time of packing (measured 2026-11-21).
    """
    field, size = name.encode("ascii"), b"%011o" % len(data)
    assert len(field) <= tarfile.LENGTH_NAME and len(size) == 11, name
    checksum = b"%06o\0 " % (_SUM + sum(field) + sum(size))
    return (
        b"".join((field, _ZEROS[len(field) :], _OWNER, size, _NO_TIME, checksum, _REST)),
        data,
        bytes(-len(data) % tarfile.BLOCKSIZE),
    )


_SIDECAR = json.JSONEncoder(sort_keys=True, ensure_ascii=False)
# A header without name, size and checksum. The checksum is the sum of all bytes, its own field counted as spaces.
_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_ZEROS, _OWNER, _NO_TIME, _REST = _HEADER[:100], _HEADER[100:124], _HEADER[135:148], _HEADER[156:]
_SUM = sum(_OWNER) + sum(_NO_TIME) + sum(b" " * 8) + sum(_REST)
