"""The step `features`: records of all thumbnails, in rows, with the same bytes for any worker and after a kill."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curation import pairs
from curation.copies import features
from curation.copies.compare_photographs import PhotographComparer
from curation.copies.compare_thumbnails import VerificationConfig
from curation.copies.described import FeatureRows, Verifier
from curation.copies.photographs import FEATURES
from curation.embed import encode_thumbnail
from curation.engine.manifest import PROGRESS_NAME, step_folder
from curation.engine.ray_runner import RayRunner
from curation.engine.runner import InlineRunner
from curation.files import npy, parquet, paths, schemas, vectors
from curation.pairs import PairsConfig
from curation.run_folder import RunFolder
from tests.curation.builders import (
    Killed,
    KilledRunner,
    bytes_in,
    content_hash,
    id_of,
    image_row,
    unit_vectors,
    write_ingest,
    write_stage,
)
from tests.curation.copies.test_compare_photographs import scene

ROWS_OF_FILES = (5, 1, 4)
CONFIG = VerificationConfig()


@pytest.fixture(scope="module")
def thumbnails() -> list[bytes]:
    """Of three scenes, each with two or three turned copies."""
    pictures = [scene(number % 3, 180, 140).rotate(3 * number) for number in range(8)]
    return [encode_thumbnail(picture, 128) for picture in [*pictures, scene(5, 180, 140), Image.new("RGB", (40, 40))]]


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    folder = str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"
    yield folder
    if not paths.is_local(folder):
        paths.filesystem(folder)[0].rm(folder, recursive=True)


def write_thumbnails(folder: str, thumbnails: list[bytes]) -> list[str]:
    files, start = [], 0
    for number, count in enumerate(ROWS_OF_FILES):
        part = thumbnails[start : start + count]
        table = pa.table([[id_of(start + row) for row in range(count)], part], schema=schemas.THUMBNAILS)
        files.append(paths.join(folder, f"thumbnails-{number:05d}.parquet"))
        parquet.write_table(files[-1], table)
        start += count
    return files


def test_every_row_has_the_features_of_its_thumbnail(root: str, thumbnails: list[bytes]) -> None:
    files, output = write_thumbnails(root, thumbnails), paths.join(root, "features")
    features.run(CONFIG, files, output, InlineRunner(), content_hash="any")
    comparer = PhotographComparer(CONFIG.working_side)
    expected = [comparer.prepare(thumbnail).features.tobytes() for thumbnail in thumbnails]
    assert len(set(expected)) == len(thumbnails)
    rows = FeatureRows(features.names(output, files))
    for wanted in ([7], [9, 0, 5], [3, 3, 8], [[4, 6], [6, 2]], range(10), []):
        read = rows.read(np.array(wanted, np.int64))
        assert {row: record.tobytes() for row, record in read.items()} == {
            row: expected[row] for row in np.unique(wanted).astype(int).tolist()
        }


def test_rows_are_read_in_the_order_asked_for(root: str) -> None:
    records = np.zeros(6, FEATURES)
    records["num_points"] = [50, 51, 52, 53, 54, 55]
    matrix = np.arange(24, dtype=np.float16).reshape(6, 4)
    for number, array in enumerate((records, matrix, np.arange(6))):
        path = paths.join(root, f"array-{number}.npy")
        npy.write_arrays(path, array, np.ones(3))
        assert npy.num_rows(path) == 6
        for rows in ([0], [5, 0, 3], [2, 2, 1], range(6), []):
            read = npy.read_rows(path, np.array(rows, np.int64))
            assert read.dtype == array.dtype and read.tobytes() == array[list(rows)].tobytes()
            assert read.shape == (len(rows), *array.shape[1:])


def test_similarities_are_the_same_with_and_without_the_step(root: str, thumbnails: list[bytes]) -> None:
    files, output = write_thumbnails(root, thumbnails), paths.join(root, "features")
    features.run(CONFIG, files, output, InlineRunner(), content_hash="any")
    stored = dict(enumerate(thumbnails))
    both = np.array([[0, 0, 0, 1, 4, 8], [3, 6, 8, 4, 7, 9]])
    with_step = Verifier(CONFIG, FeatureRows(features.names(output, files))).compare(both, stored)
    alone = Verifier(CONFIG).compare(both, stored)
    for one, other in zip(with_step, alone, strict=True):
        np.testing.assert_array_equal(one, other)
    assert with_step[0].max() > 0.5 > with_step[0].min()


def test_forgotten_thumbnails_are_prepared_from_their_records_again(
    tmp_path: Path, thumbnails: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for one thumbnail, each pair prepares one that was forgotten within the same call."""
    files, output = write_thumbnails(str(tmp_path), thumbnails), str(tmp_path / "features")
    features.run(CONFIG, files, output, InlineRunner(), content_hash="any")
    both, stored = np.array([[0, 0, 1, 1, 2], [3, 6, 4, 7, 5]]), dict(enumerate(thumbnails))
    rows = FeatureRows(features.names(output, files))
    roomy = Verifier(CONFIG, rows).compare(both, stored)
    monkeypatch.setattr("curation.copies.described.CACHED_THUMBNAILS", 1)
    np.testing.assert_array_equal(Verifier(CONFIG, rows).compare(both, stored)[0], roomy[0])


# In a run of `pairs`


@pytest.fixture
def described(tmp_path: Path, thumbnails: list[bytes]) -> RunFolder:
    """Ten images whose descriptors are near one another, so that all pairs are candidates."""
    ids = [id_of(number) for number in range(len(thumbnails))]
    matrix = (unit_vectors(0, 1, 16) + 0.1 * unit_vectors(1, len(ids), 16)).astype(np.float16)
    starts = np.cumsum([0, *ROWS_OF_FILES]).tolist()
    parts = [slice(start, end) for start, end in itertools.pairwise(starts)]
    ingest = write_ingest(
        tmp_path / "ingest", [[image_row(each, "web", "pool") for each in ids[part]] for part in parts]
    )
    tables = [
        {
            "vectors": vectors.make_table(ids[part], matrix[part]),
            "thumbnails": pa.table([ids[part], thumbnails[part]], schema=schemas.THUMBNAILS),
        }
        for part in parts
    ]
    return RunFolder(
        ingest=ingest, describe=write_stage(tmp_path / "describe", tables, inputs={"images": content_hash(ingest)})
    )


PAIRS = PairsConfig(verification=CONFIG, images_per_shard=3, max_phash_distance=-1)


def test_features_are_deleted_when_pairs_has_finished(described: RunFolder, tmp_path: Path) -> None:
    output = str(tmp_path / "pairs")
    with pytest.raises(Killed):
        pairs.run(PAIRS, described, output, KilledRunner(1 + len(ROWS_OF_FILES)))  # the join, and all features
    files = [name for name in paths.list_names(step_folder(output, "features")) if name.endswith(".npy")]
    assert len(files) == len(ROWS_OF_FILES)
    manifest = pairs.run(PAIRS, described, output, InlineRunner())
    assert manifest.totals["candidates"] == 45 and manifest.totals["pairs"] >= 6
    assert not (tmp_path / "pairs" / PROGRESS_NAME).exists()


@pytest.mark.parametrize("after_work", [False, True])
def test_a_kill_at_any_shard_changes_no_byte(described: RunFolder, tmp_path: Path, after_work: bool) -> None:
    straight, counter = str(tmp_path / "straight"), KilledRunner(10**6)
    pairs.run(PAIRS, described, straight, counter)
    num_calls = 10**6 - counter.calls_left
    assert num_calls > len(ROWS_OF_FILES) + 3
    output, kills = str(tmp_path / "killed"), 0
    while True:
        try:
            pairs.run(PAIRS, described, output, KilledRunner(1, after_work=after_work))  # one shard in each life
        except Killed:
            kills += 1
            continue
        break
    assert kills >= num_calls // 2
    assert bytes_in(output) == bytes_in(straight)


def test_two_workers_write_the_bytes_of_one(described: RunFolder, tmp_path: Path, ray_runner: RayRunner) -> None:
    for name, runner in (("inline", InlineRunner()), ("ray", ray_runner)):
        pairs.run(PAIRS, described, str(tmp_path / name), runner)
    assert bytes_in(str(tmp_path / "ray")) == bytes_in(str(tmp_path / "inline"))
