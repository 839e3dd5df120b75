"""The corpus on disk: the same bytes twice, readable by other tools and by `read_tar`."""

import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset

from curation.errors import InputError
from curation.files import paths
from curation.images.corpus_tar import CorpusSample, read_tar, write_tar
from curation.images.decode import EXTENSION_OF_FORMAT
from tests.curation.builders import encoded_image, id_of


def samples(count: int) -> list[CorpusSample]:
    formats = sorted(EXTENSION_OF_FORMAT)
    return [
        CorpusSample(
            key=id_of(number) + ("_1" if number % 5 == 4 else ""),
            data=encoded_image(number, formats[number % len(formats)]),
            format=formats[number % len(formats)],
            sidecar={
                "source": "ünï ☃",
                "label": None,
                "width": number,
                "reasons": ["as_is:a", "sample:b:c:0"],
                "a": {},
            },
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, 15])
def test_round_trip_and_the_same_bytes_twice(tmp_path: Path, count: int) -> None:
    written = samples(count)
    path = str(tmp_path / "deep/corpus-000000.tar")
    record, _ = write_tar(path, iter(written))
    assert list(read_tar(path)) == written
    data = paths.read_bytes(path)
    assert record.name == "corpus-000000.tar" and record.rows == count
    assert (record.bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())

    with_reversed_sidecars = [CorpusSample(s.key, s.data, s.format, dict(reversed(s.sidecar.items()))) for s in written]
    again, _ = write_tar(f"memory://{tmp_path.name}/corpus-000000.tar", iter(with_reversed_sidecars))
    assert again == record, "neither the order of a dictionary nor the filesystem changes the bytes"
    assert list(read_tar(f"memory://{tmp_path.name}/corpus-000000.tar")) == written
    paths.delete(f"memory://{tmp_path.name}")


def test_headers_hold_no_owner_and_no_time(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(str(path), iter(samples(3)))
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o644 and member.isreg() and not member.pax_headers
    assert path.read_bytes()[257:265] == b"ustar\x0000"


def test_tar_lists_image_and_sidecar_of_every_sample(tmp_path: Path) -> None:
    written = samples(8)
    write_tar(str(tmp_path / "a.tar"), iter(written))
    listed = subprocess.run(["tar", "tf", "a.tar"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert listed.stderr == ""
    expected = [f"{s.key}.{end}" for s in written for end in (EXTENSION_OF_FORMAT[s.format], "json")]
    assert listed.stdout.split() == expected


def test_webdataset_reads_every_sample(tmp_path: Path) -> None:
    written = samples(8)
    write_tar(str(tmp_path / "a.tar"), iter(written))
    read = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [sample.key for sample in written]
    for sample, original in zip(read, written, strict=True):
        assert sample[EXTENSION_OF_FORMAT[original.format]] == original.data
        assert json.loads(sample["json"]) == original.sidecar


def test_writer_that_fails_leaves_no_tar(tmp_path: Path) -> None:
    def broken() -> Iterator[CorpusSample]:
        yield from samples(2)
        raise InputError("the source has changed")

    with pytest.raises(InputError, match="the source has changed"):
        write_tar(str(tmp_path / "a.tar"), broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", range(4))
def test_cut_tar_is_refused(tmp_path: Path, step: int) -> None:
    path = tmp_path / "a.tar"
    written = samples(3)
    write_tar(str(path), iter(written))
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    rng = np.random.default_rng(step)
    for cut in [*range(step * 512, len(whole), 4 * 512), *rng.integers(0, len(whole), 20)]:
        path.write_bytes(whole[:cut])
        try:
            assert list(read_tar(str(path))) == written and cut >= end + 512
        except InputError as error:
            assert "not a complete tar of a corpus" in str(error) and cut < end + 512


def test_any_other_tar_is_refused(tmp_path: Path) -> None:
    for name in ("a.png", "a.json", "b.png", "c.txt"):
        (tmp_path / name).write_bytes(b"not JSON")
    for number, members in enumerate(
        (["a.png"], ["a.json", "a.png"], ["a.png", "b.png"], ["c.txt", "a.json"], ["a.png", "a.json"])
    ):
        path = tmp_path / f"{number}.tar"
        subprocess.run(["tar", "cf", path, *members], cwd=tmp_path, check=True)
        with pytest.raises(InputError, match=rf"{number}\.tar: this is not a complete tar of a corpus"):
            list(read_tar(str(path)))
    for data in (b"", b"text" * 1000):
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(InputError, match=r"x\.tar: this is not a complete tar"):
            list(read_tar(str(tmp_path / "x.tar")))


@pytest.mark.parametrize("sizes", [[], [0], [1], [511, 512, 513], [100_000] * 3, [9_000, 200] * 5])
def test_bytes_equal_those_of_tarfile(tmp_path: Path, sizes: list[int]) -> None:
    samples = [
        CorpusSample(f"{number:032x}_{number}", os.urandom(size), "PNG", {"uri": "ü" * number})
        for number, size in enumerate(sizes)
    ]
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            sidecar = json.dumps(sample.sidecar, sort_keys=True, ensure_ascii=False).encode() + b"\n"
            for name, data in ((f"{sample.key}.png", sample.data), (f"{sample.key}.json", sidecar)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    record, ranges = write_tar(str(tmp_path / "a.tar"), iter(samples))
    written = (tmp_path / "a.tar").read_bytes()
    assert written == expected.getvalue()
    assert record.bytes == len(written) and record.sha256 == hashlib.sha256(written).hexdigest()
    assert [written[image.offset : image.offset + image.length] for image in ranges] == [s.data for s in samples]
