"""The images in a plain tar, each with its label, and counts of the other members.

Members with one key, one after another, are a sample. The key is webdataset's: the name up to its first dot. A label
comes from a sidecar, a `.cls` or else a `.json` (`label`, `cls` or `class`), of the same sample:

    image           sidecars of the sample      label
    22.05.png       22.05.cls  22.06.cls        of 22.05.cls, the whole name but for its ending
    a.left.png      a.cls                       of a.cls, the key
    a.png           a.cls  a.json               of a.cls

A sample that returns later in the archive could have another label than it was given, so it is damage. A `.json`,
`.cls` or `.txt` of a sample with an image belongs to the image. All members beside images and these are counted.

Tars written one behind another in one file are read one after another.

The bytes are untrusted. Nothing is unpacked to disk, no name is used as a path, and sizes in headers are checked.
"""

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, final

from curation.images import listing
from curation.images.decode import begins_like_an_image
from curation.images.listing import MAX_LABEL_CHARACTERS

# Bytes between two members of a tar: long names, extended attributes. Assumed: Linux bounds an attribute to 64 KiB.
MAX_HEADER_BYTES = 1 << 20
# Consecutive digits in such a header; some versions of Python's reader take time that grows with the square of their
# number (CVE-2024-6232). Linux bounds a name to 255 characters.
MAX_DIGITS = 255
# Bytes of a `.json` or `.cls`. Assumed: all metadata of a photograph is some 100 kB. Larger ones give no label.
MAX_SIDECAR_BYTES = 1 << 20
# Images of one sample in a tar, kept in memory until its label is known. Assumed; further images start a new part.
MAX_IMAGES_IN_SAMPLE = 10_000
# Zeros behind the end mark of a tar. Assumed: writers pad to 10 kB, a few to 1 MB, and a second reads more than this.
MAX_ZEROS_BEHIND_END = 1 << 30
# The first bytes of a member that are enough to recognise an image.
START_BYTES = 132
# Characters of an untrusted name in a message.
_MAX_SHOWN = 200
# The errors of Python's reader. It documents TarError only. The others arise from invalid numbers, from a header that
# ends within its list of holes, and from deeply nested headers.
_DAMAGE = (tarfile.TarError, ValueError, IndexError, RecursionError)
_MANY_DIGITS = re.compile(rb"\d{%d}" % (MAX_DIGITS + 1))


@dataclass(frozen=True)
class ImageMember:
    """An image in a tar: its name, the position and the number of its bytes, and its label.

    `data` is None for more than the maximum number of bytes, for a member that is stored sparse, and for an image that
    is not chosen.
    """

    name: str
    offset: int
    length: int
    is_sparse: bool
    label: str | None
    data: bytes | None
    is_chosen: bool = True


def read_images(
    file: BinaryIO,
    passed_over: Counter[str],
    *,
    max_bytes: int,
    is_chosen: Callable[[str], bool] = lambda name: True,
    with_labels: bool = True,
) -> Iterator[ImageMember]:
    """The images of the tars in `file`, in their order; counts of the other members are added to `passed_over`.

    is_chosen: whether an image is read, by its name; the others come without their bytes. The first bytes of members
    whose name ends like no image are read all the same, because they decide whether the member is one.
    with_labels: without, no sidecar is read, and no image has a label.

    Raises tarfile.TarError for damage, with its position, after the images before it.
    """
    headers = _HeaderReader(file)
    position: int | None = 0
    while position is not None:
        try:
            headers.seek(position)
            headers.next_member()
            # "r:" refuses compressed tars, whose members cannot be read by offset later.
            with tarfile.open(fileobj=headers, mode="r:") as archive:  # type: ignore[call-overload]  # read, seek, tell suffice
                samples = _Samples(file, passed_over, max_bytes, is_chosen, with_labels)
                yield from samples.read(archive, headers)
                position = _start_of_next(file, archive.offset, headers.end)
        except RecursionError:
            raise tarfile.ReadError("headers of headers") from None
        except _DAMAGE as error:
            raise tarfile.ReadError(str(error)) from None


def shown(name: str) -> str:
    """An untrusted name for a message: quoted, special characters escaped, cut where it is long."""
    return repr(name[:_MAX_SHOWN]) + ("..." if len(name) > _MAX_SHOWN else "")


@final
class _HeaderReader:
    """The view of a tar for Python's reader: headers only, and only as many bytes as one member needs.

    Python's reader requests as many bytes as a header states, so requests and positions are checked.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.end = file.seek(0, os.SEEK_END)
        file.seek(0)
        self._left = MAX_HEADER_BYTES

    def next_member(self) -> None:
        """Resets the count of header bytes for the next member."""
        self._left = MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        self._left -= size
        if size < 0 or self._left < 0:
            raise tarfile.ReadError(f"headers of more than {MAX_HEADER_BYTES} bytes before byte {self.file.tell()}")
        data = self.file.read(size)
        if _MANY_DIGITS.search(data):
            raise tarfile.ReadError(f"a header with a number of more than {MAX_DIGITS} digits")
        return data

    def seek(self, position: int) -> int:
        if not 0 <= position <= self.end:
            raise tarfile.ReadError(f"the next header would be at byte {position}; the tar has {self.end}")
        return self.file.seek(position)

    def tell(self) -> int:
        return self.file.tell()


def _start_of_next(file: BinaryIO, end_mark: int, end: int) -> int | None:
    """The position of the first block behind the end mark that is not zero; None where only zeros follow."""
    position = end_mark
    file.seek(end_mark)
    while chunk := file.read(min(1 << 20, end - position)):
        num_zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        position += num_zeros
        if num_zeros < len(chunk):
            return position - (position - end_mark) % tarfile.BLOCKSIZE
        if position - end_mark > MAX_ZEROS_BEHIND_END:
            raise tarfile.ReadError(f"more than {MAX_ZEROS_BEHIND_END} zeros behind the end mark at byte {end_mark}")
    return None


@dataclass
class _Sample:
    """Consecutive members with one key. A stem is a whole name but for its last ending."""

    key: str
    images: list[tuple[str, tarfile.TarInfo]] = field(default_factory=list)  # with their stems
    labels: dict[str, dict[str, str | None]] = field(default_factory=dict)  # by stem of the sidecar, by its ending
    num_captions: int = 0
    num_given: int = 0  # images of parts that were given out already


@final
class _Samples:
    """Reads one archive, sample by sample.

    `_ended` holds up to three hashes for each image that has been given out, some 100 bytes of memory each: less than
    the row that ingest keeps for the image.
    """

    def __init__(
        self,
        file: BinaryIO,
        passed_over: Counter[str],
        max_bytes: int,
        is_chosen: Callable[[str], bool],
        with_labels: bool,
    ) -> None:
        self._file = file
        self._passed_over = passed_over
        self._max_bytes = max_bytes
        self._is_chosen = is_chosen
        self._with_labels = with_labels
        self._ended: set[bytes] = set()

    def read(self, archive: tarfile.TarFile, headers: _HeaderReader) -> Iterator[ImageMember]:
        """The images of the archive; before an error is raised, those before the damage.

        The sample that is open at the damage may have lost a sidecar, so its images have no label.
        """
        self._sample: _Sample | None = None
        try:
            yield from self._read(archive, headers)
        except _DAMAGE:
            if self._sample is not None:
                self._sample.labels = {}
                yield from self._end(self._sample)
            raise

    def _read(self, archive: tarfile.TarFile, headers: _HeaderReader) -> Iterator[ImageMember]:
        while (member := archive.next()) is not None:
            # Otherwise every member and every global header would stay in memory.
            archive.members.clear()  # type: ignore[attr-defined]  # as webdataset does
            archive.pax_headers.clear()  # type: ignore[attr-defined]  # typeshed leaves it out
            headers.next_member()
            # A negative size would make the reader loop forever.
            if not 0 <= member.size <= headers.end and not member.issparse():
                raise tarfile.ReadError(f"member {shown(member.name)} has {member.size} bytes, the tar {headers.end}")
            ending = listing.extension(member.name)
            if member.isdir():
                continue
            if (kind := self._kind_passed_over(member, ending)) is not None:
                self._passed_over[kind] += 1
                continue
            folder, slash, name = member.name.rpartition("/")
            key = folder + slash + name.partition(".")[0]
            if self._sample is None or self._sample.key != key:
                if (ended := self._sample) is not None:
                    self._sample = None
                    yield from self._end(ended)
                self._sample = _Sample(key)
            sample = self._sample
            stem = member.name[: -len(ending) - 1] if ending else member.name
            if ending == "txt":
                sample.num_captions += 1
            elif ending in ("cls", "json"):
                if len(sample.labels) > 2 * MAX_IMAGES_IN_SAMPLE:
                    yield from self._give_out(sample)
                self._add_sidecar(sample, stem, ending, member)
            else:
                if len(sample.images) >= MAX_IMAGES_IN_SAMPLE:
                    yield from self._give_out(sample, keep_labels=True)
                self._add_image(sample, stem, member)
        # A tar ends in two zero blocks; Python's reader also ends at the first cut or damaged header.
        self._file.seek(archive.offset)
        if self._file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"neither a header nor the end mark at byte {archive.offset}; members are missing")
        if (ended := self._sample) is not None:
            self._sample = None
            yield from self._end(ended)

    def _kind_passed_over(self, member: tarfile.TarInfo, ending: str) -> str | None:
        """The kind of a member that is neither image nor sidecar; None for an image or a sidecar."""
        if listing.is_system_file(member.name):
            return listing.SYSTEM_FILE
        if member.issym() or member.islnk():
            return listing.LINK
        if not member.isfile():
            return listing.SPECIAL_FILE
        if ending in listing.IMAGE_EXTENSIONS or ending in ("cls", "json", "txt"):
            return None
        is_image = (
            ending not in listing.OTHER_EXTENSIONS
            and not member.issparse()
            and begins_like_an_image(self._read_member(member, START_BYTES))
        )
        return None if is_image else listing.kind_of(member.name)

    def _add_image(self, sample: _Sample, stem: str, member: tarfile.TarInfo) -> None:
        has_ended = not sample.num_given and _digest("image", stem) in self._ended
        if has_ended or not self._ended.isdisjoint((_digest("sidecar", stem), _digest("sidecar", sample.key))):
            raise _returns(member, stem)
        sample.images.append((stem, member))

    def _add_sidecar(self, sample: _Sample, stem: str, ending: str, member: tarfile.TarInfo) -> None:
        ended = (_digest(kind, stem) for kind in ("image", "key", "sidecar"))
        if not self._ended.isdisjoint(ended) or ending in sample.labels.get(stem, {}):
            raise _returns(member, stem)
        label, is_readable = None, False
        if not self._with_labels:
            is_readable = True
        elif member.size <= MAX_SIDECAR_BYTES and not member.issparse():
            data = self._read_member(member)
            if ending == "cls":
                label, is_readable = data.decode(errors="replace").strip(), True
            else:
                label, is_readable = _label_in_json(data)
        if label is not None and len(label) > MAX_LABEL_CHARACTERS:
            label, is_readable = None, False
        if not is_readable:
            self._passed_over[listing.UNREADABLE_SIDECAR] += 1
        sample.labels.setdefault(stem, {})[ending] = label

    def _end(self, sample: _Sample) -> Iterator[ImageMember]:
        yield from self._give_out(sample)
        if sample.num_captions and not sample.num_given:
            self._passed_over[".txt"] += sample.num_captions

    def _give_out(self, sample: _Sample, *, keep_labels: bool = False) -> Iterator[ImageMember]:
        """The images of the sample so far, with their labels. The sample is empty afterwards.

        keep_labels: keep the labels that no image so far has as its stem, for later images of the sample.
        """
        images, sample.images = sample.images, []  # first, so that an error gives no image twice
        for stem, member in images:
            is_chosen = self._is_chosen(member.name)
            is_read = is_chosen and not member.issparse() and member.size <= self._max_bytes
            yield ImageMember(
                name=member.name,
                offset=member.offset_data,
                length=0 if member.issparse() else member.size,
                is_sparse=member.issparse(),
                label=_label(sample, stem),
                data=self._read_member(member) if is_read else None,
                is_chosen=is_chosen,
            )
        stems = {stem for stem, _ in images}
        sample.num_given += len(images)
        kept = {stem: labels for stem, labels in sample.labels.items() if keep_labels and stem not in stems}
        for stem, sidecars in sample.labels.items():
            if stem not in stems | kept.keys() and (stem != sample.key or not sample.num_given):
                self._passed_over[listing.SIDECAR_OF_NO_IMAGE] += len(sidecars)
        self._ended.update(_digest("image", stem) for stem in stems)
        self._ended.update(_digest("sidecar", stem) for stem in sample.labels.keys() - kept.keys())
        if stems:
            self._ended.add(_digest("key", sample.key))
        sample.labels = kept

    def _read_member(self, member: tarfile.TarInfo, max_bytes: int | None = None) -> bytes:
        """The bytes of a member, or the first `max_bytes` of them. The position of the file stays."""
        size = member.size if max_bytes is None else min(member.size, max_bytes)
        position = self._file.tell()
        self._file.seek(member.offset_data)
        data = self._file.read(size)
        self._file.seek(position)
        if len(data) != size:
            raise tarfile.ReadError(f"member {shown(member.name)} has {len(data)} of {member.size} bytes")
        return data


def _label(sample: _Sample, stem: str) -> str | None:
    for name in (stem, sample.key):
        for ending in ("cls", "json"):
            if (label := sample.labels.get(name, {}).get(ending)) is not None:
                return label
    return None


def _digest(kind: str, name: str) -> bytes:
    # Names may be a megabyte long. Python's own hash of a text differs from process to process.
    return hashlib.blake2b(f"{kind}/{name}".encode(errors="surrogatepass"), digest_size=16).digest()


def _returns(member: tarfile.TarInfo, stem: str) -> tarfile.ReadError:
    return tarfile.ReadError(
        f"member {shown(member.name)} at byte {member.offset} comes a second time, or after the other members of "
        f"{shown(stem)}, so that labels would be wrong or lost. Members of a sample must be neighbours, as 'tar "
        "--sort=name' writes them"
    )


def _label_in_json(data: bytes) -> tuple[str | None, bool]:
    """The label in the text of a `.json`, and whether the text is JSON. The image of an invalid one is kept."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return None, False
    if isinstance(values, dict):
        for name in ("label", "cls", "class"):
            if isinstance(values.get(name), str | int):
                return str(values[name]).encode(errors="replace").decode(), True  # JSON may contain lone surrogates
    return None, True
