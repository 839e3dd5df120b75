"""Ingest: what a source holds is counted, a source without images is named, and a failure that passes is no reject."""

import errno
import os
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from curation import ingest
from curation.engine.manifest import Manifest
from curation.engine.runner import InlineRunner
from curation.errors import InputError, RejectBudgetError
from curation.files import parquet, paths, schemas
from curation.images.sources import SourceConfig
from curation.ingest import IngestConfig
from tests.curation.builders import Killed, KilledRunner, encoded_image
from tests.curation.images.tars import member, tar_of


def source(name: str, path: str | Path, role: str = "pool", layout: str = "folder") -> SourceConfig:
    return SourceConfig.model_validate({"name": name, "path": str(path), "role": role, "layout": layout})


def run(folder: Path, *sources: SourceConfig, **settings: Any) -> Manifest:
    config = IngestConfig(sources=sources, **settings)
    return ingest.run(config, str(folder / "out"), InlineRunner())


def write(folder: Path, **files: bytes) -> Path:
    """Files named by the keywords; two underscores stand for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def test_files_and_members_that_are_no_images_are_counted_by_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"a__png": encoded_image(1), "b": encoded_image(2), "c__txt": b"c", "d__txt": b"d", "README": b"text"}
    seeds = write(tmp_path / "seeds", **names)
    members = [member("a.png", encoded_image(3)), member("b.npy", b"x"), member("c.npy", b"x")]
    pool = write(tmp_path / "pool", a__tar=tar_of(members), a_stats__json=b"{}")
    config = source("seeds", seeds, "seed"), source("pool", pool, layout="webdataset")
    manifest = run(tmp_path, *config, images_per_shard=1)
    assert manifest.totals["accepted"] == 3 and manifest.totals["rejected"] == 0
    assert manifest.facts["passed_over"] == {
        "seeds": {".txt": 2, "no extension": 1},
        "pool": {".json": 1, ".npy": 2},
    }
    assert "passed over, no images: 2 .npy, 2 .txt, 1 .json, 1 no extension" in capsys.readouterr().err
    assert run(tmp_path, *config, images_per_shard=1) == manifest


@pytest.mark.parametrize("role", ["seed", "holdout", "pool"])
def test_a_source_without_an_accepted_image_is_named(tmp_path: Path, role: str) -> None:
    members = [member("200.image", b"no image"), member("a.txt", b"no image")]
    empty = write(tmp_path / "empty", a__tar=tar_of(members))
    other = source("other", write(tmp_path / "other", a__png=encoded_image(1)), "seed" if role == "pool" else "pool")
    expected = (
        rf"source 'empty' \({role}\) has no accepted image: 0 rejected, 1 .image, 1 .txt passed over in '.*empty'"
    )
    with pytest.raises(InputError, match=expected):
        run(tmp_path, other, source("empty", empty, role, "webdataset"))
    with pytest.raises(InputError, match=expected):  # a second time, when all shards are done
        run(tmp_path, other, source("empty", empty, role, "webdataset"))


def test_one_empty_pool_source_of_two_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = source("full", write(tmp_path / "full", a__png=encoded_image(1)))
    run(tmp_path, full, source("empty", write(tmp_path / "empty", a__png=b"")), max_reject_fraction=1)
    assert "source 'empty' (pool) has no accepted image: 1 rejected, nothing passed over" in capsys.readouterr().err


def test_files_that_are_no_images_do_not_enlarge_the_reject_budget(tmp_path: Path) -> None:
    for number in range(100):
        write(tmp_path / "pool", **{f"notes-{number}": b"no image, and no ending"})
    for number in range(8):
        write(tmp_path / "pool", **{f"{number}__png": encoded_image(number)})
    for number in range(6):
        write(tmp_path / "pool", **{f"x{number}__png": b"no image"})
    with pytest.raises(RejectBudgetError, match=r"6 of 14 images"):
        run(tmp_path, source("pool", tmp_path / "pool"), max_reject_fraction=0.4)
    manifest = run(tmp_path, source("pool", tmp_path / "pool"), max_reject_fraction=0.5)
    assert manifest.totals == {"images": 14, "accepted": 8, "rejected": 6, "passed over: no extension": 100}


@pytest.mark.parametrize(("num_bad", "fraction", "is_refused"), [(5, 0.01, False), (6, 0.01, True), (1, 0.0, True)])
def test_some_rejects_stop_no_small_run(tmp_path: Path, num_bad: int, fraction: float, is_refused: bool) -> None:
    for number in range(4):
        write(tmp_path / "pool", **{f"{number}__png": encoded_image(number)})
    for number in range(num_bad):
        write(tmp_path / "pool", **{f"bad-{number}__png": b"no image"})
    if is_refused:
        with pytest.raises(RejectBudgetError, match=f"{num_bad} of {4 + num_bad} images were rejected"):
            run(tmp_path, source("pool", tmp_path / "pool"), max_reject_fraction=fraction)
    else:
        assert run(tmp_path, source("pool", tmp_path / "pool"), max_reject_fraction=fraction).totals["accepted"] == 4


# Failures that pass


class ServerError(Exception):
    """As aiohttp raises it: no OSError, but the answer's status."""

    status = 503


class Failing(MemoryFileSystem):
    """Files whose first requests fail with the given errors; opening and reading are requests."""

    protocol = "failing"
    store: dict[str, Any] = {}  # noqa: RUF012  # as in MemoryFileSystem
    pseudo_dirs = [""]  # noqa: RUF012
    on_open: dict[str, list[Exception]] = {}  # noqa: RUF012
    on_read: dict[str, list[Exception]] = {}  # noqa: RUF012
    num_requests: Counter[str] = Counter()  # noqa: RUF012

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        name = path.rpartition("/")[2]
        if mode == "rb":
            self.num_requests[name] += 1
            if self.on_open.get(name):
                raise self.on_open[name].pop()
            return FailingFile(super().open(path, mode, **options), self.on_read.get(name, []))
        return super().open(path, mode, **options)


class FailingFile:
    """A file whose first reads fail."""

    def __init__(self, file: Any, errors: list[Exception]) -> None:
        self._file, self._errors = file, errors
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def __enter__(self) -> "FailingFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def read(self, size: int = -1) -> bytes:
        if self._errors:
            raise self._errors.pop()
        return bytes(self._file.read(size))


fsspec.register_implementation("failing", Failing)
PASSING = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY, errno.EMFILE]


def test_a_failure_that_passes_is_tried_again_and_is_no_reject(tmp_path: Path) -> None:
    base = f"failing://{tmp_path.name}"
    errors = [ServerError("503"), *(OSError(number, os.strerror(number)) for number in PASSING)]
    for number, error in enumerate(errors):
        paths.write_bytes(f"{base}/files/{number}.png", encoded_image(number))
        members = [member(f"{name}.png", encoded_image(10 * number + name)) for name in (7, 8)]
        paths.write_bytes(f"{base}/tars/{number}.tar", tar_of(members))
        for name in (f"{number}.png", f"{number}.tar"):
            (Failing.on_open if number % 2 else Failing.on_read)[name] = [error]
    files, tars = source("files", f"{base}/files"), source("tars", f"{base}/tars", layout="webdataset")
    manifest = run(tmp_path, files, tars, max_reject_fraction=0)
    assert not any(Failing.on_open.values()) and not any(Failing.on_read.values())
    assert manifest.totals == {"images": 3 * len(errors), "accepted": 3 * len(errors), "rejected": 0}
    assert manifest.facts.keys() == {"sources", "limits"}, "no counts where nothing is passed over"


def test_a_failure_that_stays_stops_the_run_which_goes_on_later(tmp_path: Path) -> None:
    base = f"failing://{tmp_path.name}"
    for number in range(3):
        paths.write_bytes(f"{base}/{number}.png", encoded_image(number))
    Failing.on_open["2.png"] = [OSError(errno.EIO, "disk failed") for _ in range(20)]
    with pytest.raises(InputError, match=r"2\.png: cannot be read \(.*disk failed\).*start again"):
        run(tmp_path, source("pool", base), images_per_shard=1, max_reject_fraction=0)
    assert len(Failing.on_open.pop("2.png")) == 20 - 4, "four attempts"
    Failing.num_requests.clear()
    manifest = run(tmp_path, source("pool", base), images_per_shard=1, max_reject_fraction=0)
    assert manifest.totals["accepted"] == 3
    assert set(Failing.num_requests) == {"2.png"}, "finished shards are kept"


def test_a_failure_that_cannot_pass_is_a_reject_at_once(tmp_path: Path) -> None:
    base = f"failing://{tmp_path.name}"
    names = [os.strerror(number) for number in (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP)]
    errors = [FileNotFoundError("404"), PermissionError("403"), IsADirectoryError("folder"), OSError(errno.ELOOP, "")]
    for number, (name, error) in enumerate(zip(names, errors, strict=True)):
        paths.write_bytes(f"{base}/{name}.png", encoded_image(number))
        Failing.on_open[f"{name}.png"] = [AssertionError("a second attempt"), error]
    paths.write_bytes(f"{base}/good.png", encoded_image(9))
    manifest = run(tmp_path, source("pool", base), max_reject_fraction=1)
    Failing.on_open.clear()
    assert manifest.rejects == {"unreadable": 4} and manifest.totals["accepted"] == 1


@pytest.mark.parametrize("others", [(), ("README",), ("a-readme", "m", "z", "zz"), tuple(f"f{n}" for n in range(9))])
def test_a_few_other_files_move_no_image_into_another_shard(others: tuple[str, ...], tmp_path: Path) -> None:
    names = [f"{name}.png" for name in "bcdklnop"]
    files = {name: encoded_image(number) for number, name in enumerate(names)} | dict.fromkeys(others, b"no image")
    folder = write(tmp_path / "web", **{name.replace(".", "__"): data for name, data in files.items()})
    manifest = run(tmp_path, source("web", folder), images_per_shard=4)
    tables = [parquet.read_table(file, schemas.IMAGES) for file in manifest.paths(str(tmp_path / "out"), "images")]
    shards = [[Path(uri).name for uri in table["uri"].to_pylist()] for table in tables]
    if len(others) <= 4:
        assert shards == [names[:4], names[4:]]
    assert [name for shard in shards for name in shard] == names and max(map(len, shards)) <= 4
    assert manifest.facts.get("passed_over", {}) == ({"web": {"no extension": len(others)}} if others else {})


def test_replace_reads_changed_files_of_an_unfinished_run_again(tmp_path: Path) -> None:
    data = encoded_image(0)
    folder = write(tmp_path / "web", a__png=bytes(len(data)), b__png=encoded_image(1), c__png=encoded_image(2))
    config = IngestConfig(sources=(source("web", folder),), images_per_shard=1, max_reject_fraction=1)
    with pytest.raises(Killed):
        ingest.run(config, str(tmp_path / "out"), KilledRunner(2))
    write(folder, a__png=data)  # of equal size, so that the listing is the same
    manifest = ingest.run(config, str(tmp_path / "out"), InlineRunner(), replace=True)
    assert manifest.totals == {"images": 3, "accepted": 3, "rejected": 0}


def test_rejected_images_of_the_holdout_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holdout = write(tmp_path / "holdout", a__png=encoded_image(0), b__png=encoded_image(1)[:50])
    pool = write(tmp_path / "pool", a__png=encoded_image(2))
    manifest = run(tmp_path, source("holdout", holdout, "holdout"), source("pool", pool), max_reject_fraction=1)
    assert manifest.facts["rejected_holdout"] == 1
    assert "ingest: 1 files of the holdout were rejected" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["zip://absent.zip", "dir:///tmp", "a\0b", "github://a:b@c/x", "reference://x"])
def test_a_path_that_cannot_be_opened_is_one_message(path: str) -> None:
    with pytest.raises(InputError, match="Cannot open"):
        paths.filesystem(path)
    with pytest.raises(ValueError, match="at least 1 character"):
        source("web", "")


def test_a_reject_names_the_member_or_the_row(tmp_path: Path) -> None:
    members = [member("a.png", encoded_image(1)), member("deep/b.png", encoded_image(2)[:60])]
    tars = write(tmp_path / "tars", a__tar=tar_of(members))
    write(tmp_path / "parquet")
    images = pa.table({"image": pa.array([encoded_image(3), b"no image"], pa.binary())})
    pq.write_table(images, tmp_path / "parquet/a.parquet")
    of_parquet = source("parquet", tmp_path / "parquet", layout="parquet").model_copy(update={"image_column": "image"})
    manifest = run(tmp_path, source("tars", tars, layout="webdataset"), of_parquet, max_reject_fraction=1)
    tables = [parquet.read_table(file, schemas.REJECTS) for file in manifest.paths(str(tmp_path / "out"), "rejects")]
    (of_tar,), (of_row,) = (table["detail"].to_pylist() for table in tables)
    assert of_tar.startswith("member 'deep/b.png': ") and of_row.startswith("row 1: begins with")
