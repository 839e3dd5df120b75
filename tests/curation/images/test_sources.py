"""Sources: every layout lists the same images every time, untrusted files do no harm, references read back."""

import gzip
import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from curation.errors import DamagedFileError, InputError
from curation.files import paths
from curation.images import sources
from curation.images.decode import RejectReason
from curation.images.hashing import image_id
from curation.images.parquet_rows import ImageRow, ParquetRows
from curation.images.sources import Layout, ReferenceReader, SourceConfig, SourceItem
from tests.curation.builders import encoded_image
from tests.curation.images.tars import member, raw_header, tar_of


def source(path: str | Path, layout: str = "folder", **columns: str) -> SourceConfig:
    return SourceConfig.model_validate(
        {"name": "photos", "path": str(path), "role": "pool", "layout": layout, **columns}
    )


def read(config: SourceConfig) -> list[SourceItem]:
    files = tuple(file.path for file in sources.list_files(config))
    return list(sources.read_source(config, files, max_bytes=10_000_000))


def damage(items: Sequence[SourceItem]) -> str | None:
    """The problem of the only archive of a source; None if it was read to its end."""
    problems = [item.problem[1] for item in items if item.problem and item.problem[0] == RejectReason.DAMAGED_ARCHIVE]
    assert len(problems) <= 1
    return problems[0] if problems else None


def read_tar(path: Path, data: bytes) -> list[SourceItem]:
    path.write_bytes(data)
    return read(source(path, "webdataset"))


def contents(items: Sequence[SourceItem]) -> list[tuple[str | None, bytes | None]]:
    return [(item.label, item.data) for item in items]


def references_read_back(items: Sequence[SourceItem], layout: Layout = "folder") -> None:
    """Checks every reference, in the order of the source and in a random order."""
    reader = ReferenceReader()
    good = [item for item in items if item.data is not None]
    for item in [*good, *(good[i] for i in np.random.default_rng(0).permutation(len(good)))]:
        assert item.data is not None and item.length == len(item.data)
        assert reader.read(item.uri, item.offset, item.length, image_id(item.data), layout) == item.data
    reader.close()


# Folders


ODD_NAMES = ["plain.png", "a::b.jpg", "a#b.png", "a?b&c.png", "a b.PNG", "*[a].png", "ü☃.webp", "-x.gif", "s3:.png"]
ODD_NAMES += ["x.parquet#y.png"]  # no image in a Parquet file


@pytest.mark.parametrize("root", ["local", "url", "memory"])
def test_folder_is_listed_by_path_with_its_folders_as_labels(tmp_path: Path, root: str) -> None:
    base = {"local": str(tmp_path), "url": f"file://{tmp_path}", "memory": f"memory://{tmp_path.name}"}[root]
    names = [*ODD_NAMES, "cats/one.jpg", "cats/young::est/two.jpeg", "dogs#1/three.tiff"]
    for name in [*names, "notes.txt", "cats/png", ".hidden", "cats/one.jpg.part", "b.tar"]:
        paths.write_bytes(paths.join(base, name), name.encode())
    config = source(base)
    files = sources.list_files(config)
    assert [file.path for file in files] == sorted(names)
    assert [file.size for file in files] == [len(name.encode()) for name in sorted(names)]
    items = read(config)
    assert [item.uri for item in items] == [f"{base}/{name}" for name in sorted(names)]
    assert contents(items) == [(os.path.dirname(name) or None, name.encode()) for name in sorted(names)]
    references_read_back(items)
    assert read(source(base + "/")) == items, "a trailing slash changes nothing"


def test_chosen_files_are_read_in_the_given_order(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(b"%d" % number)
    items = sources.read_source(source(tmp_path), ("3.png", "1.png"), max_bytes=1)
    assert [item.data for item in items] == [b"3", b"1"]


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_links_within_the_source_are_read_and_links_out_of_it_are_rejected(tmp_path: Path, prefix: str) -> None:
    inside, outside = tmp_path / "in", tmp_path / "in-not"
    (inside / "deep").mkdir(parents=True)
    outside.mkdir()
    (inside / "real.png").write_bytes(b"inside")
    (outside / "secret.png").write_bytes(b"secret")
    (inside / "deep/same.png").symlink_to("../real.png")
    (inside / "absolute.png").symlink_to(inside / "real.png")
    (inside / "out.png").symlink_to(outside / "secret.png")
    (inside / "up.png").symlink_to("../in-not/secret.png")
    (inside / "deep/chain.png").symlink_to("../out.png")
    (inside / "broken.png").symlink_to("nothing.png")
    (inside / "loop.png").symlink_to("loop.png")
    (inside / "folder.png").symlink_to("deep")
    (inside / "deep/round").symlink_to("..")
    (inside / "elsewhere").symlink_to(outside)
    config = source(f"{prefix}{inside}")
    items = {item.uri.removeprefix(f"{prefix}{inside}/"): item for item in read(config)}
    assert {name: item.data for name, item in items.items() if item.data is not None} == {
        "real.png": b"inside",
        "deep/same.png": b"inside",
        "absolute.png": b"inside",
    }
    reasons = {name: item.problem[0] for name, item in items.items() if item.problem}
    assert reasons == {
        "out.png": RejectReason.LINK_OUTSIDE_SOURCE,
        "up.png": RejectReason.LINK_OUTSIDE_SOURCE,
        "deep/chain.png": RejectReason.LINK_OUTSIDE_SOURCE,
        "broken.png": RejectReason.UNREADABLE,
        "loop.png": RejectReason.UNREADABLE,
        "folder.png": RejectReason.UNREADABLE,
    }


def test_a_source_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.png").write_bytes(b"a")
    (tmp_path / "link").symlink_to("real")
    assert contents(read(source(tmp_path / "link"))) == [(None, b"a")]


def test_each_unreadable_file_is_one_reject(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    os.mkfifo(tmp_path / "pipe.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(b"latin")
    config = source(tmp_path)
    listed = sources.list_files(config)
    assert len(sources.listing_hash(listed)) == 64
    good, latin, pipe = read(config)
    assert good.data == b"a"
    assert latin.problem is not None and latin.problem[0] == RejectReason.UNREADABLE and "UTF-8" in latin.problem[1]
    assert latin.uri == f"{tmp_path}/caf\\xe9.png", "the name can be written to a table"
    assert pipe.problem == (RejectReason.UNREADABLE, "not a regular file")
    (tmp_path / "a.png").unlink()
    gone = next(iter(sources.read_source(config, ("a.png",), max_bytes=1)))
    assert gone.data is None and gone.problem is not None and gone.problem[0] == RejectReason.UNREADABLE


def test_sources_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"source 'photos': there is nothing at '.*/nothing'"):
        sources.list_files(source(tmp_path / "nothing"))
    for layout in ("folder", "webdataset", "parquet"):
        with pytest.raises(InputError, match=rf"source 'photos': no images in .*layout, which is '{layout}'"):
            sources.list_files(source(tmp_path, layout))
    (tmp_path / "a.png").write_bytes(b"a")
    with pytest.raises(InputError, match=r"looked for files ending in tar"):
        sources.list_files(source(tmp_path, "webdataset"))
    for layout, expected in (
        ("folder", "a folder"),
        ("webdataset", r"a folder or a \.tar file"),
        ("parquet", r"\.parquet"),
    ):
        with pytest.raises(InputError, match=rf"'.*/a\.png' is a file; layout '{layout}' needs .*{expected}"):
            sources.list_files(source(tmp_path / "a.png", layout))


def test_listing_hash_depends_on_names_and_sizes(tmp_path: Path) -> None:
    def listing() -> str:
        return sources.listing_hash(sources.list_files(source(tmp_path)))

    (tmp_path / "a.png").write_bytes(b"1")
    seen = {listing()}
    assert listing() in seen
    (tmp_path / "b.png").write_bytes(b"1")
    seen.add(listing())
    (tmp_path / "b.png").write_bytes(b"22")
    seen.add(listing())
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    seen.add(listing())
    assert len(seen) == 4


# Tars


def plain_tar(members: Sequence[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    return tar_of([member(name, data) for name, data in members], format)


def test_tar_of_the_webdataset_library(tmp_path: Path) -> None:
    pictures = [encoded_image(number, "JPEG") for number in range(6)]
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number, picture in enumerate(pictures):
            sample: dict[str, Any] = {"__key__": f"dir/{number:04d}", "jpg": picture}
            sidecars: list[dict[str, Any]] = [
                {"cls": number},
                {"json": {"label": f"name {number}"}},
                {"txt": "caption"},
            ]
            writer.write(sample | sidecars[number % 3])
    items = read(source(tmp_path, "webdataset"))
    labels = ["0", "name 1", None, "3", "name 4", None]
    assert contents(items) == list(zip(labels, pictures, strict=True))
    assert {item.uri for item in items} == {f"{tmp_path}/a.tar"}
    references_read_back(items)


def test_tar_of_img2dataset(tmp_path: Path) -> None:
    pictures = [encoded_image(number, "WEBP") for number in range(3)]
    members = []
    for number, picture in enumerate(pictures):
        facts = {"url": "http://x/y.png", "key": f"{number:09d}", "status": "success", "width": 24, "sha256": None}
        members += [
            (f"{number:09d}.webp", picture),
            (f"{number:09d}.json", json.dumps(facts | ({"label": number} if number else {})).encode()),
            (f"{number:09d}.txt", "wörds".encode()),
        ]
    items = read_tar(tmp_path / "00000.tar", plain_tar(members))
    assert contents(items) == list(zip([None, "1", "2"], pictures, strict=True))
    references_read_back(items)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_in_a_tar_are_never_paths(tmp_path: Path, format: int) -> None:
    names = ["../../escape.png", "/etc/absolute.png", "a::b.png", "a#b.png", "UPPER.JPG", "x/" * 45 + "long.png"]
    names += ["ü☃.png", "a.seg.png", "a.png"]
    items = read_tar(tmp_path / "a.tar", plain_tar([(name, name.encode()) for name in names], format))
    assert contents(items) == [(None, name.encode()) for name in names]
    references_read_back(items)
    assert os.listdir(tmp_path) == ["a.tar"]


def test_members_that_are_not_regular_files_are_skipped(tmp_path: Path) -> None:
    kinds = [
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.LNKTYPE, "b.png"),
        (tarfile.DIRTYPE, ""),
        (tarfile.FIFOTYPE, ""),
        (tarfile.CHRTYPE, ""),
        (tarfile.BLKTYPE, ""),
    ]
    members = [member(f"type-{kind.decode()}.png", b"", kind, linkname=target) for kind, target in kinds]
    data = tar_of([*members, member("b.png", b"real")])
    assert contents(read_tar(tmp_path / "a.tar", data)) == [(None, b"real")]


SIDECARS = [
    ("cls", b" 7 \n", "7"),
    ("cls", b"\xff\xfe", "\ufffd\ufffd"),
    ("json", b'{"label": "cat"}', "cat"),
    ("json", b'{"cls": 3}', "3"),
    ("json", b'{"class": "c", "cls": "b", "label": null}', "b"),
    ("json", b'{"label": ["a"]}', None),
    ("json", b"[1, 2]", None),
    ("json", b"", None),
    ("json", b"not JSON", None),
    ("json", b"\xff", None),
    ("json", b"[" * 200_000, None),
    ("json", b'{"label": ' + b"9" * 5000 + b"}", None),
    ("json", b'{"label": "half \\ud800"}', "half ?"),
    ("txt", b"a caption", None),
]


@pytest.mark.parametrize(("extension", "data", "label"), SIDECARS, ids=[str(n) for n in range(len(SIDECARS))])
def test_label_comes_from_the_sidecar_before_or_after_the_image(
    tmp_path: Path, extension: str, data: bytes, label: str | None
) -> None:
    image, sidecar = ("a.png", b"picture"), (f"a.{extension}", data)
    for members in ([image, sidecar], [sidecar, image], [sidecar, ("a.txt", b""), image]):
        items = read_tar(tmp_path / "a.tar", plain_tar([*members, ("b.png", b"next")]))
        assert contents(items) == [(label, b"picture"), (None, b"next")]


def test_several_images_of_a_sample_share_its_label(tmp_path: Path) -> None:
    items = read_tar(
        tmp_path / "a.tar", plain_tar([("a.left.png", b"1"), ("a.right.png", b"2"), ("a.cls", b"5"), ("b.png", b"3")])
    )
    assert contents(items) == [("5", b"1"), ("5", b"2"), (None, b"3")]
    items = read_tar(tmp_path / "b.tar", plain_tar([("x/a.png", b"1"), ("y/a.cls", b"5"), ("y/a.png", b"2")]))
    assert contents(items) == [(None, b"1"), ("5", b"2")]


TWO_SAMPLES = plain_tar(
    [("0.jpg", b"J" * 700), ("0.json", b'{"label": "cat"}'), ("1.jpg", b""), ("2.png", b"K" * 512), ("2.cls", b"7")]
)
END = TWO_SAMPLES.index(bytes(1024)) // 512 * 512 + 512  # end of the last member, where two zero blocks begin


@pytest.mark.parametrize("step", range(8))
def test_cut_tar_is_refused_or_reads_the_same(tmp_path: Path, step: int) -> None:
    path = tmp_path / "a.tar"
    whole = read_tar(path, TWO_SAMPLES)
    assert len(whole) == 4 - 1 and len(TWO_SAMPLES) == 10240
    for cut in {*range(step, len(TWO_SAMPLES), 8 * 13), *range(512 * step, len(TWO_SAMPLES), 512 * 8)}:
        items = read_tar(path, TWO_SAMPLES[:cut])
        if message := damage(items):
            assert cut < END + 512
            assert str(path) in message and "not a readable plain tar" in message
            for item, image in zip(items[:-1], whole, strict=False):
                # The sample that is open at the damage has no label.
                assert item in (image, replace(image, label=None))
        else:
            assert cut >= END + 512 and items == whole


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_tar_never_loses_a_member_silently(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "a.tar"
    names = [(item.offset, item.length) for item in read_tar(path, TWO_SAMPLES)]
    rng = np.random.default_rng(seed)
    for _ in range(80):
        damaged = bytearray(TWO_SAMPLES)
        damaged[int(rng.integers(END))] ^= 1 << int(rng.integers(8))
        items = read_tar(path, bytes(damaged))
        if damage(items) is None:
            assert [(item.offset, item.length) for item in items] == names


@pytest.mark.parametrize("name", ["b.png", "b.json", "b.txt"])
@pytest.mark.parametrize("size", [-1, -2, -512, -513, -5000, 2**33, 2**62, 2**70])
def test_impossible_sizes_are_refused(tmp_path: Path, size: int, name: str) -> None:
    start = plain_tar([("a.png", b"good")])[:1024]
    for kind in (
        (tarfile.REGTYPE,) if size in (-1, -2) else (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE)
    ):
        items = read_tar(tmp_path / "a.tar", start + raw_header(name, size, kind) + plain_tar([("c.png", b"more")]))
        assert "a.tar: not a readable plain tar" in (damage(items) or "")


def test_compressed_empty_and_other_files_are_no_tars(tmp_path: Path) -> None:
    plain = plain_tar([("a.png", b"a")])
    for data in (gzip.compress(plain), b"", b"\0" * 100, b"text " * 1000, encoded_image(0)):
        assert re.search("not a readable plain tar.*uncompressed", damage(read_tar(tmp_path / "a.tar", data)) or "")
    assert read_tar(tmp_path / "a.tar", plain_tar([])) == []
    assert read_tar(tmp_path / "a.tar", plain_tar([("notes.txt", b"x")])) == []


def test_sparse_member_is_a_reject(tmp_path: Path) -> None:
    with open(tmp_path / "s.png", "wb") as file:
        file.write(b"A" * 4096)
        file.seek(1 << 20)
        file.write(b"B" * 4096)
    (tmp_path / "t.png").write_bytes(b"T" * 3_000_000)
    subprocess.run(["tar", "--sparse", "-cf", "a.tar", "s.png", "t.png"], cwd=tmp_path, check=True)
    sparse, whole = read(source(tmp_path / "a.tar", "webdataset"))
    assert sparse.data is None and sparse.problem is not None and sparse.problem[0] == RejectReason.UNREADABLE
    assert whole.data == (tmp_path / "t.png").read_bytes()


# Parquet


def write_parquet(path: Path, column: Any, row_group_size: int = 2, **more: Any) -> None:
    pq.write_table(pa.table({"image": column, **more}), path, row_group_size=row_group_size)


def test_parquet_as_written_by_the_datasets_library(tmp_path: Path) -> None:
    pictures = [encoded_image(number) for number in range(5)]
    rows: list[Any] = [{"bytes": picture, "path": f"{number}.png"} for number, picture in enumerate(pictures)]
    rows[1:1] = [None, {"bytes": b"", "path": ""}, {"bytes": None, "path": "gone.png"}]
    write_parquet(tmp_path / "train-00000-of-00001.parquet", rows, label=[*range(7), None])
    items = read(source(tmp_path, "parquet", label_column="label"))
    assert [item.offset for item in items] == [0, 2, 4, 5, 6, 7, 1]  # last: the rows without an image, together
    assert [item.label for item in items] == ["0", "2", "4", "5", "6", None, None]
    nulls = (RejectReason.EMPTY, "the image column is null in 2 of 8 rows; the first is row 1")
    assert [item.problem for item in items] == [None] * 6 + [nulls]
    assert [item.data for item in items if item.data] == pictures
    assert {item.uri for item in items} == {f"{tmp_path}/train-00000-of-00001.parquet#image.bytes"}
    references_read_back(items, "parquet")


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"one", None, b"three"]),
        pa.array([b"one", None, b"three"], pa.large_binary()),
        pa.array([b"one", None, b"three"]).dictionary_encode(),
        pa.chunked_array([[b"one"], [None, b"three"]], pa.binary()),
    ],
    ids=["binary", "large", "dictionary", "chunks"],
)
def test_every_column_of_bytes_is_read(tmp_path: Path, column: pa.Array) -> None:
    write_parquet(tmp_path / "a.parquet", column)
    items = read(source(tmp_path / "a.parquet", "parquet", image_column="image"))
    assert [item.data for item in items] == [b"one", b"three", None]
    references_read_back(items, "parquet")


def test_flattened_struct_nested_struct_and_names_in_capitals(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image.bytes": [b"flat"]}), tmp_path / "A.PARQUET")
    pq.write_table(pa.table({"image": [{"bytes": b"struct"}]}), tmp_path / "b#1.parquet")
    items = read(source(tmp_path, "parquet"))
    assert [item.data for item in items] == [b"flat", b"struct"]
    references_read_back(items, "parquet")
    pq.write_table(pa.table({"a": [{"b": {"c": b"deep", "d": 4}}]}), tmp_path / "c.parquet")
    items = read(source(tmp_path / "c.parquet", "parquet", image_column="a.b.c", label_column="a.b.d"))
    assert contents(items) == [("4", b"deep")]
    references_read_back(items, "parquet")


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    table = {"text": ["t"], "number": [1], "many": [[b"x"]], "data": [b"d"], "path": [{"bytes": "text"}]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    for columns, message in [
        (
            {},
            r"no column image\.bytes\. It has: text, number, many\.list\.element, data, path\.bytes\. Set image_column",
        ),
        ({"image_column": "data", "label_column": "lable"}, r"no column lable\."),
        ({"image_column": "path"}, r"no column path\."),
        ({"image_column": "text"}, r"column 'text' holds no bytes"),
        ({"image_column": "number"}, r"column 'number' holds no bytes"),
        ({"image_column": "path.bytes"}, r"column 'path.bytes' holds no bytes"),
        ({"image_column": "many.list.element"}, r"column 'many\.list\.element' lies inside a list"),
        ({"image_column": "data", "label_column": "many.list.element"}, r".*lies inside a list"),
    ]:
        with pytest.raises(InputError, match=r"a\.parquet: " + message):
            read(source(tmp_path / "a.parquet", "parquet", **columns))


@pytest.mark.parametrize("seed", range(4))
def test_damaged_parquet_is_refused_or_reads(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [np.random.default_rng(n).bytes(300) for n in range(40)], 10)
    whole = path.read_bytes()
    rng = np.random.default_rng(seed)
    with ParquetRows() as rows:
        for _ in range(60):
            position = int(rng.integers(len(whole)))
            cut = rng.random() < 0.3
            data = whole[:position] if cut else whole[:-900] + flipped(whole[-900:], position % 900)
            try:
                items = list(rows.read(io.BytesIO(data), "a.parquet", "image", None, max_bytes=1000))
            except DamagedFileError as error:
                assert str(error).startswith("a.parquet: ")
            else:
                assert not cut and sum(isinstance(item, ImageRow) for item in items) <= 40


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :]


def test_parquet_without_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", pa.array([], pa.binary()))
    assert read(source(tmp_path, "parquet", image_column="image")) == []


# References


@pytest.mark.parametrize("layout", ["folder", "webdataset", "parquet"])
@pytest.mark.parametrize("root", ["local", "memory"])
def test_a_reference_reads_the_same_bytes_and_detects_changed_ones(tmp_path: Path, root: str, layout: Layout) -> None:
    base = str(tmp_path) if root == "local" else f"memory://{tmp_path.name}"

    def reference(item: SourceItem, picture: bytes) -> tuple[str, int, int, str, Layout]:
        return item.uri, item.offset, item.length, image_id(picture), layout

    def write(pictures: list[bytes]) -> None:
        match layout:
            case "folder":
                for number, picture in enumerate(pictures):
                    paths.write_bytes(f"{base}/{number}.png", picture)
            case "webdataset":
                paths.write_bytes(f"{base}/a.tar", plain_tar([(f"{n}.png", p) for n, p in enumerate(pictures)]))
            case "parquet":
                table = pa.table({"image": [{"bytes": picture} for picture in pictures]})
                with paths.atomic_write(f"{base}/a.parquet") as file:
                    pq.write_table(table, pa.PythonFile(file, mode="w"), row_group_size=3)

    pictures = [encoded_image(number) for number in range(8)]
    write(pictures)
    items = read(source(base, layout))
    assert [item.data for item in items] == pictures
    references_read_back(items, layout)

    write([*pictures[:5], pictures[5][:-1] + b"!", *pictures[6:]])
    reader = ReferenceReader()
    for number in (4, 6):
        item = items[number]
        assert reader.read(*reference(item, pictures[number])) == pictures[number]
    item = items[5]
    with pytest.raises(
        InputError, match=rf"bytes at {item.offset} are no longer those of image {image_id(pictures[5])}"
    ):
        reader.read(*reference(item, pictures[5]))
    reader.close()

    write(pictures[:4])
    if layout == "folder":
        paths.delete(f"{base}/7.png")
    with pytest.raises(InputError, match="--replace"):
        ReferenceReader().read(*reference(items[7], pictures[7]))
    paths.delete(base)
    with pytest.raises(InputError, match=r"cannot be read any more"):
        ReferenceReader().read(*reference(items[0], pictures[0]))


def test_a_missing_column_is_an_input_error(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [b"one"])
    reference = (f"{tmp_path}/a.parquet#image", 0, 3, image_id(b"one"), "parquet")
    assert ReferenceReader().read(*reference) == b"one"
    pq.write_table(pa.table({"picture": [b"one"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"no column image\."):
        ReferenceReader().read(*reference)
