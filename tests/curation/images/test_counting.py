"""Counts by headers against the images that ingest reads: messy folders, tars and Parquet files."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.errors import InputError
from curation.images import counting, sources
from curation.images.counting import count_images
from curation.images.decode import RejectReason
from curation.images.sources import Layout, SourceConfig
from tests.curation.builders import encoded_image
from tests.curation.images.tars import member, raw_header, tar_of


def source(path: Path, layout: Layout, **columns: str) -> SourceConfig:
    return SourceConfig.model_validate({"name": "web", "path": str(path), "role": "pool", "layout": layout, **columns})


def num_read(config: SourceConfig) -> tuple[int, int]:
    """The images that ingest reads, with those it rejects, and the archives that it cannot read to their end."""
    files = tuple(file.path for file in sources.list_source(config).files)
    problems = [item.problem for item in sources.read_source(config, files, max_bytes=10_000)]
    of_archives = (RejectReason.DAMAGED_ARCHIVE, RejectReason.LINK_OUTSIDE_SOURCE)
    num_damaged = sum(problem is not None and problem[0] in of_archives for problem in problems)
    return len(problems) - num_damaged, num_damaged


def messy_tar(number: int) -> bytes:
    """Images with sidecars, captions, system files, links, folders, names without an ending, and members of no kind."""
    members = [member("folder", b"", tarfile.DIRTYPE), member("._a.png", b"x"), member("__MACOSX/b.png", b"x")]
    for index in range(5 + number):
        picture = encoded_image(index)
        members += [member(f"{index:04d}.png", picture), member(f"{index:04d}.json", b'{"label": 1}')]
        members += [member(f"{index:04d}.txt", b"a caption")]
    members += [member("link.png", b"", tarfile.SYMTYPE, linkname="0000.png"), member("unnamed", encoded_image(1))]
    members += [member("notes", b"no image"), member("large.jpg", bytes(20_000)), member("empty.jpg", b"")]
    return tar_of(members)


def test_messy_tars_are_counted_as_ingest_reads_them(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.tar").write_bytes(messy_tar(number))
    (tmp_path / "behind.tar").write_bytes(messy_tar(0) + messy_tar(1))
    (tmp_path / "cut.tar").write_bytes(messy_tar(4)[:9_000])
    (tmp_path / "none.tar").write_bytes(b"")
    (tmp_path / "sparse.tar").write_bytes(raw_header("hole.png", 0, tarfile.GNUTYPE_SPARSE) + messy_tar(0))
    (tmp_path / "out.tar").symlink_to("/etc/hostname")
    (tmp_path / "notes.txt").write_text("none")
    config = source(tmp_path, "webdataset")
    images, num_damaged = num_read(config)
    count = count_images(config)
    assert count.is_exact and (count.images, len(count.damaged)) == (images, num_damaged)
    assert num_damaged >= 3 and images > 40
    assert count.pixels == 24 * 20


def test_neither_images_nor_sidecars_of_a_tar_are_read_to_count_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = (("jpg", bytes(1 << 20)), ("json", b'"%s"' % bytes(50_000)))
    members = [member(f"{index}.{ending}", data) for index in range(20) for ending, data in kinds]
    (tmp_path / "0.tar").write_bytes(tar_of(members))
    num_bytes = 0
    read = counting.paths.RetryingFile.read

    def counted(self: io.RawIOBase, size: int = -1) -> bytes:
        nonlocal num_bytes
        num_bytes += len(data := read(self, size))  # type: ignore[arg-type]
        return data

    monkeypatch.setattr(counting.paths.RetryingFile, "read", counted)
    monkeypatch.setattr(counting, "PICTURE_BYTES", 64)
    assert count_images(source(tmp_path, "webdataset")).images == 20
    assert num_bytes < 100_000


@pytest.mark.parametrize("with_statistics", [True, False])
def test_parquet_is_counted_by_its_footer(tmp_path: Path, with_statistics: bool) -> None:
    values = [None if row % 5 == 0 else {"bytes": encoded_image(row)} for row in range(23)]
    table = pa.table({"image": pa.array(values)})
    for number in range(2):
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=7, write_statistics=with_statistics)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    count = count_images(source(tmp_path, "parquet"))
    assert count.images == 2 * (18 if with_statistics else 23)
    assert count.pixels == 24 * 20
    assert [Path(uri).name for uri in count.damaged] == ["broken.parquet"]
    with pytest.raises(InputError, match="no column nothing"):
        count_images(source(tmp_path, "parquet", image_column="nothing"))


def test_a_folder_counts_images_by_name_and_by_first_bytes(tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes(encoded_image(index))
    (tmp_path / "unnamed").write_bytes(encoded_image(9))
    (tmp_path / "notes").write_text("no image")
    (tmp_path / "caption.txt").write_text("none")
    config = source(tmp_path, "folder")
    count = count_images(config)
    assert (count.images, num_read(config)[0]) == (5, 5)
    assert count.pixels == 24 * 20 and count.is_exact


def test_many_images_are_counted_by_a_part_that_the_names_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(10):
        members = (member(f"{index}.png", encoded_image(index)) for index in range(20))
        (tmp_path / f"{number}.tar").write_bytes(tar_of(members))
    config = source(tmp_path, "webdataset")
    assert count_images(config).images == 200
    for limit, tolerance in ((50, 0.2), (5, 0.4)):  # the end of a tar is no member
        monkeypatch.setattr(counting, "MAX_IMAGES", limit)
        count = count_images(config)
        assert not count.is_exact and count.num_counted < 4
        assert count.images == pytest.approx(200, rel=tolerance)
        assert count_images(config) == count
