"""The files below the folder of a source, and the names of the kinds of files that are passed over.

The name of a file or of a tar's member decides first, then its content:

    name                                         result
    ends in one of IMAGE_EXTENSIONS              an image, or a reject
    ends in one of OTHER_EXTENSIONS              counted, not opened
    ends otherwise, or has no ending             opened: an image if its first bytes are those of one, else counted
    a system's file (`is_system_file`)           counted, not opened

So a folder with a million captions costs a listing, and no caption is opened. The counts are by kind. A kind is the
ending of a name where it is short and plain, else one of the constants below.
"""

import functools
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from curation.files import paths

# Endings of the names of images; the format is then determined by the bytes.
IMAGE_EXTENSIONS = frozenset(
    {"avif", "bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"}
)
# Endings of files without pixels, of unfinished downloads, and of raw data of cameras, of which only a small preview
# could be decoded.
OTHER_EXTENSIONS = frozenset(
    "txt json jsonl ndjson cls csv tsv xml yaml yml toml md rst html htm css js py ipynb log lst caption srt vtt pdf "
    "doc docx npy npz pt pth pkl pickle safetensors parquet arrow feather h5 hdf5 mat db sqlite tar gz tgz bz2 xz zst "
    "lz4 zip 7z rar mp4 mov avi mkv webm mpg mpeg mp3 wav flac ogg aac part crdownload partial tmp lock crc md5 sha256 "
    "torrent svg svgz eps ps psd ai ico dng cr2 cr3 nef arw orf rw2 raf".split()
)
# Folders and files that operating systems and Spark leave behind. Names are compared in lower case.
_SYSTEM_FOLDERS = frozenset({"__macosx", "_temporary"})
_SYSTEM_NAMES = frozenset({".ds_store", "thumbs.db", "desktop.ini", "_success"})

# Characters of an image's label; a longer text gives no label. Assumed.
MAX_LABEL_CHARACTERS = 1_000

# Kinds other than an ending.
NO_EXTENSION = "no extension"
OTHER = "other"
SYSTEM_FILE = "system files"
LINK = "links"
SPECIAL_FILE = "special files"
SIDECAR_OF_NO_IMAGE = "sidecars of no image"
UNREADABLE_SIDECAR = "sidecars without readable text"
# Endings are untrusted text: others count as OTHER.
_PLAIN_EXTENSION = re.compile(r"[a-z0-9_+-]{1,12}")


@dataclass(frozen=True)
class Entry:
    """A file below a folder: its path relative to the folder, and its size in bytes (0 where it is not known).

    A link to a folder is an entry too; it is not followed. `special` files are pipes, sockets and devices.
    """

    path: str
    size: int
    kind: Literal["file", "folder_link", "special"] = "file"


def extension(name: str) -> str:
    """The ending of the last part of a path in lower case, without its dot; "" where it has no dot."""
    _, dot, ending = name.rpartition("/")[2].rpartition(".")
    return ending.lower() if dot else ""


def has_image_name(path: str) -> bool:
    """Whether the name ends as names of images do."""
    return extension(path) in IMAGE_EXTENSIONS


def kind_of(name: str) -> str:
    """The kind as which a file or member with this name is counted."""
    if not (ending := extension(name)):
        return NO_EXTENSION
    return f".{ending}" if _PLAIN_EXTENSION.fullmatch(ending) else OTHER


def is_system_file(path: str) -> bool:
    """Whether an operating system or Spark left the file behind, as the `._*` of macOS. `path` may be any text."""
    *folders, name = path.lower().split("/")
    return name.startswith("._") or name in _SYSTEM_NAMES or not _SYSTEM_FOLDERS.isdisjoint(folders)


def bounded(counts: Mapping[str, int], max_kinds: int) -> dict[str, int]:
    """The counts by kind in alphabetical order: the `max_kinds` largest, the sum of the others as OTHER."""
    ordered = _by_count(counts)
    result = Counter(dict(ordered[:max_kinds]))
    for _, count in ordered[max_kinds:]:
        result[OTHER] += count
    return dict(sorted(result.items()))


def in_words(counts: Mapping[str, int]) -> str:
    """The counts by kind, the largest first, such as "1,200 .txt, 3 system files"."""
    return ", ".join(f"{count:,} {kind}" for kind, count in _by_count(counts))


def _by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def walk(path: str) -> Iterator[Entry]:
    """Every file below the folder `path`, in no order. Raises OSError for a folder that cannot be listed."""
    fs, root = paths.filesystem(path)
    return _walk_local(root) if isinstance(fs, LocalFileSystem) else _walk_remote(fs, root)


def _walk_local(root: str) -> Iterator[Entry]:
    folders = [""]  # a list, not recursion: folders may be nested deeper than Python's stack
    while folders:
        folder = folders.pop()
        for entry in paths.retried(functools.partial(_scan, posixpath.join(root, folder))):
            path = folder + entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(path + "/")
            elif entry.is_symlink():
                yield Entry(path, _size(entry), "folder_link" if os.path.isdir(entry.path) else "file")
            else:
                yield Entry(path, _size(entry), "file" if entry.is_file() else "special")


def _scan(folder: str) -> list["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        return list(entries)


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except OSError as error:
        if entry.is_symlink() or isinstance(error, FileNotFoundError):
            return 0  # a broken link, or a file deleted meanwhile; ingest rejects it
        raise


def _walk_remote(fs: AbstractFileSystem, root: str) -> Iterator[Entry]:
    generic = AsyncFileSystem._find if isinstance(fs, AsyncFileSystem) else AbstractFileSystem.find
    if getattr(type(fs), generic.__name__) is not generic:
        # An object store: it lists all files below a prefix, a thousand in each request.
        for path, info in paths.retried(functools.partial(fs.find, root, detail=True)).items():
            yield Entry(path[len(root.rstrip("/")) + 1 :], int(info["size"] or 0))
        return
    # fsspec's own search of folder after folder leaves out folders that cannot be listed, and recurses.
    folders = [root.rstrip("/")]
    while folders:
        folder = folders.pop()
        for info in paths.retried(functools.partial(fs.ls, folder, detail=True)):
            path = info["name"].rstrip("/")
            if info["type"] == "directory":
                if path != folder:
                    folders.append(path)
            elif path != folder:
                yield Entry(path[len(root.rstrip("/")) + 1 :], int(info["size"] or 0))
