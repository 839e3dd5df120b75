"""Hostile tars and Parquet files, through the real ingest: each affects only itself, and its reject has a reason.

A good archive beside them shows that ingest continues; a listing of the folder, that nothing was written elsewhere.
"""

import bz2
import gzip
import io
import os
import resource
import subprocess
import sys
import tarfile
import zipfile
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import ingest
from curation.engine.runner import InlineRunner
from curation.errors import InputError, RejectBudgetError
from curation.files import parquet, paths, schemas
from curation.images import sources, tar_members
from curation.images.decode import ImageLimits, RejectReason
from curation.images.hashing import image_id
from curation.images.sources import Layout, SourceConfig
from curation.ingest import IngestConfig
from tests.curation.builders import encoded_image
from tests.curation.images.tars import member, raw_header, tar_of

GOOD = encoded_image(1)
LIMITS = ImageLimits(max_bytes=200_000)
HOSTILE_NAMES = [
    "/etc/cron.d/absolute.png",
    "../../../../tmp/escape.png",
    "a/../../b.png",
    "..\\windows.png",
    "C:\\autoexec.png",
    "n" * 300 + ".png",
    "deep/" * 2000 + "x.png",
    "new\nline.png",
    "\x1b[2J\x1b]0;title\x07.png",
    "<script>alert(1)</script>.png",
    "-rf.png",
    "half\udc80.png",
    "\u202egnp.exe.png",
    " .png",
]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(record: bytes) -> bytes:
    """An extended header with one record, preceded by its length."""
    length = len(record) + 2
    while len(str(length)) + len(record) + 2 != length:
        length += 1
    text = b"%d %s\n" % (length, record)
    return raw_header("pax", len(text), tarfile.XHDTYPE) + padded(text)


START = tar_of([member("first.png", encoded_image(2))])[: 512 + len(padded(encoded_image(2)))]
END = bytes(1024)
REAL = tar_of([member("real.png", encoded_image(3))])


Rows = list[dict[str, Any]]


def run_ingest(
    folder: Path, archives: dict[str, bytes], layout: Layout = "webdataset", **columns: str
) -> dict[str, tuple[Rows, Rows]]:
    """The accepted and the rejected rows of each archive in one ingest, by name; a good archive is among them."""
    inputs, output = folder / "sources", str(folder / "out")
    extension = "tar" if layout == "webdataset" else "parquet"
    good = tar_of([member("good.png", GOOD)]) if layout == "webdataset" else parquet_of(pa.table({"image": [GOOD]}))
    inputs.mkdir()
    for name, data in {**archives, "good": good}.items():
        (inputs / f"{name}.{extension}").write_bytes(data)
    source = SourceConfig.model_validate(
        {"name": "hostile", "path": str(inputs), "role": "pool", "layout": layout} | columns
    )
    before = listing(folder.parent)
    config = IngestConfig(sources=(source,), limits=LIMITS, max_reject_fraction=1)
    manifest = ingest.run(config, output, InlineRunner())
    assert all(path.startswith(output) for path in listing(folder.parent) - before), "written elsewhere"
    accepted, rejected = (
        [
            row
            for name in manifest.files(kind)
            for row in parquet.read_table(paths.join(output, name), schema).to_pylist()
        ]
        for kind, schema in (("images", schemas.IMAGES), ("rejects", schemas.REJECTS))
    )
    assert {row["reason"] for row in rejected} <= {str(reason) for reason in RejectReason}
    counts = len(accepted) + len(rejected), len(accepted), len(rejected)
    assert [manifest.totals[name] for name in ("images", "accepted", "rejected")] == list(counts)
    results: dict[str, tuple[Rows, Rows]] = {name: ([], []) for name in (*archives, "good")}
    for kind, rows in enumerate((accepted, rejected)):
        for row in rows:
            results[Path(row["uri"].partition("#")[0]).stem][kind].append(row)
    good_rows, good_rejects = results.pop("good")
    assert ids(good_rows) == [image_id(GOOD)] and good_rejects == []
    return results


def listing(folder: Path) -> set[str]:
    return {os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names}


def ids(accepted: list[dict[str, Any]]) -> list[str]:
    return [row["image_id"] for row in accepted]


def test_members_of_every_kind(tmp_path: Path) -> None:
    """Names with paths, links, devices, repeated names and nested archives: none is followed or opened."""
    (tmp_path / "secret.png").write_bytes(encoded_image(66))
    named = [member(name, encoded_image(number)) for number, name in enumerate(HOSTILE_NAMES)]
    targets = [
        (tarfile.SYMTYPE, str(tmp_path / "secret.png")),
        (tarfile.SYMTYPE, "../secret.png"),
        (tarfile.LNKTYPE, "real.png"),
        (tarfile.LNKTYPE, "/etc/passwd"),
        (tarfile.CHRTYPE, ""),
        (tarfile.BLKTYPE, ""),
        (tarfile.FIFOTYPE, ""),
        (tarfile.DIRTYPE, ""),
    ]
    linked = [
        member(f"{number}.png", b"", kind, linkname=target, devmajor=1, devminor=5)
        for number, (kind, target) in enumerate(targets)
    ]
    bombs = [gzip.compress(bytes(20_000_000)), bz2.compress(bytes(20_000_000))]
    archives = [REAL, gzip.compress(REAL), *bombs, zip_of(GOOD)]
    nested = [
        member(name, data)
        for number, data in enumerate(archives)
        for name in (f"{number}.tar", f"{number}.gz", f"{number}.png")
    ]
    results = run_ingest(
        tmp_path,
        {
            "names": tar_of(named),
            "nul": pax(b"path=nul\0byte.png") + REAL,
            "links": tar_of([*linked, member("real.png", encoded_image(3))]),
            "same": tar_of([member("same.png", encoded_image(number)) for number in range(4)]),
            "nested": tar_of(nested),
            "sizes": tar_of([member("huge.png", bytes(200_001)), member("a.png", GOOD[:50]), member("b.png", b"")]),
            "holes": START
            + b"".join(map(sparse_member, ("a.png", "half\udc80.png", "esc\x1b[2J.png", "s.json")))
            + REAL,
            "deep label": tar_of([member("a.png", GOOD), member("a.json", b"[" * 100_000)]),
            "huge label": tar_of([member("a.cls", b"x" * 2_000_000), member("a.png", GOOD)]),
            "long label": tar_of([member("a.png", GOOD), member("a.json", b'{"label": "%s"}' % (b"y" * 1001))]),
        },
    )
    assert ids(results["names"][0]) == [image_id(data) for _, data in named] and results["names"][1] == []
    for kind in ("nul", "links"):
        assert ids(results[kind][0]) == [image_id(encoded_image(3))] and results[kind][1] == [], kind
    assert ids(results["same"][0]) == [image_id(encoded_image(number)) for number in range(4)]
    assert len({row["offset"] for row in results["same"][0]}) == 4
    assert results["nested"][0] == [] and reasons(results["nested"][1]) == ["not_an_image"] * 5
    assert results["sizes"][0] == [] and reasons(results["sizes"][1]) == ["too_many_bytes", "truncated", "empty"]
    assert ids(results["holes"][0]) == [image_id(encoded_image(2)), image_id(encoded_image(3))]
    assert reasons(results["holes"][1]) == ["unreadable"] * 3
    assert all("stored sparse" in row["detail"] and row["detail"].isprintable() for row in results["holes"][1])
    for kind in ("deep label", "huge label", "long label"):
        assert [row["label"] for row in results[kind][0]] == [None], kind


def reasons(rejected: Rows) -> list[str]:
    return [row["reason"] for row in rejected]


def sparse_member(name: str, size: int = 1 << 60) -> bytes:
    """A member that states `size` bytes of holes, in GNU's format 1.0."""
    text = padded(b"1\n0\n0\n")
    fields = (b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.name=" + name.encode(errors="surrogateescape"))
    lines = b"".join(b"%d %s\n" % (len(field) + 4, field) for field in (*fields, b"GNU.sparse.realsize=%d" % size))
    return raw_header("pax", len(lines), tarfile.XHDTYPE) + padded(lines) + raw_header("x", len(text)) + text


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "holes.png").touch()
    os.truncate(tmp_path / "holes.png", 1 << 40)
    source = SourceConfig(name="hostile", path=str(tmp_path), role="pool")
    (item,) = sources.read_source(source, ("holes.png",), max_bytes=200_000)
    assert item.problem == (RejectReason.TOO_MANY_BYTES, f"{1 << 40} bytes; max_bytes is 200000")


def zip_of(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", data)
    return buffer.getvalue()


DAMAGED = {
    "gzip": gzip.compress(REAL),
    "gzip bomb": gzip.compress(bytes(20_000_000)),
    "bzip2 bomb": bz2.compress(bytes(20_000_000)),
    "zlib": zlib.compress(REAL),
    "zip": zip_of(GOOD),
    "empty": b"",
    "no tar": b"GIF89a" + bytes(2000),
    "cut in a header": START + REAL[:300],
    "cut in a member": START + REAL[:700],
    "cut before the end": START,
    "a member of 2^60 bytes": START + raw_header("a.png", 1 << 60) + REAL,
    "a text of 2^60 bytes": START + raw_header("a.txt", 1 << 60) + REAL,
    "a name of 2^60 bytes": START + raw_header("a", 1 << 60, tarfile.GNUTYPE_LONGNAME) + REAL,
    "a link of 2^33 bytes": START + raw_header("a", 1 << 33, tarfile.GNUTYPE_LONGLINK) + REAL,
    "attributes of 2^60 bytes": START + raw_header("a", 1 << 60, tarfile.XHDTYPE) + REAL,
    "attributes for all of 2^40 bytes": START + raw_header("a", 1 << 40, tarfile.XGLTYPE) + REAL,
    "a size of 2^60 by attribute": START + pax(b"size=%d" % (1 << 60)) + REAL,
    "a size below zero by attribute": START + pax(b"size=-512") + REAL,
    "a size that is no number": START + pax(b"size=abc") + REAL,
    "attributes of two megabytes": START + pax(b"comment=" + b"x" * 2_000_000) + REAL,
    "a megabyte of digits": START + raw_header("a", 1_000_000, tarfile.XHDTYPE) + padded(b"1" * 1_000_000) + REAL,
    "names of names": START + raw_header("a", 0, tarfile.GNUTYPE_LONGNAME) * 2_000 + REAL,
    "attributes of attributes": START + raw_header("a", 0, tarfile.XHDTYPE) * 2_000 + REAL,
    "holes that are cut off": START + raw_header("a.png", 0, tarfile.GNUTYPE_SPARSE, at_482=b"\1"),
    "holes without end": START + raw_header("a.png", 0, tarfile.GNUTYPE_SPARSE, at_482=b"\1") + (b"1" * 512) * 10_000,
    "a map of holes without end": START
    + pax(b"GNU.sparse.major=1\n22 GNU.sparse.minor=0")
    + raw_header("a.png", 2_000_000)
    + b"999999999\n"
    + b"0\n" * 1_000_000,
    "a wrong checksum": START + REAL[:148] + b"0000000\0" + REAL[156:],
}


def test_a_damaged_tar_is_one_reject(tmp_path: Path) -> None:
    for kind, (accepted, rejected) in run_ingest(tmp_path, DAMAGED).items():
        *before, last = reasons(rejected)
        assert last == "damaged_archive" and set(before) <= {"empty", "too_many_bytes"}, (
            kind
        )  # images before the damage
        assert rejected[-1]["uri"] == f"{tmp_path}/sources/{kind}.tar"
        assert "not a readable plain tar" in rejected[-1]["detail"]
        # Images before the damage are kept.
        kept = [image_id(encoded_image(2)), image_id(GOOD)]
        assert ids(accepted) in ([], kept[:1], kept[1:], kept), kind


def mutated_tar(seed: int) -> bytes:
    """Headers of all kinds with random bytes and valid checksums."""
    rng = np.random.default_rng(seed)
    kinds = [bytes([kind]) for kind in b"01234567LKSxgXDNV\0"]
    data = START
    for _ in range(int(rng.integers(1, 5))):
        changed = {f"at_{rng.integers(500)}": rng.bytes(int(rng.integers(1, 12)))}
        size = int(rng.choice([0, 5, 512, 700, 1 << 40]))
        data += raw_header("m.png", size, kinds[rng.integers(len(kinds))], **changed)
        data += rng.bytes(512 * int(rng.integers(0, 3)))
    return data + (REAL if rng.random() < 0.5 else END)


def test_mutated_headers_are_read_or_refused(tmp_path: Path) -> None:
    results = run_ingest(tmp_path, {f"{seed:04d}": mutated_tar(seed) for seed in range(100)})
    seen = {reason for _, rejected in results.values() for reason in reasons(rejected)}
    assert {"damaged_archive", "not_an_image"} <= seen <= {"damaged_archive", "not_an_image", "empty", "unreadable"}


def test_a_sample_of_too_many_images_is_read_in_parts(tmp_path: Path) -> None:
    count = tar_members.MAX_IMAGES_IN_SAMPLE + 2
    path = tmp_path / "many.tar"
    source = SourceConfig(name="hostile", path=str(path), role="pool", layout="webdataset")
    path.write_bytes(raw_header("same.png", 0) * count + END)
    items = list(sources.read_source(source, ("",), max_bytes=10))
    assert [item.data for item in items] == [b""] * count
    # The first part was given without this label.
    path.write_bytes(raw_header("same.png", 0) * count + tar_of([member("same.cls", b"7")]))
    *given, last = sources.read_source(source, ("",), max_bytes=10)
    assert [item.label for item in given] == [None] * count
    assert last.problem is not None and last.problem[0] == RejectReason.DAMAGED_ARCHIVE


def test_damaged_archives_have_their_own_budget(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02d}.tar").write_bytes(tar_of([member("a.png", encoded_image(number))]))
    (folder / "03.tar").write_bytes(b"")
    source = SourceConfig(name="web", path=str(folder), role="pool", layout="webdataset")
    config = IngestConfig(sources=(source,), max_reject_fraction=0.05)
    manifest = ingest.run(config, str(tmp_path / "out"), InlineRunner())
    assert manifest.rejects == {"damaged_archive": 1} and manifest.totals["accepted"] == 19
    (folder / "17.tar").write_bytes(START)
    with pytest.raises(
        RejectBudgetError, match=r"2 of 20 tars and Parquet files.*The first: .*03\.tar: not a readable"
    ):
        ingest.run(config, str(tmp_path / "out"), InlineRunner(), replace=True)


# Parquet


def parquet_of(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


WHOLE = parquet_of(pa.table({"image": [encoded_image(number) for number in range(4)]}))
DAMAGED_PARQUET = {
    "empty": b"",
    "no Parquet": b"PAR1" + bytes(100) + b"PAR1",
    "without its footer": WHOLE[:-500],
    "cut in its footer": WHOLE[:-20],
    "a footer longer than the file": WHOLE[:-8] + b"\xff\xff\xff\x7fPAR1",
    "pages overwritten": WHOLE[:20] + b"\xff" * 300 + WHOLE[320:],
}


def labelled(*labels: bytes) -> pa.Table:
    """Images with labels that may be invalid UTF-8."""
    values = pa.array(labels, pa.binary())
    text = pa.StringArray.from_buffers(len(labels), values.buffers()[1], values.buffers()[2])
    return pa.table({"image": [encoded_image(number) for number in range(len(labels))], "label": text})


def restated(data: bytes, size: int) -> bytes:
    """A Parquet file of one column whose footer states `size` as its unpacked bytes."""
    stated = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(0).total_uncompressed_size
    length = len(varint(stated, 0))
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    changed = data[:start] + data[start:].replace(varint(stated, 0), varint(size, length))
    assert pq.ParquetFile(io.BytesIO(changed)).metadata.row_group(0).column(0).total_uncompressed_size == size
    return changed


def varint(number: int, length: int) -> bytes:
    """A whole number as Thrift's compact protocol writes it, filled up to `length` bytes."""
    digits, left = [], number << 1
    while left or len(digits) < max(1, length):
        digits.append(left & 127 | 128)
        left >>= 7
    return bytes([*digits[:-1], digits[-1] & 127])


def test_a_damaged_parquet_file_is_one_reject(tmp_path: Path) -> None:
    for kind, (accepted, rejected) in run_ingest(tmp_path, DAMAGED_PARQUET, "parquet", image_column="image").items():
        assert reasons(rejected) == ["damaged_archive"] and accepted == [], kind


READ = """
import resource, sys
from curation.images.sources import SourceConfig, read_source
source = SourceConfig(name="x", path=sys.argv[1], role="pool", layout="parquet", image_column="image")
for name in sys.argv[2:]:
    (item,) = read_source(source, (name,), max_bytes=200_000)
    print(*item.problem)
peak = int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])  # kilobytes, as below
peaks = peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
assert peaks[0] < 200_000 and peaks[1] < 900_000, peaks
"""


def test_a_parquet_bomb_is_refused_whatever_its_footer_states(tmp_path: Path) -> None:
    """A file of 20 kB that unpacks to 560 MB, with a footer of true, too small and too large sizes.

    In a process of its own, whose peak of memory is not that of other tests.
    """
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False, "write_batch_size": 1}
    bomb = parquet_of(pa.table({"image": [bytes(80_000_000 + number) for number in range(7)]}), **options)
    assert len(bomb) < 25_000
    bombs = {"true": bomb, "small": restated(bomb, 5_000), "large": restated(bomb, 5 << 30)}
    for name, data in bombs.items():
        (tmp_path / f"{name}.parquet").write_bytes(data)
    command = [sys.executable, "-c", READ, str(tmp_path), *(f"{name}.parquet" for name in bombs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith(f"damaged_archive {tmp_path}/") for line in lines) and len(lines) == 3
    assert all("more memory than the sizes in its footer allow" in line for line in lines[:2])
    assert "5368709120 bytes unpacked, and 4294967296 at most are read" in lines[2]


def test_millions_of_rows_without_an_image_are_one_reject(tmp_path: Path) -> None:
    """They count as one image for the budget of rejects, so that they hide no others."""
    images = pa.array([None] * 1_000_000 + [GOOD, GOOD[:50]], pa.binary())
    (tmp_path / "web").mkdir()
    (tmp_path / "web/a.parquet").write_bytes(data := parquet_of(pa.table({"image": images})))
    assert len(data) < 10_000
    source = SourceConfig(name="web", path=str(tmp_path / "web"), role="pool", layout="parquet", image_column="image")
    config = IngestConfig(sources=(source,), max_reject_fraction=0.7)
    manifest = ingest.run(config, str(tmp_path / "out"), InlineRunner())
    assert manifest.totals == {"images": 3, "accepted": 1, "rejected": 2}
    rejected = parquet.read_table(f"{tmp_path}/out/rejects-00000.parquet", schemas.REJECTS).to_pylist()
    assert [(row["reason"], row["detail"]) for row in rejected][1:] == [
        ("empty", "the image column is null in 1,000,000 of 1,000,002 rows; the first is row 0")
    ]


def parquet_source(path: Path, **columns: str) -> SourceConfig:
    values = {"name": "web", "path": str(path), "role": "pool", "layout": "parquet", "image_column": "image"}
    return SourceConfig.model_validate(values | columns)


def test_rows_that_the_footer_leaves_out_are_damage(tmp_path: Path) -> None:
    images = pa.table({"image": pa.array([encoded_image(number) for number in range(61)], pa.binary())})
    data = bytearray(parquet_of(images, use_dictionary=False))
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    position = data.rindex(bytes([0x16, 2 * 61]), footer)  # the row group's number of rows, as Thrift writes 61
    source = SourceConfig(
        name="web", path=str(tmp_path / "a.parquet"), role="pool", layout="parquet", image_column="image"
    )
    for stated in (10, 63):
        data[position + 1] = 2 * stated
        (tmp_path / "a.parquet").write_bytes(data)
        (item,) = sources.read_source(source, ("",), max_bytes=10**6)
        assert item.problem is not None and item.problem[0] == RejectReason.DAMAGED_ARCHIVE


@pytest.mark.parametrize("encoding", ["DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"])
def test_columns_of_delta_encodings_are_read(encoding: str, tmp_path: Path) -> None:
    table = pa.table({"image": [encoded_image(1), encoded_image(2)], "label": ["a", "ab"]})
    options = {"use_dictionary": False, "column_encoding": {"image": encoding, "label": encoding}}
    (tmp_path / "a.parquet").write_bytes(parquet_of(table, **options))
    source = parquet_source(tmp_path / "a.parquet", label_column="label")
    items = list(sources.read_source(source, ("",), max_bytes=10**6))
    assert [(item.data, item.label) for item in items] == list(zip(*table.to_pydict().values(), strict=True))


def test_a_column_without_any_value_is_one_reject(tmp_path: Path) -> None:
    """As pandas writes it: its type is null."""
    (tmp_path / "a.parquet").write_bytes(parquet_of(pa.table({"image": pa.nulls(5)})))
    source = SourceConfig(
        name="web", path=str(tmp_path / "a.parquet"), role="pool", layout="parquet", image_column="image"
    )
    (item,) = sources.read_source(source, ("",), max_bytes=10**6)
    assert item.problem == (RejectReason.EMPTY, "the image column is null in 5 of 5 rows; the first is row 0")


@pytest.mark.parametrize("repeated", ["image", "label"])
def test_a_value_shared_by_thousands_of_rows_is_in_memory_once(tmp_path: Path, repeated: str) -> None:
    """A file of some kilobytes that would unpack to 40 GB: 2,000 rows of 20 MB."""
    path = tmp_path / "a.parquet"
    huge = pa.DictionaryArray.from_arrays(pa.array([0] * 2_000, pa.int32()), pa.array([" " * 20_000_000]))
    huge = huge.cast(pa.dictionary(pa.int32(), pa.binary())) if repeated == "image" else huge
    columns = {"image": pa.array([GOOD] * 2_000), "label": pa.array(["x"] * 2_000)} | {repeated: huge}
    options = {"compression": "zstd", "store_schema": False, "dictionary_pagesize_limit": 1 << 28}
    pq.write_table(pa.table(columns), path, **options)
    assert path.stat().st_size < 10_000
    source = SourceConfig(
        name="hostile", path=str(path), role="pool", layout="parquet", image_column="image", label_column="label"
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    items = islice(sources.read_source(source, ("",), max_bytes=200_000), 20)
    lengths = [item.length for item in items]
    assert lengths == [20_000_000 if repeated == "image" else len(GOOD)] * 20
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 500_000_000


def test_invalid_labels_are_repaired_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(labelled(b"good", b"\xff\xfe", b"z" * 5_000, b"esc\x1b"), path)
    columns = {"image_column": "image", "label_column": "label"}
    source = SourceConfig.model_validate(
        {"name": "hostile", "path": str(path), "role": "pool", "layout": "parquet"} | columns
    )
    items = list(sources.read_source(source, ("",), max_bytes=200_000))
    assert [item.label for item in items] == ["good", "\ufffd\ufffd", None, "esc\x1b"]


def test_columns_of_the_wrong_type_are_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    source = SourceConfig(name="hostile", path=str(path), role="pool", layout="parquet", image_column="image")
    for column in ([1, 2], ["text"] * 2, [[b"x"]] * 2, [1.5, None]):
        pq.write_table(pa.table({"image": column}), path)
        with pytest.raises(InputError, match=r"Set image_column|lies inside a list"):
            list(sources.read_source(source, ("",), max_bytes=200_000))
