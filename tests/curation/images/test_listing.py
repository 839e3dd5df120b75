"""Listing: every file below a folder is an image, is opened, or is counted; a folder that cannot be listed is named."""

import ctypes
import errno
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from curation.errors import InputError
from curation.files import paths
from curation.images import listing, sources
from curation.images.decode import RejectReason
from curation.images.sources import SourceConfig, SourceItem
from tests.curation.builders import encoded_image
from tests.curation.images.tars import member, tar_of


def source(path: str | Path, layout: str = "folder") -> SourceConfig:
    return SourceConfig.model_validate({"name": "photos", "path": str(path), "role": "holdout", "layout": layout})


def read(config: SourceConfig) -> tuple[list[SourceItem], dict[str, int]]:
    """The items of a source, and all that was passed over."""
    listed = sources.list_source(config)
    passed_over = Counter(listed.passed_over)
    files = tuple(file.path for file in listed.files)
    items = list(sources.read_source(config, files, max_bytes=1_000_000, passed_over=passed_over))
    return items, dict(passed_over)


@contextmanager
def without_roots_rights() -> Iterator[None]:
    """Removes CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH from this thread, so that permissions apply to root."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    try:
        sets[0] = effective & ~0b110
        assert libc.capset(header, sets) == 0
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0


@pytest.mark.parametrize("locked", ["", "deep/locked"])
def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, locked: str) -> None:
    folder = tmp_path / "source"
    (folder / "deep/locked").mkdir(parents=True)
    for name in ("a.png", "deep/locked/b.png"):
        (folder / name).write_bytes(encoded_image(1))
    (folder / locked).chmod(0)
    try:
        with (
            without_roots_rights(),
            pytest.raises(InputError, match=rf"cannot be listed .*Permission denied.*{folder / locked}/?'"),
        ):
            sources.list_files(source(folder))
    finally:
        (folder / locked).chmod(0o755)


def test_a_source_below_an_unreadable_folder_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "locked/source").mkdir(parents=True)
    (tmp_path / "locked").chmod(0)
    try:
        with without_roots_rights(), pytest.raises(InputError, match=r"cannot be listed .*Permission denied"):
            sources.list_files(source(tmp_path / "locked/source"))
    finally:
        (tmp_path / "locked").chmod(0o755)


class FolderByFolder(MemoryFileSystem):
    """A remote filesystem that lists one folder in each request, as SFTP does. Requests for some folders fail."""

    protocol = "folders"
    store: dict[str, Any] = {}  # noqa: RUF012  # as in MemoryFileSystem
    pseudo_dirs = [""]  # noqa: RUF012
    failures: dict[str, list[OSError]] = {}  # noqa: RUF012

    find = AbstractFileSystem.find

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        name = self._strip_protocol(path).rpartition("/")[2]
        if self.failures.get(name):
            raise self.failures[name].pop()
        return super().ls(path, detail=detail, **options)


fsspec.register_implementation("folders", FolderByFolder)


def test_a_remote_folder_that_cannot_be_listed_is_named_and_a_passing_failure_is_tried_again(tmp_path: Path) -> None:
    base = f"folders://{tmp_path.name}"
    for name in ("a.png", "young/b.png", "locked/c.png"):
        paths.write_bytes(f"{base}/{name}", b"x")
    FolderByFolder.failures["young"] = [OSError(errno.EIO, "server busy") for _ in range(2)]
    assert [file.path for file in sources.list_files(source(base))] == ["a.png", "locked/c.png", "young/b.png"]
    FolderByFolder.failures["locked"] = [PermissionError("403 for locked") for _ in range(2)]
    with pytest.raises(InputError, match=r"cannot be listed \(403 for locked\)"):
        sources.list_files(source(base))


def test_folders_nested_deeper_than_the_stack_are_listed(tmp_path: Path) -> None:
    folder = str(tmp_path / "deep")
    try:
        os.mkdir(folder)
        for _ in range(1_200):
            folder += "/d"
            os.mkdir(folder)
        Path(folder, "a.png").write_bytes(b"x")
        (file,) = sources.list_files(source(tmp_path / "deep"))
        assert file.path == "d/" * 1_200 + "a.png"
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / "deep")], check=True)  # shutil.rmtree recurses


IMAGE, TEXT = encoded_image(1, "JPEG"), b"no image, but some text that is long enough"
AVIF = b"\0\0\0\x20ftypavif" + bytes(40)
# Name, bytes, and the kind as which the file is counted; None for an image.
NAMES = [
    ("a.jpe", IMAGE, None),
    ("b.jpg_large", IMAGE, None),
    ("c.avif", AVIF, None),
    ("photo.jpeg?width=200", IMAGE, None),
    ("0123abcd", IMAGE, None),
    ("200.image", IMAGE, None),
    (".hidden", IMAGE, None),
    ("e.jpg_large", TEXT, ".jpg_large"),
    ("photo.html?x=1", TEXT, "other"),
    ("LICENSE", TEXT, "no extension"),
    ("empty", b"", "no extension"),
    ("notes.TXT", TEXT, ".txt"),
    ("raw.nef", b"II*\0" + bytes(40), ".nef"),
    ("download.jpg.part", IMAGE[:100], ".part"),
    ("x.<script>", TEXT, "other"),
    ("x." + "long" * 10, TEXT, "other"),
    ("._a.jpg", TEXT, "system files"),
    ("__MACOSX/a.jpg", TEXT, "system files"),
    ("_temporary/0/part-1.jpg", TEXT, "system files"),
    ("Thumbs.db", TEXT, "system files"),
    ("deep/desktop.ini", TEXT, "system files"),
    (".DS_Store", TEXT, "system files"),
    ("z.jpg", TEXT, None),  # an image's name: decoding rejects it
]
IMAGES = sorted(name for name, _, kind in NAMES if kind is None)
COUNTS = Counter(kind for _, _, kind in NAMES if kind is not None)


@pytest.mark.parametrize("root", ["local", "memory"])
def test_files_are_images_by_name_or_content_and_the_others_are_counted(tmp_path: Path, root: str) -> None:
    base = str(tmp_path) if root == "local" else f"memory://{tmp_path.name}"
    for name, data, _ in NAMES:
        paths.write_bytes(f"{base}/{name}", data)
    items, passed_over = read(source(base))
    assert [item.uri for item in items] == [f"{base}/{name}" for name in IMAGES]
    assert all(item.data is not None for item in items)
    assert passed_over == COUNTS


def test_members_are_images_by_name_or_content_and_the_others_are_counted(tmp_path: Path) -> None:
    members = [member(f"{number}/{name}", data) for number, (name, data, _) in enumerate(NAMES)]
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    (tmp_path / "b.tar.gz").touch()
    items, passed_over = read(source(tmp_path, "webdataset"))
    assert [item.data for item in items] == [data for _, data, kind in NAMES if kind is None]
    assert passed_over == COUNTS | {".gz": 1}


def test_links_and_special_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.png").write_bytes(IMAGE)
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "out").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path / "pipe")
    items, passed_over = read(source(tmp_path))
    assert {item.uri.rpartition("/")[2]: item.problem and item.problem[0] for item in items} == {
        "a.png": None,
        "out": RejectReason.LINK_OUTSIDE_SOURCE,
    }
    assert passed_over == {"links": 1, "special files": 1}


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_an_archive_is_no_pipe_and_no_link_out_of_the_source(tmp_path: Path, layout: str) -> None:
    ending = {"webdataset": "tar", "parquet": "parquet"}[layout]
    (tmp_path / "in").mkdir()
    (tmp_path / f"secret.{ending}").write_bytes(tar_of([member("a.png", IMAGE)]))
    (tmp_path / f"in/c.{ending}").symlink_to(f"../secret.{ending}")
    os.mkfifo(tmp_path / f"in/d.{ending}")
    (link, pipe), _ = read(source(tmp_path / "in", layout))
    assert link.problem is not None and link.problem[0] == RejectReason.LINK_OUTSIDE_SOURCE
    assert pipe.problem == (RejectReason.DAMAGED_ARCHIVE, f"{tmp_path}/in/d.{ending}: not a regular file")
    os.mkfifo(tmp_path / f"alone.{ending}")
    with pytest.raises(InputError, match=r"neither a file nor a folder"):
        sources.list_files(source(tmp_path / f"alone.{ending}", layout))


def test_the_number_of_kinds_is_bounded() -> None:
    counts = {f".x{number:02d}": number + 1 for number in range(50)} | {"other": 3}
    kept = listing.bounded(counts, 5)
    assert kept == {".x45": 46, ".x46": 47, ".x47": 48, ".x48": 49, ".x49": 50, "other": sum(range(1, 46)) + 3}
    assert listing.in_words({".txt": 1_200, "links": 3, ".md": 3}) == "1,200 .txt, 3 .md, 3 links"
